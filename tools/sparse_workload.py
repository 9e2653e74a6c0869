"""Columns and diagonals of a sparse prefill, the same for every kernel that is timed on them.

A head's diagonals are the nearest ones and runs of adjacent offsets that start anywhere, not at multiples of a tile:
real heads concentrate near the diagonal and in bands. Its columns are uniform over the keys that every row may see.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NO_COLUMN, NO_OFFSET = np.iinfo(np.int32).max, np.iinfo(np.int32).min


class Workload(NamedTuple):
    """`rows` query rows that end at key `keys`; `budgets`: "columns+diagonals" or "published:LAYER"; `run` adjacent."""

    rows: int
    keys: int
    budgets: str
    run: int

    def __str__(self) -> str:
        return f"{self.keys:,} keys, {self.budgets}, runs of {self.run}"


WORKLOADS = (
    Workload(32768, 131072, "1000+6144", 64),
    Workload(32768, 524288, "1000+6144", 64),
    Workload(32768, 1015808, "1000+6144", 64),
    Workload(32768, 1015808, "1000+6144", 8),
    Workload(32768, 1015808, "1000+20480", 64),
    Workload(32768, 1015808, "published:21", 64),
)


class Lines(NamedTuple):
    """columns int32 [heads, most columns], ascending, padded with 2^31 - 1; offsets int32 [heads, most offsets] of
    diagonals, descending, padded with -2^31: row i of the rows sees key i + keys - rows - offset."""

    columns: np.ndarray
    offsets: np.ndarray
    column_counts: np.ndarray
    offset_counts: np.ndarray

    def slashes(self, keys: int) -> np.ndarray:
        """The diagonals by the key they meet on a last row that sees `keys` keys, ascending, padded with 2^31 - 1."""
        met = np.full_like(self.offsets, NO_COLUMN)
        for row, offsets, count in zip(met, self.offsets, self.offset_counts):
            first = np.count_nonzero(offsets[:count] >= keys)
            row[: count - first] = keys - 1 - offsets[first:count]
        return met


def budgets_of(name: str, heads: int) -> list[tuple[int, int]]:
    """(columns, diagonals) of each head."""
    if not name.startswith("published:"):
        vertical, slash = map(int, name.split("+"))
        return [(vertical, slash)] * heads
    model = {40: "14B", 28: "7B"}[heads]
    layers = json.loads((CONFIGS / f"sparse_attention_config_{model}.json").read_text(encoding="utf-8"))
    layer = layers[int(name.partition(":")[2])]
    sizes = [layer[str(head)][1:3] for head in range(heads)]
    return [(130 if vertical == 30 else vertical, slash) for vertical, slash in sizes]


def make(workload: Workload, budgets: Sequence[tuple[int, int]], seed: int | Sequence[int] = 0) -> Lines:
    """As many of both as each head's (columns, diagonals) say, and there are."""
    rng = np.random.default_rng(seed)
    near = 4096 if max(slash for _, slash in budgets) > 20000 and len(set(budgets)) == 1 else 2048
    counts = np.minimum(np.asarray(budgets, np.int32), workload.keys)
    column_counts, offset_counts = counts.T.copy()
    columns = np.full((len(budgets), column_counts.max()), NO_COLUMN, np.int32)
    offsets = np.full((len(budgets), offset_counts.max()), NO_OFFSET, np.int32)
    shared_keys = workload.keys - workload.rows
    for head, (vertical, slash) in enumerate(counts):
        columns[head, :vertical] = _spread(rng, 0, shared_keys, vertical, 1)
        nearest = min(near, slash)
        far = _spread(rng, nearest, workload.keys, slash - nearest, workload.run)
        offsets[head, :slash] = np.concatenate([np.arange(nearest), far])[::-1]
    return Lines(columns, offsets, column_counts, offset_counts)


def _spread(rng: np.random.Generator, begin: int, end: int, count: int, run: int) -> np.ndarray:
    """`count` numbers from begin on, ascending, before `end` where so many are: runs of `run`, which start anywhere."""
    runs = -(-count // run)
    gaps = np.sort(rng.integers(0, max(0, end - begin - runs * run) + 1, runs))
    starts = begin + gaps + run * np.arange(runs)
    return (starts[:, None] + np.arange(run)).ravel()[:count]
