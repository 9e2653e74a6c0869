"""Probe scores, column and diagonal selection, stage split: properties 16 to 24."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from cases import CHUNK_LEN, CHUNK_SIZE, LOCAL_SIZE, exact_frequencies, make_prompt, rotations
from faces import FACES, Face

each_face = pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 50), (3, 3), (7, 50), (64, 64), (64, 65), (64, 300)])
def test_p16_diagonal_sums_equal_the_naive_sums(rng: np.random.Generator, rows: int, columns: int) -> None:
    """Property 16: slash[t] sums A[a, t - (lq - 1 - a)]; one probe row is returned as it is."""
    scores = rng.random((2, rows, columns))
    naive = [
        [sum(head[a, t - (rows - 1 - a)] for a in range(rows) if t >= rows - 1 - a) for t in range(columns)]
        for head in scores
    ]
    np.testing.assert_allclose(oracle.diagonal_sums(scores), naive, rtol=0, atol=1e-12)
    if rows == 1:
        np.testing.assert_array_equal(oracle.diagonal_sums(scores), scores[:, 0])


@each_face
@pytest.mark.parametrize("rows, end", [(1, 1), (1, 300), (5, 5), (22, 150), (64, 64), (64, 192), (64, 500)])
def test_p16_probe_returns_column_and_diagonal_sums(face: Face, rng: np.random.Generator, rows: int, end: int) -> None:
    """Property 16: the sums of the explicit probe matrix; its single row where lq = 1."""
    prompt = make_prompt(rng, end)
    keys, _, table = prompt.caches
    probes = prompt.critical[:, end - rows :]
    scores = oracle.probe_scores(probes, keys, table, end, CHUNK_LEN, prompt.scale)
    vertical, slash = face.dca_probe(probes, keys, table, end, CHUNK_LEN, prompt.scale)
    np.testing.assert_allclose(vertical, scores.sum(axis=1), rtol=0, atol=10 * face.tolerance)
    np.testing.assert_allclose(slash, oracle.diagonal_sums(scores), rtol=0, atol=10 * face.tolerance)
    if rows == 1:
        np.testing.assert_allclose(vertical, slash, rtol=0, atol=face.tolerance)


@pytest.mark.parametrize("rows, end", [(1, 1), (64, 64), (20, 150), (64, 330), (64, 512)])
def test_p17_probe_rows_are_causal_distributions(rng: np.random.Generator, rows: int, end: int) -> None:
    """Property 17: probe rows sum to 1, and (a, M - lq + b) = 0 for b > a."""
    prompt = make_prompt(rng, end)
    keys, _, table = prompt.caches
    scores = oracle.probe_scores(prompt.critical[:, end - rows :], keys, table, end, CHUNK_LEN, prompt.scale)
    np.testing.assert_allclose(scores.sum(axis=-1), 1.0, rtol=0, atol=1e-13)
    assert (scores[:, :, end - rows :][:, np.triu(np.ones((rows, rows), bool), 1)] == 0).all()


@each_face
def test_p17_probe_mass_is_one_a_row(face: Face, rng: np.random.Generator) -> None:
    """Property 17: the sums over columns, and over diagonals, add up to the number of probe rows."""
    prompt = make_prompt(rng, 330)
    keys, _, table = prompt.caches
    vertical, slash = face.dca_probe(prompt.critical[:, -64:], keys, table, 330, CHUNK_LEN, prompt.scale)
    np.testing.assert_allclose(vertical.sum(axis=1), 64.0, rtol=10 * face.tolerance)
    np.testing.assert_allclose(slash.sum(axis=1), 64.0, rtol=10 * face.tolerance)


@each_face
@pytest.mark.parametrize("length", [1, 29, 30, 31, 99, 100, 101, 700])
def test_p18_sinks_and_local_diagonals_are_always_selected(face: Face, rng: np.random.Generator, length: int) -> None:
    """Property 18: columns 0..29 and offsets 0..99, or as many as exist, whatever their sums."""
    vertical, slash = 1.0 + rng.random((2, 3, length))
    vertical[:, :30] = 0.0
    slash[:, -100:] = 0.0
    sizes = np.array([130, 200, 1000])
    columns, slashes = face.select_critical(vertical, slash, sizes, sizes, 1000, 1000)
    for head in range(3):
        assert set(range(min(30, length))) <= set(columns[head].tolist())
        assert set(range(max(0, length - 100), length)) <= set(slashes[head].tolist())


@each_face
def test_p19_a_needle_is_selected_as_a_column(face: Face, rng: np.random.Generator) -> None:
    """Property 19: a key that every probe row scores high is among the columns, in whichever stage it lies."""
    tokens = 3 * CHUNK_LEN + 70
    for needle in (50, CHUNK_LEN + 60, 2 * CHUNK_LEN + 77, 3 * CHUNK_LEN + 2):
        prompt = make_prompt(rng, tokens, inv_freq=np.full(32, 1e-6, np.float32))
        keys, _, table = prompt.caches
        slot = prompt.cache.slots(0, needle, needle + 1)
        shared = 5.0 * rng.standard_normal(64)
        keys.reshape(-1, *keys.shape[2:])[slot] = shared
        probes = 0.1 * prompt.critical[:, -64:] + shared
        scores = face.dca_probe(probes, keys, table, tokens, CHUNK_LEN, prompt.scale)
        sizes = np.full(4, 31), np.full(4, 100)
        columns, _ = face.select_critical(*scores, *sizes, 31, 100)
        assert (columns[:, 30] == needle).all()


def test_p19_critical_positions_keep_diagonals_smooth(rng: np.random.Generator) -> None:
    """Property 19: with one content for all queries and one for all keys, only positions decide the logits.

    succ_critical logits are the plain RoPE logits of the true distance; inter_critical logits are constant along
    diagonals inside a pair of chunks; the clamped succ logits, which selection must not use, are constant along columns
    once r >= w.
    """
    head_dim, inv_freq = 64, exact_frequencies(64)
    q, k = rng.standard_normal((2, 1, head_dim))
    positions = np.arange(3 * CHUNK_LEN)
    tiled_q, tiled_k = np.tile(q, (len(positions), 1, 1)), np.tile(k, (len(positions), 1, 1))
    keys = rotations(tiled_k, oracle.key_positions(positions, CHUNK_LEN)[None], inv_freq)[0, :, 0]
    critical = rotations(tiled_q, oracle.critical_positions(positions, CHUNK_LEN, CHUNK_SIZE), inv_freq)[:, :, 0]
    clamped = rotations(tiled_q, oracle.query_positions(positions, CHUNK_LEN, CHUNK_SIZE), inv_freq)[:, :, 0]
    chunk = [slice(n * CHUNK_LEN, (n + 1) * CHUNK_LEN) for n in range(3)]

    plain = rotations(tiled_q, positions[None], inv_freq)[0, :, 0] @ k[0]
    succ = critical[oracle.SUCC, chunk[1]] @ keys[chunk[0]].T
    distance = np.arange(CHUNK_LEN)[:, None] + CHUNK_LEN - np.arange(CHUNK_LEN)
    np.testing.assert_allclose(succ, plain[distance], rtol=0, atol=1e-12)

    inter = critical[oracle.INTER, chunk[2]] @ keys[chunk[0]].T
    np.testing.assert_allclose(inter[1:, 1:], inter[:-1, :-1], rtol=0, atol=1e-12)
    assert np.abs(inter[1:] - inter[:-1]).max() > 0.1

    frozen = (clamped[oracle.SUCC, chunk[1]] @ keys[chunk[0]].T)[LOCAL_SIZE:]
    np.testing.assert_allclose(frozen, np.broadcast_to(frozen[:1], frozen.shape), rtol=0, atol=1e-12)
    assert np.abs(frozen[1:, 1:] - frozen[:-1, :-1]).max() > 0.1


@each_face
def test_p20_sizes_are_clipped_to_the_number_of_keys(face: Face, rng: np.random.Generator) -> None:
    """Property 20: budgets above M select everything; below, exactly their size, ascending, then INT32_MAX."""
    vertical, slash = rng.random((2, 3, 200))
    sizes = np.array([130, 199, 5000])
    columns, slashes = face.select_critical(vertical, slash, sizes, sizes, 5000, 5000)
    assert columns.shape == slashes.shape == (3, 200)
    for chosen in (columns, slashes):
        for head, size in enumerate((130, 199, 200)):
            assert (np.diff(chosen[head, :size]) > 0).all() and chosen[head, size - 1] < 200
            assert (chosen[head, size:] == oracle.PADDING).all()


@each_face
def test_selection_takes_the_largest_sums_and_the_lower_index_of_equal_ones(
    face: Face, rng: np.random.Generator
) -> None:
    """Sections 5.2 to 5.4: exact top-k by sum, ties to the lower index, different sizes in one call."""
    vertical = rng.integers(0, 6, (4, 900)) / 8.0
    slash = rng.integers(0, 6, (4, 900)) / 8.0
    slash[2], vertical[3] = 0.25, 0.0
    vertical_sizes, slash_sizes = np.array([30, 131, 500, 900]), np.array([100, 101, 333, 899])
    expected = oracle.select_critical(vertical, slash, vertical_sizes, slash_sizes, 900, 899)
    got = face.select_critical(vertical, slash, vertical_sizes, slash_sizes, 900, 899)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
    for head in range(4):
        forced_and_best = sorted(range(30, 900), key=lambda j: (-vertical[head, j], j))[: vertical_sizes[head] - 30]
        assert expected[0][head][: vertical_sizes[head]].tolist() == sorted([*range(30), *forced_and_best])


def random_selection(rng: np.random.Generator, begin: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and diagonals as selection could return them: sinks and local diagonals among them."""
    keys = begin + rows
    columns = np.unique(np.r_[: min(30, keys), rng.integers(0, keys, rng.integers(1, 40))])
    slashes = np.unique(np.r_[max(0, keys - 100) : keys, rng.integers(0, keys, rng.integers(1, 40))])
    return columns, slashes


PIECES = [(0, 1), (0, 128), (0, 77), (50, 30), (128, 128), (130, 5), (200, 56), (256, 1), (300, 84), (512, 100)]


@pytest.mark.parametrize("begin, rows", PIECES)
def test_p21_stage_split_covers_the_selection_exactly_once(rng: np.random.Generator, begin: int, rows: int) -> None:
    """Property 21: mapped back to absolute keys, stage columns and offsets are the selected columns and diagonals.

    For every row; no key appears in two stages; pieces that start mid-chunk included.
    """
    for _ in range(20):
        columns, slashes = random_selection(rng, begin, rows)
        parts = oracle.split_stages(columns, slashes, begin, rows, CHUNK_LEN)
        for a in range(rows):
            wanted = {*columns.tolist(), *(slashes - (rows - 1 - a)).tolist()}
            found: list[int] = []
            for (stage, start, end), local_columns, offsets in parts:
                shift = a - rows if stage == oracle.INTRA else a
                hits = {*local_columns.tolist(), *(end - start + shift - offsets).tolist()}
                found += [start + j for j in hits if 0 <= j < end - start]
            assert len(found) == len(set(found))
            visible = range(begin + a + 1)
            assert set(found) & set(visible) == wanted & set(visible)


FALLBACKS = [
    (7168, [0, 1433, 2866, 4299, 5732]),
    (253952, [0, 50790, 101580, 152370, 203160]),
    (131072, [0, 26214, 52428, 78642, 104856]),
    (16, [0, 3, 6, 9, 12]),
    (7, [0, 1, 2, 3, 4]),
    (5, [0, 1, 2, 3, 4]),
    (3, [0, 1, 2]),
    (1, [0]),
]


@pytest.mark.parametrize("length, expected", FALLBACKS)
def test_p22_fallback_indices(length: int, expected: list[int]) -> None:
    """Property 22: the evenly spaced indices that stand in for an empty list."""
    assert oracle.fallback(length).tolist() == expected


@each_face
def test_p22_empty_stages_get_fallback_columns(face: Face) -> None:
    """Property 22: a stage without columns or diagonals visits its fallbacks; what a block covers is not repeated."""
    chunk_len, begin, rows = 256, 3 * 256, 64
    slashes = np.arange(begin, begin + rows)[None]
    only_succ, only_inter = np.arange(520, 526)[None], np.arange(2)[None]
    index = face.sparse_index(only_succ, slashes, begin, rows, chunk_len)
    assert oracle.index_stage(index, 0, 0, oracle.SUCC).columns == only_succ[0].tolist()
    assert oracle.index_stage(index, 0, 0, oracle.INTER) == ([104, 206, 308, 410], [0, 102, 204, 306, 408])
    index = face.sparse_index(only_inter, slashes, begin, rows, chunk_len)
    assert oracle.index_stage(index, 0, 0, oracle.SUCC) == ([705], [512 + c for c in (0, 51, 102, 153)])
    assert oracle.index_stage(index, 0, 0, oracle.INTER).columns == [0, 1]


@each_face
def test_p24_slices_of_heads_concatenate_to_the_whole(face: Face, rng: np.random.Generator) -> None:
    """Property 24: every rank's query heads, KV heads and budgets give that rank's slice of the sparse output."""
    begin, end, ranks = 300, 384, 2
    prompt = make_prompt(rng, end, heads=8, kv_heads=4)
    vertical, slash = np.array([40, 60, 130, 31, 90, 200, 33, 50]), np.array([100, 130, 110, 101, 250, 100, 180, 140])

    def run(heads: slice, kv_heads: slice) -> np.ndarray:
        cache = prompt.cache._replace(
            keys=np.ascontiguousarray(prompt.cache.keys[:, :, kv_heads]),
            values=np.ascontiguousarray(prompt.cache.values[:, :, kv_heads]),
        )
        part = replace(prompt, q=prompt.q[:, heads], queries=prompt.queries[:, :, heads], cache=cache)
        probes = prompt.critical[:, end - 64 : end, heads]
        scores = face.dca_probe(probes, cache.keys, cache.tables[0], end, CHUNK_LEN, prompt.scale)
        selected = face.select_critical(*scores, vertical[heads], slash[heads], 200, 250)
        return part.sparse(face, begin, end, face.sparse_index(*selected, begin, end - begin, CHUNK_LEN))[0]

    whole = run(slice(0, 8), slice(0, 4))
    parts = [run(slice(4 * r, 4 * r + 4), slice(2 * r, 2 * r + 2)) for r in range(ranks)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=face.tolerance)
