"""Rotary positions, rotation and temperature (sections 2, 3 and 9 of the specification)."""

from __future__ import annotations

import math

import numpy as np

from .arrays import Array


def key_positions(positions: Array, chunk_len: int) -> Array:
    """Rotary position of the cached key of each absolute position: p mod L."""
    return np.asarray(positions) % chunk_len


def query_positions(positions: Array, chunk_len: int, chunk_size: int) -> Array:
    """Rotary positions [3, T] of the intra, succ and inter queries (section 2.1): r, min(r + L, c), min(2L - 1, c)."""
    r = np.asarray(positions) % chunk_len
    inter = np.full_like(r, min(2 * chunk_len - 1, chunk_size))
    return np.stack([r, np.minimum(r + chunk_len, chunk_size), inter])


def critical_positions(positions: Array, chunk_len: int, chunk_size: int) -> Array:
    """Rotary positions [3, T] of the probe queries (section 2.1), not clamped: r, r + L, r + c."""
    r = np.asarray(positions) % chunk_len
    return np.stack([r, r + chunk_len, r + chunk_size])


def relative_positions(queries: Array, keys: Array, chunk_len: int, chunk_size: int, critical: bool = False) -> Array:
    """Relative position [len(queries), len(keys)] of every pair of absolute positions (section 0), causal or not.

    `critical` gives the continuous positions that selection uses instead of the clamped ones.
    """
    i, j = np.asarray(queries)[:, None], np.asarray(keys)[None, :]
    r_i, r_j = i % chunk_len, j % chunk_len
    chunks_apart = i // chunk_len - j // chunk_len
    succ = r_i + chunk_len if critical else np.minimum(r_i + chunk_len, chunk_size)
    inter = r_i + chunk_size if critical else np.full_like(r_i, min(2 * chunk_len - 1, chunk_size))
    result: Array = np.where(chunks_apart == 0, r_i, np.where(chunks_apart == 1, succ, inter)) - r_j
    return result


def inverse_frequencies(head_dim: int, base: float) -> Array:
    """float32 [D/2]: base^(-2k/D)."""
    return (float(base) ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def temperature(length: int, original_length: int) -> float:
    """m(n) of section 3, for a whole sequence of `length` tokens; 1 where the configuration switches scaling off."""
    if original_length == 0:
        return 1.0
    return max(1.0, 0.1 * math.log(length / original_length) + 1.0)


def rotate(x: Array, table: Array) -> Array:
    """Half-split rotation of x [..., D] by rows cos | sin [..., D]."""
    half = x.shape[-1] // 2
    cos, sin = table[..., :half], table[..., half:]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotary_table(positions: Array, inv_freq: Array) -> Array:
    """cos | sin [V, T, D] of angles that are float32 products of float32 factors, as section 2.2 has them."""
    angles = np.asarray(positions).astype(np.float32)[..., None] * np.asarray(inv_freq, dtype=np.float32)
    assert angles.dtype == np.float32
    angles = angles.astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def decode_inputs(
    lengths: Array, block_tables: Array, inv_freq: Array, page_size: int, chunk_len: int, chunk_size: int, original: int
) -> tuple[Array, Array, Array]:
    """Lengths int32 [B] grow by one in place; the new tokens' slots [B], rotary table [3, B, D] and scales [B].

    A scale is D^-0.5 m(length)^2; `original` is the original_max_position_embeddings of the temperature. A row of
    length 0 is empty: it stays so, its slot is -1, and what else it gets is that of a first token.
    """
    positions = lengths.astype(np.int64)
    pages = np.asarray(block_tables)[np.arange(len(lengths)), positions // page_size].astype(np.int64)
    table = rotary_table(query_positions(positions, chunk_len, chunk_size), inv_freq)
    scale = [temperature(place + 1, original) ** 2 / math.sqrt(2 * len(inv_freq)) for place in positions.tolist()]
    lengths += lengths > 0
    return np.where(positions > 0, pages * page_size + positions % page_size, -1), table, np.array(scale)
