"""Lengths are kept to the token, and scores are RULER's."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from paddle_qwen1m.evaluate.samples import Prompter, Question, TooShort, largest, score, score_likeliest

QUESTION = Question("What is it?", "It is", ("7",), 5, " 7.")


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


def test_what_is_listed_in_any_order_is_scored_text_by_text(prompter: Prompter) -> None:
    """A changed token costs its text, unless it stands between two or begins another one that is still to come."""
    listed = Question("Which?", "They are", ("81234", "6567", "jade"), 30, " 81234, 6567, jade", any_order=True)
    answer = prompter.encode(listed.answer)
    first, second, third = (len(prompter.encode(part)) for part in (" ", " 81234, ", " 81234, 6567,"))
    text = [prompter.decode([token]) for token in answer]
    assert ("8" in text[first], "6" in text[second], "j" in text[third]) == (True,) * 3, "where each text begins"

    def scored(place: int, token: int, question: Question = listed) -> float:
        likeliest = [*answer[:place], token, *answer[place + 1 :]]
        return score_likeliest(likeliest, answer, question, prompter.decode)

    assert scored(0, answer[0]) == 1.0
    assert scored(text.index(","), 0) == 1.0
    assert scored(text.index("4"), 0) == pytest.approx(2 / 3)
    assert scored(first, answer[third]) == 1.0
    assert scored(third, answer[first]) == pytest.approx(2 / 3), "that one has been listed"
    one_way = Question("Which?", "They are", ("8",), 30, listed.answer)
    assert scored(0, answer[0], one_way) == 1.0 and scored(text.index(","), 0, one_way) == 0.0
