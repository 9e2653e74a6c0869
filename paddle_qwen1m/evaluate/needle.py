"""The needle map: access codes hidden at every depth of documents of every length, each asked for on its own.

After G. Kamradt's needle in a haystack, but with one document for all depths of a length, which is then prefilled once
for all its questions: other codes stand in the document beside the one that is asked for.
"""

from __future__ import annotations

import zlib

import numpy as np

from paddle_qwen1m.evaluate.ruler import Haystack, Sentences
from paddle_qwen1m.evaluate.samples import Prompter, Question, Sample, TooShort, largest
from paddle_qwen1m.evaluate.words import NAMES, filler, number

TASK = "needle"
CODE_DIGITS = 5
ANSWER_TOKENS = 32


def depths(count: int) -> list[float]:
    """`count` places, 0.0 the beginning of a document, 1.0 its end. ValueError for more than there are names."""
    if not 1 <= count <= len(NAMES):
        raise ValueError(f"a document has needles at 1 to {len(NAMES)} depths, got {count}")
    return [float(depth) for depth in np.linspace(0.0, 1.0, count)] if count > 1 else [0.5]


def make(
    length: int, sample: int, prompter: Prompter, count: int, *, seed: int = 0, haystack: Haystack = filler
) -> Sample:
    """The `sample`-th document of a length, with needles at `count` depths and a question for each.

    Prompt and longest answer of each question fill at most `length` tokens, of the longest one to within a sentence.
    haystack: sentences without end. Raises TooShort.
    """
    rng = np.random.default_rng([seed, zlib.crc32(TASK.encode()), length, sample])
    named = [NAMES[name] for name in rng.permutation(len(NAMES))[:count]]
    codes = [number(rng, CODE_DIGITS) for _ in named]
    needles = [f"The access code for {name} is {code}." for name, code in zip(named, codes)]
    text = Sentences(haystack(rng))
    places = depths(count)

    def build(units: int) -> Sample:
        sentences = text.first(units)
        for depth, needle in sorted(zip(places, needles), reverse=True):
            sentences.insert(round(depth * units), needle)
        document = "".join(f" {sentence}" for sentence in sentences)
        return Sample(
            TASK,
            length,
            sample,
            tuple(
                Question(
                    f"{document}\n{_question(name)}",
                    "",
                    (code,),
                    ANSWER_TOKENS,
                    needle,
                    facts={"depth_percent": round(100 * depth, 1), "needle": needle},
                )
                for name, code, depth, needle in zip(named, codes, places, needles)
            ),
        )

    widest = max(range(count), key=lambda one: len(prompter.encode(_question(named[one]))))
    try:
        made = largest(build, lambda tried: prompter.tokens(tried.questions[widest]), length, 1)
    except TooShort as error:
        raise TooShort(f"{TASK}: a length of {length:,} tokens is too short for {count} needles, {error}") from None
    return made


def _question(name: str) -> str:
    return f"What is the access code for {name}?"
