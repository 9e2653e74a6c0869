"""What the second small checkpoint is trained on: RULER's needles, variables and common words, from easy to whole.

The documents are those that `paddle-qwen1m eval ruler` asks about, from the same module; here they are also made
shorter, with fewer needles, hops and words: a level of each kind says how far. Without a deep learning framework.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from small_checkpoint import BEGIN_OF_TURN, END_OF_TURN, FRAME, SYSTEM, make_tokenizer
from tokenizers import Tokenizer

from paddle_qwen1m.evaluate import ruler
from paddle_qwen1m.evaluate.samples import Question, TooShort, largest
from paddle_qwen1m.evaluate.words import ADJECTIVES, FILLER, NOUNS, filler, prose

KINDS = ("needles", "variables", "words")
MEASURED = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_2", "niah_multikey_3", "vt", "cwe")
"""Tasks of `eval ruler` that these documents prepare for."""
TRAINED_LENGTH = 4096
LEVELS = 5
BUDGETS = {
    "needles": (256, 512, 1024, 2048, 4096),
    "variables": (512, 512, 1024, 2048, 4096),
    "words": (512, 1024, 2048, 4096, 4096),
}
"""Tokens that a document of each level fills at most."""
HOPS = (1, 2, 4, 4, 4)
WORDS = ((3, 6, 1), (5, 8, 1), (10, 10, 1), (10, 20, 2), (10, 30, 3))
"""Common words, how often these are there, and how often others, a level."""
SHARES = (0.5, 0.3, 0.2)
"""Of a batch's documents, how many each kind has."""
UUIDS = (0.2, 0.5, 0.6, 0.6, 0.6)
"""Share of needles whose values are UUIDs, a level; the others are numbers."""
FEW_NEEDLES = 0.3
"""Share of documents with one or two needles, whose answer is a plain copy: without them the lookup seldom begins."""
OWN_LEVEL = 0.6
"""Share of documents of the level that has been reached; the others are of lower ones, which are not forgotten so."""
MOST_TURNS = 8
"""Needles of a document that are asked for, one after the other."""
TEXT_WEIGHT, ANSWER_WEIGHT = 0.02, 1.0
FIRST_WEIGHTS = (1.0, 8.0, 6.0, 4.0, 2.0)
"""Of a needle's first tokens, a space and what tells it from the others: what follows is a plain copy, learnt at once,
and without these the lookup is a thirtieth of the loss."""
MOST_CHOICES = 10
NO_ANSWER, NO_CHOICE = -1, -1
FACT = re.compile(r"A secret (?:number|uuid) of (\S+) is (\S+)\.")
RANDOM_TEXT = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|\b[A-Z]{3,}\b|\d+")
"""What no token is made of: UUIDs, VAR and variables, numbers."""


def ruler_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer that knows the words of these documents; digits and letters of variables are a token each.

    A letter behind a space is one token as well, whichever it is, so that all variables have as many.
    """
    rng = np.random.default_rng(0)
    corpus = [f" {letter}" for letter in string.ascii_uppercase] * 3000
    corpus += [f" {adjective}-{noun}" for adjective, noun in zip(ADJECTIVES * 2, NOUNS)] * 100
    corpus += [*FILLER, *FRAME] * 100
    for task in MEASURED:
        for _ in range(200):
            question = ruler.TASKS[task].plan(rng, 512, prose)(10)
            text = f"{question.prompt}\n{question.answer_prefix}{question.answer}"
            corpus.append(RANDOM_TEXT.sub("", text))
    return make_tokenizer(corpus, vocab_size)


@dataclass(frozen=True)
class Answer:
    """Tokens `begin` to `end` of a row. choices: places where any of several tokens is right, and these."""

    kind: int
    begin: int
    end: int
    choices: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Row:
    """Token ids of a conversation about a document, and where its answers are."""

    ids: list[int]
    answers: list[Answer]


@dataclass(frozen=True)
class Batch:
    """rows R of T tokens with A answers, C of whose tokens have alternatives.

    ids int64 [R, T]; weights float32 [R, T], of each token as a target; answers int64 [R, T], the number of the answer
    that a token is part of, or NO_ANSWER; kinds int64 [A], numbers of KINDS; choices int64 [C, 2 + MOST_CHOICES]: row,
    place, and the tokens that are right there, then NO_CHOICE.
    """

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    answers: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int64]
    choices: npt.NDArray[np.int64]


class Documents:
    """Makes batches of about `tokens` tokens, of documents of up to `longest` tokens."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, longest: int = TRAINED_LENGTH) -> None:
        self._tokenizer, self._tokens, self._longest = tokenizer, tokens, longest

    def batch(self, seed: int, step: int, levels: Sequence[int]) -> Batch:
        """The batch of a step, the same each time. levels: of each of KINDS, 0 to LEVELS - 1, the highest drawn."""
        rng = np.random.default_rng([seed, step])
        length = int(rng.choice(self._lengths(levels)))
        fitting = [
            [level for level in range(reached + 1) if self._budget(kind, level) <= length]
            for kind, reached in zip(KINDS, levels)
        ]
        rows = []
        for _ in range(max(1, self._tokens // length)):
            shares = np.array([share if possible else 0.0 for share, possible in zip(SHARES, fitting)])
            kind = int(rng.choice(len(KINDS), p=shares / shares.sum()))
            own = rng.random() < OWN_LEVEL
            rows.append(self._row(rng, kind, fitting[kind][-1] if own else int(rng.choice(fitting[kind]))))
        return _batch(rows, length)

    def _lengths(self, levels: Sequence[int]) -> list[int]:
        """Lengths of rows: of the documents that can be drawn."""
        return sorted(
            {self._budget(kind, level) for kind, reached in zip(KINDS, levels) for level in range(reached + 1)}
        )

    def _budget(self, kind: str, level: int) -> int:
        return min(BUDGETS[kind][level], self._longest)

    def _row(self, rng: np.random.Generator, kind: int, level: int) -> Row:
        budget = self._budget(KINDS[kind], level)
        task, few = _task(rng, KINDS[kind], level)
        whole = level == LEVELS - 1 and rng.random() < 0.5  # as it is measured: one question, and no room left
        limit = budget if whole else int(budget * rng.uniform(0.5, 1.0))
        build = task.plan(rng, limit, (prose, filler)[rng.integers(2)])
        if few:
            question = build(task.least)
        else:
            try:
                question = largest(
                    build, lambda made: len(self._opening(made)) + len(self._ids(made.answer)) + 1, limit, task.least
                )
            except TooShort:
                question = build(task.least)
        row = Row(self._opening(question), [])
        self._answer(row, kind, question)
        if isinstance(task, ruler.Needles) and not whole:
            facts = FACT.findall(question.prompt)
            for place in rng.permutation(len(facts))[: MOST_TURNS - 1]:
                follow = task.ask([facts[place]])
                if follow.expected == question.expected:
                    continue
                turn = self._ids(f"\n{BEGIN_OF_TURN}user\n{follow.prompt}{_before_answer(follow)}")
                if len(row.ids) + len(turn) + len(self._ids(follow.answer)) + 1 > budget:
                    break
                row.ids.extend(turn)
                self._answer(row, kind, follow)
        return Row(row.ids[:budget], [one for one in row.answers if one.end <= budget])

    def _opening(self, question: Question) -> list[int]:
        """What the chat template makes of a question, and how its answer begins."""
        return self._ids(
            f"{BEGIN_OF_TURN}system\n{SYSTEM}{END_OF_TURN}\n{BEGIN_OF_TURN}user\n{question.prompt}{_before_answer(question)}"
        )

    def _answer(self, row: Row, kind: int, question: Question) -> None:
        """Appends the rest of the answer, and the end of the turn. Common words may come in any order; variables are
        learnt along their chain.
        """
        encoded = self._tokenizer.encode(question.answer)
        begin, choices = len(row.ids), []
        if question.any_order and KINDS[kind] != "variables":
            firsts, at = [], 0
            for text in question.expected:
                at = question.answer.index(text, at)
                firsts.append(next(place for place, (_, end) in enumerate(encoded.offsets) if end > at))
            for number, place in enumerate(firsts):
                choices.append((begin + place, tuple(dict.fromkeys(encoded.ids[one] for one in firsts[number:]))))
        row.ids.extend([*encoded.ids, self._tokenizer.token_to_id(END_OF_TURN)])
        row.answers.append(Answer(kind, begin, begin + len(encoded.ids), tuple(choices)))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)


def _before_answer(question: Question) -> str:
    return f"{END_OF_TURN}\n{BEGIN_OF_TURN}assistant\n{question.answer_prefix}"


def _task(rng: np.random.Generator, kind: str, level: int) -> tuple[ruler.Task, bool]:
    """What a document of a level hides, and whether it has nothing besides."""
    shown = level >= 2 and rng.random() < 0.8
    if kind == "variables":
        return ruler.Chain(hops=HOPS[level], shown=shown), False
    if kind == "words":
        common, often, seldom = WORDS[level]
        return ruler.CommonWords(common, often, seldom, shown), False
    values = "uuid" if rng.random() < UUIDS[level] else "number"
    keyed = values == "uuid" and level >= 1 and rng.random() < 0.5
    few = rng.random() < FEW_NEEDLES
    alone = rng.random() < (0.5 if few else 0.6)
    where = "needles" if alone else "noise" if few else ("noise", "text")[rng.integers(2)]
    return ruler.Needles(where, values, keyed), few


def _batch(rows: Sequence[Row], length: int) -> Batch:
    ids = np.zeros((len(rows), length), np.int64)
    weights = np.zeros((len(rows), length), np.float32)
    answers = np.full((len(rows), length), NO_ANSWER, np.int64)
    kinds, choices = list[int](), list[list[int]]()
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = row.ids
        weights[number, 1 : len(row.ids)] = TEXT_WEIGHT
        for answer in row.answers:
            weights[number, answer.begin : answer.end] = ANSWER_WEIGHT
            if KINDS[answer.kind] == "needles":
                first = FIRST_WEIGHTS[: answer.end - answer.begin]
                weights[number, answer.begin : answer.begin + len(first)] = first
            answers[number, answer.begin : answer.end] = len(kinds)
            kinds.append(answer.kind)
            for place, right in answer.choices:
                choices.append([number, place, *right, *[NO_CHOICE] * (MOST_CHOICES - len(right))])
    return Batch(
        ids, weights, answers, np.array(kinds, np.int64), np.array(choices, np.int64).reshape(-1, 2 + MOST_CHOICES)
    )
