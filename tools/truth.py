"""What sparse prefill loses with calibrated budgets, on the small checkpoints: one command, one table, GPU or CPU.

    python tools/truth.py --out DIR [--needle 16384 65536 131072 262144] [--ruler 16384] [--rounds 16] [--seconds 460]

For each length of either checkpoint it calibrates on texts of that length (`paddle-qwen1m calibrate`), then asks about
documents of other seeds: dense, with the calibrated budgets, with those that ship with the checkpoint, with the forced
keys alone, and the first two with int8 keys and values, all about the same documents. A round is a document with
--answers needles, or as many of RULER's documents, of --tasks in turn. Question and answer stand in the prompt
(needle_reading.py). Rounds are gone through one by one, all lengths and choices of each, so that the table stands on
whole ones whenever --seconds are over; DIR/truth.md has it and the commands that made the budgets, DIR/truth.png shows
it, DIR/truth.json has every answer. Its last lines are of all lengths at which dense has nine in ten answers right, and
of all. A second call with the same DIR goes on from there; --seconds 0 asks nothing and makes the table and the picture
anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import asked_documents
import numpy as np
from asked_documents import Document
from needle_reading import READS_ONCE, read_asked
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
from paddlenlp.utils.log import logger
from retrieval import BUDGETS, FORCED_ALONE, VisitedAtMost

from paddle_qwen1m import cli, ops
from paddle_qwen1m.calibrate.strategies import STRATEGIES
from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.evaluate import needle, ruler
from paddle_qwen1m.evaluate.samples import Prompter
from paddle_qwen1m.evaluate.statistics import Interval, paired_difference

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
NEEDLE, RULER = "needle", "ruler"
KNOWN_TASKS = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_3")
"""Which checkpoints/ruler answers at four times its trained length as well."""
DENSE, CALIBRATED, SHIPPED, FORCED = "dense", "calibrated", "shipped", "forced keys alone"
INT8 = "+int8"
STRONG = 0.9
"""Dense's share of right answers from which on a length counts as one that the checkpoint can read."""
WHERE_STRONG = f"where dense is at least {100 * STRONG:g}"
ALL = "all"
CHOICES = (DENSE, CALIBRATED, SHIPPED, FORCED, DENSE + INT8, CALIBRATED + INT8)
FIRST_SEED, CALIBRATION_SEED = 1000, 0
"""Of the documents that are asked about, and of the texts that budgets are found on."""
GIVEN = ("answers", "tasks", "strategy", "recall", "cost", "sparse_threshold")
"""Arguments that a run goes on with."""


class Cell(NamedTuple):
    """A checkpoint at a length."""

    checkpoint: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.checkpoint}, {self.tokens:,} tokens"


class Beside(NamedTuple):
    """A choice's share of right answers, how much it is less dense's, and the share of pairs that it visits."""

    score: float
    lost: Interval
    visited: str


class Line(NamedTuple):
    """Answers of a cell or of several: how many, dense's share of right ones, and the other choices beside it."""

    title: str
    answers: int
    dense: float
    others: dict[str, Beside]


class Truth:
    """The run in a folder: answers by cell, choice and round, each a list of 0 and 1; shares of pairs visited."""

    def __init__(self, out: Path, arguments: argparse.Namespace) -> None:
        self.path = out / "truth.json"
        self.given = {name: getattr(arguments, name) for name in GIVEN}
        self.answers: dict[str, dict[str, dict[str, list[int]]]] = {}
        self.visited: dict[str, dict[str, str]] = {}
        self.cards: list[str] = []
        if self.path.exists():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            if before["given"] != self.given:
                sys.exit(f"{self.path} is of a run with {before['given']}, not {self.given}: give another --out")
            self.answers, self.visited, self.cards = before["answers"], before["visited"], before["cards"]

    def add(self, cell: Cell, choice: str, number: int, right: list[int], visited: str) -> None:
        self.answers.setdefault(str(cell), {}).setdefault(choice, {})[str(number)] = right
        self.visited.setdefault(str(cell), {})[choice] = visited
        state = {"given": self.given, "cards": self.cards, "visited": self.visited, "answers": self.answers}
        self.path.write_text(json.dumps(state), encoding="utf-8")

    def __contains__(self, key: tuple[Cell, str, int]) -> bool:
        cell, choice, number = key
        return str(number) in self.answers.get(str(cell), {}).get(choice, {})

    def lines(self, cells: Sequence[Cell], choices: Sequence[str]) -> list[Line]:
        """One a cell, one of the cells where dense has STRONG of the answers right, and one of all, of the rounds that
        all choices have had; the first choice is dense.
        """
        found = [(cell, line) for cell in cells if (line := self._line(str(cell), [cell], choices))]
        strong = [cell for cell, line in found if line.dense >= STRONG]
        together = [self._line(WHERE_STRONG, strong, choices), self._line(ALL, cells, choices)]
        return [*(line for _, line in found), *filter(None, together)]

    def _line(self, title: str, cells: Sequence[Cell], choices: Sequence[str]) -> Line | None:
        """Of these cells together; None where there are no such rounds."""
        shared = [
            (str(cell), number)
            for cell in cells
            for number in self.answers.get(str(cell), {}).get(DENSE, {})
            if all(number in self.answers[str(cell)].get(choice, {}) for choice in choices)
        ]
        if not shared:
            return None
        right = {
            choice: [right for cell, number in shared for right in self.answers[cell][choice][number]]
            for choice in choices
        }
        rounds = [(cell, number) for cell, number in shared for _ in self.answers[cell][DENSE][number]]
        visited = self.visited[str(cells[0])] if len(cells) == 1 else {}
        others = {
            choice: Beside(
                float(np.mean(right[choice])),
                paired_difference(right[choice], right[DENSE], rounds),
                visited.get(choice, ""),
            )
            for choice in choices[1:]
        }
        return Line(title, len(rounds), float(np.mean(right[DENSE])), others)


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    choices = list(lines[0].others) if lines else []
    head = "| | answers | dense | " + " | ".join(
        f"{choice} | less dense, points [95 %] | pairs visited" for choice in choices
    )
    rows = [f"{head} |", f"|---|{'---:|' * (2 + 3 * len(choices))}"]
    for line in lines:
        row = [line.title, f"{line.answers:,}", f"{100 * line.dense:.1f}"]
        for score, lost, visited in line.others.values():
            interval = f"{100 * lost.mean:+.1f}"
            if not math.isnan(lost.low):
                interval += f" [{100 * lost.low:+.1f}, {100 * lost.high:+.1f}]"
            row += [f"{100 * score:.1f}", interval, visited]
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def picture(out: Path, lines: Sequence[Line]) -> None:
    """What each choice but the control loses beside dense, with its interval: PNG. Nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    choices = [choice for choice in lines[0].others if choice != FORCED] if lines else []
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.22 * len(lines) * (len(choices) + 1)))
    for number, choice in enumerate(choices):
        places = [(len(choices) + 1) * row + number for row in range(len(lines))]
        lost = [line.others[choice].lost for line in lines]
        means = [100 * one.mean for one in lost]
        sides = [[0.0 if math.isnan(end) else 100 * abs(end - one.mean) for end, one in zip(ends, lost)]
                 for ends in ([one.low for one in lost], [one.high for one in lost])]  # fmt: skip
        axes.errorbar(means, places, xerr=sides, fmt="o", capsize=3, label=choice)
    middle = (len(choices) - 1) / 2
    axes.set_yticks(
        [(len(choices) + 1) * row + middle for row in range(len(lines))],
        [f"{line.title}\n{line.answers:,} answers, dense {100 * line.dense:.1f} %" for line in lines],
    )
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", linewidth=1)
    axes.grid(True, axis="x", alpha=0.3)
    axes.set_xlabel("points beside dense, the same documents; 95 % intervals")
    if choices:
        axes.legend(loc="best")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


@dataclass(frozen=True)
class Asker:
    """Makes what a checkpoint is asked: rounds of so many answers, and texts to calibrate on."""

    checkpoint: str
    tasks: Sequence[str]
    answers: int
    prompter: Prompter

    @property
    def folder(self) -> Path:
        return CHECKPOINTS / self.checkpoint

    def round(self, tokens: int, number: int) -> Iterator[Document]:
        if self.checkpoint == NEEDLE:
            yield self._document(needle.TASK, tokens, FIRST_SEED + number)
            return
        for one in range(number * self.answers, (number + 1) * self.answers):
            yield self._document(self.tasks[one % len(self.tasks)], tokens, FIRST_SEED + one)

    @property
    def calibrated_on(self) -> Sequence[str]:
        """The tasks of the texts."""
        return (needle.TASK,) if self.checkpoint == NEEDLE else self.tasks

    def texts(self, tokens: int, count: int) -> Iterator[str]:
        """A document, a question and its answer each, of every task as many."""
        for task in self.calibrated_on:
            for number in range(count):
                document = self._document(task, tokens, CALIBRATION_SEED + number)
                yield self.prompter.decode(np.concatenate([document.head, *document.asked[0]]).tolist())

    def _document(self, task: str, tokens: int, number: int) -> Document:
        return asked_documents.make(task, tokens, number, self.answers, self.prompter)


class Calibration:
    """Budgets for a checkpoint and a length, found on texts of that length; `command` of paddle-qwen1m makes them."""

    def __init__(self, cell: Cell, asker: Asker, arguments: argparse.Namespace) -> None:
        name, count = f"{cell.checkpoint}_{cell.tokens}", arguments.texts * len(asker.calibrated_on)
        self.budgets = arguments.out / f"budgets_{name}.json"
        self._texts = asker.texts(cell.tokens, arguments.texts)
        self._files = [arguments.out / f"text_{name}_{number}.txt" for number in range(count)]
        self.command = [
            "calibrate", str(asker.folder), "--out", str(self.budgets), "--strategy", arguments.strategy,
            "--recall", str(arguments.recall), "--cost", str(arguments.cost),
            "--sparse-threshold", str(arguments.sparse_threshold),
            "--text", *map(str, self._files),
        ]  # fmt: skip

    def __str__(self) -> str:
        return f"paddle-qwen1m {' '.join(self.command)}"

    def run(self) -> None:
        """Unless the budgets are there."""
        if self.budgets.exists():
            return
        for file, text in zip(self._files, self._texts):
            file.write_text(text, encoding="utf-8")
        print(self, flush=True)
        if cli.main(self.command):
            sys.exit("calibrate failed")


class Subject:
    """A checkpoint with one choice of keys."""

    def __init__(self, choice: str, folder: Path, longest: int, threshold: int) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["max_position_embeddings"] = max(config["max_position_embeddings"], longest)
        name, _, int8 = choice.partition("+")
        self._choice, self._folder = name, folder
        self._shape = config["num_hidden_layers"], config["num_attention_heads"]
        self._engine = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            sparse=name != DENSE,
            sparse_threshold=threshold,
            **READS_ONCE,
            **({"kv_cache_dtype": int8} if int8 else {}),
        ).engine

    def read(self, tokens: int, documents: Sequence[Document], budgets: Path) -> tuple[list[int], str]:
        """Which answers are right, and the share of pairs visited of the documents."""
        self._engine.configure(self._engine.options, self._budgets(tokens, budgets))
        visited, right = VisitedAtMost(), list[int]()
        for document in documents:
            asked_once = len(document.asked) == 1
            answers = read_asked(self._engine, document, visited, visited if asked_once else _nobody)
            right += [int(one.right) for one in answers]
        return right, str(visited)

    def _budgets(self, tokens: int, calibrated: Path) -> SparseBudgets:
        if self._choice == FORCED:
            return SparseBudgets.uniform(*FORCED_ALONE, *self._shape)
        shipped = [start for start, name in BUDGETS.items() if start <= tokens and (self._folder / name).exists()]
        file = self._folder / BUDGETS[max(shipped)] if self._choice == SHIPPED else calibrated
        return SparseBudgets.from_file(file, *self._shape)


def _nobody(*_piece: Any) -> None:
    """Observes nothing."""


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, lengths in ((NEEDLE, [16384, 65536, 131072, 262144]), (RULER, [16384])):
        text = f"lengths for checkpoints/{name} (default: {' '.join(map(str, lengths))})"
        parser.add_argument(f"--{name}", type=int, nargs="*", default=lengths, metavar="TOKENS", help=text)
    parser.add_argument("--rounds", type=int, default=16, help="of each length (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=16, help="a round (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=list(ruler.TASKS), default=list(KNOWN_TASKS))
    parser.add_argument("--texts", type=int, default=2, help="of a task, to calibrate on (default: %(default)s)")
    parser.add_argument("--choices", nargs="*", choices=CHOICES, default=list(CHOICES), help="dense is always one")
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="output", help="default: %(default)s")
    parser.add_argument("--recall", type=float, default=0.9, help="default: %(default)s")
    parser.add_argument("--cost", type=float, default=0.07, help="default: %(default)s")
    parser.add_argument("--sparse-threshold", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=460.0, help="after calibration; then no round is begun")
    arguments = parser.parse_args(given)
    logger.set_level("ERROR")
    arguments.out.mkdir(parents=True, exist_ok=True)
    truth = Truth(arguments.out, arguments)
    card = _card()
    truth.cards = list(dict.fromkeys([*truth.cards, card]))
    print(card, flush=True)
    cells = [Cell(name, tokens) for name in (NEEDLE, RULER) for tokens in getattr(arguments, name)]
    askers = {
        name: Asker(
            name, arguments.tasks, arguments.answers, Prompter(AutoTokenizer.from_pretrained(str(CHECKPOINTS / name)))
        )
        for name in dict.fromkeys(cell.checkpoint for cell in cells)
    }
    calibrations = {cell: Calibration(cell, askers[cell.checkpoint], arguments) for cell in cells}
    for calibration in calibrations.values():
        calibration.run()
    until = time.monotonic() + arguments.seconds
    choices = [DENSE, *(choice for choice in arguments.choices if choice != DENSE)]
    subjects = {
        (name, choice): Subject(choice, asker.folder, max(getattr(arguments, name)), arguments.sparse_threshold)
        for name, asker in askers.items()
        for choice in choices
    }
    for number in range(arguments.rounds):
        for cell in cells:
            if time.monotonic() > until:
                break
            left = [choice for choice in choices if (cell, choice, number) not in truth]
            documents = list(askers[cell.checkpoint].round(cell.tokens, number)) if left else []
            for choice in left:
                started = time.monotonic()
                right, visited = subjects[cell.checkpoint, choice].read(
                    cell.tokens, documents, calibrations[cell].budgets
                )
                truth.add(cell, choice, number, right, visited)
                print(
                    f"{number}: {cell}, {choice}: {sum(right)} of {len(right)}, {visited} of the pairs, "
                    f"{time.monotonic() - started:.1f} s",
                    flush=True,
                )
    lines = truth.lines(cells, choices)
    commands = "\n".join(f"    {calibration}" for calibration in calibrations.values())
    report = f"{', '.join(truth.cards)}\n\n{table(lines)}\n\nBudgets were made by\n\n{commands}\n"
    (arguments.out / "truth.md").write_text(report, encoding="utf-8")
    picture(arguments.out / "truth.png", lines)
    print(table(lines))
    return 0


def _card() -> str:
    if not ops.on_gpu():
        return f"CPU, {os.cpu_count()} cores"
    import paddle

    return str(paddle.device.cuda.get_device_name())


if __name__ == "__main__":
    sys.exit(main())
