"""One layer's attention over a step: decode, dense prefill, or sparse prefill with the keys chosen per head."""

from __future__ import annotations

from collections.abc import Generator

import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.selector import Projected, Selector
from paddle_qwen1m.attention.step import Step
from paddle_qwen1m.cache import LayerCache


def keep(projected: Projected, cache: LayerCache, step: Step, *, queries: bool = False) -> paddle.Tensor | None:
    """Puts the keys and values of a step's rows into the cache; gives the queries of all rows where they are wanted."""
    where = step.rotary, step.slots, cache.keys, cache.values, cache.quantised
    return ops.rotate_and_cache(projected.qkv, projected.bias, *where, queries=queries)


def decode(q: paddle.Tensor, cache: LayerCache, step: Step) -> paddle.Tensor:
    """Attention output [B, H, D] of a decode step, whose keys and values are in the cache; q: [3, B, H, D]."""
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


def attend(
    projected: Projected, cache: LayerCache, step: Step, selector: Selector | None
) -> Generator[None, None, paddle.Tensor]:
    """Attention output [T, H, D] of a step's rows, whose keys and values go to the cache first.

    `selector` chooses the keys of sparse pieces. Pauses behind each group of row blocks that the step names. Rows of
    another share hold whatever was in memory.
    """
    rows = projected.qkv.shape[0]
    q = keep(projected, cache, step, queries=not step.sparse_pieces and rows <= step.rows_at_once)
    if step.lengths is not None:
        assert q is not None
        return decode(q, cache, step)
    out = paddle.empty([rows, projected.heads, cache.keys.shape[3]], projected.qkv.dtype)
    yield from _attend_densely(projected, cache, step, out, q)
    yield from _attend_sparsely(projected, cache, step, selector, out)
    return out


def _attend_densely(
    projected: Projected, cache: LayerCache, step: Step, out: paddle.Tensor, q: paddle.Tensor | None
) -> Generator[None, None, None]:
    """q: the queries of all rows, where these are no more than are there at once."""
    rotated = None if q is None else (0, q)
    for dense in step.dense_pieces:
        first, last = dense.first, min(dense.first + step.rows_at_once, out.shape[0])
        if dense.pieces.shape[0] > 0:
            if rotated is None or rotated[0] != first:
                rotated = None  # its memory is free again
                rotated = first, projected.queries(step.rotary, first, last - first, table_row=first)
            (keys, values, chunk_len, quantised, _), tables = cache.readable(step.block_tables, dense.copied)
            where = tables, dense.pieces, step.scale, chunk_len
            ops.dca_prefill(rotated[1], out[first:last], keys, values, *where, quantised=quantised)
        if dense.pauses:
            yield


def _attend_sparsely(
    projected: Projected, cache: LayerCache, step: Step, selector: Selector | None, out: paddle.Tensor
) -> Generator[None, None, None]:
    for sparse in step.sparse_pieces:
        assert selector is not None
        pages = sparse.block_table, sparse.copied
        lines = selector.choose(sparse, projected, *cache.readable(*pages))
        for span, first, runs in sparse.spans(step.rows_at_once):
            q = projected.queries(step.rotary, span.row, span.rows, table_row=span.row)
            index = lines.visits(first, span.row_blocks)
            for run in runs:
                if run.size > 0:
                    # once more: in a pause others read theirs
                    (keys, values, chunk_len, quantised, _), table = cache.readable(*pages)
                    ops.dca_sparse_prefill(
                        q,
                        out[span.row : span.row + span.rows],
                        keys,
                        values,
                        table,
                        index,
                        0,
                        span.begin,
                        span.rows,
                        chunk_len,
                        sparse.scale,
                        order=selector.budgets.order,
                        first_block=run.first,
                        num_blocks=run.size,
                        all_columns=lines.all_columns,
                        quantised=quantised,
                    )
                if run.pauses:
                    yield
            del q, index  # their memory is free again while the next ones are made
