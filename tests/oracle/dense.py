"""Dense dual chunk attention over paged keys, stage by stage (sections 4 and 9 of the specification)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .arrays import Array, wide

INTRA, SUCC, INTER = 0, 1, 2


class StageKeys(NamedTuple):
    """The absolute keys [start, end) that meet one stage's rotation of the queries."""

    stage: int
    start: int
    end: int


def attend(q: Array, k: Array, v: Array, visible: Array, scale: float) -> tuple[Array, Array]:
    """Softmax attention of q [n, H, D] over k, v [m, G, D], and the natural log of the sum of exp of scaled logits.

    visible is bool [n, m] or [H, n, m]. Query head h reads KV head h * G // H. Returns O [n, H, D] and LSE [H, n]; a
    row that sees nothing has O = 0 and LSE = -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = scale * (q.transpose(1, 0, 2) @ k.transpose(1, 2, 0))
    logits = np.where(visible, logits, -np.inf)
    peak = np.maximum(logits.max(axis=-1, initial=-np.inf), np.finfo(np.float64).min)
    weights = np.exp(logits - peak[..., None])
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore"):
        lse = peak + np.log(total)
    out = weights @ v.transpose(1, 0, 2) / np.where(total == 0.0, 1.0, total)[..., None]
    return out.transpose(1, 0, 2), lse


def merge(outputs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """One softmax over the union of disjoint key sets from each set's output [n, H, D] and natural-log LSE [H, n]."""
    stacked = np.stack(lses)
    peak = np.maximum(stacked.max(axis=0), np.finfo(np.float64).min)
    weights = np.exp(stacked - peak)
    total = weights.sum(axis=0)
    with np.errstate(divide="ignore"):
        lse = peak + np.log(total)
    weights = weights / np.where(total == 0.0, 1.0, total)
    return sum(w.T[..., None] * o for w, o in zip(weights, outputs)), lse


def stages_of(begin: int, end: int, chunk_len: int) -> list[StageKeys]:
    """Key sets of the queries [begin, end), which lie in one DCA chunk (section 4.2 step 3), without empty ones."""
    chunk = begin // chunk_len * chunk_len
    assert end <= chunk + chunk_len, f"queries [{begin}, {end}) cross a border of DCA chunks of {chunk_len}"
    stages = [StageKeys(INTRA, chunk, end)]
    if chunk >= chunk_len:
        stages.append(StageKeys(SUCC, chunk - chunk_len, chunk))
    if chunk >= 2 * chunk_len:
        stages.append(StageKeys(INTER, 0, chunk - chunk_len))
    return stages


def pieces_of(begin: int, end: int, chunk_len: int) -> list[tuple[int, int]]:
    """The pieces [begin, end) of a prefill chunk, each within one DCA chunk (section 4.2)."""
    borders = [begin, *range((begin // chunk_len + 1) * chunk_len, end, chunk_len), end]
    return list(zip(borders[:-1], borders[1:]))


def read_pages(cache: Array, block_table: Array, start: int, end: int) -> Array:
    """Rows [end - start, G, D] of the tokens [start, end) of a sequence."""
    page_size = cache.shape[1]
    positions = np.arange(start, end)
    return wide(cache[np.asarray(block_table)[positions // page_size], positions % page_size])


def dense_piece(
    q: Array,
    key_cache: Array,
    value_cache: Array,
    block_table: Array,
    begin: int,
    chunk_len: int,
    scale: float,
) -> tuple[Array, Array]:
    """O [n, H, D] and LSE [H, n] of the piece [begin, begin + n) from its rotated queries [V, n, H, D]."""
    rows = np.arange(begin, begin + q.shape[1])
    parts = []
    for stage, start, end in stages_of(begin, begin + len(rows), chunk_len):
        keys = read_pages(key_cache, block_table, start, end)
        values = read_pages(value_cache, block_table, start, end)
        visible = np.arange(start, end) <= rows[:, None]
        parts.append(attend(wide(q[stage]), keys, values, visible, scale))
    return merge(*zip(*parts))


def dca_prefill(
    q: Array,
    out: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    pieces: Array,
    scale: Array,
    chunk_len: int,
    lse: Array | None = None,
) -> None:
    """Write dual chunk attention of every piece (sequence, first row, rows, first absolute position) into its rows.

    lse [T, H], when given, receives the natural log of the sum of exp of the scaled logits.
    """
    for sequence, row, rows, begin in np.asarray(pieces).tolist():
        own = slice(row, row + rows)
        caches = key_cache, value_cache, block_tables[sequence]
        out[own], sums = dense_piece(q[:, own], *caches, begin, chunk_len, float(scale[sequence]))
        if lse is not None:
            lse[own] = sums.T


def decode_lengths(length: int, chunk_len: int) -> tuple[int, int, int]:
    """Keys of the intra, succ and inter stage that the last of `length` tokens attends to (section 9)."""
    chunk = (length - 1) // chunk_len
    earlier = max(chunk - 1, 0)
    return length - chunk * chunk_len, (chunk - earlier) * chunk_len, earlier * chunk_len


def dca_decode(
    q: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    lengths: Array,
    scale: Array,
    chunk_len: int,
) -> Array:
    """Attention [B, H, D] of the last token of each sequence: three stages split by length, merged (section 9).

    A sequence of length 0 gets zeros.
    """
    out = np.zeros(q.shape[1:])
    for sequence, length in enumerate(np.asarray(lengths).tolist()):
        if length == 0:
            continue
        intra, succ, inter = decode_lengths(length, chunk_len)
        parts = []
        for stage, start, count in ((INTER, 0, inter), (SUCC, inter, succ), (INTRA, inter + succ, intra)):
            keys = read_pages(key_cache, block_tables[sequence], start, start + count)
            values = read_pages(value_cache, block_tables[sequence], start, start + count)
            query = wide(q[stage if count else INTRA, sequence])[None]
            parts.append(attend(query, keys, values, np.ones((1, count), bool), float(scale[sequence])))
        out[sequence] = merge(*zip(*parts))[0][0]
    return out
