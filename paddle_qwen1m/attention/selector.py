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

Observer = Callable[[int, Piece, ops.SparseIndex], None]
"""Called with (layer, piece, index) for every sparse piece."""


class Projected(NamedTuple):
    """The projections of a step's rows, qkv [T, (H + 2G) D], and their bias [(H + 2G) D], not yet added."""

    qkv: paddle.Tensor
    bias: paddle.Tensor


class LayerBudgets:
    """How many columns and diagonals the heads of one layer keep, from int32 [H] each."""

    def __init__(self, vertical: np.ndarray, slash: np.ndarray) -> None:
        self.vertical = paddle.to_tensor(vertical)
        self.slash = paddle.to_tensor(slash)
        self.max_vertical = int(vertical.max())
        self.max_slash = int(slash.max())


@dataclass
class Selector:
    """The choice of keys of one layer; `observer`, when set, sees each."""

    layer: int
    budgets: LayerBudgets
    observer: Observer | None = None

    def choose(
        self, sparse: SparsePiece, projected: Projected, cache: LayerCache, block_table: paddle.Tensor, heads: int
    ) -> ops.SparseIndex:
        """What a piece visits: its last queries score all keys, and the best columns and diagonals stay. block_table:
        int32 [W] of its sequence in `cache`.
        """
        piece, budgets = sparse.piece, self.budgets
        first = piece.row + piece.rows - piece.probe_rows
        critical = ops.rotate_queries(*projected, sparse.critical_rotary, first, heads)
        sums = ops.dca_probe(
            critical, cache.keys, block_table, piece.end, cache.chunk_len, sparse.scale, cache.quantised
        )
        columns, slashes = ops.select_critical(
            *sums, budgets.vertical, budgets.slash, budgets.max_vertical, budgets.max_slash
        )
        index = ops.sparse_index(columns, slashes, piece.begin, piece.rows, cache.chunk_len)
        if self.observer is not None:
            self.observer(self.layer, piece, index)
        return index
