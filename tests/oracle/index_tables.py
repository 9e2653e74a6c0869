"""The five tables of `paddle_qwen1m.ops.SparseIndex` from lists of what is visited, and the way back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arrays import Array
from .dense import INTER, INTRA, SUCC
from .index import SparseIndex, index_stage, padded_lists
from .selection import PADDING

COLUMN_GROUP = 64
"""A stage's columns begin at a multiple of it."""


class IndexTables(NamedTuple):
    """blocks int32 [H, R, B], counts int32 [H, R, 6], listed int32 [H, R, W / 32], columns int32 [H, W], column_counts
    int32 [H, 3], as `paddle_qwen1m.ops.SparseIndex` has them.
    """

    blocks: Array
    counts: Array
    listed: Array
    columns: Array
    column_counts: Array


def column_spans(column_counts: Array) -> dict[int, range]:
    """Where the columns of each stage lie, of one head's counts [3]: inter first, then succ, then intra."""
    spans, first = {}, 0
    for stage in (INTER, SUCC, INTRA):
        spans[stage] = range(first, first + int(column_counts[stage]))
        first += -(-int(column_counts[stage]) // COLUMN_GROUP) * COLUMN_GROUP
    return spans


def used_width(column_counts: Array) -> int:
    """Where the padding of the last stage's columns ends, of one head's counts [3]."""
    return sum(-(-int(count) // COLUMN_GROUP) * COLUMN_GROUP for count in column_counts)


def listed_bits(tables: IndexTables) -> Array:
    """bool [H, R, W]: whether the column is listed."""
    words = np.ascontiguousarray(tables.listed).view(np.uint32)
    bits = words[..., None] >> np.arange(32, dtype=np.uint32) & 1
    return bits.reshape(*words.shape[:-1], -1).astype(bool)


def listed_columns(tables: IndexTables) -> SparseIndex:
    """The columns of each row block as a list, with blocks and counts as they are; what is undefined is not looked at.

    The counts must be those of the bits.
    """
    bits, heads, row_blocks = listed_bits(tables), *tables.counts.shape[:2]
    lists: list[list[list[int]]] = [[[] for _ in range(row_blocks)] for _ in range(heads)]
    for head in range(heads):
        for stage, span in column_spans(tables.column_counts[head]).items():
            columns = tables.columns[head, span.start : span.stop]
            for r in range(row_blocks):
                own = columns[bits[head, r, span.start : span.stop]].tolist()
                assert len(own) == tables.counts[head, r, 3 + stage], "as many bits as are counted"
                lists[head][r] += own
    return SparseIndex(tables.blocks, padded_lists(lists), tables.counts)


def index_tables(index: SparseIndex) -> IndexTables:
    """The tables of an index. Columns of a stage: all that some row block lists, each once, ascending. Undefined
    columns are padding, and undefined bits zero.
    """
    heads, row_blocks = index.counts.shape[:2]
    stages = (INTER, SUCC, INTRA)
    lists = np.empty((heads, row_blocks, 3), object)
    for head, r, stage in np.ndindex(heads, row_blocks, 3):
        lists[head, r, stage] = index_stage(index, head, r, stage).columns
    union = [
        [np.unique(np.concatenate([np.array(one, np.int32) for one in lists[head, :, stage]])) for stage in range(3)]
        for head in range(heads)
    ]
    column_counts = np.array([[len(of_stage) for of_stage in of_head] for of_head in union], np.int32)
    width = max(COLUMN_GROUP, *map(used_width, column_counts))
    columns = np.full((heads, width), PADDING, np.int32)
    bits = np.zeros((heads, row_blocks, width), bool)
    for head in range(heads):
        spans = column_spans(column_counts[head])
        for stage in stages:
            span, of_stage = spans[stage], union[head][stage]
            columns[head, span.start : span.stop] = of_stage
            for r in range(row_blocks):
                bits[head, r, span.start : span.stop] = np.isin(of_stage, lists[head, r, stage])
    listed = np.packbits(bits, axis=-1, bitorder="little").view("<i4")
    return IndexTables(index.blocks, index.counts, listed, columns, column_counts)
