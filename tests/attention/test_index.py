"""Conversion of columns and offsets to blocks and columns: properties 25 to 27."""

from __future__ import annotations

import numpy as np
import oracle
import paddle
import pytest
from faces import FACES, Face
from oracle.index_vectors import GOLDEN

from paddle_qwen1m import ops
from paddle_qwen1m.config import column_widths

each_face = pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)


@pytest.mark.parametrize("name", GOLDEN)
def test_p25_golden_vectors_of_one_stage(name: str) -> None:
    """Property 25: section 6, exact, for columns and offsets as the stage sees them."""
    rows, keys, causal, block, columns, offsets, expected = GOLDEN[name]
    merged = oracle.index_rows(rows, keys, columns, offsets, causal, block)
    assert [(r.blocks, r.columns) for r in merged] == expected


@each_face
@pytest.mark.parametrize("name", GOLDEN)
def test_p25_golden_vectors_through_the_selection(face: Face, name: str) -> None:
    """Property 25: the same vectors as the intra stage of a piece that ends at kv, or the succ stage before one."""
    rows, keys, causal, block, columns, offsets, expected = GOLDEN[name]
    begin = keys - rows if causal else keys
    chunk_len = 2 * keys if causal else keys
    last = begin + rows - 1
    slashes = np.sort([last - s for s in offsets])
    index = face.sparse_index(np.array([columns]), slashes[None], begin, rows, chunk_len, block)
    stage = oracle.INTRA if causal else oracle.SUCC
    got = [oracle.index_stage(index, 0, r, stage) for r in range(len(expected))]
    assert [(r.blocks, r.columns) for r in got] == expected


def requested_cells(
    rows: int, keys: int, columns: np.ndarray, offsets: np.ndarray, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Cells [rows, keys] on a column or a diagonal, and those that causality allows."""
    row, key = np.arange(rows)[:, None], np.arange(keys)
    last = row + keys - rows if causal else row + keys
    visible = key <= last if causal else np.ones((rows, keys), bool)
    return (np.isin(np.broadcast_to(key, (rows, keys)), columns) | np.isin(last - key, offsets)) & visible, visible


def assert_invariants(
    rows: int,
    keys: int,
    columns: np.ndarray,
    offsets: np.ndarray,
    causal: bool,
    merged: list[oracle.IndexRow],
    block: int = 64,
) -> None:
    """The invariants of section 6 for one head and stage, local keys."""
    requested, visible = requested_cells(rows, keys, columns, offsets, causal)
    for r, (blocks, singles) in enumerate(merged):
        own = slice(r * block, (r + 1) * block)
        starts, singles_array = np.array(blocks, dtype=int), np.array(singles, dtype=int)
        assert (np.diff(starts) >= block).all(), "blocks ascend and are disjoint"
        assert len(blocks) <= len(offsets)
        assert (np.diff(singles_array) > 0).all(), "columns ascend and are unique"
        assert ((singles_array >= 0) & (singles_array < keys)).all()
        assert set(singles) <= set(columns.tolist())
        covered = np.zeros(keys + block, bool)
        for start in blocks:
            assert 0 <= start < keys
            covered[start : start + block] = True
        assert not covered[singles_array].any(), "no column lies in a block"
        assert all(start + block <= keys for start in blocks[:-1]), "only the last block overruns the keys"
        covered[singles_array] = True
        assert (covered[:keys] | ~requested[own]).all(), "every requested visible cell is covered"
        if causal:
            tail = visible[own].all(axis=0)
            assert all(tail[start : start + block].all() for start in blocks[:-2]), "masks only in the last two blocks"
            groups = -(-len(singles) // block)
            assert tail[singles_array[: max(0, groups - 2) * block]].all(), "masks only in the last two column groups"


def random_stage(rng: np.random.Generator, causal: bool) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Rows, keys, ascending columns and descending offsets of one stage, sparse to crowded."""
    rows = int(rng.integers(1, 260))
    keys = rows + int(rng.integers(0, 300)) if causal else int(rng.integers(1, 500))
    reach = keys if causal else keys + rows
    columns = np.unique(rng.integers(0, keys, rng.integers(1, 60)))
    offsets = rng.integers(0, reach, rng.integers(1, 60))
    if rng.random() < 0.5:
        start = int(rng.integers(0, reach))
        offsets = np.r_[offsets, np.arange(start, min(reach, start + int(rng.integers(1, 200))))]
    if causal:
        offsets = np.r_[offsets, np.arange(min(100, keys))]
    return rows, keys, columns, np.unique(offsets)[::-1]


@pytest.mark.parametrize("causal", [True, False])
def test_p26_conversion_invariants(rng: np.random.Generator, causal: bool) -> None:
    """Property 26: the invariants of section 6 on random rows, keys, columns and offsets."""
    for _ in range(400):
        rows, keys, columns, offsets = random_stage(rng, causal)
        merged = oracle.index_rows(rows, keys, columns.tolist(), offsets.tolist(), causal, 64)
        assert_invariants(rows, keys, columns, offsets, causal, merged)


@each_face
def test_p26_selection_invariants(face: Face, rng: np.random.Generator) -> None:
    """Property 26: the invariants for every stage of random pieces, several heads with padding in one call."""
    for _ in range(25):
        chunk_len = int(rng.choice([64, 128, 192, 320]))
        begin = int(rng.integers(0, 4 * chunk_len))
        rows = int(rng.integers(1, chunk_len - begin % chunk_len + 1))
        heads, seen = 3, begin + rows
        columns = np.full((heads, seen), oracle.PADDING, np.int32)
        slashes = np.full((heads, seen), oracle.PADDING, np.int32)
        for head in range(heads):
            chosen = np.unique(np.r_[: min(30, seen), rng.integers(0, seen, rng.integers(1, 60))])
            columns[head, : len(chosen)] = chosen
            chosen = np.unique(np.r_[max(0, seen - 100) : seen, rng.integers(0, seen, rng.integers(1, 60))])
            slashes[head, : len(chosen)] = chosen
        index = face.sparse_index(columns, slashes, begin, rows, chunk_len)
        row_blocks = -(-rows // 64)
        assert index.counts.shape == (heads, row_blocks, 6)
        for head in range(heads):
            own = columns[head][columns[head] < seen], slashes[head][slashes[head] < seen]
            for (stage, start, end), local_columns, offsets in oracle.split_stages(*own, begin, rows, chunk_len):
                merged = [oracle.index_stage(index, head, r, stage) for r in range(row_blocks)]
                local = [oracle.IndexRow([b - start for b in r.blocks], [c - start for c in r.columns]) for r in merged]
                if not len(local_columns):
                    local_columns = oracle.fallback(end - start)
                if not len(offsets):
                    offsets = oracle.fallback(end - start)[::-1]
                assert_invariants(rows, end - start, local_columns, offsets, stage == oracle.INTRA, local)


@each_face
def test_index_equals_the_oracle_entry_by_entry(face: Face, rng: np.random.Generator) -> None:
    """Section 6: the rounding of ranges is part of the contract; blocks and columns agree exactly with the oracle."""
    for _ in range(40):
        chunk_len = int(rng.choice([64, 128, 192, 448]))
        begin = int(rng.integers(0, 4 * chunk_len))
        rows = int(rng.integers(1, chunk_len - begin % chunk_len + 1))
        seen = begin + rows
        columns, slashes = (np.full((2, seen), oracle.PADDING, np.int32) for _ in range(2))
        for head in range(2):
            spread = seen if rng.random() < 0.5 else max(1, seen // 4)
            low = int(rng.integers(0, seen - spread + 1))
            chosen = np.unique(low + rng.integers(0, spread, rng.integers(1, 60)))
            columns[head, : len(chosen)] = chosen
            chosen = np.unique(np.r_[seen - 1, low + rng.integers(0, spread, rng.integers(1, 60))])
            slashes[head, : len(chosen)] = chosen
        index = face.sparse_index(columns, slashes, begin, rows, chunk_len)
        expected = oracle.sparse_index(columns, slashes, begin, rows, chunk_len)
        np.testing.assert_array_equal(index.counts, expected.counts)
        for head, r, stage in np.ndindex(*expected.counts.shape[:2], 3):
            assert oracle.index_stage(index, head, r, stage) == oracle.index_stage(expected, head, r, stage)


@pytest.mark.parametrize("run", [1, 2, 63, 64, 65, 66, 100, 129, 200])
def test_p27_a_run_of_offsets_costs_its_length_in_blocks(run: int) -> None:
    """Property 27: r consecutive offsets, away from the edges, yield ceil((63 + r) / 64) blocks."""
    offsets = [*range(500 + run - 1, 499, -1), 0]
    merged = oracle.index_rows(64, 2048, [0], offsets, True, 64)
    assert len(merged[0].blocks) - 1 == -(-(63 + run) // 64)


@each_face
@pytest.mark.parametrize("run", [1, 2, 65, 66, 100, 129])
def test_p27_runs_through_the_selection(face: Face, run: int) -> None:
    """Property 27: the same through the index of a whole piece, in the succ stage."""
    chunk_len, rows = 1024, 64
    begin = chunk_len
    hits = begin + rows - 1 - np.arange(500 + run - 1, 499, -1)
    slashes = np.r_[hits, begin + rows - 1][None]
    index = face.sparse_index(np.array([[0]]), slashes, begin, rows, chunk_len)
    assert index.counts[0, 0, oracle.SUCC] == -(-(63 + run) // 64)


def tables_of(columns: paddle.Tensor, slashes: paddle.Tensor, *piece: int, **row_blocks: int) -> oracle.IndexTables:
    return oracle.IndexTables(*(t.numpy() for t in ops.sparse_index(columns, slashes, *piece, **row_blocks)))


@pytest.mark.parametrize("begin, rows", [(0, 200), (320, 320), (700, 130), (2000, 200), (2240, 320)])
def test_columns_lie_there_once_a_head_with_a_bit_a_row_block_for_each(
    rng: np.random.Generator, begin: int, rows: int
) -> None:
    """Stages from multiples of 64 on, INT32_MAX up to the next; bits are those of the listed columns, as many as are
    counted. One head keeps columns of all stages, one few and late ones, one none: for a stage without any of its own
    five spread ones stand in.
    """
    chunk_len, keys = 320, begin + rows
    lines = [np.sort(rng.permutation(keys)[:190]), np.arange(keys - 5, keys), np.empty(0, int)]
    columns = np.array([np.r_[line, np.full(190 - len(line), oracle.PADDING)] for line in lines], np.int32)
    diagonals = np.r_[keys - 100 : keys : 3]
    slashes = np.tile(diagonals.astype(np.int32), (3, 1))
    tables = tables_of(paddle.to_tensor(columns), paddle.to_tensor(slashes), begin, rows, chunk_len)
    expected, bits = oracle.sparse_index(columns, slashes, begin, rows, chunk_len), oracle.listed_bits(tables)
    for head, line in enumerate(lines):
        first, parts = 0, oracle.split_stages(line, diagonals, begin, rows, chunk_len)
        assert set(np.flatnonzero(tables.column_counts[head])) == {stage.stage for stage, _, _ in parts}
        for (stage, start, end), own, _ in reversed(parts):
            own = start + (own if len(own) else oracle.fallback(end - start))
            assert len(own) == tables.column_counts[head, stage]
            padded = -(-len(own) // 64) * 64
            np.testing.assert_array_equal(tables.columns[head, first : first + len(own)], own)
            assert (tables.columns[head, first + len(own) : first + padded] == 2**31 - 1).all()
            assert not bits[head, :, first + len(own) : first + padded].any()
            for r in range(-(-rows // 64)):
                listed = bits[head, r, first : first + padded]
                assert listed.sum() == tables.counts[head, r, 3 + stage]
                assert own[listed[: len(own)]].tolist() == oracle.index_stage(expected, head, r, stage).columns
            first += padded
    assert bits[0].any(), "some columns are listed"


@each_face
@pytest.mark.parametrize("columns", [[100, 1000], [1000], [100, 900, 1000]])
def test_columns_behind_the_last_block_of_a_stage_are_listed(face: Face, columns: list[int]) -> None:
    """However many are left there: in the succ stage, for a row block that no later diagonal of it crosses."""
    begin = chunk_len = 1024
    index = face.sparse_index(np.array([columns]), np.array([[200, begin + 127]]), begin, 128, chunk_len)
    blocks, listed = oracle.index_stage(index, 0, 1, oracle.SUCC)
    assert max(blocks) + 64 < 900 and listed == columns


@pytest.mark.parametrize("selected", [1, 51, 52, 53, 64, 115, 116, 117, 1000])
def test_columns_have_room_for_every_cut_into_stages(selected: int) -> None:
    """What a head takes at most: each stage filled up, and five columns where it has none; as the plan counts it."""
    begin, rows, chunk_len = 5000, 64, 1000
    cuts = {*range(min(selected, 4) + 1), 59, 60, 64, 65, 128, 129, selected - 1, selected} & {*range(selected + 1)}
    starts = 0, 4000, 5000
    lines = [
        [n for start, size in zip(starts, (one, other, selected - one - other)) for n in range(start, start + size)]
        for one in cuts
        for other in cuts
        if one + other <= selected and selected - one - other <= rows
    ]
    columns = paddle.to_tensor(np.array(lines, np.int32))
    slashes = paddle.to_tensor(np.full((len(lines), 1), begin + rows - 1, np.int32))
    tables = tables_of(columns, slashes, begin, rows, chunk_len)
    width = (selected + 3 * (5 + 63)) // 64 * 64
    assert tables.columns.shape[1] == 32 * tables.listed.shape[2] == column_widths(np.array(selected)) == width
    assert max(map(oracle.used_width, tables.column_counts)) <= width
    assert tables.column_counts.sum() >= columns.size


def test_row_blocks_of_a_piece_are_those_of_the_whole(rng: np.random.Generator) -> None:
    """Ranges that begin and end anywhere, of a piece that all three stages are seen from, its last row block short."""
    begin, rows, chunk_len = 5 * 640 + 100, 470, 640
    columns, slashes = (
        paddle.to_tensor(np.sort(np.stack([rng.permutation(begin + rows)[:n] for _ in range(2)])).astype(np.int32))
        for n in (90, 700)
    )
    piece = columns, slashes, begin, rows, chunk_len
    whole = tables_of(*piece)
    widths = [oracle.used_width(counts) for counts in whole.column_counts]
    for first, count in ((0, 0), (0, 3), (2, 5), (7, 1)):
        part = tables_of(*piece, first_block=first, num_blocks=count)
        assert part.counts.shape[1] == part.blocks.shape[1] == part.listed.shape[1] == count
        np.testing.assert_array_equal(part.counts, whole.counts[:, first : first + count])
        np.testing.assert_array_equal(part.column_counts, whole.column_counts)
        for head, width in enumerate(widths):
            np.testing.assert_array_equal(part.columns[head, :width], whole.columns[head, :width])
            own, words = whole.listed[head, first : first + count], width // 32
            np.testing.assert_array_equal(part.listed[head, :, :words], own[:, :words])
        for head, block in np.ndindex(*part.counts.shape[:2]):
            size = part.counts[head, block, :3].sum()
            np.testing.assert_array_equal(part.blocks[head, block, :size], whole.blocks[head, first + block, :size])
    with pytest.raises(ValueError, match=r"row blocks 7 to 9 are not among the piece's 8"):
        ops.sparse_index(*piece, first_block=7, num_blocks=2)
