"""Lengths are kept to the token, and scores are RULER's."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from paddle_qwen1m.evaluate.samples import Prompter, Question, TooShort, largest, score

QUESTION = Question("What is it?", "It is", ("7",), 5)


@pytest.mark.parametrize(
    ("answer", "expected", "share"),
    [
        ("The numbers are 123 and 456.", ["123", "456"], 1.0),
        ("The number is 123.", ["123", "456"], 0.5),
        ("I do not know.", ["123", "456"], 0.0),
        ("agile-ANCHOR", ["Agile-Anchor"], 1.0),
        ("12 3", ["123"], 0.0),
        ("", ["123"], 0.0),
        ("a b c", ["a", "b", "c", "d"], 0.75),
    ],
)
def test_the_score_is_the_share_of_expected_texts_in_the_answer(answer: str, expected: list[str], share: float) -> None:
    assert score(answer, expected) == share


@pytest.mark.parametrize("fixed", [0, 7, 900])
@pytest.mark.parametrize("unit", [1, 3, 250])
def test_one_unit_more_would_not_fit(fixed: int, unit: int) -> None:
    tried = []

    def tokens(units: int) -> int:
        tried.append(units)
        return fixed + unit * units + units // 7  # not quite linear

    found = largest(lambda units: units, tokens, 10_000, 2)
    fits = [units for units in range(2, 10_001) if fixed + unit * units + units // 7 <= 10_000]
    assert found in fits
    assert found + 1 not in fits
    assert len(tried) < 20, "a long text is not encoded a time a unit"


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(TooShort, match="the smallest sample takes 1,100 tokens"):
        largest(lambda units: units, lambda units: 100 * units, 1_000, 11)


def test_a_prompt_is_what_the_chat_template_makes_of_it_and_the_beginning_of_the_answer(tokenizer: Any) -> None:
    text = Prompter(tokenizer).text(QUESTION)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nIt is"
    )
    assert Prompter(tokenizer, raw=True).text(QUESTION) == "What is it? It is"
    assert Prompter(tokenizer).tokens(QUESTION) == len(tokenizer(text)["input_ids"]) + 5


def test_a_tokenizer_without_a_chat_template_is_refused_unless_prompts_are_plain(tokenizer: Any) -> None:
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template: give --raw"):
        Prompter(bare)
    assert Prompter(bare, raw=True).text(QUESTION) == "What is it? It is"
