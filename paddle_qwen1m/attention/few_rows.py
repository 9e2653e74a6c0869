"""A step of few rows of one sequence, in tensors that are made once and filled with whatever rows come."""

from __future__ import annotations

import numpy as np

from paddle_qwen1m import ops
from paddle_qwen1m.attention import positions
from paddle_qwen1m.attention.step import DensePieces, SequenceRows, Step, StepBuilder, groups


class FewRows:
    """What a step of `size` rows takes, which attend to all keys before them in up to max_pages pages.

    Nothing that the step launches on a GPU depends on what the tensors hold, so that it can be captured and replayed.
    Rows behind those that it was filled with are cached nowhere, attend to nothing and hold whatever was in memory.
    """

    def __init__(self, builder: StepBuilder, size: int, max_pages: int, page_size: int) -> None:
        assert size <= builder.chunk_len, "rows may lie in two DCA chunks at most"
        self._builder, self._size, self._max_pages = builder, size, max_pages
        self._variants = positions.num_variants(max_pages * page_size, builder.chunk_len)
        self._int64 = ops.tensor(np.zeros([2, size], np.int64))
        """Ids and slots."""
        self._int32 = ops.tensor(np.zeros(self._variants * size + max_pages + 2 * 4, np.int32))
        """Rotary positions, the page table and two pieces, one behind the other."""
        self._scale = ops.tensor(np.ones(1, np.float32))
        self._all = ops.tensor(np.arange(size))

    def fill(self, rows: SequenceRows, slots: np.ndarray) -> None:
        """The next step is of these rows; slots: where they are cached, int64 [n]."""
        count, builder = len(rows.ids), self._builder
        assert count <= self._size and len(rows.pages) <= self._max_pages
        own, where = np.zeros([2, self._size], np.int64), np.zeros(self._size, np.int64)
        own[0, :count], own[1, :count], own[1, count:] = rows.ids, slots, -1
        where[:count] = np.arange(rows.begin, rows.end)
        table, pieces = np.zeros(self._max_pages, np.int32), np.zeros([2, 4], np.int32)
        table[: len(rows.pages)] = rows.pages
        (group,) = groups([(0, piece) for piece in positions.pieces(rows.begin, rows.end, builder.chunk_len)], 0)
        pieces[: len(group)] = group
        rotary = builder.query_positions(where, self._variants)
        ops.upload(self._int64, own)
        ops.upload(self._int32, np.concatenate([rotary.ravel(), table, pieces.ravel()]))
        ops.upload(self._scale, np.asarray([builder.scale(rows.length)], np.float32))

    def step(self) -> Step:
        """Of the rows that it is filled with when it runs. All rows' logits can be made of what it gives."""
        ends = np.cumsum([0, self._variants * self._size, self._max_pages, 2 * 4]).tolist()
        rotary, table, pieces = (self._int32[begin:end] for begin, end in zip(ends, ends[1:]))
        dense = [DensePieces(pieces.reshape([2, 4]))]
        return Step(
            ids=self._int64[0],
            slots=self._int64[1],
            rotary=self._builder.rotary_table(rotary.reshape([self._variants, self._size])),
            block_tables=table.reshape([1, self._max_pages]),
            scale=self._scale,
            rows_at_once=self._builder.rows_at_once,
            logit_rows=self._all,
            num_logits=self._size,
            dense_pieces=dense,
            last_dense_pieces=dense,
        )
