"""Synthetic documents of the needle checkpoint: filler sentences, access codes hidden among them, questions, answers.

A document is a string of filler in which sentences "The access code for NAME is DDDDD." are hidden. Asked "What is the
access code for NAME?", the model must answer with that sentence. Everything is made from a seed, without a deep
learning framework: the demo, the tests and the training script share it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable

import numpy as np

from paddle_qwen1m.evaluate.words import FILLER, NAMES

SYSTEM = "You are a helpful assistant."
END_OF_TURN = "<|im_end|>"

CODE_DIGITS = 5

Encode = Callable[[str], list[int]]
"""Text to token ids, special tokens recognised, none added."""


@dataclass(frozen=True)
class Needle:
    """One hidden fact."""

    name: str
    code: str

    @property
    def sentence(self) -> str:
        """What stands in the document, and what the model was trained to answer."""
        return f"The access code for {self.name} is {self.code}."

    @property
    def question(self) -> str:
        """The user's question, which follows the document on a line of its own."""
        return f"What is the access code for {self.name}?"


@dataclass(frozen=True)
class Document:
    """Sentences in reading order, and the needles that are among them (the first is the one whose depth was set)."""

    sentences: tuple[str, ...]
    needles: tuple[Needle, ...]

    @property
    def text(self) -> str:
        """The sentences, each after one space: the form the checkpoint was trained on."""
        return "".join(f" {sentence}" for sentence in self.sentences)


class DocumentMaker:
    """Makes documents of a given number of tokens.

    A text of sentences encodes to the concatenation of what its sentences encode to, each with the space before it,
    so lengths are sums of known lengths and a document of a million tokens is made, and its ids are known, without
    encoding it.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._ids: dict[str, list[int]] = {}
        self._frame = len(encode(prompt_head())) + len(encode(prompt_tail(Needle("", ""))))

    def make(self, tokens: int, needles: int, seed: int, depth: float | None = None) -> Document:
        """A document whose prompt and answer together fill at most `tokens` tokens, to within one filler sentence.

        needles: how many facts are hidden, 1 to 30, at random places. depth: where the first of them goes, from 0.0
        (the beginning) to 1.0 (the end); random when None. Raises ValueError when the needles alone do not fit.
        """
        if not 1 <= needles <= len(NAMES):
            raise ValueError(f"a document holds 1 to {len(NAMES)} needles, got {needles}")
        if depth is not None and not 0.0 <= depth <= 1.0:
            raise ValueError(f"the depth of a needle lies between 0.0 and 1.0, got {depth}")
        rng = np.random.default_rng([seed, needles])
        hidden = draw_needles(rng, needles)
        asked = max(self._length(needle.name) for needle in hidden)
        answer = max(len(self._encode(f"{needle.sentence}{END_OF_TURN}")) for needle in hidden)
        room = tokens - self._frame - asked - answer - sum(self._length(needle.sentence) for needle in hidden)
        if room < 0:
            raise ValueError(f"{needles} needles, a question and its answer do not fit into {tokens} tokens")
        filler: list[str] = []
        while True:
            sentence = FILLER[rng.integers(len(FILLER))]
            room -= self._length(sentence)
            if room < 0:
                break
            filler.append(sentence)
        return Document(tuple(hide(rng, filler, hidden, depth)), tuple(hidden))

    def ids(self, document: Document) -> list[int]:
        """What the document's text encodes to."""
        return [token for sentence in document.sentences for token in self._sentence_ids(sentence)]

    def _length(self, sentence: str) -> int:
        return len(self._sentence_ids(sentence))

    def _sentence_ids(self, sentence: str) -> list[int]:
        if sentence not in self._ids:
            self._ids[sentence] = self._encode(f" {sentence}")
        return self._ids[sentence]


def draw_needles(rng: np.random.Generator, count: int) -> list[Needle]:
    """`count` needles with different names and random codes."""
    names = rng.choice(len(NAMES), size=count, replace=False)
    return [Needle(NAMES[i], "".join(str(digit) for digit in rng.integers(10, size=CODE_DIGITS))) for i in names]


def hide(rng: np.random.Generator, filler: list[str], needles: list[Needle], depth: float | None = None) -> list[str]:
    """The filler with the needles' sentences inserted at random places, the first needle's at `depth` if given."""
    places = [int(place) for place in rng.integers(len(filler) + 1, size=len(needles))]
    if depth is not None:
        places[0] = int(depth * len(filler))
    sentences = list(filler)
    for needle in np.argsort(places, kind="stable")[::-1]:
        sentences.insert(places[needle], needles[needle].sentence)
    return sentences


def prompt_head() -> str:
    """What stands before the document: the system turn and the beginning of the user's."""
    return f"<|im_start|>system\n{SYSTEM}{END_OF_TURN}\n<|im_start|>user\n"


def prompt_tail(needle: Needle) -> str:
    """What stands between the document and the answer: the question, and the beginning of the assistant's turn."""
    return f"\n{needle.question}{END_OF_TURN}\n<|im_start|>assistant\n"


def prompt(document: Document, needle: Needle) -> str:
    """The whole prompt: what the checkpoint's chat template makes of the system line, the document and the question."""
    return f"{prompt_head()}{document.text}{prompt_tail(needle)}"


def messages(document: Document, needle: Needle) -> list[dict[str, str]]:
    """The same prompt as messages for the tokenizer's `apply_chat_template`."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{document.text}\n{needle.question}"},
    ]


def is_answer(generated: str, needle: Needle) -> bool:
    """Whether a generated answer names the needle's code, exactly and as its only number."""
    return re.findall(r"\d+", generated) == [needle.code]
