"""What goes over the wire comes out as it went in, however its bytes are cut; what cannot go is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paddle_qwen1m.cache import CacheFull
from paddle_qwen1m.engine import (
    Completion,
    Finished,
    Logits,
    Metrics,
    NotEnoughMemory,
    Prefilled,
    PromptLogprobs,
    Request,
    SamplingParams,
    StructuredOutputsParams,
    TokenChosen,
    TokenLogprobs,
)
from paddle_qwen1m.engine.admission import Limits
from paddle_qwen1m.parallel import failure, wire
from paddle_qwen1m.parallel.job import JobEnded
from paddle_qwen1m.weights import CheckpointError

LIKELY = TokenLogprobs(3, -0.25, 1, (3, 70_000), (-0.25, -float("inf")))
ALONE = TokenLogprobs(2**40, -1e-300, 152_064)
MESSAGES: tuple[Any, ...] = (
    None, True, 0, -(2**63), 2**80, 1.5, "", "ein Text\0\ud800", [], (), {}, [[], ()], [1, 2.5, None], [True, 1],
    [2**63, 1], (2**40, 1), [0.1, float("inf")], {"a": (1, 2), 5: -1.5, None: []}, ["list", "of numbers"], ((), (1, 2)),
    [(1, "a"), (2.5,)], [{"kind": "dict"}],
    {"kind": "events", "events": [TokenChosen("a", 5, -0.5, 1, LIKELY, "stop"), TokenChosen("b", 7, -1.0)]},
    [Prefilled("a", 4, 8, 0, 1e9), TokenChosen("a", 5, -0.5, 1, None, "length")],
    PromptLogprobs("a", 5, (LIKELY, ALONE, LIKELY)), PromptLogprobs("a", 5, ()), (LIKELY, None),
    Finished("a", (Completion([1, 2], [-0.5, -1.5], "stop", 1, "\n\n", [LIKELY, ALONE]),)), Finished("a", ()),
    SamplingParams(
        logit_bias={5: 1.5}, allowed_token_ids=[5, 6], stop=["a"], stop_token_ids=[1], seed=-(2**63), n=2,
        bad_words=["b"], structured_outputs=StructuredOutputsParams(json={"type": "object", "enum": [1, "x", None]}),
    ),
    Limits(1, 2, 3, 4), Metrics(running=2, pages=7, generated_tokens=2**40),
)  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: str(message)[:40].encode("ascii", "replace").decode())
def test_a_message_comes_out_as_it_went_in(message: Any) -> None:
    (read,) = wire.Reader().feed(wire.encode(message))
    assert read == message and repr(read) == repr(message)  # 1 is not True, and () not []


@pytest.mark.parametrize("values", [np.arange(-5, 70_000), np.array([2**40, -1]), np.ones((2, 3), np.float32) / 3])
def test_arrays_keep_type_and_shape(values: np.ndarray) -> None:
    (read,) = wire.Reader().feed(wire.encode(Logits("a", values)))
    assert read.values.dtype == values.dtype and np.array_equal(read.values, values)
    read.values[:] = 0  # it is the reader's own


def test_a_prompt_takes_four_bytes_a_token() -> None:
    prompt = np.arange(152_064)
    request = Request("a", prompt, SamplingParams(), (0, 5), (7, 8), ((1, 2), (3,)), "salt")
    raw = wire.encode(request)
    assert len(raw) < 4 * len(prompt) + 1000
    (read,) = wire.Reader().feed(raw)
    assert np.array_equal(read.prompt, prompt)
    assert repr(read).partition("params=")[2] == repr(request).partition("params=")[2]


def test_bytes_may_come_in_any_pieces() -> None:
    raw = b"".join(map(wire.encode, MESSAGES))
    for size in (1, 7, 1000, len(raw)):
        reader = wire.Reader()
        read = [one for begin in range(0, len(raw), size) for one in reader.feed(raw[begin : begin + size])]
        assert list(map(repr, read)) == list(map(repr, MESSAGES))


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", ValueError("no"), np.zeros(2, complex)])
def test_what_cannot_go_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        wire.encode({"kind": "any", "value": value})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'["array","|O",[1],["|O",1]]', "an array of '|O'"),
        (b'["os.system","true"]', "'os.system' is no kind of value"),
        (b"[]", "not a message"),
        (b"{", "not a message"),
    ],
)
def test_bytes_that_are_no_message_make_nothing(text: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem.replace("|", r"\|")):
        list(wire.Reader().feed(wire.HEAD.pack(len(text), 8) + text + bytes(8)))
    with pytest.raises(ValueError, match="a message of "):
        list(wire.Reader().feed(b"\xff" * wire.HEAD.size))


# --- exceptions ---


def over_the_wire(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        (told,) = wire.Reader().feed(wire.encode(failure.describe(caught)))
    return failure.rebuild(told, "rank 1 on host")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such option"), TypeError("x"), CacheFull("full"), CheckpointError("cut"),
        NotEnoughMemory("5 GB"),
        FileNotFoundError(2, "No such file or directory", "model.safetensors"), MemoryError(), JobEnded("rank 0: gone"),
    ],
    ids=repr,
)  # fmt: skip
def test_an_exception_keeps_type_and_text(error: Exception) -> None:
    rebuilt = over_the_wire(error)
    assert type(rebuilt) is type(error) and str(rebuilt) == str(error) and rebuilt.__cause__ is None


def test_an_exception_of_a_library_becomes_the_nearest_that_is_known() -> None:
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    assert type(over_the_wire(error)) is ValueError and str(over_the_wire(error)) == str(error)


def test_another_exception_says_where_it_came_from() -> None:
    rebuilt = over_the_wire(LookupError("the dog ate it"))
    assert type(rebuilt) is RuntimeError and str(rebuilt) == "rank 1 on host: LookupError: the dog ate it"
    assert "in over_the_wire" in str(rebuilt.__cause__)
