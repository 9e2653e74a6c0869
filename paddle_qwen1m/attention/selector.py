"""Which keys the heads of a layer visit in a sparse prefill: probe, then the best columns and diagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.attention.step import SparsePiece
from paddle_qwen1m.cache import LayerCache
from paddle_qwen1m.config import column_widths

Observer = Callable[[int, Piece, ops.SparseIndex], None]
"""Called with (layer, piece, index) for every sparse piece."""


class Projected(NamedTuple):
    """The projections of a step's rows, qkv [T, (H + 2G) D], and their bias [(H + 2G) D], not yet added; heads: H."""

    qkv: paddle.Tensor
    bias: paddle.Tensor
    heads: int

    def queries(self, table: paddle.Tensor, row: int, rows: int | None = None, *, table_row: int = 0) -> paddle.Tensor:
        """Those of rows [row, row + rows), as `ops.rotate_queries` has them: [V, rows, H, D]."""
        return ops.rotate_queries(self.qkv, self.bias, table, self.heads, row=row, rows=rows, table_row=table_row)


class Lines:
    """What the heads of a layer visit in a piece: columns and diagonals int32 [H, n], of `ops.select_critical`.

    all_columns: see `ops.dca_sparse_prefill`.
    """

    def __init__(
        self, columns: paddle.Tensor, diagonals: paddle.Tensor, piece: Piece, chunk_len: int, all_columns: int
    ) -> None:
        self.all_columns = all_columns
        self._piece = columns, diagonals, piece.begin, piece.rows, chunk_len
        self._chains = ops.index_chains(*self._piece)

    def visits(self, first_block: int = 0, num_blocks: int | None = None) -> ops.SparseIndex:
        """The same by row blocks of the piece, so many from one on, by default all."""
        return ops.sparse_index(*self._piece, first_block=first_block, num_blocks=num_blocks, chains=self._chains)


def visited_keys(vertical: np.ndarray, slash: np.ndarray) -> np.ndarray:
    """How many keys a row of heads with these budgets is expected to visit, in their shape: a row block's diagonals are
    blocks of keys, about two keys a row for each of them where neighbours are chosen.
    """
    return vertical + 2 * slash


class LayerBudgets:
    """How many columns and diagonals the heads of one layer keep, from int32 [H] each. order: int32 [H], of the heads,
    first those that visit most.
    """

    def __init__(self, vertical: np.ndarray, slash: np.ndarray) -> None:
        self.vertical = paddle.to_tensor(vertical)
        self.slash = paddle.to_tensor(slash)
        self.order = paddle.to_tensor(np.argsort(-visited_keys(vertical, slash), kind="stable").astype(np.int32))
        self.max_vertical = int(vertical.max())
        self.max_slash = int(slash.max())
        self._columns = vertical

    def all_columns(self, keys: int) -> int:
        """Of all heads at most, of so many keys, as an index has them."""
        return int(column_widths(np.minimum(self._columns, keys)).sum())


@dataclass
class Selector:
    """The choice of keys of one layer; `observer`, when set, sees each."""

    layer: int
    budgets: LayerBudgets
    observer: Observer | None = None

    def choose(self, sparse: SparsePiece, projected: Projected, cache: LayerCache, block_table: paddle.Tensor) -> Lines:
        """What a piece visits: its last queries score all keys, and the best columns and diagonals stay. block_table:
        int32 [W] of its sequence in `cache`.
        """
        piece, budgets = sparse.piece, self.budgets
        first = piece.row + piece.rows - piece.probe_rows
        critical = projected.queries(sparse.critical_rotary, first)
        sums = ops.dca_probe(
            critical, cache.keys, block_table, piece.end, cache.chunk_len, sparse.scale, cache.quantised
        )
        columns, diagonals = ops.select_critical(
            *sums, budgets.vertical, budgets.slash, budgets.max_vertical, budgets.max_slash
        )
        lines = Lines(columns, diagonals, piece, cache.chunk_len, budgets.all_columns(piece.end))
        if self.observer is not None:
            self.observer(self.layer, piece, lines.visits())
        return lines
