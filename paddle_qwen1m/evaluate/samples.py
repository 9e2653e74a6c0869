"""What is asked: questions about documents of exact lengths in tokens of the model's own tokenizer, and their score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, TypeVar

from paddle_qwen1m.text import decoder


class TooShort(ValueError):
    """A length that the smallest sample of a task does not fit."""


class TooLong(ValueError):
    """A length that the largest sample of a task, made of all that there is, does not fill."""


@dataclass(frozen=True)
class Question:
    """prompt: what the user says, document and question. answer_prefix: how the answer begins, given with the prompt.

    expected: texts that the answer must have. max_tokens: of the answer. answer: how a right one goes on. any_order:
    whether the expected texts, which stand in `answer` in one order, would be as right in another one. any_one: whether
    one of them is enough. facts: what else a reader of results wants.
    """

    prompt: str
    answer_prefix: str
    expected: tuple[str, ...]
    max_tokens: int
    answer: str
    any_order: bool = False
    any_one: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """The `number`-th document of a task at a length, in tokens, with its questions, which share its text."""

    task: str
    length: int
    number: int
    questions: tuple[Question, ...]


class Prompter:
    """Makes token ids of questions, with the tokenizer's chat template, or of the plain text where there is none."""

    def __init__(self, tokenizer: Any, *, raw: bool = False) -> None:
        """ValueError for a tokenizer without a chat template, unless `raw`."""
        if not raw and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: give --raw, and prompts are plain text")
        self._tokenizer, self._raw = tokenizer, raw
        self._decode = decoder(tokenizer, skip_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return self._decode(ids)

    def text(self, question: Question) -> str:
        """The whole prompt, the beginning of the answer included."""
        if self._raw:
            return f"{question.prompt} {question.answer_prefix}".rstrip()
        messages = [{"role": "user", "content": question.prompt}]
        turn = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return f"{turn}{question.answer_prefix}"

    def ids(self, question: Question) -> list[int]:
        return self.encode(self.text(question))

    def tokens(self, question: Question) -> int:
        """Of the prompt and the longest answer together, as RULER counts; of the right one, should that be longer."""
        return len(self.ids(question)) + max(question.max_tokens, len(self.encode(question.answer)))


def score(answer: str, expected: Sequence[str], any_one: bool = False) -> float:
    """RULER's string_match_all, as a share: how many of the texts are in the answer, upper and lower case the same.

    any_one: its string_match_part, 1 where at least one of them is.
    """
    said = answer.lower()
    found = sum(text.lower() in said for text in expected)
    return float(found > 0) if any_one else found / len(expected)


def score_likeliest(
    likeliest: Sequence[int], answer: Sequence[int], question: Question, decode: Callable[[list[int]], str]
) -> float:
    """Of the likeliest token in the place of each of `answer`'s: 1 where they are the same, else 0.

    Where the expected texts could come in another order it is the share of them whose tokens are the likeliest, the
    first one of each being as good if another text that is still to come begins with it.
    """
    if not question.any_order:
        return float(list(likeliest) == list(answer))
    text, ends = decode(list(answer)), [len(decode(list(answer[:count]))) for count in range(len(answer) + 1)]
    spans, begin = list[range](), 0
    for expected in question.expected:
        begin = text.index(expected, begin)
        end = begin + len(expected)
        places = [place for place in range(len(answer)) if ends[place] < end and ends[place + 1] > begin]
        spans.append(range(places[0], places[-1] + 1))
        begin = end
    found = 0
    for number, span in enumerate(spans):
        firsts = {answer[later[0]] for later in spans[number:]}
        rest = span[1:]
        found += likeliest[span[0]] in firsts and all(likeliest[place] == answer[place] for place in rest)
    return found / len(spans)


Made = TypeVar("Made")
LEAST_SLOPE = 0.5
"""Tokens of a unit, whatever two of them that were measured say."""


def largest(
    build: Callable[[int], Made], tokens: Callable[[Made], int], limit: int, least: int, most: int | None = None
) -> Made:
    """`build(units)` with as many units, at least `least`, as `limit` tokens hold: with one more they would not fit.

    tokens: of what was built, about linear in the units; a long text is encoded a few times, not a time a unit. most:
    units that there are; None where there is no end. Raises TooShort, or TooLong where `most` do not fill the limit.
    """
    low, made = least, build(least)
    low_tokens = least_tokens = tokens(made)
    if low_tokens > limit:
        raise TooShort(f"the smallest sample takes {low_tokens:,} tokens")
    high: int | None = None
    slope = float(low_tokens) / max(low, 1)
    """Tokens a unit: what belongs to no unit makes it too large at first, so that the first guess is a careful one."""
    while low_tokens < limit and high != low + 1:
        if low == most:
            raise TooLong(f"the largest sample takes {low_tokens:,} tokens")
        guess = low + max(1, int((limit - low_tokens) / max(slope, LEAST_SLOPE)))
        if high is not None:
            guess = min(guess, high - 1)
        if most is not None:
            guess = min(guess, most)
        tried = build(guess)
        cost = tokens(tried)
        slope = (cost - least_tokens) / (guess - least)
        if cost > limit:
            high = guess
        else:
            low, made, low_tokens = guess, tried, cost
    return made
