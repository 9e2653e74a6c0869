"""RULER's question-answering tasks: passages of a published data set, a question about some of them, others around.

qa_1 is made of a file of SQuAD (1.1 or 2.0), qa_2 of one of HotpotQA, each in the JSON that its authors publish. As in
RULER a question's own passages are there in any case, 1 or 10, then others of the same article, then any; all of them
in random order, and one of the answers that the file knows is enough. The wording is not RULER's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paddle_qwen1m.evaluate.ruler import Build, Haystack
from paddle_qwen1m.evaluate.samples import Question

SQUAD, HOTPOT = "qa_1", "qa_2"
FORMATS = {SQUAD: "SQuAD", HOTPOT: "HotpotQA"}
"""Of the file that a task needs."""
ANSWER_TOKENS = 32
ONLY_THE_ANSWER = "with the answer alone and no other words"


@dataclass(frozen=True)
class Asked:
    """answers: any one is right. own, near: passages by number, what it needs and others of the same article."""

    question: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Collection:
    """A data set, and the task that it is for."""

    task: str
    passages: Sequence[str]
    asked: Sequence[Asked]

    def about(self, number: int, seed: int) -> About:
        """The `number`-th question in the random order of a seed. ValueError where there are not so many."""
        if number >= len(self.asked):
            raise ValueError(f"{self.task}: the data have {len(self.asked):,} questions, fewer than --samples")
        order = np.random.default_rng(seed).permutation(len(self.asked))
        return About(self, int(order[number]))


@dataclass(frozen=True)
class About:
    """One question among as many passages as fit: a ruler.Task."""

    collection: Collection
    place: int

    @property
    def least(self) -> int:
        return len(self.collection.asked[self.place].own)

    @property
    def most(self) -> int:
        return len(self.collection.passages)

    def plan(self, rng: np.random.Generator, limit: int, haystack: Haystack) -> Build:
        passages, asked = self.collection.passages, self.collection.asked[self.place]
        known = {*asked.own, *asked.near}
        near = [asked.near[one] for one in rng.permutation(len(asked.near))]
        others = [int(one) for one in rng.permutation(len(passages)) if one not in known]
        chosen = [*asked.own, *near, *others]
        order = int(rng.integers(2**31))

        def build(units: int) -> Question:
            shuffled = np.random.default_rng(order).permutation(chosen[:units])
            documents = "\n\n".join(
                f"Document {number}:\n{passages[one]}" for number, one in enumerate(shuffled.tolist(), 1)
            )
            return Question(
                f"Below are documents, each with its number. Answer the question behind them from what they say, "
                f"{ONLY_THE_ANSWER}.\n\n{documents}\n\nAnswer the question from the documents above, "
                f"{ONLY_THE_ANSWER}.\n\nQuestion: {asked.question}",
                "Answer:",
                asked.answers,
                ANSWER_TOKENS,
                f" {asked.answers[0]}",
                any_one=True,
                facts={"question": asked.question},
            )

        return build


def read(text: str) -> Collection:
    """A file of SQuAD or HotpotQA; which one it is shows in its form. ValueError for another one."""
    try:
        content = json.loads(text)
        found = _squad(content["data"]) if isinstance(content, dict) else _hotpot(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"neither SQuAD's nor HotpotQA's JSON: {what}") from error
    if not found.asked:
        raise ValueError("there is no question in it that has an answer")
    return found


def _squad(articles: Any) -> Collection:
    """Articles of paragraphs with questions; those of 2.0 that have no answer are left out."""
    places: dict[str, int] = {}
    for article in articles:
        for paragraph in article["paragraphs"]:
            places.setdefault(str(paragraph["context"]), len(places))
    asked = list[Asked]()
    for article in articles:
        of_article = list(dict.fromkeys(places[paragraph["context"]] for paragraph in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            own = places[paragraph["context"]]
            near = tuple(one for one in of_article if one != own)
            for one in paragraph["qas"]:
                answers = tuple(dict.fromkeys(str(answer["text"]) for answer in one["answers"]))
                if answers and not one.get("is_impossible", False):
                    asked.append(Asked(str(one["question"]), answers, (own,), near))
    return Collection(SQUAD, list(places), asked)


def _hotpot(content: Any) -> Collection:
    """Questions with ten passages each, two of which the answer needs; "title, line break, sentences" is a passage."""
    places: dict[str, int] = {}
    asked = list[Asked]()
    for one in content:
        texts = [f"{title}\n{''.join(sentences)}" for title, sentences in one["context"]]
        own = dict.fromkeys(places.setdefault(text, len(places)) for text in texts)
        asked.append(Asked(str(one["question"]), (str(one["answer"]),), tuple(own)))
    return Collection(HOTPOT, list(places), asked)
