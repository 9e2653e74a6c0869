"""Which columns and diagonals a head attends to, and how many (sections 1 and 5 of the specification)."""

from __future__ import annotations

import math

import numpy as np

from .arrays import Array, wide
from .dense import read_pages, stages_of

SINK_COLUMNS = 30
LOCAL_DIAGONALS = 100
PADDING = np.iinfo(np.int32).max


def probe_scores(q: Array, key_cache: Array, block_table: Array, end: int, chunk_len: int, scale: float) -> Array:
    """Softmax rows A [H, lq, M] of the last lq queries before `end`, from critical rotations [V, lq, H, D]."""
    rows = np.arange(end - q.shape[1], end)
    group = q.shape[2] // key_cache.shape[2]
    logits = []
    for stage, start, stop in reversed(stages_of(rows[0], end, chunk_len)):
        keys = np.repeat(read_pages(key_cache, block_table, start, stop), group, axis=1)
        logits.append(scale * (wide(q[stage]).transpose(1, 0, 2) @ keys.transpose(1, 2, 0)))
    masked = np.where(np.arange(end) <= rows[:, None], np.concatenate(logits, axis=-1), -np.inf)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
    result: Array = weights / weights.sum(axis=-1, keepdims=True)
    return result


def diagonal_sums(scores: Array) -> Array:
    """slash [H, M] of A [H, lq, M]: entry t sums the diagonal that hits column t on the last row (section 5.3)."""
    heads, rows, columns = scores.shape
    slash = np.zeros((heads, columns))
    for a in range(rows):
        shift = rows - 1 - a
        slash[:, shift:] += scores[:, a, : columns - shift]
    return slash


def dca_probe(
    q: Array, key_cache: Array, block_table: Array, end: int, chunk_len: int, scale: float
) -> tuple[Array, Array]:
    """Column and diagonal sums (vertical [H, M], slash [H, M]) of the probe rows, nothing forced yet."""
    scores = probe_scores(q, key_cache, block_table, end, chunk_len, scale)
    return scores.sum(axis=1), diagonal_sums(scores)


def select_critical(
    vertical: Array,
    slash: Array,
    vertical_sizes: Array,
    slash_sizes: Array,
    max_vertical: int,
    max_slash: int,
) -> tuple[Array, Array]:
    """Best columns and diagonals of every head, ascending, padded with INT32_MAX (sections 5.2 to 5.4).

    The first 30 columns and the last 100 diagonals come first; among equal scores the lower index wins.
    """
    length = vertical.shape[1]
    columns = np.array(vertical, dtype=np.float64)
    columns[:, :SINK_COLUMNS] = np.inf
    diagonals = np.array(slash, dtype=np.float64)
    diagonals[:, max(length - LOCAL_DIAGONALS, 0) :] = np.inf
    return (
        _top(columns, vertical_sizes, min(max_vertical, length)),
        _top(diagonals, slash_sizes, min(max_slash, length)),
    )


def _top(scores: Array, sizes: Array, width: int) -> Array:
    chosen = np.full((scores.shape[0], width), PADDING, dtype=np.int32)
    for head, size in enumerate(np.asarray(sizes).tolist()):
        best = np.argsort(-scores[head], kind="stable")[: min(size, width)]
        chosen[head, : len(best)] = np.sort(best)
    return chosen


def effective_vertical_size(size: int) -> int:
    """A column budget of exactly 30 would be spent on the forced columns, and counts as 130 (section 1.3)."""
    return 130 if size == SINK_COLUMNS else size


def refine_budget(base: tuple[int, int], recall: float) -> tuple[int, int]:
    """(vertical, slash) budget of a head from its base pair and measured attention recall (section 1.4)."""
    buckets = ((0.9, 0), (0.8, 2048), (0.7, 4096), (0.6, 8192), (-math.inf, 12244))
    increment = next(increment for threshold, increment in buckets if recall >= threshold)
    return base[0] + increment, base[1] + increment
