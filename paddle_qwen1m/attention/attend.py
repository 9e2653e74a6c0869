"""One layer's attention over a step: decode, dense prefill, or sparse prefill with the keys chosen per head."""

from __future__ import annotations

from collections.abc import Generator

import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.selector import Projected, Selector
from paddle_qwen1m.attention.step import Step
from paddle_qwen1m.cache import LayerCache


def attend(
    q: paddle.Tensor, projected: Projected, cache: LayerCache, step: Step, selector: Selector | None
) -> Generator[None, None, paddle.Tensor]:
    """Attention output [T, H, D] of queries q [V, T, H, D] against a cache that holds the step's keys already.

    `projected` is what the queries of sparse pieces are rotated from once more, to choose keys; `selector` does that.
    Pauses behind each group of row blocks that the step names.
    """
    keys, values, chunk_len = cache
    if step.lengths is not None:
        return ops.dca_decode(q, keys, values, step.block_tables, step.lengths, step.scale, chunk_len)
    out = paddle.empty(q.shape[1:], q.dtype)
    for pieces in step.dense_pieces:
        ops.dca_prefill(q, out, keys, values, step.block_tables, pieces, step.scale, chunk_len)
        yield
    for sparse in step.sparse_pieces:
        assert selector is not None
        piece, table = sparse.piece, sparse.block_table
        index = selector.choose(sparse, projected, cache, heads=q.shape[2])
        where = piece.row, piece.begin, piece.rows, chunk_len, sparse.scale
        for first, count in sparse.groups:
            ops.dca_sparse_prefill(q, out, keys, values, table, index, *where, first_block=first, num_blocks=count)
            yield
    return out
