"""One layer's attention over a step: decode, dense prefill, or sparse prefill with the keys chosen per head."""

from __future__ import annotations

from typing import Callable

import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.attention.step import SparsePiece, Step
from paddle_qwen1m.config import SparseBudgets

Observer = Callable[[int, Piece, ops.SparseIndex], None]
"""Called with (layer, piece, index) for every sparse piece."""


class LayerBudgets:
    """Columns and diagonals that the heads of one layer keep."""

    def __init__(self, budgets: SparseBudgets, layer: int) -> None:
        vertical, slash = budgets.vertical[layer], budgets.slash[layer]
        self.vertical = paddle.to_tensor(vertical)
        self.slash = paddle.to_tensor(slash)
        self.max_vertical = int(vertical.max())
        self.max_slash = int(slash.max())


def attend(
    q: paddle.Tensor,
    qkv: paddle.Tensor,
    bias: paddle.Tensor,
    keys: paddle.Tensor,
    values: paddle.Tensor,
    step: Step,
    chunk_len: int,
    layer: int,
    budgets: LayerBudgets | None,
    observe: Observer | None,
) -> paddle.Tensor:
    """Attention output [T, H, D] of queries q [V, T, H, D] against caches that hold the step's keys already.

    qkv [T, (H + 2G) D] and its bias give the probe rows' critical queries.
    """
    if step.lengths is not None:
        return ops.dca_decode(q, keys, values, step.block_tables, step.lengths, step.scale, chunk_len)
    out = paddle.empty(q.shape[1:], q.dtype)
    if step.dense_pieces is not None:
        ops.dca_prefill(q, out, keys, values, step.block_tables, step.dense_pieces, step.scale, chunk_len)
    for sparse in step.sparse_pieces:
        assert budgets is not None
        piece = sparse.piece
        index = critical_index(sparse, qkv, bias, keys, chunk_len, q.shape[2], budgets)
        if observe is not None:
            observe(layer, piece, index)
        ops.dca_sparse_prefill(
            q,
            out,
            keys,
            values,
            sparse.block_table,
            index,
            piece.row,
            piece.begin,
            piece.rows,
            chunk_len,
            sparse.scale,
        )
    return out


def critical_index(
    sparse: SparsePiece,
    qkv: paddle.Tensor,
    bias: paddle.Tensor,
    keys: paddle.Tensor,
    chunk_len: int,
    heads: int,
    budgets: LayerBudgets,
) -> ops.SparseIndex:
    """Which keys each head visits: the piece's last queries score all keys; the best columns and diagonals stay."""
    piece = sparse.piece
    critical = ops.rotate_queries(qkv, bias, sparse.critical_rotary, piece.row + piece.rows - piece.probe_rows, heads)
    vertical, slash = ops.dca_probe(critical, keys, sparse.block_table, piece.end, chunk_len, sparse.scale)
    columns, slashes = ops.select_critical(
        vertical, slash, budgets.vertical, budgets.slash, budgets.max_vertical, budgets.max_slash
    )
    return ops.sparse_index(columns, slashes, piece.begin, piece.rows, chunk_len)
