"""What was asked and answered: a journal that a run goes on from, lm-eval's files, tables in Markdown.

A folder a configuration: `evaluation.json`, what the run was given, `journal.jsonl`, a line an answer, written as it
comes, and at the end `results_*.json` and `samples_*.jsonl` as lm-evaluation-harness lays them out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from paddle_qwen1m import __version__
from paddle_qwen1m.evaluate import perplexity, statistics
from paddle_qwen1m.evaluate.statistics import paired_difference, standard_error
from paddle_qwen1m.streams import InputError, shown

GIVEN, JOURNAL = "evaluation.json", "journal.jsonl"
KEPT_CHARACTERS = 1000
"""Of either end of a long prompt in samples_*.jsonl: the document can be made again."""
Key = tuple[str, int, int, int]


@dataclass(frozen=True)
class Record:
    """One question and what became of it.

    sample: the document's number; question: its number there. tokens: of the prompt. score: the share of `expected`
    found, or the mean of -log p in nats. prompt: shortened; prompt_hash: of all of it.
    """

    task: str
    length: int
    sample: int
    question: int
    tokens: int
    score: float
    expected: list[str]
    response: str
    finish_reason: str | None
    cached_tokens: int | None
    max_tokens: int
    prompt: str
    prompt_hash: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.task, self.length, self.sample, self.question

    @property
    def document(self) -> tuple[str, int, int]:
        return self.task, self.length, self.sample


class Journal:
    """The answers of one configuration so far, in a folder."""

    def __init__(self, folder: Path, given: Mapping[str, Any]) -> None:
        """given: everything that answers depend on. InputError where the folder's run was given something else."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check(json.loads(json.dumps(given)))
            self.records = self._read()
            self._file = open(folder / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise InputError(f"--out: cannot write {shown(str(folder))}: {error.strerror or error}") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def __contains__(self, key: Key) -> bool:
        return key in self.records

    def add(self, record: Record) -> None:
        """Keeps an answer, at once and whatever happens next."""
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record.key] = record

    def _check(self, given: dict[str, Any]) -> None:
        path = self.folder / GIVEN
        if not path.exists():
            path.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
            return
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise InputError(f"--out: {shown(str(path))} is not what a run has left there: {error}") from error
        missing = object()
        other = [name for name in {**before, **given} if before.get(name, missing) != given.get(name, missing)]
        if other:
            changes = ", ".join(f"{name} was {before.get(name)!r} and is {given.get(name)!r}" for name in other)
            raise InputError(
                f"--out: {shown(str(self.folder))} holds answers of a run with other options ({changes}): give the "
                "same ones to go on, or another folder"
            )

    def _read(self) -> dict[Key, Record]:
        """Whole lines; of one that was being written when the run ended, nothing stays."""
        path = self.folder / JOURNAL
        if not path.exists():
            return {}
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with open(path, "r+b") as file:
                file.truncate(len(whole))
        try:
            records = [Record(**json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError) as error:
            raise InputError(f"--out: {shown(str(path))} is damaged: {error}") from error
        return {record.key: record for record in records}


def shortened(text: str) -> str:
    """The text without its middle, where it is long."""
    if len(text) <= 3 * KEPT_CHARACTERS:
        return text
    left_out = len(text) - 2 * KEPT_CHARACTERS
    return f"{text[:KEPT_CHARACTERS]}[... {left_out:,} characters ...]{text[-KEPT_CHARACTERS:]}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def grouped(records: Iterable[Record]) -> dict[str, dict[int, list[Record]]]:
    """By task, then length, both in the order of the run's options."""
    groups: dict[str, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record.task][record.length].append(record)
    return {task: dict(lengths) for task, lengths in groups.items()}


def mean(records: Sequence[Record]) -> float:
    return sum(record.score for record in records) / len(records)


def positions(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of windows of one length: the perplexity of each range of positions."""
    ranges: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        for one in record.facts["by_position"]:
            ranges[one["begin"], one["end"]].append(one)
    return [
        {
            "begin": begin,
            "end": end,
            "perplexity": perplexity.perplexity(sum(one["nats"] for one in ones), sum(one["tokens"] for one in ones)),
        }
        for (begin, end), ones in ranges.items()
    ]


def write_harness_files(
    folder: Path, model: str, given: Mapping[str, Any], records: Sequence[Record], date: str
) -> Path:
    """results_DATE.json and samples_TASK_DATE.jsonl; returns the first. Those of earlier calls go."""
    for old in (*folder.glob("results_*.json"), *folder.glob("samples_*.jsonl")):
        old.unlink()
    groups = grouped(records)
    results: dict[str, dict[str, Any]] = {}
    for task, lengths in groups.items():
        results[task] = {"alias": task}
        for length, ones in lengths.items():
            nats = mean(ones)
            value = perplexity.perplexity(nats, 1) if task == perplexity.TASK else nats
            results[task][f"{length},none"] = value
            error = standard_error([one.score for one in ones], [one.document for one in ones])
            results[task][f"{length}_stderr,none"] = "N/A" if math.isnan(error) or task == perplexity.TASK else error
            if task == perplexity.TASK:
                results[task][f"{length}_by_position"] = positions(ones)
        with open(folder / f"samples_{task}_{date}.jsonl", "w", encoding="utf-8") as file:
            for number, one in enumerate(one for ones in lengths.values() for one in ones):
                file.write(json.dumps(_sample(number, one)) + "\n")
    path = folder / f"results_{date}.json"
    content = {
        "results": results,
        "groups": {},
        "configs": {task: {"task": task, "num_fewshot": 0, "metadata": dict(given)} for task in groups},
        "versions": {task: __version__ for task in groups},
        "n-shot": {task: 0 for task in groups},
        "higher_is_better": {
            task: {str(length): task != perplexity.TASK for length in lengths} for task, lengths in groups.items()
        },
        "n-samples": {
            task: {"original": count, "effective": count}
            for task, count in ((task, sum(map(len, lengths.values()))) for task, lengths in groups.items())
        },
        "config": {"model": "paddle_qwen1m", "model_args": dict(given)},
        "model_name": model,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _sample(number: int, record: Record) -> dict[str, Any]:
    metric = str(record.length)
    doc = {
        "task": record.task,
        "max_length": record.length,
        "sample": record.sample,
        "question": record.question,
        "length": record.tokens,
        "outputs": record.expected,
        "cached_tokens": record.cached_tokens,
        **record.facts,
    }
    return {
        "doc_id": number,
        "doc": doc,
        "target": record.expected,
        "arguments": {
            "gen_args_0": {
                "arg_0": record.prompt,
                "arg_1": {"do_sample": False, "temperature": 0.0, "max_gen_toks": record.max_tokens, "until": []},
            }
        },
        "resps": [[record.response]],
        "filtered_resps": [record.response],
        "filter": "none",
        "metrics": [metric],
        "doc_hash": digest(json.dumps(doc, sort_keys=True)),
        "prompt_hash": record.prompt_hash,
        "target_hash": digest(json.dumps(record.expected)),
        metric: record.score,
    }


def tables(runs: Mapping[str, Sequence[Record]]) -> str:
    """Markdown of every configuration's records: a table a task by length, and the differences from the first one."""
    parts = []
    configurations = list(runs)
    tasks = {name: grouped(records) for name, records in runs.items()}
    first = tasks[configurations[0]]
    lengths = sorted({length for of_task in first.values() for length in of_task})
    is_perplexity = perplexity.TASK in first
    for name in configurations:
        rows = []
        for task, of_task in tasks[name].items():
            means = {length: mean(ones) for length, ones in of_task.items()}
            rows.append([task, *(_shown(means.get(length), is_perplexity) for length in lengths)])
        if len(rows) > 1:
            rows.append(["mean", *(_shown(_mean_of_tasks(tasks[name], length), False) for length in lengths)])
        kind = "perplexity" if is_perplexity else "score, of 100"
        parts.append(f"### {name}: {kind}\n\n" + _table(["task", *(f"{length:,}" for length in lengths)], rows))
        if is_perplexity:
            parts += [_position_table(name, of_task) for of_task in tasks[name].values()]
    for name in configurations[1:]:
        rows = _differences(tasks[name], first, lengths)
        unit = "nats a token" if is_perplexity else "points of 100"
        head = ["task", *(f"{length:,}" for length in lengths), "all lengths"]
        about = f"{unit}, with 95 % interval from {statistics.FEWEST} documents on"
        parts.append(f"### {name} less {configurations[0]}: {about}\n\n" + _table(head, rows))
    return "\n\n".join(parts) + "\n"


def _differences(
    one: Mapping[str, Mapping[int, Sequence[Record]]],
    other: Mapping[str, Mapping[int, Sequence[Record]]],
    lengths: Sequence[int],
) -> list[list[str]]:
    """A row a task, and one of all; questions that only one configuration has been asked are left out."""
    rows = []
    for title, chosen in [*((task, [task]) for task in one), *([("all", list(one))] if len(one) > 1 else [])]:
        pairs = {
            length: [
                pair
                for task in chosen
                for pair in _paired(one[task].get(length, ()), other.get(task, {}).get(length, ()))
            ]
            for length in lengths
        }
        rows.append([title, *map(_difference, pairs.values()), _difference([*chain(*pairs.values())])])
    return rows


def _paired(one: Sequence[Record], other: Sequence[Record]) -> list[tuple[Record, Record]]:
    by_key = {record.key: record for record in other}
    return [(record, by_key[record.key]) for record in one if record.key in by_key]


def _difference(pairs: Sequence[tuple[Record, Record]]) -> str:
    if not pairs:
        return ""
    in_nats = pairs[0][0].task == perplexity.TASK
    interval = paired_difference(
        [mine.score for mine, _ in pairs],
        [theirs.score for _, theirs in pairs],
        [mine.document for mine, _ in pairs],
        width=None if in_nats else 1.0,
    )
    scale, digits = (1, 4) if in_nats else (100, 1)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def _mean_of_tasks(tasks: Mapping[str, Mapping[int, Sequence[Record]]], length: int) -> float | None:
    means = [mean(lengths[length]) for lengths in tasks.values() if length in lengths]
    return sum(means) / len(means) if means else None


def _position_table(name: str, lengths: Mapping[int, Sequence[Record]]) -> str:
    by_length = {length: positions(ones) for length, ones in lengths.items()}
    ranges = sorted({(one["begin"], one["end"]) for ones in by_length.values() for one in ones})
    rows = []
    for begin, end in ranges:
        found = [
            next((_rounded(one["perplexity"]) for one in ones if (one["begin"], one["end"]) == (begin, end)), "")
            for ones in by_length.values()
        ]
        rows.append([f"{begin:,} to {end - 1:,}", *found])
    return f"### {name}: perplexity by position\n\n" + _table(
        ["positions", *(f"{length:,}" for length in by_length)], rows
    )


def _shown(value: float | None, is_perplexity: bool) -> str:
    if value is None:
        return ""
    return _rounded(perplexity.perplexity(value, 1)) if is_perplexity else f"{100 * value:.1f}"


def _rounded(value: float) -> str:
    """Of a perplexity: three places, or of a large one four digits."""
    return f"{value:.3f}" if value < 10_000 else f"{value:.3e}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
