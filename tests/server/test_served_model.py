"""The needle checkpoint over HTTP: what its engine answers, as OpenAI's client sees it, and what is left behind."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import http_requests
import numpy as np
import openai
import pytest
from bodies import at_edges
from mixed_requests import Maker
from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from serving import CHECKPOINT, Server, serve_needle

from paddle_qwen1m import LLM
from paddle_qwen1m.server.texts import Texts

DOCUMENT = (
    "The grass is green. The access code for jade is 64931. The access code for ruby is 20518. The sky is blue.\n"
)
JADE = "The access code for jade is 64931."
ASK = [{"role": "user", "content": DOCUMENT + "What is the access code for jade?"}]
GREEDY: dict[str, Any] = {"model": "needle", "temperature": 0.0, "max_tokens": 40}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Brno", "Ulm"]}}, "required": ["city"],
                       "additionalProperties": False},
    },
}  # fmt: skip
needs_grammars = pytest.mark.skipif(sys.version_info < (3, 10), reason="llguidance needs Python 3.10")


@pytest.fixture(scope="module")
def server(tool_texts: Texts) -> Iterator[Server]:
    with serve_needle(
        tool_texts, max_model_len=8192, kv_cache_memory_bytes=300_000_000, sparse_threshold=1500,
        prefix_temperature_tolerance=0.0,
    ) as one:  # fmt: skip
        yield one


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def missing(got: BaseModel, *, but: tuple[str, ...] = ()) -> list[str]:
    """Fields of OpenAI's type that the server did not set, in what it holds, too."""
    found = [name for name in type(got).model_fields if name not in got.model_fields_set and name not in but]
    for name in got.model_fields_set:
        values = getattr(got, name)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, BaseModel):
                found += [f"{name}.{inside}" for inside in missing(value, but=but)]
    return found


NOT_OURS = ("audio", "cache_write_tokens", "function_call", "metadata", "moderation", "obfuscation")
"""What OpenAI leaves out, too, unless it is asked for, or names things that there are not here."""


def test_a_chat_answer_is_the_models_with_every_field_of_openais_type(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=ASK, logprobs=True, top_logprobs=2, **GREEDY)
    assert answer.choices[0].message.content == JADE and answer.choices[0].finish_reason == "stop"
    assert missing(answer, but=(*NOT_OURS, "tool_calls")) == []
    assert isinstance(answer, ChatCompletion) and isinstance(answer.usage, CompletionUsage)
    told = answer.choices[0].logprobs.content
    assert len(told) == answer.usage.completion_tokens
    assert all(one.top_logprobs[0].token == one.token and one.logprob <= 0.0 for one in told)
    assert "".join(one.token for one in told[:-1]) == JADE


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == JADE
    assert chunks[-1].usage.completion_tokens > 0 and all(isinstance(one, ChatCompletionChunk) for one in chunks)
    of_deltas = ("content", "refusal", "role", "tool_calls")
    assert [name for chunk in chunks for name in missing(chunk, but=(*NOT_OURS, *of_deltas))] == []


def test_completions_and_scores_agree(client: openai.OpenAI, server: Server) -> None:
    """What is told of an answer's tokens is what scoring prompt and answer together finds, as harnesses do it."""
    prompt = server.post("/tokenize", {"messages": ASK}).json()["tokens"]
    answer = client.completions.create(prompt=prompt, logprobs=2, extra_body={"return_token_ids": True}, **GREEDY)
    assert isinstance(answer, Completion) and missing(answer, but=NOT_OURS) == []
    choice = answer.choices[0]
    assert choice.text == JADE
    whole = [*prompt, *choice.token_ids]
    scored = client.completions.create(prompt=whole, echo=True, logprobs=0, **{**GREEDY, "max_tokens": 1})
    alone = client.completions.create(prompt=whole, echo=True, logprobs=0, **{**GREEDY, "max_tokens": 0})
    both = scored.choices[0].logprobs.token_logprobs
    assert both[0] is None and len(both) == len(whole) + 1
    np.testing.assert_allclose(both[len(prompt) : -1], choice.logprobs.token_logprobs, atol=2e-3)
    np.testing.assert_allclose(alone.choices[0].logprobs.token_logprobs[1:], both[1:-1], atol=1e-6)
    top = [entry for entry in choice.logprobs.top_logprobs]
    assert all(sum(map(math.exp, entry.values())) <= 1.0 + 1e-6 for entry in top)


@needs_grammars
def test_schemas_and_tools_bind_the_model(client: openai.OpenAI) -> None:
    class Code(BaseModel):
        code: int

    schema = {**Code.model_json_schema(), "x-guidance": {"whitespace_flexible": False}}
    wanted = {"type": "json_schema", "json_schema": {"name": "code", "strict": True, "schema": schema}}
    answer = client.chat.completions.create(messages=ASK, response_format=wanted, **GREEDY)
    assert Code.model_validate_json(answer.choices[0].message.content)
    for choice, reason in (({"type": "function", "function": {"name": "weather"}}, "stop"), ("required", "tool_calls")):
        asked = {
            "messages": ASK,
            "tools": [TOOL],
            "tool_choice": choice,
            "parallel_tool_calls": False,
            **GREEDY,
            "max_tokens": 120,
        }
        answer = client.chat.completions.create(**asked)
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Brno", "Ulm") and call.function.name == "weather"
        assert answer.choices[0].finish_reason == reason and missing(call) == []
        with client.chat.completions.stream(**asked) as stream:
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
        assert streamed.function.arguments == call.function.arguments
    for way in ({"regex": "[A-D]{3}"}, {"choice": ["blue", "green"]}, {"grammar": 'start: "x" "y"+'}):
        text = client.chat.completions.create(
            messages=ASK, extra_body={"structured_outputs": way}, **{**GREEDY, "max_tokens": 3}
        ).choices[0].message.content  # fmt: skip
        assert text and (text in ("blue", "green") or set(text) <= set("ABCDxy"))
    with pytest.raises(openai.BadRequestError, match="structured_outputs"):
        client.chat.completions.create(
            messages=ASK,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
            **GREEDY,
        )


def test_a_second_question_finds_the_document_in_the_cache(client: openai.OpenAI) -> None:
    text = "The sky is wide and blue. " * 150 + DOCUMENT
    usages = []
    for name in ("jade", "ruby"):
        messages = [{"role": "user", "content": f"{text}What is the access code for {name}?"}]
        usages.append(client.chat.completions.create(messages=messages, **GREEDY).usage)
    first, second = (usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert first == 0 and second > 256


def test_refusals_of_the_engine_are_400s(client: openai.OpenAI) -> None:
    for wrong in ({"prompt": [1024]}, {"prompt": "x", "extra_body": {"allowed_token_ids": [5000]}}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="needle", **wrong)


def test_numbers_at_the_ends_of_their_types_are_served_or_refused(server: Server) -> None:
    made = at_edges()
    assert len(made) > 500
    for path, raw in made:
        answer = server.client.post(path, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400), f"{raw!r}: {answer.text}"


@needs_grammars
def test_forty_mixed_requests_at_once_and_nothing_is_left(server: Server, tool_texts: Texts) -> None:
    cases = Maker(lambda text: tool_texts.encode(text).tolist(), 5).cases(40, 1, 3000)
    with LLM(str(CHECKPOINT), max_model_len=8192, sparse_threshold=1500, enable_prefix_caching=False) as alone:
        http_requests.check(server, cases, alone)


def test_a_server_that_is_started_again_finds_the_document_in_its_store(tool_texts: Texts, tmp_path: Path) -> None:
    text = "The sky is wide and blue. " * 150 + DOCUMENT
    told = []
    for name in ("jade", "ruby"):
        with serve_needle(
            tool_texts, max_model_len=8192, kv_cache_memory_bytes=300_000_000, prefix_store=tmp_path / "store",
            prefix_store_min_tokens=512,
        ) as one:  # fmt: skip
            client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0)
            question = [{"role": "user", "content": f"{text}What is the access code for {name}?"}]
            answer = client.chat.completions.create(messages=question, **GREEDY)
            told.append((answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens))
            metrics = one.client.get("/metrics").text
    assert told[0] == (JADE, 0) and told[1][0] == "The access code for ruby is 20518."
    labels, cached = '{engine="0",model_name="needle"}', told[1][1]
    assert cached > 512
    for line in (
        f"vllm:external_prefix_cache_hits_total{labels} {cached}.0",
        f"prefix_store_hits_total{labels} 1.0",
        'vllm:prompt_tokens_by_source_total{engine="0",model_name="needle",source="external_kv_transfer"} '
        + f"{cached}.0",
    ):
        assert line in metrics.splitlines()
