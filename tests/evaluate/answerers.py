"""Subjects whose answers are known: of an evaluation, what is asked and what is kept can be counted with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Callable

import numpy as np
import numpy.typing as npt

from paddle_qwen1m.evaluate.subject import Answer, Prompt, Reading, SubjectError


class Answerer:
    """Says what `say` makes of a prompt's text. dies_after: so many answers it gives, then it is gone."""

    name = "answerer"

    def __init__(self, tokenizer: Any, say: Callable[[str], str], dies_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.closed = False
        self._tokenizer, self._say, self._dies_after = tokenizer, say, dies_after

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        for prompt in prompts:
            if self._dies_after == len(self.asked):
                raise SubjectError("nobody is there")
            self.asked.append(self._tokenizer.decode(list(prompt.ids)))
            yield Answer(self._say(self.asked[-1]), "stop", 0)

    def logprobs(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Of the token at position p: -p."""
        return -np.arange(1, len(ids), dtype=np.float64)

    def likeliest(self, reading: Reading) -> npt.NDArray[np.int64]:
        """The right answer where `say` says anything, else one whose last token is another."""
        self.asked.append(self._tokenizer.decode(list(reading.ids)))
        tokens = np.array(reading.ids[len(reading.ids) - reading.answer_tokens :], np.int64)
        tokens[-1] += not self._say(self.asked[-1])
        return tokens

    def close(self) -> None:
        self.closed = True
