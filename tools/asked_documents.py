"""Documents of the needle task and of RULER's, with their questions and right answers, as token ids."""

from __future__ import annotations

from dataclasses import dataclass

import needle_documents
import numpy as np
from needle_documents import DocumentMaker, Encode, prompt_head, prompt_tail

from paddle_qwen1m.evaluate import needle, ruler
from paddle_qwen1m.evaluate.samples import Prompter

TASKS = (needle.TASK, *ruler.TASKS)


@dataclass(frozen=True)
class Document:
    """Token ids int64: `head`, and behind it a question and its right answer, of each question."""

    head: np.ndarray
    asked: tuple[tuple[np.ndarray, np.ndarray], ...]


def with_needles(document: needle_documents.Document, maker: DocumentMaker, encode: Encode) -> Document:
    """A document and the questions for its needles."""
    head = np.asarray(encode(prompt_head()) + maker.ids(document), np.int64)
    pairs = [(encode(prompt_tail(one)), encode(one.sentence)) for one in document.needles]
    return Document(head, tuple((np.asarray(one, np.int64), np.asarray(other, np.int64)) for one, other in pairs))


def make(task: str, tokens: int, number: int, needles: int, prompter: Prompter) -> Document:
    """The task's document of this number, whose prompt and answer take up to so many tokens; of the needle task with so
    many questions, of RULER's with one, which stands in `head`.
    """
    if task == needle.TASK:
        maker = DocumentMaker(prompter.encode)
        return with_needles(maker.make(tokens, needles, number), maker, prompter.encode)
    (question,) = ruler.make(task, tokens, number, prompter).questions
    text = prompter.text(question)
    before, whole = (np.asarray(prompter.encode(one), np.int64) for one in (text, text + question.answer))
    same = before == whole[: len(before)]
    begin = len(before) if same.all() else int(same.argmin())
    return Document(whole[:begin], ((whole[begin:begin], whole[begin:]),))
