"""Goes through the documents of a run, asks what has not been asked yet, and keeps every answer as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Callable

from paddle_qwen1m.evaluate import perplexity
from paddle_qwen1m.evaluate.results import Journal, Record, digest, shortened
from paddle_qwen1m.evaluate.samples import Prompter, Sample, score, score_likeliest
from paddle_qwen1m.evaluate.subject import Prompt, Reading, Subject
from paddle_qwen1m.progress import Progress


@dataclass(frozen=True)
class Job:
    """One document of a run and its `questions`; `ask` asks those of the numbers given, and makes the document then."""

    task: str
    length: int
    number: int
    questions: int
    ask: Callable[[Subject, Sequence[int]], Iterator[Record]]

    def left(self, journal: Journal) -> list[int]:
        """Numbers of questions without an answer."""
        return [one for one in range(self.questions) if (self.task, self.length, self.number, one) not in journal]


def ask(jobs: Sequence[Job], journal: Journal, open_subject: Callable[[], Subject]) -> None:
    """Asks what is left, of whom is opened where anything is; what was answered before an error stays."""
    waiting = [job for job in jobs if job.left(journal)]
    if not waiting:
        return
    subject = open_subject()
    try:
        title = f"{subject.name}, {len(waiting)} document{'s' if len(waiting) > 1 else ''}"
        with Progress(title, sum(job.length for job in waiting)) as progress:
            for job in waiting:
                for record in job.ask(subject, job.left(journal)):
                    journal.add(record)
                progress.update(job.length)
    finally:
        subject.close()


def about_sample(task: str, length: int, number: int, questions: int, make: Callable[[], Sample], by: Prompter) -> Job:
    """A job whose questions are answered by writing."""

    def run(subject: Subject, numbers: Sequence[int]) -> Iterator[Record]:
        sample = make()
        asked = [sample.questions[one] for one in numbers]
        texts = [by.text(question) for question in asked]
        prompts = [Prompt(by.encode(text), question.max_tokens) for text, question in zip(texts, asked)]
        for prompt in prompts:
            assert len(prompt.ids) + prompt.max_tokens <= length, (task, length, number)
        answers = subject.answers(prompts)
        for one, question, text, prompt, answer in zip(numbers, asked, texts, prompts, answers):
            yield Record(
                task, length, number, one, len(prompt.ids), score(answer.text, question.expected, question.any_one),
                list(question.expected), answer.text, answer.finish_reason, answer.cached_tokens, prompt.max_tokens,
                shortened(text), digest(text), dict(question.facts),
            )  # fmt: skip

    return Job(task, length, number, questions, run)


def about_reading(task: str, length: int, number: int, questions: int, make: Callable[[], Sample], by: Prompter) -> Job:
    """A job whose right answers stand in the prompt, and count where their tokens are the likeliest ones.

    A generated answer is written by dense decode, which can hide what sparse prefill lost of the question's own rows.
    """

    def run(subject: Subject, numbers: Sequence[int]) -> Iterator[Record]:
        sample = make()
        for one in numbers:
            question = sample.questions[one]
            text = by.text(question)
            asked, whole = by.encode(text), by.encode(text + question.answer)
            assert len(whole) <= length, (task, length, number)
            begin = next((place for place, pair in enumerate(zip(asked, whole)) if pair[0] != pair[1]), len(asked))
            found = subject.likeliest(Reading(whole, len(whole) - begin)).tolist()
            yield Record(
                task, length, number, one, len(whole),
                score_likeliest(found, whole[begin:], question, by.decode), [question.answer],
                by.decode(found), None, None, len(whole) - begin, shortened(text), digest(text), dict(question.facts),
            )  # fmt: skip

    return Job(task, length, number, questions, run)


def about_window(window: perplexity.Window, text: str) -> Job:
    """A job that asks how likely a window is; `text`: what it decodes to."""

    def run(subject: Subject, _numbers: Sequence[int]) -> Iterator[Record]:
        logprobs = subject.logprobs(window.ids)
        yield Record(
            perplexity.TASK, window.length, window.number, 0, len(window.ids), -float(logprobs.mean()), [], "", None,
            None, 0, shortened(text), digest(text), {"by_position": perplexity.by_position(logprobs)},
        )  # fmt: skip

    return Job(perplexity.TASK, window.length, window.number, 1, run)
