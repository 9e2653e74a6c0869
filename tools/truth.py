"""What sparse prefill loses with calibrated budgets, on the needle checkpoint: one command, one table, GPU or CPU.

    python tools/truth.py --out DIR [--tokens 16384 65536 131072 262144] [--documents 16] [--seconds 460]

For each length it calibrates on texts of that length (`paddle-qwen1m calibrate`), then asks for every needle of
documents of other seeds: dense, with the calibrated budgets, with those that ship with the checkpoint, with the forced
keys alone, and the first two with int8 keys and values, all about the same documents. Question and answer stand in the
prompt (needle_reading.py). Documents are gone through one by one, all lengths and choices of each, so that the table
stands on whole documents whenever --seconds are over; DIR/truth.md has it, DIR/truth.json every answer. A second call
with the same DIR goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from needle_documents import END_OF_TURN, Document, DocumentMaker, Encode, prompt
from needle_reading import READS_ONCE, read
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
from paddlenlp.utils.log import logger
from retrieval import BUDGETS, CHECKPOINT, FORCED_ALONE, VisitedAtMost

from paddle_qwen1m import cli, ops
from paddle_qwen1m.calibrate.strategies import STRATEGIES
from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.evaluate.statistics import paired_difference

DENSE, CALIBRATED, SHIPPED, FORCED = "dense", "calibrated", "shipped", "forced keys alone"
INT8 = "+int8"
CHOICES = (DENSE, CALIBRATED, SHIPPED, FORCED, DENSE + INT8, CALIBRATED + INT8)
FIRST_SEED, CALIBRATION_SEED = 1000, 0
"""Of the documents that are asked about, and of the texts that budgets are found on."""
GIVEN = ("needles", "strategy", "recall", "cost", "sparse_threshold")
"""Arguments that a run goes on with."""


class Truth:
    """The run in a folder: answers by length, choice and document, each a list of 0 and 1; shares of pairs visited."""

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

    def add(self, tokens: int, choice: str, document: int, right: list[int], visited: str | None) -> None:
        self.answers.setdefault(str(tokens), {}).setdefault(choice, {})[str(document)] = right
        if visited is not None:
            self.visited.setdefault(str(tokens), {})[choice] = visited
        state = {"given": self.given, "cards": self.cards, "visited": self.visited, "answers": self.answers}
        self.path.write_text(json.dumps(state), encoding="utf-8")

    def __contains__(self, key: tuple[int, str, int]) -> bool:
        tokens, choice, document = key
        return str(document) in self.answers.get(str(tokens), {}).get(choice, {})

    def table(self, lengths: Sequence[int], choices: Sequence[str]) -> str:
        """Markdown: a row a length, and one of all, of the documents that all choices have read; the first is dense."""
        head = "| tokens | answers | dense | " + " | ".join(
            f"{choice} | less dense, points [95 %] | pairs visited" for choice in choices[1:]
        )
        lines = [f"{head} |", f"|{'---:|' * (3 + 3 * len(choices[1:]))}"]
        for title, chosen in [*((f"{one:,}", [one]) for one in lengths), ("all", list(lengths))]:
            shared = [
                (one, document)
                for one in chosen
                for document in self.answers.get(str(one), {}).get(DENSE, {})
                if all(document in self.answers[str(one)].get(choice, {}) for choice in choices)
            ]
            if not shared:
                continue
            scores = {
                choice: [right for one, document in shared for right in self.answers[str(one)][choice][document]]
                for choice in choices
            }
            documents = [(one, d) for one, d in shared for _ in self.answers[str(one)][DENSE][d]]
            cells = [title, f"{len(documents):,}", f"{100 * np.mean(scores[DENSE]):.1f}"]
            for choice in choices[1:]:
                lost = paired_difference(scores[choice], scores[DENSE], documents)
                interval = f"{100 * lost.mean:+.1f}"
                if not math.isnan(lost.low):
                    interval += f" [{100 * lost.low:+.1f}, {100 * lost.high:+.1f}]"
                seen = self.visited.get(str(chosen[0]), {}).get(choice, "") if len(chosen) == 1 else ""
                cells += [f"{100 * np.mean(scores[choice]):.1f}", interval, seen]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def calibrated(out: Path, tokens: int, texts: int, maker: DocumentMaker, arguments: argparse.Namespace) -> Path:
    """Budgets for a length, found on texts of that length: a document, a question and its answer each."""
    budgets = out / f"budgets_{tokens}.json"
    if budgets.exists():
        return budgets
    files = []
    for seed in range(CALIBRATION_SEED, CALIBRATION_SEED + texts):
        document = maker.make(tokens, arguments.needles, seed)
        needle = document.needles[0]
        files.append(out / f"text_{tokens}_{seed}.txt")
        files[-1].write_text(prompt(document, needle) + needle.sentence + END_OF_TURN, encoding="utf-8")
    command = [
        "calibrate", str(CHECKPOINT), "--out", str(budgets), "--strategy", arguments.strategy,
        "--recall", str(arguments.recall), "--cost", str(arguments.cost),
        "--sparse-threshold", str(arguments.sparse_threshold),
        "--text", *map(str, files),
    ]  # fmt: skip
    print(f"paddle-qwen1m {' '.join(command)}", flush=True)
    if cli.main(command):
        sys.exit("calibrate failed")
    return budgets


class Subject:
    """The checkpoint with one choice of keys."""

    def __init__(self, choice: str, config: dict[str, Any], threshold: int) -> None:
        name, _, int8 = choice.partition("+")
        self._choice, self._shape = name, (config["num_hidden_layers"], config["num_attention_heads"])
        self._engine = AutoModelForCausalLM.from_pretrained(
            str(CHECKPOINT),
            config=config,
            sparse=name != DENSE,
            sparse_threshold=threshold,
            **READS_ONCE,
            **({"kv_cache_dtype": int8} if int8 else {}),
        ).engine

    def read(self, tokens: int, document: Document, encode: Encode, budgets: Path) -> tuple[list[int], str]:
        """Which answers are right, and the share of pairs visited of the document."""
        if self._choice == FORCED:
            chosen = SparseBudgets.uniform(*FORCED_ALONE, *self._shape)
        else:
            shipped = CHECKPOINT / BUDGETS[max(start for start in BUDGETS if start <= tokens)]
            chosen = SparseBudgets.from_file(shipped if self._choice == SHIPPED else budgets, *self._shape)
        self._engine.configure(self._engine.options, chosen)
        visited = VisitedAtMost()
        answers = read(self._engine, [document], encode, visited, lambda *_piece: None)
        return [int(one.right) for one in answers], str(visited)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="*", default=[16384, 65536, 131072, 262144])
    parser.add_argument("--documents", type=int, default=16, help="of each length (default: %(default)s)")
    parser.add_argument("--needles", type=int, default=16, help="answers a document (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=2, help="to calibrate on, of each length (default: %(default)s)")
    parser.add_argument("--choices", nargs="*", choices=CHOICES, default=list(CHOICES), help="dense is always one")
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="least", help="default: %(default)s")
    parser.add_argument("--recall", type=float, default=0.9, help="default: %(default)s")
    parser.add_argument("--cost", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--sparse-threshold", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=460.0, help="after calibration; then no document is begun")
    arguments = parser.parse_args()
    logger.set_level("ERROR")
    arguments.out.mkdir(parents=True, exist_ok=True)
    truth = Truth(arguments.out, arguments)
    card = _card()
    truth.cards = list(dict.fromkeys([*truth.cards, card]))
    print(card, flush=True)
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT))
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = max(config["max_position_embeddings"], *arguments.tokens)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    maker = DocumentMaker(encode)
    budgets = {one: calibrated(arguments.out, one, arguments.texts, maker, arguments) for one in arguments.tokens}
    until = time.monotonic() + arguments.seconds
    choices = [DENSE, *(choice for choice in arguments.choices if choice != DENSE)]
    subjects = {choice: Subject(choice, config, arguments.sparse_threshold) for choice in choices}
    for number in range(arguments.documents):
        for tokens in arguments.tokens:
            if time.monotonic() > until:
                break
            document = maker.make(tokens, arguments.needles, FIRST_SEED + number)
            for choice, subject in subjects.items():
                if (tokens, choice, number) not in truth:
                    started = time.monotonic()
                    right, visited = subject.read(tokens, document, encode, budgets[tokens])
                    truth.add(tokens, choice, number, right, visited)
                    seconds = time.monotonic() - started
                    print(
                        f"{number}: {tokens:,} tokens, {choice}: {sum(right)} of {len(right)}, {visited} of the pairs, "
                        f"{seconds:.1f} s",
                        flush=True,
                    )
    table = truth.table(arguments.tokens, choices)
    (arguments.out / "truth.md").write_text(f"{', '.join(truth.cards)}\n\n{table}\n", encoding="utf-8")
    print(table)
    return 0


def _card() -> str:
    if not ops.on_gpu():
        return f"CPU, {os.cpu_count()} cores"
    import paddle

    return str(paddle.device.cuda.get_device_name())


if __name__ == "__main__":
    sys.exit(main())
