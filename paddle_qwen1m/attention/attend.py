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
    Pauses behind each group of row blocks that the step names. Rows of another share hold whatever was in memory.
    """
    if step.lengths is not None:
        return ops.dca_decode(
            q,
            cache.keys,
            cache.values,
            step.block_tables,
            step.lengths,
            step.scale,
            cache.chunk_len,
            cache.quantised,
        )
    out = paddle.empty(q.shape[1:], q.dtype)
    for dense in step.dense_pieces:
        if dense.pieces.shape[0] > 0:
            (keys, values, chunk_len, quantised, _), tables = cache.readable(step.block_tables, dense.copied)
            where = tables, dense.pieces, step.scale, chunk_len
            ops.dca_prefill(q, out, keys, values, *where, quantised=quantised)
        yield
    for sparse in step.sparse_pieces:
        assert selector is not None
        piece = sparse.piece
        pages = sparse.block_table, sparse.copied
        index = selector.choose(sparse, projected, *cache.readable(*pages), heads=q.shape[2])
        for first, count in sparse.own_groups:
            if count > 0:
                # once more: in a pause others read theirs
                (keys, values, chunk_len, quantised, _), table = cache.readable(*pages)
                ops.dca_sparse_prefill(
                    q,
                    out,
                    keys,
                    values,
                    table,
                    index,
                    piece.row,
                    piece.begin,
                    piece.rows,
                    chunk_len,
                    sparse.scale,
                    first_block=first,
                    num_blocks=count,
                    quantised=quantised,
                )
            yield
    return out
