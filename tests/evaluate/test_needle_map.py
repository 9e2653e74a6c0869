"""The needle map: a needle at each depth, one document for all questions of a length."""

from __future__ import annotations

from typing import Any

import pytest

from paddle_qwen1m.evaluate import needle
from paddle_qwen1m.evaluate.samples import Prompter, TooShort


def test_each_needle_lies_at_its_depth_in_tokens(prompter: Prompter, tokenizer: Any) -> None:
    sample = needle.make(4096, 0, prompter, 5)
    document = sample.questions[0].prompt.rpartition("\n")[0]
    tokens = len(tokenizer(document)["input_ids"])
    for question, depth in zip(sample.questions, (0, 25, 50, 75, 100)):
        assert question.facts["depth_percent"] == depth
        assert document.count(question.facts["needle"]) == 1
        before = len(tokenizer(document[: document.index(question.facts["needle"])])["input_ids"])
        assert abs(100 * before / tokens - depth) < 2
        assert question.expected[0] in question.facts["needle"]


def test_questions_share_a_document_that_fills_the_length(prompter: Prompter, tokenizer: Any) -> None:
    sample = needle.make(2048, 3, prompter, 8)
    ids = [prompter.ids(question) for question in sample.questions]
    assert len({question.prompt.rpartition("\n")[2] for question in sample.questions}) == 8
    most = max(len(one) + question.max_tokens for one, question in zip(ids, sample.questions))
    assert 2048 - 40 < most <= 2048
    shared = next(place for place, tokens in enumerate(zip(*ids)) if len(set(tokens)) > 1)
    assert all(len(one) - shared < 32 for one in ids), "nothing but the question is another"


def test_depths_are_linear_and_have_a_name_each() -> None:
    assert needle.depths(3) == [0.0, 0.5, 1.0]
    assert needle.depths(1) == [0.5]
    with pytest.raises(ValueError, match="at 1 to 30 depths, got 31"):
        needle.depths(31)


def test_a_length_too_short_is_refused(prompter: Prompter) -> None:
    with pytest.raises(TooShort, match="needle: a length of 100 tokens is too short for 10 needles"):
        needle.make(100, 0, prompter, 10)
