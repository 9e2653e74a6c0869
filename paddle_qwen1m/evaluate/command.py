"""`paddle-qwen1m eval`: reads what the flags name, asks each configuration in its turn, and writes what came of it."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from paddle_qwen1m.evaluate import needle, perplexity, qa, report, ruler
from paddle_qwen1m.evaluate.asking import Job, about_reading, about_sample, about_window, ask
from paddle_qwen1m.evaluate.results import Journal, Record, digest, tables, write_harness_files
from paddle_qwen1m.evaluate.samples import Prompter, Sample
from paddle_qwen1m.evaluate.subject import Endpoint, InProcess, Subject, configuration
from paddle_qwen1m.evaluate.words import filler, prose
from paddle_qwen1m.options import read_llm_options
from paddle_qwen1m.paddlenlp import serving
from paddle_qwen1m.server.flags import model_options
from paddle_qwen1m.streams import InputError, file_argument, name_argument, note, read_document, say, shown
from paddle_qwen1m.text import decoder

HAYSTACKS: dict[str, ruler.Haystack] = {"prose": prose, "filler": filler}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
QuestionData = dict[str, tuple[qa.Collection, str]]
NO_EFFECT = ("max_model_len", "tokenizer")
"""Options that answers do not depend on, or that the tokenizer's name stands for."""


def evaluate(arguments: argparse.Namespace) -> int:
    """Asks and writes; 0. InputError for what cannot be used, SubjectError where an endpoint fails."""
    name_argument("MODEL", arguments.model)
    file_argument("--out", arguments.out)
    configurations = _configurations(arguments)
    try:
        options = read_llm_options(model_options(arguments))
        identity = None if arguments.base_url is not None else serving.identify(arguments.model, options)
        _check_lengths(arguments, options, identity)
        tokenizer = serving.load_tokenizer(options.get("tokenizer") or arguments.model, options)
        text = _own_text(arguments)
        data = _question_data(arguments)
        jobs = _jobs(arguments, tokenizer, text, data)
        given = _given(arguments, options, identity, text, data)
    except (FileNotFoundError, NotADirectoryError, PermissionError, TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    _tell_what_is_dense(arguments, configurations, given)
    out, runs = Path(arguments.out), dict[str, list[Record]]()
    for name in configurations:
        with Journal(out / name, given) as journal:
            try:
                ask(jobs, journal, partial(_open, arguments, name, options))
            except BaseException:
                if journal.records:
                    count = len(journal.records)
                    kept = "1 answer is kept" if count == 1 else f"{count:,} answers are kept"
                    note(f"{kept} in {shown(str(journal.folder))}: the same command goes on from there")
                raise
            order = {(job.task, job.length, job.number): place for place, job in enumerate(jobs)}
            runs[name] = sorted(journal.records.values(), key=lambda one: (order[one.document], one.question))
    _write(out, arguments, given, runs)
    return 0


def _configurations(arguments: argparse.Namespace) -> list[str]:
    if arguments.base_url is not None:
        return [Endpoint.name]
    names = list(dict.fromkeys(name.strip() for name in arguments.compare.split(",")))
    try:
        for name in names:
            configuration(name)
    except ValueError as error:
        raise InputError(str(error)) from error
    return names


def _own_text(arguments: argparse.Namespace) -> str | None:
    """What the user gave to read, perplexity's text or a haystack; None where the package's own words do. It is read
    once: standard input has nothing more to say then.
    """
    if arguments.kind == perplexity.TASK:
        return read_document(arguments.text, "--text")
    return None if arguments.haystack in HAYSTACKS else read_document(arguments.haystack, "--haystack")


def _question_data(arguments: argparse.Namespace) -> QuestionData:
    """What --qa-data names, by the task it is for, with a digest of each file."""
    found: QuestionData = {}
    for name in getattr(arguments, "qa_data", None) or ():
        text = read_document(name, "--qa-data")
        try:
            collection = qa.read(text)
        except ValueError as error:
            raise InputError(f"--qa-data: {shown(name)} is {error}") from error
        if collection.task in found:
            raise InputError(f"--qa-data: {shown(name)} is the second file of {qa.FORMATS[collection.task]}: give one")
        found[collection.task] = collection, digest(text)
    return found


def _jobs(arguments: argparse.Namespace, tokenizer: Any, text: str | None, data: QuestionData) -> list[Job]:
    """What is asked of every configuration, shortest documents first; text: _own_text, data: _question_data. Raises
    TooShort before any work is done.
    """
    if arguments.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {arguments.samples}")
    lengths = sorted(set(arguments.lengths))
    if arguments.kind == perplexity.TASK:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        decode = decoder(tokenizer, skip_special_tokens=False)
        cut = [one for length in lengths for one in perplexity.windows(ids, length, arguments.samples)]
        return [about_window(one, decode(list(one.ids))) for one in cut]
    prompter = Prompter(tokenizer, raw=arguments.raw)
    source = HAYSTACKS[arguments.haystack] if text is None else _haystack(text)
    numbers = range(arguments.samples)
    about = about_sample
    if arguments.score == "logits":
        if arguments.base_url is not None:
            raise ValueError("--score logits needs a model in process: leave out --base-url")
        about = about_reading
    common: dict[str, Any] = {"seed": arguments.seed, "haystack": source}
    if arguments.kind == needle.TASK:
        depths = len(needle.depths(arguments.depths))
        needle.make(lengths[0], 0, prompter, depths, **common)
        return [
            about(
                needle.TASK, length, number, depths,
                partial(needle.make, length, number, prompter, depths, **common), prompter,
            )
            for length in lengths
            for number in numbers
        ]  # fmt: skip
    tasks = _tasks(arguments, data)
    kinds: dict[tuple[str, int], ruler.Task] = {
        (task, number): data[task][0].about(number, arguments.seed) if task in data else ruler.TASKS[task]
        for task in tasks
        for number in numbers
    }

    def make(task: str, length: int, number: int) -> Sample:
        return ruler.make(task, length, number, prompter, kind=kinds[task, number], **common)

    for task in tasks:
        for number in numbers if task in data else [0]:  # data have passages that differ in length
            make(task, lengths[0], number)
        if task in data:  # and an end
            make(task, lengths[-1], 0)
    return [
        about(task, length, number, 1, partial(make, task, length, number), prompter)
        for length in lengths
        for task in tasks
        for number in numbers
    ]


def _tasks(arguments: argparse.Namespace, data: QuestionData) -> list[str]:
    tasks = list(dict.fromkeys(arguments.tasks or [*ruler.TASKS, *data]))
    for task in tasks:
        if task in qa.FORMATS and task not in data:
            raise ValueError(f"--tasks: {task} needs a file of {qa.FORMATS[task]}: give --qa-data FILE")
        if task not in ruler.TASKS and task not in qa.FORMATS:
            raise ValueError(f"--tasks: there is no {task!r}, but {', '.join([*ruler.TASKS, *qa.FORMATS])}")
    unused = [task for task in data if task not in tasks]
    if unused:
        raise ValueError(f"--qa-data: a file of {qa.FORMATS[unused[0]]} is for {unused[0]}, which is not in --tasks")
    return tasks


def _haystack(text: str) -> ruler.Haystack:
    """The sentences of a text, again and again."""
    sentences = [one for one in SENTENCE_END.split(text) if one.strip()]

    def own(_rng: np.random.Generator) -> Iterator[str]:
        return cycle(sentences)

    return own


def _check_lengths(arguments: argparse.Namespace, options: dict[str, Any], identity: serving.Identity | None) -> None:
    """Makes room for the longest document. ValueError where the model, or the user's own limit, has not enough."""
    needed = max(arguments.lengths) + (arguments.kind == perplexity.TASK)  # which asks for a token it has no use for
    if identity is not None and needed > identity.longest:
        raise ValueError(
            f"--lengths: {needed:,} tokens are more than {arguments.model} can have, max_position_embeddings "
            f"{identity.longest:,}"
        )
    limit = options.setdefault("max_model_len", needed)
    if 0 < limit < needed:
        raise ValueError(f"--lengths: {needed:,} tokens are more than --max-model-len, {limit:,}")


def _given(
    arguments: argparse.Namespace,
    options: dict[str, Any],
    identity: serving.Identity | None,
    text: str | None,
    data: QuestionData,
) -> dict[str, Any]:
    """All that answers depend on, but for the configuration; text: _own_text, data: _question_data."""
    given: dict[str, Any] = {
        "kind": arguments.kind,
        "model": arguments.model,
        "tokenizer": options.get("tokenizer") or arguments.model,
        "lengths": sorted(set(arguments.lengths)),
        "samples": arguments.samples,
    }
    if text is not None:
        given["text_sha256" if arguments.kind == perplexity.TASK else "haystack_sha256"] = digest(text)
    if arguments.kind != perplexity.TASK:
        given |= {
            "seed": arguments.seed,
            "raw": arguments.raw,
            "score": arguments.score,
            "haystack": arguments.haystack,
        }
    if arguments.kind == needle.TASK:
        given["depths"] = arguments.depths
    if arguments.kind == "ruler":
        given["tasks"] = _tasks(arguments, data)
        if data:
            given["qa_data_sha256"] = {task: of_file for task, (_, of_file) in data.items()}
    if identity is None:
        given |= {"base_url": arguments.base_url, "served_model": arguments.served_model}
    else:
        given["options"] = {name: str(value) for name, value in sorted(options.items()) if name not in NO_EFFECT}
        given |= asdict(identity)
    return given


def _tell_what_is_dense(arguments: argparse.Namespace, configurations: Sequence[str], given: dict[str, Any]) -> None:
    """A line where `sparse` would be dense at some lengths, or at all."""
    if not any("sparse" in name.split("+") for name in configurations):
        return
    above = given["sparse_above"]
    if above is None:
        note(
            f"note: {arguments.model} has no sparse budgets: `sparse` is dense here; give --sparse-budgets FILE, or "
            "find some with `paddle-qwen1m calibrate`"
        )
        return
    dense = [f"{length:,}" for length in given["lengths"] if length <= above]
    if dense:
        note(f"note: `sparse` is dense at {', '.join(dense)} tokens: it begins above --sparse-threshold, {above:,}")


def _open(arguments: argparse.Namespace, name: str, options: dict[str, Any]) -> Subject:
    if arguments.base_url is not None:
        try:
            return Endpoint(arguments.base_url, arguments.served_model)
        except ModuleNotFoundError as error:
            raise InputError(f"--base-url needs {error.name}: pip install 'paddle-qwen1m[eval]'") from error
    try:
        return InProcess(arguments.model, name, options)
    except (FileNotFoundError, NotADirectoryError, PermissionError, TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def _write(out: Path, arguments: argparse.Namespace, given: dict[str, Any], runs: dict[str, list[Record]]) -> None:
    date = time.strftime("%Y-%m-%dT%H-%M-%S")
    for name, records in runs.items():
        write_harness_files(out / name, arguments.model, given, records, date)
    markdown = tables(runs)
    title = f"{arguments.kind}: {Path(arguments.model).name}"
    (out / "results.md").write_text(f"# {title}\n\n{markdown}", encoding="utf-8")
    pictures = report.pictures(runs)
    if not pictures:
        note("note: there are no pictures without matplotlib: pip install 'paddle-qwen1m[eval]'")
    for file, content in pictures.items():
        (out / file).write_bytes(content)
    (out / "report.html").write_text(report.page(title, given, markdown, pictures), encoding="utf-8")
    say(markdown.rstrip())
    say(f"\n{shown(str(out / 'report.html'))}")
