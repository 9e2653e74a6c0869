"""RULER's synthetic tasks under RULER's names, in words of our own: samples that fill a length, from a seed.

Hsieh et al., RULER: What's the real context size of your long-context language models?, 2024: which task hides what,
how often, how many tokens an answer gets and how it is scored. Wording, words and haystacks are not RULER's,
so that scores compare configurations and servers that were asked by this module, not with published ones to the point.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Callable, Protocol

import numpy as np

from paddle_qwen1m.evaluate.samples import Prompter, Question, Sample, TooLong, TooShort, largest
from paddle_qwen1m.evaluate.words import FILLER, identifier, letters, names, number, prose

NEEDLE_TOKENS, CHAIN_TOKENS, COMMON_TOKENS, FREQUENT_TOKENS = 128, 30, 120, 50
"""Of an answer: niah, vt, cwe, fwe."""
VALUE_DIGITS, CHAIN_DIGITS, NAME_LETTERS, CODED_LETTERS = 7, 5, 5, 6
FREQUENT, ALPHA, CODED_WORDS, NOISE = 3, 2.0, 1000, "..."
SHORTEST_NAMED = 8
"""No needle with a name takes fewer tokens: how many names a length can need."""

Haystack = Callable[[np.random.Generator], Iterator[str]]
Build = Callable[[int], Question]


class Task(Protocol):
    """A kind of sample; it has at least `least` and at most `most` units of whatever fills its document."""

    @property
    def least(self) -> int: ...

    @property
    def most(self) -> int | None: ...

    def plan(self, rng: np.random.Generator, limit: int, haystack: Haystack) -> Build:
        """What makes the question whose document has so many units; `limit`: tokens that it will have at most."""


class Sentences:
    """The first sentences of an endless text, drawn once."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source, self._drawn = source, list[str]()

    def first(self, count: int) -> list[str]:
        self._drawn += islice(self._source, max(0, count - len(self._drawn)))
        return self._drawn[:count]


def noise(_rng: np.random.Generator) -> Iterator[str]:
    """The same five sentences again and again."""
    while True:
        yield from FILLER[:5]


@dataclass(frozen=True)
class Needles:
    """Needle in a haystack: `keys` with `values` each are hidden, and the first `asked` of them are asked for.

    where: "noise", "text" or "needles", other needles of the same kind. kind: of the values, and with `keyed` of the
    keys as well, "number" or "uuid".
    """

    where: str
    kind: str = "number"
    keyed: bool = False
    keys: int = 1
    values: int = 1
    asked: int = 1
    least: int = 1
    most: None = None

    def plan(self, rng: np.random.Generator, limit: int, haystack: Haystack) -> Build:
        among_needles = self.where == "needles"
        drawn = self._keys(rng, self.keys + (limit // SHORTEST_NAMED if among_needles else 0))
        facts = [(key, self._value(rng)) for key in islice(drawn, self.keys) for _ in range(self.values)]
        if among_needles:
            text = Sentences(self._fact(key, self._value(rng)) for key in drawn)
        else:
            text = Sentences((noise if self.where == "noise" else haystack)(rng))
        places = rng.random(len(facts))
        asked = self.ask(facts[: self.asked * self.values])
        hidden = [self._fact(key, value) for key, value in facts]
        depths = [round(100 * float(place), 1) for place in places[: len(asked.expected)]]

        def build(units: int) -> Question:
            document = " ".join(_hide(text.first(units), hidden, places))
            return replace(
                asked,
                prompt=f"Somewhere in the following text secret {self.kind}s are written down. Read it and keep them "
                f"in mind: you will be asked for them at its end.\n\n{document}\n\n{asked.prompt}",
                facts={"depths": depths},
            )

        return build

    def ask(self, facts: Sequence[tuple[str, str]]) -> Question:
        """The question for the values of some keys, without the document."""
        keys = _listed(list(dict.fromkeys(key for key, _ in facts)))
        values = [value for _, value in facts]
        what, verb = (f"{self.kind}s", "are") if len(facts) > 1 else (self.kind, "is")
        return Question(
            f"Which secret {what} of {keys} {verb} written down in the text?",
            f"In the text, the secret {what} of {keys} {verb}",
            tuple(values),
            NEEDLE_TOKENS,
            f" {_listed(values)}.",
            self.values > 1,
        )

    def _keys(self, rng: np.random.Generator, at_most: int) -> Iterator[str]:
        return (identifier(rng) for _ in range(at_most)) if self.keyed else names(rng, at_most)

    def _value(self, rng: np.random.Generator) -> str:
        return number(rng, VALUE_DIGITS) if self.kind == "number" else identifier(rng)

    def _fact(self, key: str, value: str) -> str:
        return f"A secret {self.kind} of {key} is {value}."


@dataclass(frozen=True)
class Chain:
    """Variable tracking: one variable gets a value, each of `hops` others that of the one before it; all are asked.

    shown: whether an example that is answered stands before the question.
    """

    hops: int = 4
    shown: bool = True
    most: None = None

    @property
    def least(self) -> int:
        return self.hops + 1

    def plan(self, rng: np.random.Generator, limit: int, haystack: Haystack) -> Build:
        example = self._question(rng, Sentences(noise(rng)).first(2 * self.least))
        text = Sentences(noise(rng))
        chain, places = self._chain(rng), np.sort(rng.random(self.hops + 1))

        def build(units: int) -> Question:
            question = self._ask(chain, places, text.first(units))
            return _after_example(example, question) if self.shown else question

        return build

    def _question(self, rng: np.random.Generator, sentences: list[str]) -> Question:
        return self._ask(self._chain(rng), np.sort(rng.random(self.hops + 1)), sentences)

    def _chain(self, rng: np.random.Generator) -> tuple[list[str], str]:
        variables: dict[str, None] = {}
        while len(variables) < self.hops + 1:
            variables[letters(rng, NAME_LETTERS, "A")] = None
        return list(variables), number(rng, CHAIN_DIGITS)

    def _ask(self, chain: tuple[list[str], str], places: np.ndarray, sentences: list[str]) -> Question:
        variables, value = chain
        sources = [value, *(f"VAR {variable}" for variable in variables)]
        lines = [f"VAR {variable} = {source}" for variable, source in zip(variables, sources)]
        document = "\n".join(_hide(sentences, lines, places))
        return Question(
            "In the following text some lines assign values to variables, directly or from another variable. Follow "
            f"them.\n\n{document}\n\nWhich variables have the value {value} at the end of the text? There are "
            f"{len(variables)} of them.",
            f"Following the assignments, the {len(variables)} variables with the value {value} are:",
            tuple(variables),
            CHAIN_TOKENS,
            _in_any_order(variables),
            True,
        )


@dataclass(frozen=True)
class CommonWords:
    """Common words extraction: `common` words of a list are there `often`, all others `seldom` times.

    shown: whether an example that is answered stands before the question.
    """

    common: int = 10
    often: int = 30
    seldom: int = 3
    shown: bool = True
    most: None = None

    @property
    def least(self) -> int:
        return self.common

    def plan(self, rng: np.random.Generator, limit: int, haystack: Haystack) -> Build:
        drawn = Sentences(names(rng, 3 * self.common + limit // (SHORTEST_NAMED * self.seldom)))
        words = drawn.first(3 * self.common)
        example = self._ask(rng, words[self.common : 2 * self.common], words[2 * self.common :], 4, 1)
        order = int(rng.integers(2**31))

        def build(units: int) -> Question:
            uncommon = drawn.first(3 * self.common + units)[3 * self.common :]
            shuffled = np.random.default_rng(order)
            question = self._ask(shuffled, words[: self.common], uncommon, self.often, self.seldom)
            return _after_example(example, question) if self.shown else question

        return build

    def _ask(
        self, rng: np.random.Generator, common: list[str], uncommon: list[str], often: int, seldom: int
    ) -> Question:
        words = rng.permutation(np.array(common * often + uncommon * seldom)).tolist()
        document = " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))
        return Question(
            "In the following numbered list some words come up again and again, others seldom. Keep in mind those that "
            f"come up most often.\n\n{document}\n\nWhich {len(common)} words come up most often in the list?",
            f"The {len(common)} words that come up most often in the list are:",
            tuple(common),
            COMMON_TOKENS,
            _in_any_order(common),
            True,
        )


@dataclass(frozen=True)
class FrequentWords:
    """Frequent words extraction: the k-th most frequent coded word has a share of k^-ALPHA; the first one is dots.

    The `FREQUENT` that follow the dots are asked for.
    """

    least: int = 100
    most: None = None

    def plan(self, rng: np.random.Generator, limit: int, haystack: Haystack) -> Build:
        coded: dict[str, None] = {}
        while len(coded) < CODED_WORDS:
            coded[letters(rng, CODED_LETTERS)] = None
        words = np.array([NOISE, *coded])
        shares = np.arange(1, len(words) + 1, dtype=np.float64) ** -ALPHA
        shares /= shares.sum()
        order = int(rng.integers(2**31))

        def build(units: int) -> Question:
            counts = np.floor(units * shares).astype(np.int64)
            text = np.random.default_rng(order).permutation(np.repeat(words, counts)).tolist()
            return Question(
                "Read the following coded text and count how often its words come up. Dots are no words.\n\n"
                f"{' '.join(text)}\n\nWhich {FREQUENT} coded words come up most often in the text? Dots are no words.",
                f"The {FREQUENT} coded words that come up most often are:",
                tuple(words[1 : 1 + FREQUENT].tolist()),
                FREQUENT_TOKENS,
                _in_any_order(words[1 : 1 + FREQUENT].tolist()),
                True,
            )

        return build


TASKS: dict[str, Task] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", kind="uuid"),
    "niah_multikey_1": Needles("text", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", kind="uuid", keyed=True),
    "niah_multivalue": Needles("text", values=4),
    "niah_multiquery": Needles("text", keys=4, asked=4),
    "vt": Chain(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}


def make(
    task: str,
    length: int,
    sample: int,
    prompter: Prompter,
    *,
    seed: int = 0,
    haystack: Haystack = prose,
    kind: Task | None = None,
) -> Sample:
    """The `sample`-th sample of a task: prompt and longest answer fill `length` tokens to within one unit.

    haystack: sentences without end, for the tasks that hide needles in a text. kind: of a task that is none of TASKS,
    because it needs data. Raises TooShort or TooLong, naming the task.
    """
    kind = TASKS[task] if kind is None else kind
    rng = np.random.default_rng([seed, zlib.crc32(task.encode()), length, sample])
    try:
        question = largest(kind.plan(rng, length, haystack), prompter.tokens, length, kind.least, kind.most)
    except TooShort as error:
        raise TooShort(f"{task}: a length of {length:,} tokens is too short, {error}") from None
    except TooLong as error:
        raise TooLong(f"{task}: the data do not fill a length of {length:,} tokens, {error}") from None
    return Sample(task, length, sample, (question,))


def _hide(sentences: Sequence[str], hidden: Sequence[str], places: np.ndarray) -> list[str]:
    """The sentences with those hidden at `places`, 0 to 1, among them; at equal places in the order given."""
    at = [int(place * (len(sentences) + 1)) for place in places]
    text = list(sentences)
    for one in sorted(range(len(hidden)), key=lambda one: (at[one], one), reverse=True):
        text.insert(at[one], hidden[one])
    return text


def _after_example(example: Question, question: Question) -> Question:
    """The question behind one that is answered."""
    solved = f"{example.prompt}\n{example.answer_prefix}{example.answer}"
    return replace(question, prompt=f"{solved}\n\n\n{question.prompt}")


def _in_any_order(texts: Sequence[str]) -> str:
    return f" {', '.join(texts)}"


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
