"""Attention over exactly the keys that an index visits (sections 7 and 8 of the specification)."""

from __future__ import annotations

from .arrays import Array, wide
from .dense import attend, merge, read_pages, stages_of
from .index import SparseIndex, visited_cells


def sparse_piece(
    q: Array,
    key_cache: Array,
    value_cache: Array,
    block_table: Array,
    index: SparseIndex,
    begin: int,
    chunk_len: int,
    scale: float,
    block: int = 64,
) -> tuple[Array, Array]:
    """O [n, H, D] and LSE [H, n] of a piece over exactly the cells its index visits, from queries [V, n, H, D]."""
    rows = q.shape[1]
    parts = []
    for part in stages_of(begin, begin + rows, chunk_len):
        keys = read_pages(key_cache, block_table, part.start, part.end)
        values = read_pages(value_cache, block_table, part.start, part.end)
        visible = visited_cells(index, begin, rows, chunk_len, part, block) > 0
        parts.append(attend(wide(q[part.stage]), keys, values, visible, scale))
    return merge(*zip(*parts))


def dca_sparse_prefill(
    q: Array,
    out: Array,
    key_cache: Array,
    value_cache: Array,
    block_table: Array,
    index: SparseIndex,
    row: int,
    begin: int,
    rows: int,
    chunk_len: int,
    scale: float,
    lse: Array | None = None,
) -> None:
    """Write the piece [begin, begin + rows) into rows row .. row + rows of out; its queries are the same rows of q.

    lse [T, H], when given, receives the natural log of the sum of exp of the scaled logits of the visited cells.
    """
    own = slice(row, row + rows)
    caches = key_cache, value_cache, block_table
    out[own], sums = sparse_piece(q[:, own], *caches, index, begin, chunk_len, scale)
    if lse is not None:
        lse[own] = sums.T
