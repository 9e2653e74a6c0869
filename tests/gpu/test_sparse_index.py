"""Index conversion on a GPU beside the oracle: the same blocks, columns and counts, entry by entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from cuda_library import index_shapes
from oracle.index_vectors import GOLDEN

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

POISON = -7
GUARD = 64


def convert(
    cuda: Any,
    columns: np.ndarray,
    slashes: np.ndarray,
    begin: int,
    rows: int,
    chunk_len: int,
    block: int,
    first: int = 0,
    count: int | None = None,
    *,
    chained: bool = False,
) -> oracle.SparseIndex:
    """The index of row blocks of a piece, by default of all, in tables of the widths that the op gives them; entries
    that nobody wrote are POISON. chained: by chains that were made before.
    """
    heads, count = len(columns), -(-rows // block) - first if count is None else count
    shapes = index_shapes(heads, count, columns.shape[1], slashes.shape[1], begin + rows, block)
    tables = {
        name: torch.full((int(np.prod(shape)) + GUARD,), POISON, dtype=torch.int32, device="cuda")
        for name, shape in shapes.items()
    }
    fields = {
        "columns": torch.from_numpy(np.ascontiguousarray(columns, np.int32)).cuda(),
        "slashes": torch.from_numpy(np.ascontiguousarray(slashes, np.int32)).cuda(),
        "chains": None,
        "tables": {**tables, "block_width": shapes["blocks"][2], "column_width": shapes["columns"][1]},
        "heads": heads,
        "selected_columns": columns.shape[1],
        "selected_slashes": slashes.shape[1],
        "begin": begin,
        "rows": rows,
        "chunk_len": chunk_len,
        "block": block,
        "first_block": first,
        "num_blocks": count,
    }
    if chained:
        shape = heads, 3, slashes.shape[1] + 6
        fields["chains"] = torch.full(shape, POISON, dtype=torch.int32, device="cuda")
        cuda("index_chains", **fields)
    cuda("sparse_index", **fields)
    results = {name: table.cpu().numpy() for name, table in tables.items()}
    assert all((result[-GUARD:] == POISON).all() for result in results.values()), "written behind the end"
    found = oracle.IndexTables(**{name: results[name][:-GUARD].reshape(shape) for name, shape in shapes.items()})
    assert_laid_out(found, columns, slashes, begin, rows, chunk_len)
    index = oracle.listed_columns(found)
    width = shapes["columns"][1] - index.columns.shape[2]
    return index._replace(columns=np.pad(index.columns, ((0, 0), (0, 0), (0, width)), constant_values=oracle.PADDING))


def assert_laid_out(
    found: oracle.IndexTables, columns: np.ndarray, slashes: np.ndarray, begin: int, rows: int, chunk_len: int
) -> None:
    """Columns by stages, those that keep one from being empty among them, with padding behind them and nothing else."""
    for head in range(len(columns)):
        chosen = [lines[head][lines[head] != oracle.PADDING].astype(int) for lines in (columns, slashes)]
        wanted = np.full(found.columns.shape[1], POISON)
        wanted[: oracle.used_width(found.column_counts[head])] = oracle.PADDING
        spans = oracle.column_spans(found.column_counts[head])
        sizes = [0, 0, 0]
        for (stage, start, end), own, _ in oracle.split_stages(*chosen, begin, rows, chunk_len):
            own = start + (own if len(own) else oracle.fallback(end - start))
            sizes[stage], wanted[spans[stage].start : spans[stage].start + len(own)] = len(own), own
        np.testing.assert_array_equal(found.column_counts[head], sizes)
        np.testing.assert_array_equal(found.columns[head], wanted)


def assert_equal_to_the_oracle(
    cuda: Any, columns: np.ndarray, slashes: np.ndarray, begin: int, rows: int, chunk_len: int, block: int = 64
) -> None:
    got = convert(cuda, columns, slashes, begin, rows, chunk_len, block)
    expected = oracle.sparse_index(columns, slashes, begin, rows, chunk_len, block)
    piece = f"piece [{begin}, {begin + rows}), chunks of {chunk_len}, blocks of {block}"
    np.testing.assert_array_equal(got.counts, expected.counts, f"counts; {piece}")
    for name, table, wanted, counts, unused in (
        ("blocks", got.blocks, expected.blocks, expected.counts[..., :3], POISON),
        ("columns", got.columns, expected.columns, expected.counts[..., 3:], oracle.PADDING),
    ):
        width = max(table.shape[2], wanted.shape[2])
        table, wanted = (
            np.pad(t, ((0, 0), (0, 0), (0, width - t.shape[2])), constant_values=unused) for t in (table, wanted)
        )
        wanted = np.where(np.arange(width) < counts.sum(axis=2, keepdims=True), wanted, unused)
        np.testing.assert_array_equal(table, wanted, f"{name}; {piece}")


def padded(rows: list[np.ndarray], width: int) -> np.ndarray:
    return np.stack([np.r_[row, np.full(width - len(row), oracle.PADDING)].astype(np.int32) for row in rows])


def random_lines(rng: np.random.Generator, keys: int, most: int) -> np.ndarray:
    """Ascending distinct keys: scattered, in runs, in one part of the sequence, all of them, or none."""
    kind = rng.integers(0, 6)
    if kind == 0:
        return np.arange(keys)
    if kind == 1:
        return np.empty(0, int)
    spread = keys if kind < 4 else max(1, keys // int(rng.integers(2, 9)))
    low = int(rng.integers(0, keys - spread + 1))
    chosen = low + rng.integers(0, spread, rng.integers(1, most + 1))
    if rng.random() < 0.5:
        chosen = (chosen[: len(chosen) // 8 + 1, None] + np.arange(rng.integers(1, 200))).ravel()
    return np.unique(chosen[chosen < keys])


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(cuda: Any, name: str) -> None:
    """Section 6, exact: as the intra stage of a piece that ends at kv, or the succ stage before one."""
    rows, keys, causal, block, columns, offsets, expected = GOLDEN[name]
    begin = keys - rows if causal else keys
    slashes = np.sort([begin + rows - 1 - s for s in offsets])
    index = convert(cuda, np.array([columns]), slashes[None], begin, rows, 2 * keys if causal else keys, block)
    stage = oracle.INTRA if causal else oracle.SUCC
    got = [oracle.index_stage(index, 0, r, stage) for r in range(len(expected))]
    assert [(r.blocks, r.columns) for r in got] == expected


@pytest.mark.parametrize("block", [1, 2, 16, 64, 128])
def test_equal_to_the_oracle(cuda: Any, rng: np.random.Generator, block: int) -> None:
    """Pieces that start anywhere in a chunk, stages with and without lines of their own, heads of different budgets."""
    for _ in range(60):
        chunk_len = int(rng.choice([2, 8, 30]) if block < 16 else rng.choice([64, 128, 192, 448, 1000]))
        begin = int(rng.integers(0, 5 * chunk_len))
        rows = int(rng.integers(1, chunk_len - begin % chunk_len + 1))
        keys = begin + rows
        lines = [[random_lines(rng, keys, 60) for _ in range(4)] for _ in range(2)]
        if rng.random() < 0.5:
            lines[1] = [np.unique(np.r_[max(0, keys - 100) : keys, line]) for line in lines[1]]
        width = max(1, *(len(line) for part in lines for line in part))
        assert_equal_to_the_oracle(
            cuda, padded(lines[0], width), padded(lines[1], width + 3), begin, rows, chunk_len, block
        )


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 2048, 2111])
def test_every_column_and_every_diagonal(cuda: Any, rows: int) -> None:
    """Full budgets, one or the other or both, in the third chunk."""
    chunk_len = 2112
    begin = 2 * chunk_len + (chunk_len - rows) // 2
    keys = begin + rows
    everything, few = np.arange(keys)[None], np.r_[0:30, keys - 100 : keys][None]
    for columns, slashes in ((everything, everything), (everything, few), (few, everything)):
        assert_equal_to_the_oracle(cuda, columns, slashes, begin, rows, chunk_len)


def test_no_selection_at_all(cuda: Any) -> None:
    """Only what keeps a stage from being empty."""
    nothing = np.full((2, 5), oracle.PADDING)
    for begin, rows, chunk_len in ((0, 200, 256), (300, 150, 256), (700, 3, 256), (9, 1, 3)):
        assert_equal_to_the_oracle(cuda, nothing, nothing, begin, rows, chunk_len)


@pytest.mark.parametrize("run", [1, 8, 64])
def test_a_million_keys(cuda: Any, rng: np.random.Generator, run: int) -> None:
    """The last piece of 1,015,808 keys in chunks of the real length: local diagonals and runs anywhere."""
    begin, rows, chunk_len = 983_040, 8_192, 253_952
    keys = begin + rows
    columns, slashes = [], []
    for budget in (1000, 130):
        columns.append(np.unique(np.r_[0:30, rng.integers(0, keys, budget - 30)]))
        starts = rng.integers(0, keys - run, 4096 // run)
        slashes.append(np.unique(np.r_[keys - 2048 : keys, (starts[:, None] + np.arange(run)).ravel()]))
    assert_equal_to_the_oracle(cuda, padded(columns, 1000), padded(slashes, 6144), begin, rows, chunk_len)


def test_row_blocks_of_a_piece_are_those_of_the_whole(cuda: Any, rng: np.random.Generator) -> None:
    """Ranges that begin and end anywhere, of a piece that all three stages are seen from, its last row block short."""
    begin, rows, chunk_len = 5 * 640 + 100, 470, 640
    keys = begin + rows
    columns = np.sort(np.stack([rng.permutation(keys)[:90] for _ in range(2)]))
    slashes = np.sort(np.stack([rng.permutation(keys)[:700] for _ in range(2)]))
    piece = cuda, columns, slashes, begin, rows, chunk_len, 64
    whole = convert(*piece)
    for first, count in ((0, 1), (0, 3), (2, 5), (7, 1), (1, 7)):
        for chained in (False, True):
            part = convert(*piece, first, count, chained=chained)
            for one, of_all in zip(part, whole):
                np.testing.assert_array_equal(
                    one, of_all[:, first : first + count], f"row blocks from {first}, {count}"
                )
