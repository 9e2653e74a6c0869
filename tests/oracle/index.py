"""A selection as key blocks and single keys of every block of rows (sections 5.5 and 6 of the specification)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .arrays import Array
from .dense import INTER, INTRA, SUCC, StageKeys, stages_of
from .selection import PADDING


class SparseIndex(NamedTuple):
    """What every head visits in every block of rows of one piece, as lists: blocks [H, R, *] and columns [H, R, *] in
    the order inter, succ, intra; counts [H, R, 6] of blocks of intra, succ, inter and columns of intra, succ, inter.
    """

    blocks: Array
    columns: Array
    counts: Array


class IndexRow(NamedTuple):
    """What one block of query rows visits in one stage: first keys of key blocks, and single keys, stage-local."""

    blocks: list[int]
    columns: list[int]


def fallback(length: int) -> Array:
    """Up to five evenly spaced indices that stand in for an empty list of a stage of `length` keys (section 5.5)."""
    return np.arange(0, length, int(max(1, length / 5)))[:5]


def split_stages(
    columns: Array, slashes: Array, begin: int, rows: int, chunk_len: int
) -> list[tuple[StageKeys, Array, Array]]:
    """For each stage: its keys, its local columns (ascending) and its local offsets (descending), before fallbacks.

    columns and slashes are one head's absolute selection without padding (section 5.5).
    """
    chunk = begin // chunk_len * chunk_len
    keys_seen = begin + rows
    parts = []
    for part in stages_of(begin, keys_seen, chunk_len):
        inside = columns[(columns >= part.start) & (columns < part.end)]
        if part.stage == INTRA:
            offsets = (keys_seen - 1) - slashes[slashes >= chunk]
        elif part.stage == SUCC:
            reaches = (slashes >= chunk - chunk_len) & (slashes < chunk + rows)
            offsets = (chunk + rows - 1) - slashes[reaches]
        else:
            offsets = (chunk - chunk_len + rows - 1) - slashes[slashes < chunk - chunk_len + rows]
        parts.append((part, np.sort(inside - part.start), np.sort(offsets)[::-1]))
    return parts


def index_rows(
    rows: int, keys: int, columns: Sequence[int], offsets: Sequence[int], causal: bool, block: int
) -> list[IndexRow]:
    """Section 6 for one head and stage: ascending columns and descending offsets, merged for every block of rows."""
    return [_merge_row(start, rows, keys, columns, offsets, causal, block) for start in range(0, rows, block)]


def _merge_row(
    start: int, rows: int, keys: int, columns: Sequence[int], offsets: Sequence[int], causal: bool, block: int
) -> IndexRow:
    edge = start + block + (keys - rows if causal else keys)
    sentinel = edge + block
    out = IndexRow([], [])

    def end_of(offset: int) -> int:
        return max(edge - offset, block)

    def flush() -> None:
        out.blocks.extend(range(range_start, min(range_end, keys), block))

    waiting_columns, waiting_offsets = list(columns), list(offsets)
    column = waiting_columns.pop(0)
    offset = waiting_offsets.pop(0)
    while offset >= edge and waiting_offsets:
        offset = waiting_offsets.pop(0)
    if offset > edge:
        range_start = edge if causal else keys
        range_end = range_start + block
    else:
        range_end = end_of(offset)
        range_start = range_end - block

    while True:
        if column < range_end:
            if column < range_start:
                out.columns.append(column)
            column = waiting_columns.pop(0) if waiting_columns else sentinel
        elif waiting_offsets and (causal or waiting_offsets[0] >= start):
            end = end_of(waiting_offsets.pop(0))
            if end > range_end + block:
                flush()
                range_start, range_end = end - block, end
            elif end > range_end:
                range_end += block
        elif causal or not waiting_columns:
            if not causal and column < keys:
                out.columns.append(column)
            flush()
            return out
        else:
            flush()
            range_start, range_end = keys, keys + block
            waiting_offsets = []


def sparse_index(columns: Array, slashes: Array, begin: int, rows: int, chunk_len: int, block: int = 64) -> SparseIndex:
    """Selection [H, *] of the piece [begin, begin + rows) as key blocks and columns of every block of rows.

    Splits into stages, puts fallbacks where a stage got no column or no diagonal (section 5.5), and merges each stage
    (section 6).
    """
    heads, row_blocks = len(columns), -(-rows // block)
    counts = np.zeros((heads, row_blocks, 6), dtype=np.int32)
    blocks: list[list[list[int]]] = [[[] for _ in range(row_blocks)] for _ in range(heads)]
    singles: list[list[list[int]]] = [[[] for _ in range(row_blocks)] for _ in range(heads)]
    for head in range(heads):
        own_columns = columns[head][columns[head] != PADDING].astype(np.int64)
        own_slashes = slashes[head][slashes[head] != PADDING].astype(np.int64)
        parts = split_stages(own_columns, own_slashes, begin, rows, chunk_len)
        for (stage, start, end), local_columns, offsets in reversed(parts):
            if not len(local_columns):
                local_columns = fallback(end - start)
            if not len(offsets):
                offsets = fallback(end - start)[::-1]
            merged = index_rows(rows, end - start, local_columns.tolist(), offsets.tolist(), stage == INTRA, block)
            for r, row in enumerate(merged):
                blocks[head][r] += [start + b for b in row.blocks]
                singles[head][r] += [start + c for c in row.columns]
                counts[head, r, stage] = len(row.blocks)
                counts[head, r, 3 + stage] = len(row.columns)
    return SparseIndex(padded_lists(blocks), padded_lists(singles), counts)


def padded_lists(lists: list[list[list[int]]]) -> Array:
    """int32 [H, R, the most of a list]."""
    width = max(len(entry) for head in lists for entry in head)
    return np.array([[e + [PADDING] * (width - len(e)) for e in head] for head in lists], dtype=np.int32)


def index_stage(index: SparseIndex, head: int, row_block: int, stage: int) -> IndexRow:
    """The blocks and columns (absolute keys) that an index lists for one head, row block and stage."""
    counts = np.asarray(index.counts)[head, row_block].tolist()
    before = {INTER: (), SUCC: (INTER,), INTRA: (INTER, SUCC)}[stage]
    block = sum(counts[s] for s in before)
    column = sum(counts[3 + s] for s in before)
    return IndexRow(
        np.asarray(index.blocks)[head, row_block, block : block + counts[stage]].tolist(),
        np.asarray(index.columns)[head, row_block, column : column + counts[3 + stage]].tolist(),
    )


def visited_cells(
    index: SparseIndex, begin: int, rows: int, chunk_len: int, stage: StageKeys, block: int = 64
) -> Array:
    """How often an index visits every cell [H, rows, keys of the stage] that causality allows."""
    heads = index.counts.shape[0]
    times = np.zeros((heads, rows, stage.end - stage.start), dtype=np.int32)
    keys = np.arange(stage.start, stage.end)
    for head in range(heads):
        for r, first in enumerate(range(0, rows, block)):
            blocks, columns = index_stage(index, head, r, stage.stage)
            visits = np.bincount(np.array(columns, dtype=np.int64) - stage.start, minlength=len(keys))
            for b in blocks:
                visits += (keys >= b) & (keys < b + block)
            times[head, first : first + block] = visits
    return np.where(keys <= np.arange(begin, begin + rows)[:, None], times, 0)
