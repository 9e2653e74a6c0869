"""What a calibration has found so far, kept so that it can go on, and the files that it ends with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_qwen1m.calibrate.strategies import Candidates, Ints, Kept, Pairs
from paddle_qwen1m.fileio.durable import publish, temporary, write_whole
from paddle_qwen1m.streams import InputError, shown

GIVEN, LAYERS = "calibration.json", "layers.jsonl"
PROGRESS_SUFFIX = ".progress"


@dataclass(frozen=True)
class LayerResult:
    """Of each head of a layer: columns, diagonals and score as they go into the file; what the pairs before, and these,
    keep of the attention, cost and change (fields of Kept).
    """

    columns: list[int]
    diagonals: list[int]
    score: list[float]
    before: dict[str, list[float]]
    after: dict[str, list[float]]


@dataclass(frozen=True)
class Measured:
    """Of a layer: what its heads may get, and what the pairs before keep, [H]."""

    candidates: Candidates
    before: Kept

    @classmethod
    def of(cls, candidates: Candidates, before: Kept) -> Measured:
        """With numbers as they are kept, so that a run that goes on chooses as one that was never interrupted."""
        return cls.read(cls(candidates, before).line())

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Measured:
        pairs = Pairs(*(np.array(line[name], np.int64) for name in Pairs._fields))
        kept, before = (Kept(*(np.array(line[which][name]) for name in Kept._fields)) for which in ("kept", "before"))
        return cls(Candidates(pairs, np.array(line["score"]), kept), before)

    def line(self) -> dict[str, Any]:
        """What `read` reads."""
        pairs, score, kept = self.candidates
        return {
            **{name: sizes.tolist() for name, sizes in pairs._asdict().items()},
            "score": _rounded(score),
            "kept": {name: _rounded(values) for name, values in kept._asdict().items()},
            "before": {name: _rounded(values) for name, values in self.before._asdict().items()},
        }

    def chosen(self, which: Ints) -> LayerResult:
        """With this candidate of each head, [H]."""
        pairs, score, kept = self.candidates

        def of(values: npt.NDArray[Any]) -> list[Any]:
            return np.take_along_axis(values, which[None], 0)[0].tolist()

        return LayerResult(
            of(pairs.columns), of(pairs.diagonals), of(score),
            {name: values.tolist() for name, values in self.before._asdict().items()},
            {name: of(values) for name, values in kept._asdict().items()},
        )  # fmt: skip


class Progress:
    """A folder beside the output: what the run was given, its layers so far, and the texts before the next one."""

    def __init__(self, out: Path, given: Mapping[str, Any]) -> None:
        """InputError where a run with other options has left its folder there, or `out` cannot be written."""
        self.folder = out.with_name(out.name + PROGRESS_SUFFIX)
        self.layers: list[Measured] = []
        try:
            if (self.folder / GIVEN).exists():
                self._go_on(json.loads(json.dumps(given)))
                return
            if out.exists():
                raise InputError(f"--out: {shown(str(out))} is there already: move it away, or give another name")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / GIVEN, _json(given))
        except OSError as error:
            raise InputError(f"--out: cannot write {shown(str(self.folder))}: {error.strerror or error}") from error

    def _go_on(self, given: Mapping[str, Any]) -> None:
        try:
            before = dict(json.loads((self.folder / GIVEN).read_text(encoding="utf-8")))
            lines = (self.folder / LAYERS).read_bytes().splitlines() if (self.folder / LAYERS).exists() else []
            self.layers = [Measured.read(json.loads(line)) for line in lines]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"--out: {shown(str(self.folder))} is not what a run has left there: {error}; remove it to begin anew"
            ) from error
        missing = object()
        other = [name for name in {**before, **given} if before.get(name, missing) != given.get(name, missing)]
        if other:
            changes = ", ".join(f"{name} was {before.get(name)!r} and is {given.get(name)!r}" for name in other)
            raise InputError(
                f"--out: {shown(str(self.folder))} holds layers of a run with other options ({changes}): give the same "
                "ones to go on, or another --out"
            )

    def texts(self, hidden_size: int) -> list[npt.NDArray[np.float32]] | None:
        """The residual streams [n, hidden_size] before the next layer; None before the first one."""
        if not self.layers:
            return None
        files = sorted(self.folder.glob(self._pattern(len(self.layers))))
        return [np.fromfile(path, np.float32).reshape(-1, hidden_size) for path in files]

    def add(self, layer: Measured, texts: Sequence[npt.NDArray[np.float32]]) -> None:
        """Keeps what was found of the next layer, and the texts as they are behind it."""
        number = len(self.layers) + 1
        for place, text in enumerate(texts):
            path = self.folder / self._pattern(number).replace("*", f"{place:03d}")
            with open(temporary(path), "wb") as file:
                text.tofile(file)
            publish(path)
        lines = [json.dumps(one.line()) for one in (*self.layers, layer)]
        write_whole(self.folder / LAYERS, "".join(f"{line}\n" for line in lines).encode())
        self.layers.append(layer)
        for old in self.folder.glob(self._pattern(number - 1)):
            old.unlink()

    def end(self) -> None:
        """The output is written: nothing is left to go on with."""
        shutil.rmtree(self.folder)

    @staticmethod
    def _pattern(layers: int) -> str:
        return f"text-*-before-layer-{layers}.f32"


def write(out: Path, given: Mapping[str, Any], layers: Sequence[LayerResult]) -> str:
    """Writes the budgets and beside them the report; returns it, in Markdown."""
    budgets = [
        {
            str(head): ["vertical_and_slash", *entry]
            for head, entry in enumerate(zip(one.columns, one.diagonals, one.score))
        }
        for one in layers
    ]
    lines = ",\n".join(f" {json.dumps(heads)}" for heads in budgets)
    report = markdown(given, layers)
    write_whole(out, f"[\n{lines}\n]\n".encode())
    write_whole(out.with_name(f"{out.name}.report.json"), _json({**given, "layers": [asdict(one) for one in layers]}))
    write_whole(out.with_name(f"{out.name}.report.md"), report.encode())
    return report


def markdown(given: Mapping[str, Any], layers: Sequence[LayerResult]) -> str:
    """Tables of layers and of heads."""
    before, after = ([getattr(one, which) for one in layers] for which in ("before", "after"))
    rows = [
        [str(number), *(cell for kept in (old, new) for cell in _cells(kept))]
        for number, (old, new) in enumerate(zip(before, after))
    ]
    rows.append(["all", *(cell for kept in (before, after) for cell in _cells(_joined(kept)))])
    head = [
        "layer",
        *(f"{when}: {what}" for when in ("before", "after") for what in ("recall", "worst head", "keys", "change")),
    ]
    details = [
        [
            f"{number}.{head_number}", f"{one.columns[head_number]:,}", f"{one.diagonals[head_number]:,}",
            *(
                f"{kept[name][head_number]:{form}}"
                for kept in (one.before, one.after)
                for name, form in (("mean", ".3f"), ("last", ".3f"), ("cost", ".3f"), ("change", ".1e"))
            ),
        ]
        for number, one in enumerate(layers)
        for head_number in range(len(one.columns))
    ]  # fmt: skip
    columns = [f"{when}: {what}" for when in ("before", "after") for what in ("recall", "last rows", "keys", "change")]
    return (
        f"# Sparse budgets of {given['model']}\n\n"
        f"Before: {given['before']}. Recall is the share of a head's attention that is kept, `keys` the share of the "
        "keys that are visited, `last rows` the recall of the texts' last 64 rows, `change` what the "
        "missing keys change of the residual stream behind it, squared norm over squared norm; the table of layers has "
        "the lower of both recalls, and the sum of the changes.\n\n"
        f"{_table(head, rows)}\n\n{_table(['layer.head', 'columns', 'diagonals', *columns], details)}\n\n"
        f"## What was given\n\n```json\n{_json(given).decode()}```\n"
    )


def _cells(kept: Mapping[str, Sequence[float]]) -> list[str]:
    recall = np.minimum(kept["mean"], kept["last"])
    return [
        f"{recall.mean():.3f}",
        f"{recall.min():.3f}",
        f"{np.mean(kept['cost']):.1%}",
        f"{np.sum(kept['change']):.1e}",
    ]


def _joined(layers: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    return {name: [value for one in layers for value in one[name]] for name in layers[0]}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rounded(values: npt.NDArray[np.float64]) -> list[Any]:
    """In lists as deep as the array, to four digits."""
    rounded: list[Any] = np.array([float(f"{value:.4g}") for value in values.flat]).reshape(values.shape).tolist()
    return rounded


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
