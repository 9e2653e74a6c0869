"""Numpy float64 reference of every custom op: what each must compute, written to be read beside the specification.

Functions carry the names, arguments and shapes of `paddle_qwen1m.ops` (its docstring explains the letters) and are
slow on purpose. Inputs are arrays of any float type that numpy holds; arithmetic and results are float64. Caches and
`out` are written in place, as the ops do. "Section" and "property" refer to the specification of dual chunk and
vertical-slash attention that the tests quote.

Beside the ops: the explicit pairwise form of dual chunk attention, which shares nothing but the relative positions'
definition with the three-stage form, and the rules that turn positions, lengths and recall into numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
INTRA, SUCC, INTER = 0, 1, 2
SINK_COLUMNS = 30
LOCAL_DIAGONALS = 100
PADDING = np.iinfo(np.int32).max


class SparseIndex(NamedTuple):
    """What every head visits in every block of rows of one piece: the layout of `paddle_qwen1m.ops.SparseIndex`."""

    blocks: Array
    columns: Array
    counts: Array


class IndexRow(NamedTuple):
    """What one block of query rows visits in one stage: first keys of key blocks, and single keys, stage-local."""

    blocks: list[int]
    columns: list[int]


class StageKeys(NamedTuple):
    """The absolute keys [start, end) that meet one stage's rotation of the queries."""

    stage: int
    start: int
    end: int


# Positions, rotation and temperature (sections 2 and 3)


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

    A scale is D^-0.5 m(length)^2; `original` is the original_max_position_embeddings of the temperature.
    """
    lengths += 1
    positions = lengths.astype(np.int64) - 1
    pages = np.asarray(block_tables)[np.arange(len(lengths)), positions // page_size].astype(np.int64)
    table = rotary_table(query_positions(positions, chunk_len, chunk_size), inv_freq)
    scale = [temperature(length, original) ** 2 / math.sqrt(2 * len(inv_freq)) for length in lengths.tolist()]
    return pages * page_size + positions % page_size, table, np.array(scale)


# Everything around attention


def embedding(ids: Array, table: Array, first: int = 0) -> Array:
    """Rows [T, hidden] of table [rows, hidden], which holds ids from `first` on; zeros for the others."""
    at = ids - first
    held = (at >= 0) & (at < len(table))
    return np.where(held[:, None], _wide(table)[np.where(held, at, 0)], 0.0)


def rms_norm(hidden: Array, weight: Array, eps: float) -> Array:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis of [T, N]."""
    hidden = _wide(hidden)
    result: Array = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + eps) * _wide(weight)
    return result


def add_rms_norm(delta: Array, residual: Array, weight: Array, eps: float) -> Array:
    """residual += delta in place; the norm of the sum."""
    residual += delta
    return rms_norm(residual, weight, eps)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [T, K] times weight [N, K] transposed, plus bias [N]."""
    product = _wide(x) @ _wide(weight).T
    return product if bias is None else product + _wide(bias)


def silu_mul(gate_up: Array) -> Array:
    """silu(gate) * up for gate | up side by side in [T, 2I]."""
    gate, up = np.split(_wide(gate_up), 2, axis=-1)
    with np.errstate(over="ignore"):
        result: Array = gate / (1.0 + np.exp(-gate)) * up
        return result


def gather_rows(hidden: Array, rows: Array) -> Array:
    """Rows [n, N] of hidden [T, N]."""
    return _wide(hidden)[rows]


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
    rows = (_wide(qkv) + _wide(bias)).reshape(tokens, -1, head_dim)
    queries, keys, values = np.split(rows, [-2 * kv_heads, -kv_heads], axis=1)
    table = _wide(table)
    for token, slot in enumerate(np.asarray(slots)):
        page, offset = divmod(int(slot), page_size)
        key_cache[page, offset] = round_to_cache(rotate(keys[token], table[0, token]))
        value_cache[page, offset] = round_to_cache(values[token])
    return rotate(queries[None], table[:, :, None])


def rotate_queries(qkv: Array, bias: Array, table: Array, row: int, heads: int) -> Array:
    """Rotations [V, n, H, D] of the biased queries of rows row .. row + n, for probe tables [V, n, D]."""
    _, n, head_dim = table.shape
    queries = (_wide(qkv) + _wide(bias))[row : row + n, : heads * head_dim].reshape(n, heads, head_dim)
    return rotate(queries[None], _wide(table)[:, :, None])


# Dense attention (sections 4 and 9)


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
    return _wide(cache[np.asarray(block_table)[positions // page_size], positions % page_size])


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
        parts.append(attend(_wide(q[stage]), keys, values, visible, scale))
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
    """Attention [B, H, D] of the last token of each sequence: three stages split by length, merged (section 9)."""
    out = np.empty(q.shape[1:])
    for sequence, length in enumerate(np.asarray(lengths).tolist()):
        intra, succ, inter = decode_lengths(length, chunk_len)
        parts = []
        for stage, start, count in ((INTER, 0, inter), (SUCC, inter, succ), (INTRA, inter + succ, intra)):
            keys = read_pages(key_cache, block_tables[sequence], start, start + count)
            values = read_pages(value_cache, block_tables[sequence], start, start + count)
            query = _wide(q[stage if count else INTRA, sequence])[None]
            parts.append(attend(query, keys, values, np.ones((1, count), bool), float(scale[sequence])))
        out[sequence] = merge(*zip(*parts))[0][0]
    return out


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


# Choosing columns and diagonals (section 5)


def probe_scores(q: Array, key_cache: Array, block_table: Array, end: int, chunk_len: int, scale: float) -> Array:
    """Softmax rows A [H, lq, M] of the last lq queries before `end`, from critical rotations [V, lq, H, D]."""
    rows = np.arange(end - q.shape[1], end)
    group = q.shape[2] // key_cache.shape[2]
    logits = []
    for stage, start, stop in reversed(stages_of(rows[0], end, chunk_len)):
        keys = np.repeat(read_pages(key_cache, block_table, start, stop), group, axis=1)
        logits.append(scale * (_wide(q[stage]).transpose(1, 0, 2) @ keys.transpose(1, 2, 0)))
    masked = np.where(np.arange(end) <= rows[:, None], np.concatenate(logits, axis=-1), -np.inf)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
    result: Array = weights / weights.sum(axis=-1, keepdims=True)
    return result


def diagonal_sums(scores: Array) -> Array:
    """slash [H, M] of A [H, lq, M]: entry t sums the diagonal that hits column t on the last row (section 5.3)."""
    heads, rows, columns = scores.shape
    slash = np.zeros((heads, columns))
    for a in range(rows):
        shift = rows - 1 - a
        slash[:, shift:] += scores[:, a, : columns - shift]
    return slash


def dca_probe(
    q: Array, key_cache: Array, block_table: Array, end: int, chunk_len: int, scale: float
) -> tuple[Array, Array]:
    """Column and diagonal sums (vertical [H, M], slash [H, M]) of the probe rows, nothing forced yet."""
    scores = probe_scores(q, key_cache, block_table, end, chunk_len, scale)
    return scores.sum(axis=1), diagonal_sums(scores)


def select_critical(
    vertical: Array,
    slash: Array,
    vertical_sizes: Array,
    slash_sizes: Array,
    max_vertical: int,
    max_slash: int,
) -> tuple[Array, Array]:
    """Best columns and diagonals of every head, ascending, padded with INT32_MAX (sections 5.2 to 5.4).

    The first 30 columns and the last 100 diagonals come first; among equal scores the lower index wins.
    """
    length = vertical.shape[1]
    columns = np.array(vertical, dtype=np.float64)
    columns[:, :SINK_COLUMNS] = np.inf
    diagonals = np.array(slash, dtype=np.float64)
    diagonals[:, max(length - LOCAL_DIAGONALS, 0) :] = np.inf
    return (
        _top(columns, vertical_sizes, min(max_vertical, length)),
        _top(diagonals, slash_sizes, min(max_slash, length)),
    )


def _top(scores: Array, sizes: Array, width: int) -> Array:
    chosen = np.full((scores.shape[0], width), PADDING, dtype=np.int32)
    for head, size in enumerate(np.asarray(sizes).tolist()):
        best = np.argsort(-scores[head], kind="stable")[: min(size, width)]
        chosen[head, : len(best)] = np.sort(best)
    return chosen


def fallback(length: int) -> Array:
    """Up to five evenly spaced indices that stand in for an empty list of a stage of `length` keys (section 5.5)."""
    return np.arange(0, length, int(max(1, length / 5)))[:5]


def split_stages(
    columns: Array, slashes: Array, begin: int, rows: int, chunk_len: int
) -> list[tuple[StageKeys, Array, Array]]:
    """For each stage: its keys, its local columns (ascending) and its local offsets (descending), before fallbacks.

    columns and slashes are one head's absolute selection without padding (section 5.5).
    """
    chunk = begin // chunk_len * chunk_len
    keys_seen = begin + rows
    parts = []
    for part in stages_of(begin, keys_seen, chunk_len):
        inside = columns[(columns >= part.start) & (columns < part.end)]
        if part.stage == INTRA:
            offsets = (keys_seen - 1) - slashes[slashes >= chunk]
        elif part.stage == SUCC:
            reaches = (slashes >= chunk - chunk_len) & (slashes < chunk + rows)
            offsets = (chunk + rows - 1) - slashes[reaches]
        else:
            offsets = (chunk - chunk_len + rows - 1) - slashes[slashes < chunk - chunk_len + rows]
        parts.append((part, np.sort(inside - part.start), np.sort(offsets)[::-1]))
    return parts


def index_rows(
    rows: int, keys: int, columns: Sequence[int], offsets: Sequence[int], causal: bool, block: int
) -> list[IndexRow]:
    """Section 6 for one head and stage: ascending columns and descending offsets, merged for every block of rows."""
    return [_merge_row(start, rows, keys, columns, offsets, causal, block) for start in range(0, rows, block)]


def _merge_row(
    start: int, rows: int, keys: int, columns: Sequence[int], offsets: Sequence[int], causal: bool, block: int
) -> IndexRow:
    edge = start + block + (keys - rows if causal else keys)
    sentinel = edge + block
    out = IndexRow([], [])

    def end_of(offset: int) -> int:
        return max(edge - offset, block)

    def flush() -> None:
        out.blocks.extend(range(range_start, min(range_end, keys), block))

    waiting_columns, waiting_offsets = list(columns), list(offsets)
    column = waiting_columns.pop(0)
    offset = waiting_offsets.pop(0)
    while offset >= edge and waiting_offsets:
        offset = waiting_offsets.pop(0)
    if offset > edge:
        range_start = edge if causal else keys
        range_end = range_start + block
    else:
        range_end = end_of(offset)
        range_start = range_end - block

    while True:
        if column < range_end:
            if column < range_start:
                out.columns.append(column)
            column = waiting_columns.pop(0) if waiting_columns else sentinel
        elif waiting_offsets and (causal or waiting_offsets[0] >= start):
            end = end_of(waiting_offsets.pop(0))
            if end > range_end + block:
                flush()
                range_start, range_end = end - block, end
            elif end > range_end:
                range_end += block
        elif causal or not waiting_columns:
            if not causal and column < keys:
                out.columns.append(column)
            flush()
            return out
        else:
            flush()
            range_start, range_end = keys, keys + block
            waiting_offsets = []


def sparse_index(columns: Array, slashes: Array, begin: int, rows: int, chunk_len: int, block: int = 64) -> SparseIndex:
    """Selection [H, *] of the piece [begin, begin + rows) as key blocks and columns of every block of rows.

    Splits into stages, puts fallbacks where a stage got no column or no diagonal (section 5.5), and merges each stage
    (section 6).
    """
    heads, row_blocks = len(columns), -(-rows // block)
    counts = np.zeros((heads, row_blocks, 6), dtype=np.int32)
    blocks: list[list[list[int]]] = [[[] for _ in range(row_blocks)] for _ in range(heads)]
    singles: list[list[list[int]]] = [[[] for _ in range(row_blocks)] for _ in range(heads)]
    for head in range(heads):
        own_columns = columns[head][columns[head] != PADDING].astype(np.int64)
        own_slashes = slashes[head][slashes[head] != PADDING].astype(np.int64)
        parts = split_stages(own_columns, own_slashes, begin, rows, chunk_len)
        for (stage, start, end), local_columns, offsets in reversed(parts):
            if not len(local_columns):
                local_columns = fallback(end - start)
            if not len(offsets):
                offsets = fallback(end - start)[::-1]
            merged = index_rows(rows, end - start, local_columns.tolist(), offsets.tolist(), stage == INTRA, block)
            for r, row in enumerate(merged):
                blocks[head][r] += [start + b for b in row.blocks]
                singles[head][r] += [start + c for c in row.columns]
                counts[head, r, stage] = len(row.blocks)
                counts[head, r, 3 + stage] = len(row.columns)
    return SparseIndex(_padded(blocks), _padded(singles), counts)


def _padded(lists: list[list[list[int]]]) -> Array:
    width = max(len(entry) for head in lists for entry in head)
    return np.array([[e + [PADDING] * (width - len(e)) for e in head] for head in lists], dtype=np.int32)


def index_stage(index: SparseIndex, head: int, row_block: int, stage: int) -> IndexRow:
    """The blocks and columns (absolute keys) that an index lists for one head, row block and stage."""
    counts = np.asarray(index.counts)[head, row_block].tolist()
    before = {INTER: (), SUCC: (INTER,), INTRA: (INTER, SUCC)}[stage]
    block = sum(counts[s] for s in before)
    column = sum(counts[3 + s] for s in before)
    return IndexRow(
        np.asarray(index.blocks)[head, row_block, block : block + counts[stage]].tolist(),
        np.asarray(index.columns)[head, row_block, column : column + counts[3 + stage]].tolist(),
    )


def visited_cells(
    index: SparseIndex, begin: int, rows: int, chunk_len: int, stage: StageKeys, block: int = 64
) -> Array:
    """How often an index visits every cell [H, rows, keys of the stage] that causality allows."""
    heads = index.counts.shape[0]
    times = np.zeros((heads, rows, stage.end - stage.start), dtype=np.int32)
    keys = np.arange(stage.start, stage.end)
    for head in range(heads):
        for r, first in enumerate(range(0, rows, block)):
            blocks, columns = index_stage(index, head, r, stage.stage)
            visits = np.bincount(np.array(columns, dtype=np.int64) - stage.start, minlength=len(keys))
            for b in blocks:
                visits += (keys >= b) & (keys < b + block)
            times[head, first : first + block] = visits
    return np.where(keys <= np.arange(begin, begin + rows)[:, None], times, 0)


# Sparse attention (sections 7 and 8)


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
        parts.append(attend(_wide(q[part.stage]), keys, values, visible, scale))
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


# Sampling


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1), a multiple of 2^-24, that (seed, step) stand for: splitmix64."""
    mask = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15 * (step + 1)) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return (z >> 40) * 2.0**-24


def processed_logits(logits: Array, seen: Array, penalty: float, banned: Array) -> Array:
    """One row's logits [vocab] after the penalty over seen tokens, with banned ids at -inf (entries of -1: none)."""
    logits = _wide(logits)
    logits = np.where(seen.astype(bool), np.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits[banned[banned >= 0]] = -np.inf
    return logits


def candidates(logits: Array, temperature: float, top_k: int, top_p: float) -> tuple[Array, Array]:
    """Ids that a draw from one row's processed logits can give, in descending probability, and their cumulative one.

    top_k 0 and top_p 1 are off; ties go to the lower id. The cumulative probabilities are renormalised and end at 1.
    """
    order = np.argsort(-logits, kind="stable")
    kept = order[np.isfinite(logits[order])][: top_k if top_k > 0 else None]
    mass = np.exp((logits[kept] - logits[kept[0]]) / temperature)
    mass /= mass.sum()
    if top_p < 1:
        before = np.cumsum(mass) - mass
        kept = kept[: max(1, np.count_nonzero(before < top_p))]
    mass = mass[: len(kept)]
    return kept, np.cumsum(mass) / mass.sum()


def sample(
    logits: Array,
    seen: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    repetition_penalty: Array,
    banned: Array,
    banned_steps: Array,
    seeds: Array,
    steps: Array,
) -> tuple[Array, Array]:
    """One token id [B] a row and its log-probability [B] before temperature, top_k and top_p.

    Penalty over seen tokens, banned ids to -inf (entries of -1 mean none) while the step is below banned_steps,
    temperature (0: arg-max), top_k (0: off), top_p; ties go to the lower id. The token is the first, in descending
    probability, whose cumulative renormalised probability exceeds the uniform of (seed, step). Afterwards it is marked
    in seen, and the steps have grown by one.
    """
    ids = np.empty(len(logits), dtype=np.int64)
    logprobs = np.empty(len(logits))
    for row in range(len(logits)):
        step = int(steps[row])
        bans = banned[row] if step < banned_steps[row] else banned[row, :0]
        processed = processed_logits(logits[row], seen[row], float(repetition_penalty[row]), bans)
        ids[row] = processed.argmax()
        if temperature[row] > 0:
            kept, cumulative = candidates(processed, float(temperature[row]), int(top_k[row]), float(top_p[row]))
            chosen = np.searchsorted(cumulative, uniform(int(seeds[row]), step), side="right")
            ids[row] = kept[min(int(chosen), len(kept) - 1)]
        peak = processed.max()
        logprobs[row] = processed[ids[row]] - peak - np.log(np.exp(processed - peak).sum())
        seen[row, ids[row]] = 1
        steps[row] = step + 1
    return ids, logprobs


# Budgets (sections 1.3 and 1.4)


def effective_vertical_size(size: int) -> int:
    """A column budget of exactly 30 would be spent on the forced columns, and counts as 130 (section 1.3)."""
    return 130 if size == SINK_COLUMNS else size


def refine_budget(base: tuple[int, int], recall: float) -> tuple[int, int]:
    """(vertical, slash) budget of a head from its base pair and measured attention recall (section 1.4)."""
    buckets = ((0.9, 0), (0.8, 2048), (0.7, 4096), (0.6, 8192), (-math.inf, 12244))
    increment = next(increment for threshold, increment in buckets if recall >= threshold)
    return base[0] + increment, base[1] + increment


def _wide(x: Array) -> Array:
    return np.asarray(x, dtype=np.float64)
