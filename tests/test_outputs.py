"""What a caller gets of a request, from its events alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from paddle_qwen1m.engine import (
    Completion,
    Finished,
    Prefilled,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenChosen,
    TokenLogprobs,
)
from paddle_qwen1m.outputs import Collector, CompletionOutput, Logprob, RequestOutput, Tokens

END, OTHER_END = 9, 8
TOKENS = Tokens(lambda ids: "".join("abcdefgh"[token] for token in ids), lambda ids: "abcdefghij"[ids[0]])


def collector(**params: Any) -> Collector:
    request = Request("one", np.array([3, 4]), SamplingParams(**params), eos_token_ids=(END,))
    return Collector(request, "de", TOKENS if request.params.detokenize else None)


def chosen(token: int, index: int = 0, **rest: Any) -> TokenChosen:
    return TokenChosen("one", token, -0.5, index, **rest)


def test_fields_have_the_names_that_users_know() -> None:
    def names(kind: Any) -> list[str]:
        return [field.name for field in fields(kind)]

    assert names(RequestOutput) == [
        "request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished", "metrics",
        "num_cached_tokens",
    ]  # fmt: skip
    assert names(CompletionOutput) == [
        "index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason", "stop_reason",
    ]  # fmt: skip
    assert names(Logprob) == ["logprob", "rank", "decoded_token"]


def test_a_token_that_ends_an_answer_is_one_of_its_tokens_and_not_of_its_text() -> None:
    for end, stop_reason in ((END, None), (OTHER_END, OTHER_END)):
        one = collector(stop_token_ids=[OTHER_END])
        one.take(chosen(0))
        one.take(chosen(end, finish_reason="stop"))
        one.take(Finished("one", (Completion([0, end], [-0.5] * 2, "stop", stop_reason=stop_reason),)))
        (answer,) = one.output().outputs
        assert (answer.text, answer.token_ids, answer.finish_reason) == ("a", [0, end], "stop")
        assert answer.stop_reason == stop_reason and answer.finished() and one.output().finished


def test_a_stop_text_ends_an_answer_whatever_still_comes() -> None:
    one = collector(stop=["bc"], n=2, logprobs=0)
    assert one.take(chosen(0)) is one.take(chosen(1)) is None
    assert one.take(chosen(2)) == (0, "bc"), "the engine is told"
    assert one.take(chosen(5)) is one.take(chosen(0, index=1)) is None
    first, second = one.output().outputs
    assert (first.text, first.token_ids, first.finish_reason, first.stop_reason) == ("a", [0, 1, 2], "stop", "bc")
    assert (second.text, second.token_ids, second.finish_reason) == ("a", [0], None)
    assert not one.output().finished


def test_a_stop_text_and_the_last_token_together() -> None:
    one = collector(stop="b")
    assert one.take(chosen(1, finish_reason="length")) is None, "the engine has ended it already"
    (answer,) = one.output().outputs
    assert (answer.finish_reason, answer.stop_reason, answer.text) == ("stop", "b", "")


def test_what_was_held_back_comes_with_the_end() -> None:
    one = collector(stop=["bcd"])
    for token in (0, 1, 2):
        one.take(chosen(token, finish_reason="length" if token == 2 else None))
    assert one.output().outputs[0].text == "abc"


def test_an_answer_that_was_aborted_says_so() -> None:
    one = collector()
    one.take(chosen(0))
    one.take(Finished("one", (Completion([0], [-0.5], "abort"),)))
    assert (one.output().outputs[0].text, one.output().outputs[0].finish_reason) == ("a", "abort")


def test_logprobs_are_of_the_token_and_of_the_likeliest() -> None:
    one = collector(logprobs=2, prompt_logprobs=1)
    one.take(PromptLogprobs("one", 1, (TokenLogprobs(4, -3.0, 7, (1,), (-0.2,)),)))
    one.take(chosen(2, logprobs=TokenLogprobs(2, -2.0, 3, (0, 1), (-0.5, -1.0))))
    one.take(chosen(0, logprobs=TokenLogprobs(0, -0.25, 1, (0, 5), (-0.25, -2.5))))
    output = one.output()
    (answer,) = output.outputs
    assert answer.cumulative_logprob == -2.25 and answer.logprobs is not None
    told = [
        {token: (one.logprob, one.rank, one.decoded_token) for token, one in entry.items()} for entry in answer.logprobs
    ]
    assert told == [
        {2: (-2.0, 3, "c"), 0: (-0.5, 1, "a"), 1: (-1.0, 2, "b")},
        {0: (-0.25, 1, "a"), 5: (-2.5, 2, "f")},
    ]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert {token: one.rank for token, one in (output.prompt_logprobs[1] or {}).items()} == {4: 7, 1: 1}


def test_without_detokenizing_there_is_no_text() -> None:
    one = collector(detokenize=False, logprobs=0)
    one.take(chosen(0, logprobs=TokenLogprobs(0, -1.0, 1)))
    (answer,) = one.output().outputs
    assert (answer.text, answer.token_ids) == ("", [0])
    assert answer.logprobs is not None and answer.logprobs[0][0].decoded_token is None


def test_times_and_reused_tokens_are_told() -> None:
    one = collector()
    assert one.output().num_cached_tokens is None
    started = one.metrics.arrival_time + 0.25
    one.take(Prefilled("one", 2, 2, 1, started))
    one.take(chosen(0))
    metrics = one.output().metrics
    assert one.output().num_cached_tokens == 1
    assert metrics.time_in_queue == 0.25 and metrics.first_token_time == metrics.last_token_time is not None
