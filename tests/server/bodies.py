"""Bodies that clients should not send: chosen ones, and whatever fields with whatever values, drawn by hypothesis."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from paddle_qwen1m.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

KINDS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
MESSAGES = [{"role": "user", "content": "x"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [40]},
}
EVIL = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b'{"prompt": NaN}',
    b'{"prompt": Infinity}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"prompt": "x", "max_tokens": 1e999}',
    b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": "x", "seed": 123456789012345678901234567890}',
    b'{"prompt": [' + b"9" * 30 + b"]}",
    b'{"prompt": [-1]}',
    b'{"prompt": [1.5]}',
    b'{"prompt": [true]}',
    b'{"prompt": []}',
    b'{"prompt": [[]]}',
    b'{"prompt": [[1], "x", null]}',
    b'{"prompt": {"a": 1}}',
    b'{"prompt": null}',
    b'{"prompt": ""}',
    b'{"prompt": "x", "n": -1}',
    b'{"prompt": "x", "n": 0}',
    b'{"prompt": "x", "temperature": -1}',
    b'{"prompt": "x", "temperature": "hot"}',
    b'{"prompt": "x", "top_p": 0}',
    b'{"prompt": "x", "stop": ""}',
    b'{"prompt": "x", "stop": [null]}',
    b'{"prompt": "x", "logit_bias": {"x": 1}}',
    b'{"prompt": "x", "min_tokens": 99}',
    b'{"prompt": "x", "stop_token_ids": [-5]}',
    b'{"prompt": "x", "bad_words": [""]}',
    b'{"prompt": "x", "stream": 1}',
    b'{"prompt": "x", "truncate_prompt_tokens": -7}',
    b'{"prompt": "x", "structured_outputs": {}}',
    b'{"prompt": "x", "response_format": {"type": "xml"}}',
    b'{"prompt": "x", "logit_bias": {"999999999999999999999": 1}}',
]
EDGES: list[float] = [
    *(sign * 2**bits + more for bits in (15, 31, 32, 53, 63, 64, 70) for sign in (1, -1) for more in (-1, 0)),
    *(0, 1, -1, 0.5, 1e38, 3.5e38, 1e308, -1e308, 5e-324, 1e-40),
]
"""Numbers at the ends of types."""
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(EDGES)
TEXTS = st.text(max_size=8) | st.sampled_from(["\0", "\ud800", "x" * 2000, "🙂", "auto", "none", "{{ 7 * 7 }}", "</s>"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(TEXTS, inside, max_size=4),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "x"]),
        "content": VALUES,
        "tool_calls": st.lists(
            st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXTS, "arguments": VALUES})})
        ),
        "name": VALUES,
        "tool_call_id": VALUES,
    },
)
SHAPED = {
    "messages": st.lists(MESSAGE, max_size=3),
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema"])},
        optional={"json_schema": st.fixed_dictionaries({"schema": st.dictionaries(TEXTS, VALUES, max_size=3)})},
    ),
    "structured_outputs": st.dictionaries(
        st.sampled_from(["json", "regex", "choice", "grammar", "json_object", "structural_tag"]), VALUES, max_size=2
    ),
    "tools": st.lists(
        st.fixed_dictionaries(
            {
                "type": st.just("function"),
                "function": st.fixed_dictionaries({"name": TEXTS}, optional={"parameters": VALUES}),
            }
        ),
        max_size=2,
    ),
    "prompt": st.lists(st.integers(-2, 1030), max_size=4) | st.lists(TEXTS, max_size=3) | TEXTS,
    "tokens": st.lists(st.integers(-2, 1030), max_size=4),
    "max_tokens": st.integers(-2, 8),
    "n": st.integers(-2, 4),
    "logprobs": st.integers(-2, 22),
    "stream": st.booleans(),
}
"""Fields whose values are drawn near what they should be, so that more than the first check sees them."""


def at_edges() -> list[tuple[str, bytes]]:
    """For each field that is a number, or a list of them, and each of EDGES: a good body with it."""
    made = []
    for path, kind in KINDS.items():
        for name, field in kind.model_fields.items():
            of = str(field.annotation)
            for number in EDGES if "int" in of or "float" in of else []:
                value = {str(number): 1.0, "5": number} if "dict" in of else [number] if "list" in of else number
                made.append((path, json.dumps({**GOOD[path], name: value}).encode()))
    return made


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and the body to send there: one that could be served with a few fields replaced, or broken bytes."""
    path = draw(st.sampled_from(sorted(KINDS)))
    names = sorted(KINDS[path].model_fields)
    body = dict(GOOD[path])
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        body[name] = draw(st.one_of(VALUES, *([SHAPED[name]] if name in SHAPED else [])))
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(raw)))
        raw = raw[:place] + draw(st.binary(max_size=3)) + raw[place + draw(st.integers(0, 3)) :]
    return path, raw
