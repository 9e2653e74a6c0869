"""Documents of the needle task and of RULER's, with their questions and right answers, as token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from needle_documents import DocumentMaker, prompt_head, prompt_tail

from paddle_qwen1m.evaluate import needle, ruler
from paddle_qwen1m.evaluate.samples import Prompter

TASKS = (needle.TASK, *ruler.TASKS)


@dataclass(frozen=True)
class Document:
    """Token ids int64: `head`, and behind it a question and its right answer, of each question."""

    head: np.ndarray
    asked: tuple[tuple[np.ndarray, np.ndarray], ...]


def make(task: str, tokens: int, number: int, needles: int, prompter: Prompter) -> Document:
    """The task's document of this number, whose prompt and answer take up to so many tokens; of the needle task with so
    many questions, of RULER's with one, which stands in `head`.
    """
    if task == needle.TASK:
        maker = DocumentMaker(prompter.encode)
        made = maker.make(tokens, needles, number)
        asked = [(prompter.encode(prompt_tail(one)), prompter.encode(one.sentence)) for one in made.needles]
        pairs = tuple((np.asarray(question, np.int64), np.asarray(answer, np.int64)) for question, answer in asked)
        return Document(np.asarray(prompter.encode(prompt_head()) + maker.ids(made), np.int64), pairs)
    (question,) = ruler.make(task, tokens, number, prompter).questions
    text = prompter.text(question)
    before, whole = (np.asarray(prompter.encode(one), np.int64) for one in (text, text + question.answer))
    same = before == whole[: len(before)]
    begin = len(before) if same.all() else int(same.argmin())
    return Document(whole[:begin], ((whole[begin:begin], whole[begin:]),))
