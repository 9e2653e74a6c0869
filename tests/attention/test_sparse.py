"""Sparse attention over an index, and its assembly from selection to output: properties 28 to 33."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from cases import CHUNK_LEN, Prompt, make_prompt
from faces import FACES, Face, OpFace, OracleFace, error

oracle_face = OracleFace()
each_face = pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)
PIECES = [(0, 1), (0, 128), (0, 100), (50, 110), (128, 256), (190, 256), (256, 257), (270, 384), (520, 640), (527, 600)]


def lse_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute deviation of a log: the relative one of the sum it stands for."""
    return float(np.abs(got - expected).max()) if np.isfinite(got).all() else float("inf")


def whole_index(prompt: Prompt, begin: int, end: int, blocks_per_stage: int) -> oracle.SparseIndex:
    """Every visible key: each stage's first aligned blocks, then all its other keys as columns."""
    row_blocks, heads = -(-(end - begin) // 64), prompt.q.shape[1]
    blocks: list[int] = []
    columns: list[int] = []
    counts = np.zeros((heads, row_blocks, 6), np.int32)
    for stage, start, stop in reversed(oracle.stages_of(begin, end, prompt.chunk_len)):
        own = list(range(start, stop, 64))[:blocks_per_stage]
        rest = list(range(min(start + 64 * len(own), stop), stop))
        counts[..., stage], counts[..., 3 + stage] = len(own), len(rest)
        blocks += own
        columns += rest
    shape = heads, row_blocks
    return oracle.SparseIndex(
        np.broadcast_to(np.array(blocks, np.int32), (*shape, len(blocks))).copy(),
        np.broadcast_to(np.array(columns, np.int32), (*shape, len(columns))).copy(),
        counts,
    )


SHAPES = [(1, 1), (1, 1024), (1, 2048), (1023, 2049), (1023, 1023), (32, 32), (65, 65), (129, 129)]


@each_face
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows, keys", SHAPES)
def test_p28_blocks_and_columns_that_cover_everything_equal_dense(
    face: Face, rng: np.random.Generator, rows: int, keys: int, causal: bool
) -> None:
    """Property 28: first blocks aligned, all other keys columns; O and LSE equal dense attention.

    Without a mask as the succ stage of a piece after one chunk of `keys` keys; causal as the intra stage. float32 on
    the CPU.
    """
    chunk_len = -(-keys // 64) * 64 + 64 if causal else keys
    begin = keys - rows if causal else keys
    prompt = make_prompt(rng, begin + rows, chunk_len, 32, heads=2, kv_heads=1, page_size=64 if causal else 1)
    piece = prompt.queries[:, begin:], *prompt.caches, begin, chunk_len, prompt.scale
    expected, expected_lse = oracle.dense_piece(*piece)
    sizes = (0, 1, 2, 3, 7, 15, 32) if rows * keys < 200_000 else (0, 7, 32)
    for blocks in sizes:
        got, lse = prompt.sparse(face, begin, begin + rows, whole_index(prompt, begin, begin + rows, blocks))
        assert error(got, expected) < face.tolerance
        assert lse_error(lse, expected_lse.T) < 10 * face.tolerance


@each_face
@pytest.mark.parametrize("begin, end", PIECES)
def test_p29_future_keys_never_reach_a_row(face: Face, rng: np.random.Generator, begin: int, end: int) -> None:
    """Property 29: altering keys and values after a row's position leaves the row unchanged, bit for bit."""
    prompt = make_prompt(rng, end)
    index = prompt.index(face, begin, end, 60, 101)
    before, _ = prompt.sparse(face, begin, end, index)
    keys, values, _ = prompt.caches
    for row in (0, (end - begin) // 2, end - begin - 1):
        future = prompt.cache.slots(0, begin + row + 1, end)
        saved = keys.copy(), values.copy()
        keys.reshape(-1, *keys.shape[2:])[future] = 50.0 * rng.standard_normal((len(future), *keys.shape[2:]))
        values.reshape(-1, *keys.shape[2:])[future] = 50.0
        after, _ = prompt.sparse(face, begin, end, index)
        np.testing.assert_array_equal(after[: row + 1], before[: row + 1])
        assert row + 1 == end - begin or not np.array_equal(after[row + 1 :], before[row + 1 :])
        keys[:], values[:] = saved


@each_face
@pytest.mark.parametrize("begin, end", PIECES)
def test_p30_lse_is_the_natural_log_over_the_visited_keys(
    face: Face, rng: np.random.Generator, begin: int, end: int
) -> None:
    """Property 30: LSE equals log sum exp of the scaled logits over exactly the visited set; recall lies in (0, 1]."""
    prompt = make_prompt(rng, end, temperature=1.1)
    index = prompt.index(oracle_face, begin, end, 60, 101)
    _, lse = prompt.sparse(face, begin, end, index)
    total = np.zeros((4, end - begin))
    for stage in oracle.stages_of(begin, end, CHUNK_LEN):
        times = oracle.visited_cells(index, begin, end - begin, CHUNK_LEN, stage)
        assert times.max(initial=0) <= 1, "no key is visited twice"
        keys = np.repeat(oracle.read_pages(prompt.caches[0], prompt.caches[2], stage.start, stage.end), 2, axis=1)
        queries = prompt.queries[stage.stage, begin:end].transpose(1, 0, 2)
        logits = prompt.scale * (queries @ keys.transpose(1, 2, 0))
        total += (np.exp(logits) * times).sum(axis=-1)
    assert lse_error(lse, np.log(total).T) < 10 * face.tolerance
    recall = np.exp(lse.T - prompt.dense_lse(begin, end))
    assert (recall > 0).all() and (recall <= 1 + 10 * face.tolerance).all()


@each_face
@pytest.mark.parametrize("vertical, slash", [(10_000, 100), (10_000, 10_000), (31, 10_000)])
@pytest.mark.parametrize("begin, end", PIECES)
def test_p31_full_budgets_reproduce_dense_attention(
    face: Face, rng: np.random.Generator, begin: int, end: int, vertical: int, slash: int
) -> None:
    """Property 31: all columns, or all diagonals, with few of the other: exact for starts 0, mid-chunk, multi-chunk."""
    prompt = make_prompt(rng, end, temperature=1.07)
    got, lse = prompt.sparse(face, begin, end, prompt.index(face, begin, end, vertical, slash))
    assert error(got, prompt.dense(oracle_face)[begin:]) < face.tolerance
    assert lse_error(lse, prompt.dense_lse(begin, end).T) < 10 * face.tolerance


def selected_mass(prompt: Prompt, begin: int, end: int, vertical: int, slash: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall [H, n] of the selected cells alone, and of all that the index visits."""
    keys, _, table = prompt.caches
    rows, positions = np.arange(begin, end), np.arange(end)
    probes = prompt.critical[:, max(begin, end - 64) : end]
    scores = oracle.dca_probe(probes, keys, table, end, CHUNK_LEN, prompt.scale)
    sizes = np.full(4, vertical), np.full(4, slash)
    columns, slashes = oracle.select_critical(*scores, *sizes, vertical, slash)
    index = oracle.sparse_index(columns, slashes, begin, end - begin, CHUNK_LEN)
    dense = prompt.dense_lse(begin, end)
    selected, visited = np.zeros_like(dense), np.zeros_like(dense)
    for stage in oracle.stages_of(begin, end, CHUNK_LEN):
        own = slice(stage.start, stage.end)
        k = np.repeat(oracle.read_pages(keys, table, stage.start, stage.end), 2, axis=1)
        queries = prompt.queries[stage.stage, begin:end].transpose(1, 0, 2)
        logits = prompt.scale * (queries @ k.transpose(1, 2, 0))
        mass = np.where(positions[own] <= rows[:, None], np.exp(logits - dense[..., None]), 0.0)
        diagonal = positions[own] + (end - 1 - rows)[:, None]
        for head in range(4):
            wanted = np.isin(positions[own], columns[head])[None] | np.isin(diagonal, slashes[head])
            selected[head] += (mass[head] * wanted).sum(axis=-1)
        visited += (mass * oracle.visited_cells(index, begin, end - begin, CHUNK_LEN, stage)).sum(axis=-1)
    return selected, visited


@pytest.mark.parametrize("begin, end", [(0, 128), (190, 256), (520, 640)])
def test_p32_larger_budgets_never_lower_recall(rng: np.random.Generator, begin: int, end: int) -> None:
    """Property 32: the recall of the selected columns and diagonals rises with every budget, for every row.

    Blocks add keys that nobody selected, and where they start depends on the selection: a larger budget may lose such
    a gift (on some rows about 1 % of the mass). Visited keys hold the selected ones always, and more mass on average.
    """
    prompt = make_prompt(rng, end)
    budgets = [(31, 100), (31, 120), (60, 120), (60, 300), (200, 300), (640, 640)]
    recalls = [selected_mass(prompt, begin, end, *budget) for budget in budgets]
    for selected, visited in recalls:
        assert (visited >= selected - 1e-12).all() and (visited <= 1 + 1e-12).all()
    for (smaller, smaller_visited), (larger, larger_visited) in zip(recalls, recalls[1:]):
        assert (larger >= smaller - 1e-12).all()
        assert larger_visited.mean() >= smaller_visited.mean() - 1e-12
    np.testing.assert_allclose(recalls[-1][0], 1.0, rtol=0, atol=1e-12)


def adversarial_columns(end: int) -> dict[str, np.ndarray]:
    """Selections with all columns at one place."""
    return {
        "first": np.array([0]),
        "last": np.array([end - 1]),
        "inter": np.arange(0, min(end, 200), 3),
        "final": np.arange(max(0, end - 90), end),
    }


@each_face
@pytest.mark.parametrize("columns", ["first", "last", "inter", "final"])
@pytest.mark.parametrize("begin, end", PIECES)
def test_p33_one_sided_selections_stay_finite(
    face: Face, rng: np.random.Generator, begin: int, end: int, columns: str
) -> None:
    """Property 33: all columns in one stage, only local diagonals or a lone one: finite, and the oracle's numbers."""
    prompt = make_prompt(rng, end, temperature=3.0)
    for diagonals in (np.array([end - 1]), np.arange(max(0, end - 100), end), np.array([0, end - 1])):
        chosen = np.tile(adversarial_columns(end)[columns].astype(np.int32), (4, 1))
        slashes = np.tile(np.unique(diagonals).astype(np.int32), (4, 1))
        index = face.sparse_index(chosen, slashes, begin, end - begin, CHUNK_LEN)
        got, lse = prompt.sparse(face, begin, end, index)
        expected, expected_lse = prompt.sparse(
            oracle_face, begin, end, oracle.sparse_index(chosen, slashes, begin, end - begin, CHUNK_LEN)
        )
        assert error(got, expected) < face.tolerance
        assert lse_error(lse, expected_lse) < 10 * face.tolerance


@pytest.mark.parametrize("fault", ["first column", "first block", "last block"])
@pytest.mark.parametrize("begin, end", [(310, 384), (520, 640)])
def test_a_dropped_column_or_block_is_noticed(rng: np.random.Generator, begin: int, end: int, fault: str) -> None:
    """The comparison has teeth: an op that skipped one column, or one tile, of one head would fail it by far."""
    prompt = make_prompt(rng, end)
    index = prompt.index(oracle_face, begin, end, 60, 101)
    expected, _ = prompt.sparse(oracle_face, begin, end, index)
    faulty = oracle.SparseIndex(*(part.copy() for part in index))
    head, row_block = 1, 0
    counts = faulty.counts[head, row_block]
    entries = (faulty.columns if fault == "first column" else faulty.blocks)[head, row_block]
    kinds = counts[3:] if fault == "first column" else counts[:3]
    if fault == "last block":
        kinds[oracle.INTRA] -= 1
    else:
        first_stage = max(stage for stage in range(3) if kinds[stage] > 0)
        kinds[first_stage] -= 1
        entries[:-1] = entries[1:].copy()
    assert (kinds >= 0).all()
    got, _ = prompt.sparse(OpFace(), begin, end, faulty)
    assert error(got, expected) > 100 * OpFace.tolerance
    intact, _ = prompt.sparse(OpFace(), begin, end, index)
    assert error(intact, expected) < OpFace.tolerance
