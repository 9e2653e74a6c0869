"""What a step computes around attention: embedding, norms, linears, the cache write."""

from __future__ import annotations

from typing import Callable

import numpy as np

from .arrays import Array, wide
from .positions import rotate


def embedding(ids: Array, table: Array, first: int = 0) -> Array:
    """Rows [T, hidden] of table [rows, hidden], which holds ids from `first` on; zeros for the others."""
    at = ids - first
    held = (at >= 0) & (at < len(table))
    return np.where(held[:, None], wide(table)[np.where(held, at, 0)], 0.0)


def rms_norm(hidden: Array, weight: Array, eps: float) -> Array:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis of [T, N]."""
    hidden = wide(hidden)
    result: Array = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + eps) * wide(weight)
    return result


def add_rms_norm(delta: Array, residual: Array, weight: Array, eps: float) -> Array:
    """residual += delta in place; the norm of the sum."""
    residual += delta
    return rms_norm(residual, weight, eps)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [T, K] times weight [N, K] transposed, plus bias [N]."""
    product = wide(x) @ wide(weight).T
    return product if bias is None else product + wide(bias)


def silu_mul(gate_up: Array) -> Array:
    """silu(gate) * up for gate | up side by side in [T, 2I]."""
    gate, up = np.split(wide(gate_up), 2, axis=-1)
    with np.errstate(over="ignore"):
        result: Array = gate / (1.0 + np.exp(-gate)) * up
        return result


def gather_rows(hidden: Array, rows: Array) -> Array:
    """Rows [n, N] of hidden [T, N]."""
    return wide(hidden)[rows]


def join_columns(parts: Array, columns: int) -> Array:
    """The first columns [n, columns] of parts [P, n, share] side by side."""
    return np.concatenate(list(wide(parts)), axis=1)[:, :columns]


def rotate_and_cache(
    qkv: Array,
    bias: Array,
    table: Array,
    slots: Array,
    key_cache: Array,
    value_cache: Array,
    round_to_cache: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """Bias and split qkv; write rotated keys and plain values, rounded once, at slots; all rotations of the queries.

    Returns q [V, T, H, D]. `round_to_cache` rounds to a type that numpy does not have.
    """
    _, page_size, kv_heads, head_dim = key_cache.shape
    tokens = qkv.shape[0]
    rows = (wide(qkv) + wide(bias)).reshape(tokens, -1, head_dim)
    queries, keys, values = np.split(rows, [-2 * kv_heads, -kv_heads], axis=1)
    table = wide(table)
    for token, slot in enumerate(np.asarray(slots)):
        if slot < 0:  # a row that is not cached
            continue
        page, offset = divmod(int(slot), page_size)
        key_cache[page, offset] = round_to_cache(rotate(keys[token], table[0, token]))
        value_cache[page, offset] = round_to_cache(values[token])
    return rotate(queries[None], table[:, :, None])


def rotate_queries(qkv: Array, bias: Array, table: Array, row: int, heads: int) -> Array:
    """Rotations [V, n, H, D] of the biased queries of rows row .. row + n, for probe tables [V, n, D]."""
    _, n, head_dim = table.shape
    queries = (wide(qkv) + wide(bias))[row : row + n, : heads * head_dim].reshape(n, heads, head_dim)
    return rotate(queries[None], wide(table)[:, :, None])
