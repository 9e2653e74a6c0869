"""Ops of the rest of a step: rotations and cache write, embedding, norms, linears, activation, casts."""

from __future__ import annotations

import ctypes

import paddle

from paddle_qwen1m.ops.library import call, library
from paddle_qwen1m.ops.pages import NOT_QUANTISED, Quantised
from paddle_qwen1m.ops.weight8 import Weight8, linear8, reads_bytes

FEW_ROWS = 16
"""Up to so many rows a linear layer on a GPU is a custom op, which reads the weights once; above, a GEMM, of cuBLAS or,
of many rows on a Hopper, our own. (QWEN1M_FEW_ROWS of custom_ops/include/qwen1m/step.h)
"""


def embedding(
    ids: paddle.Tensor, table: paddle.Tensor, *, first: int = 0, vocabulary: int | None = None
) -> paddle.Tensor:
    """Rows `ids` (int64 [T]) of `table` [rows, N]: the residual stream, float32 [T, N].

    A table that holds a part of a vocabulary, its rows from `first` on, gives zeros for the ids of other parts.
    """
    return call("embedding", ids, table, first, table.shape[0] if vocabulary is None else vocabulary)[0]


def rms_norm(
    hidden: paddle.Tensor, weight: paddle.Tensor, eps: float, out: paddle.Tensor | None = None
) -> paddle.Tensor:
    """hidden / sqrt(mean(hidden^2) + eps) * weight over the last axis of float32 [T, N], as activations: new ones, or
    `out` [T, N], contiguous.
    """
    return call("rms_norm", hidden, weight, eps)[0] if out is None else _norm_into(None, hidden, weight, eps, out)


def add_rms_norm(
    delta: paddle.Tensor, residual: paddle.Tensor, weight: paddle.Tensor, eps: float, out: paddle.Tensor | None = None
) -> paddle.Tensor:
    """Adds `delta` [T, N] to `residual` float32 in place and returns the RMSNorm of the sum, as `rms_norm` does."""
    if out is None:
        return call("add_rms_norm", delta, residual, weight, eps)[1]
    return _norm_into(delta, residual, weight, eps, out)


def _norm_into(
    delta: paddle.Tensor | None, residual: paddle.Tensor, weight: paddle.Tensor, eps: float, out: paddle.Tensor
) -> paddle.Tensor:
    call("rms_norm_into", delta, residual, weight, out, eps)
    return out


def linear(
    x: paddle.Tensor, weight: paddle.Tensor | Weight8, bias: paddle.Tensor | None = None, *, float32: bool = False
) -> paddle.Tensor:
    """x [T, K] times the transpose of `weight` [N, K] (as published, out by in), plus `bias` [N]: [T, N].

    The result is activations, or float32 when asked for, which is never rounded on the way. On a GPU more than FEW_ROWS
    rows of activations are a GEMM's, which takes no bias (ValueError). A weight of 8 bits takes none either, and gives
    activations.
    """
    if isinstance(weight, Weight8):
        if bias is not None or float32:
            raise ValueError("linear: a weight of 8 bits takes no bias and gives activations, not float32")
        if reads_bytes(x):
            return linear8(x, weight)
        weight = weight.widened_for(x)
    if not float32 and bias is not None and x.shape[0] > FEW_ROWS and x.place.is_gpu_place():
        raise ValueError(f"linear: bias must be None for more than {FEW_ROWS} rows on a GPU, got {x.shape[0]} rows")
    if float32 or not _is_of_cublas(x, weight):
        return call("linear", x, weight, bias, float32)[0]
    return paddle.matmul(x, weight, transpose_y=True)


def gated_linear(x: paddle.Tensor, weight: paddle.Tensor | Weight8) -> paddle.Tensor:
    """`silu_mul` of `linear` by a weight of gate and up [2I, K]: [T, I]. On a GPU the product of few rows with a weight
    that has not 8 bits is never in memory, nor, on a Hopper, of many rows whose tiles nearly fill whole rounds.
    """
    if isinstance(weight, Weight8):
        if reads_bytes(x):
            return silu_mul(linear8(x, weight))
        weight = weight.widened_for(x)
    if _is_of_cublas(x, weight):
        return silu_mul(linear(x, weight))
    return call("gated_linear", x, weight)[0]


def rotating_linear(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor,
    table: paddle.Tensor,
    slots: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
) -> paddle.Tensor:
    """`rotate_and_cache` of `linear` by the weight of q, k and v [(H + 2G) D, K], into caches that have not 8 bits: q
    [V, T, H, D]. On a GPU of up to FEW_ROWS rows (ValueError), whose product is never in memory.
    """
    return call("rotating_linear", x, weight, bias, table, slots, key_cache, value_cache)[2]


def _is_of_cublas(x: paddle.Tensor, weight: paddle.Tensor) -> bool:
    """Whether so many rows are multiplied by Paddle's matmul, which calls cuBLAS."""
    rows, features = x.shape[0], weight.shape[0]
    if rows <= FEW_ROWS or not x.place.is_gpu_place():
        return False
    return not library().qwen1m_cuda_multiplies_many_rows(ctypes.c_int64(rows), ctypes.c_int64(features))


def cast(values: paddle.Tensor, dtype: str) -> paddle.Tensor:
    """`values` as "float32", "bfloat16" or "float16", rounded to nearest even."""
    return call("cast", values, dtype)[0]


def silu_mul(gate_up: paddle.Tensor) -> paddle.Tensor:
    """SiLU of the left half of [T, 2I] times its right half: [T, I]."""
    return call("silu_mul", gate_up)[0]


def gather_rows(hidden: paddle.Tensor, rows: paddle.Tensor) -> paddle.Tensor:
    """Rows `rows` (int64 [n]) of `hidden` [T, N], activations or float32; zeros for a row of -1."""
    return call("gather_rows", hidden, rows)[0]


def join_columns(parts: paddle.Tensor, columns: int) -> paddle.Tensor:
    """The first `columns` columns of float32 `parts` [P, n, share] side by side: [n, columns]."""
    return call("join_columns", parts, columns)[0]


def rotary_table(positions: paddle.Tensor, inv_freq: paddle.Tensor) -> paddle.Tensor:
    """cos | sin of positions (int32 [V, T]) times inv_freq (float32 [D/2]), the product in float32: [V, T, D]."""
    return call("rotary_table", positions, inv_freq)[0]


def rotate_and_cache(
    qkv: paddle.Tensor,
    bias: paddle.Tensor,
    table: paddle.Tensor,
    slots: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    quantised: Quantised | None = None,
    *,
    queries: bool = True,
) -> paddle.Tensor | None:
    """Adds the bias to qkv [T, (H + 2G) D], writes keys rotated by table[0] and values, returns q [V, T, H, D]; None
    without `queries`.

    `table` is a `rotary_table` of V variants; slots (int64 [T]) are page * page_size + offset, -1 for a row that is not
    cached. The caches are written in place, rounded once to their type; bytes with a scale for each token and KV head.
    """
    cache = key_cache, value_cache, *(quantised or NOT_QUANTISED)
    results = call("rotate_and_cache" if queries else "cache_keys", qkv, bias, table, slots, *cache)
    return results[2] if queries else None


def rotate_queries(
    qkv: paddle.Tensor,
    bias: paddle.Tensor,
    table: paddle.Tensor,
    heads: int,
    *,
    row: int,
    rows: int | None = None,
    table_row: int = 0,
) -> paddle.Tensor:
    """Biased queries of rows [row, row + rows) of qkv [T, (H + 2G) D], rotated by each variant of the table [V, R, D],
    whose rows from table_row on are theirs, by default all: [V, rows, H, D].
    """
    return call("rotate_queries", qkv, bias, table, row, table.shape[1] if rows is None else rows, table_row, heads)[0]


def decode_inputs(
    lengths: paddle.Tensor,
    block_tables: paddle.Tensor,
    inv_freq: paddle.Tensor,
    page_size: int,
    chunk_len: int,
    chunk_size: int,
    original_max_position_embeddings: int,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Where the next token of each of B sequences goes and how it is rotated; their lengths grow by one in place.

    lengths int32 [B], block_tables int32 [B, W], inv_freq float32 [D/2]. Returns slots int64 [B], the rotary table of
    all three variants float32 [3, B, D], and the scales D^-0.5 m(length)^2 float32 [B]. A length of 0 is that of a row
    without a sequence: it stays 0, and the row's slot is -1.
    """
    _, slots, table, scale = call(
        "decode_inputs",
        lengths,
        block_tables,
        inv_freq,
        page_size,
        chunk_len,
        chunk_size,
        original_max_position_embeddings,
    )
    return slots, table, scale
