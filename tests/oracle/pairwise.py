"""Dual chunk attention pair by pair: shares nothing with the three stages but the relative positions' definition."""

from __future__ import annotations

import numpy as np

from .arrays import Array
from .positions import relative_positions


def pairwise_dca(
    q: Array,
    k: Array,
    v: Array,
    inv_freq: Array,
    chunk_len: int,
    chunk_size: int,
    scale: float,
    begin: int = 0,
    critical: bool = False,
) -> Array:
    """Dual chunk attention by the definition: every pair has one relative position, every row one softmax.

    q [n, H, D] of positions begin .. begin + n, k and v [begin + n, G, D], none rotated. The logit of a pair is the
    real part of the sum over frequencies of q * conj(k) * exp(i * relative position * frequency). Returns [n, H, D].
    """
    rows, keys = np.arange(begin, begin + q.shape[0]), np.arange(begin + q.shape[0])
    distance = relative_positions(rows, keys, chunk_len, chunk_size, critical).astype(np.float64)
    group, half = q.shape[1] // k.shape[1], q.shape[2] // 2
    query = q[..., :half] + 1j * q[..., half:]
    key = np.repeat(k[..., :half] - 1j * k[..., half:], group, axis=1)
    logits = np.zeros((q.shape[1], *distance.shape))
    for f, frequency in enumerate(np.asarray(inv_freq, dtype=np.float64)):
        phase = np.exp(1j * frequency * distance)
        logits += (query[:, :, f].T[:, :, None] * key[:, :, f].T[:, None, :] * phase).real
    logits = np.where(keys <= rows[:, None], scale * logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    result: Array = (weights @ np.repeat(v, group, axis=1).transpose(1, 0, 2)).transpose(1, 0, 2)
    return result
