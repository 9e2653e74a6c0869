"""Ops that choose the keys of a sparse prefill: probe, top-k, index."""

from __future__ import annotations

from typing import NamedTuple

import paddle

from paddle_qwen1m.config import BLOCK, LOCAL_DIAGONALS, SINK_COLUMNS
from paddle_qwen1m.ops.library import call
from paddle_qwen1m.ops.pages import NOT_QUANTISED, Quantised

PROBE_ROWS = 64


class SparseIndex(NamedTuple):
    """What every head visits in R blocks of 64 rows of one piece, the three stages side by side.

    blocks: int32 [H, R, B] absolute first keys of 64-key blocks, not aligned; ascending: inter, then succ, then intra.
    counts: int32 [H, R, 6]: blocks of intra, succ, inter, then listed columns of intra, succ, inter. Blocks past the
    counts are undefined.
    listed: int32 [H, R, W / 32], as bits: c % 32 of word c / 32 is set where a row block visits the column at c; none
    of those lies in a block of its stage.
    columns: int32 [H, W] absolute keys of a head, inter, then succ, then intra. Those of a stage ascend from a multiple
    of 64 on, and up to the next one INT32_MAX follows, whose bits are zero; what lies behind the last stage's, and its
    bits, is undefined.
    column_counts: int32 [H, 3] of intra, succ, inter; 0 of a stage that has no keys.
    """

    blocks: paddle.Tensor
    counts: paddle.Tensor
    listed: paddle.Tensor
    columns: paddle.Tensor
    column_counts: paddle.Tensor


def dca_probe(
    q: paddle.Tensor,
    key_cache: paddle.Tensor,
    block_table: paddle.Tensor,
    end: int,
    chunk_len: int,
    scale: float,
    quantised: Quantised | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Softmax of a piece's last critical queries over keys [0, end), summed by column and by diagonal.

    q [V, n, H, D], n <= 64, are the critical rotations of the rows that end at position end - 1; block_table int32 [W].
    Returns vertical and slash, float32 [H, end]; slash is indexed by the column that a diagonal hits on the last row.
    """
    cache = key_cache, *(quantised or NOT_QUANTISED), block_table
    vertical, slash = call("dca_probe", q, *cache, end, chunk_len, scale)
    return vertical, slash


def select_critical(
    vertical: paddle.Tensor,
    slash: paddle.Tensor,
    vertical_sizes: paddle.Tensor,
    slash_sizes: paddle.Tensor,
    max_vertical: int,
    max_slash: int,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Each head's best columns and diagonals: int32 [H, min(max, M)], ascending, padded with INT32_MAX.

    The first 30 columns and the last 100 slash columns come first, then the largest sums, ties to the lower index.
    Sizes are int32 [H], at most `max_vertical` and `max_slash`.
    """
    columns, slashes = call(
        "select_critical",
        vertical,
        slash,
        vertical_sizes,
        slash_sizes,
        max_vertical,
        max_slash,
        SINK_COLUMNS,
        LOCAL_DIAGONALS,
    )
    return columns, slashes


def index_chains(
    columns: paddle.Tensor, slashes: paddle.Tensor, begin: int, rows: int, chunk_len: int, block: int = BLOCK
) -> paddle.Tensor | None:
    """What `sparse_index` can take from one call to the next for the row blocks of a piece; None on a CPU."""
    if not columns.place.is_gpu_place():
        return None
    return call("index_chains", columns, slashes, begin, rows, chunk_len, block)[0]


def sparse_index(
    columns: paddle.Tensor,
    slashes: paddle.Tensor,
    begin: int,
    rows: int,
    chunk_len: int,
    block: int = BLOCK,
    *,
    first_block: int = 0,
    num_blocks: int | None = None,
    chains: paddle.Tensor | None = None,
) -> SparseIndex:
    """What the piece [begin, begin + rows) visits, from `select_critical`'s result.

    Only of its row blocks [first_block, first_block + num_blocks), by default of all. chains: of the same piece, which
    are made anew without.
    """
    if num_blocks is None:
        num_blocks = -(-rows // block) - first_block
    piece = begin, rows, chunk_len, block
    return SparseIndex(*call("sparse_index", columns, slashes, chains, *piece, first_block, num_blocks))
