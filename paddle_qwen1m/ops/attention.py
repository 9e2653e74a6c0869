"""Ops of dual chunk attention over a paged cache: dense and sparse prefill, decode."""

from __future__ import annotations

from enum import IntEnum

import paddle

from paddle_qwen1m.config import BLOCK
from paddle_qwen1m.ops.keys import SparseIndex
from paddle_qwen1m.ops.library import call
from paddle_qwen1m.ops.pages import NOT_QUANTISED, Quantised


class Stage(IntEnum):
    """Which rotation of a query meets a key: same DCA chunk, the one before, any earlier one."""

    INTRA = 0
    SUCC = 1
    INTER = 2


def dca_prefill(
    q: paddle.Tensor,
    out: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    block_tables: paddle.Tensor,
    pieces: paddle.Tensor,
    scale: paddle.Tensor,
    chunk_len: int,
    lse: paddle.Tensor | None = None,
    *,
    quantised: Quantised | None = None,
) -> None:
    """Dense dual chunk attention of a step's pieces; writes their rows of out [T, H, D].

    q is [V, T, H, D]; pieces int32 [P, 4] are (sequence, first row, rows, position of the first row), each within one
    DCA chunk; block_tables int32 [S, W]; scale float32 [S] is D^-0.5 m^2 of each sequence. lse float32 [T, H], when
    given, receives the natural log of the sum of exp(scaled logits). A range of a piece's rows is a piece as well; what
    a row gets does not depend on how its piece is cut.
    """
    cache = key_cache, value_cache, *(quantised or NOT_QUANTISED), block_tables
    call("dca_prefill", q, out, *cache, pieces, scale, lse, chunk_len)


def dca_sparse_prefill(
    q: paddle.Tensor,
    out: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    block_table: paddle.Tensor,
    index: SparseIndex,
    row: int,
    begin: int,
    rows: int,
    chunk_len: int,
    scale: float,
    lse: paddle.Tensor | None = None,
    *,
    order: paddle.Tensor | None = None,
    first_block: int = 0,
    num_blocks: int | None = None,
    all_columns: int | None = None,
    quantised: Quantised | None = None,
) -> None:
    """Dual chunk attention of one piece over the keys its index names; writes rows [row, row + rows) of out [T, H, D].

    q is [V, T, H, D]; block_table int32 [W] of the piece's sequence; lse as in `dca_prefill`.
    Only the piece's row blocks [first_block, first_block + num_blocks) are computed, by default all of them; what a row
    gets does not depend on how its piece is cut. A GPU begins the heads in `order` int32 [H], by default their own, and
    may have copies of all heads' columns, `all_columns` at most with every stage filled up to groups of 64; by default
    as many as the index has room for.
    """
    if num_blocks is None:
        num_blocks = -(-rows // BLOCK) - first_block
    if all_columns is None:
        all_columns = index.columns.size
    call(
        "dca_sparse_prefill",
        q,
        out,
        key_cache,
        value_cache,
        *(quantised or NOT_QUANTISED),
        block_table,
        *index,
        order,
        lse,
        row,
        begin,
        rows,
        first_block,
        num_blocks,
        all_columns,
        chunk_len,
        scale,
    )


def dca_decode(
    q: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    block_tables: paddle.Tensor,
    lengths: paddle.Tensor,
    scale: paddle.Tensor,
    chunk_len: int,
    quantised: Quantised | None = None,
) -> paddle.Tensor:
    """The last token of each of B sequences against all its keys: q [V, B, H, D] to [B, H, D].

    lengths int32 [B] count the token itself, whose key is in the cache; a row of length 0 gets zeros. block_tables
    int32 [B, W]; scale float32 [B].
    """
    cache = key_cache, value_cache, *(quantised or NOT_QUANTISED), block_tables
    return call("dca_decode", q, *cache, lengths, scale, chunk_len)[0]
