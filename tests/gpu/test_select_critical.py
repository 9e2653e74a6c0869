"""Exact top-k on a GPU beside the oracle: the same indices, entry by entry."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

POISON = -7
Rows = Callable[[np.random.Generator, int, int], np.ndarray]


def select(
    cuda: Any, sums: np.ndarray, sizes: np.ndarray, widths: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Columns and diagonals of sums [2, H, keys] and sizes [2, H]; `widths` default to the largest size that counts."""
    _, heads, keys = sums.shape
    widths = widths or tuple(min(keys, int(size)) for size in sizes.max(axis=1))
    guarded = [torch.full((heads * width + 64,), POISON, dtype=torch.int32, device="cuda") for width in widths]
    vertical, slash = (torch.from_numpy(np.ascontiguousarray(s, np.float32)).cuda() for s in sums)
    vertical_sizes, slash_sizes = (torch.from_numpy(np.ascontiguousarray(s, np.int32)).cuda() for s in sizes)
    cuda(
        "select_critical",
        vertical=vertical,
        slash=slash,
        vertical_sizes=vertical_sizes,
        slash_sizes=slash_sizes,
        columns=guarded[0],
        slashes=guarded[1],
        heads=heads,
        keys=keys,
        column_width=widths[0],
        slash_width=widths[1],
        forced_columns=min(oracle.SINK_COLUMNS, keys),
        forced_diagonals=min(oracle.LOCAL_DIAGONALS, keys),
    )
    results = [g.cpu().numpy() for g in guarded]
    for result in results:
        assert (result[-64:] == POISON).all(), "written behind the end"
    columns, slashes = (r[:-64].reshape(heads, width) for r, width in zip(results, widths))
    return columns, slashes


def assert_equal_to_the_oracle(cuda: Any, sums: np.ndarray, sizes: np.ndarray) -> None:
    sums = np.asarray(sums, np.float32)
    expected = oracle.select_critical(*sums, *sizes, *sizes.max(axis=1).tolist())
    for name, got, wanted in zip(("columns", "slashes"), select(cuda, sums, sizes), expected):
        for head, (row, wanted_row) in enumerate(zip(got, wanted)):
            np.testing.assert_array_equal(row, wanted_row, f"{name} of head {head}, size {sizes[:, head].tolist()}")


def probabilities(rng: np.random.Generator, heads: int, keys: int) -> np.ndarray:
    """Spread over many orders of magnitude, as sums of a softmax are; some underflow."""
    return np.exp(-np.abs(rng.standard_normal((heads, keys))) * rng.uniform(0.1, 60, (heads, 1)))


def few_values(rng: np.random.Generator, heads: int, keys: int) -> np.ndarray:
    return rng.integers(0, 5, (heads, keys)) / 8.0


def last_bits(rng: np.random.Generator, heads: int, keys: int) -> np.ndarray:
    """Equal but for the lowest bits of the mantissa."""
    return (np.float32(0.75).view(np.int32) + rng.integers(0, 600, (heads, keys))).astype(np.int32).view(np.float32)


def tiny(rng: np.random.Generator, heads: int, keys: int) -> np.ndarray:
    """Denormals, zeros of both signs."""
    bits = rng.integers(0, 3, (heads, keys)) * rng.integers(0, 2000, (heads, keys))
    values = bits.astype(np.int32).view(np.float32)
    return np.where(rng.random((heads, keys)) < 0.2, np.float32(-0.0), values)


def constant(rng: np.random.Generator, heads: int, keys: int) -> np.ndarray:
    return np.broadcast_to(rng.choice([0.0, 1e-30, 1.0], (heads, 1)), (heads, keys))


def sorted_rows(rng: np.random.Generator, heads: int, keys: int) -> np.ndarray:
    rows = np.sort(rng.random((heads, keys)), axis=1)
    return rows[:, ::-1] if rng.random() < 0.5 else rows


def needles(rng: np.random.Generator, heads: int, keys: int) -> np.ndarray:
    """Nothing but a few keys, in places that differ by head."""
    rows = np.zeros((heads, keys))
    rows[np.arange(heads)[:, None], rng.integers(0, keys, (heads, 40))] = rng.random((heads, 40)) * 64
    return rows


KINDS = [probabilities, few_values, last_bits, tiny, constant, sorted_rows, needles]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@each_kind
@pytest.mark.parametrize("keys", [1, 2, 3, 31, 100, 101, 1023, 16383, 16384, 16385, 16388, 40001])
def test_equal_to_the_oracle(cuda: Any, rng: np.random.Generator, kind: Rows, keys: int) -> None:
    """Rows that begin off 16 bytes, ends of tiles, sizes from 1 to beyond all keys, ties to the lower index."""
    heads = 6
    sums = np.stack([kind(rng, heads, keys), kind(rng, heads, keys)])
    sizes = rng.integers(1, keys + 20, (2, heads))
    sizes[:, :3] = 1, keys, max(1, keys - 1)
    assert_equal_to_the_oracle(cuda, sums, sizes)


@each_kind
def test_a_million_keys(cuda: Any, rng: np.random.Generator, kind: Rows) -> None:
    keys = int(rng.integers(1_000_000, 1_010_001))
    sums = np.stack([kind(rng, 3, keys), kind(rng, 3, keys)])
    assert_equal_to_the_oracle(cuda, sums, np.array([[1000, 15744, 130], [6096, 18340, 800]]))


@pytest.mark.parametrize("keys", [500_224, 1_010_000])
def test_a_sample_that_misleads(cuda: Any, rng: np.random.Generator, keys: int) -> None:
    """Large are the packs of four that the kernel looks at first, one in each group of 64, and hardly another entry."""
    groups = np.arange(keys // 256, dtype=np.uint32)
    packs = groups.astype(np.int64) * 64 + (groups * np.uint32(2654435761) >> np.uint32(16)) % 64
    sums = rng.random((2, 3, keys)) * 1e-3
    sums[:, :, (packs[:, None] * 4 + np.arange(4)).ravel()] += 1.0
    sums[:, :, rng.integers(0, keys, 5000)] += 2.0
    assert_equal_to_the_oracle(cuda, sums, np.array([[1000, 12000, 30], [6096, 18340, 4990]]))


def test_more_entries_than_have_room_in_a_list(cuda: Any, rng: np.random.Generator) -> None:
    """Many heads, so that few blocks share a row; dense places, and many that are equal."""
    sums = np.stack([probabilities(rng, 40, 600_000), few_values(rng, 40, 600_000)])
    sums[0, :, 100_000:130_000] += 2.0
    assert_equal_to_the_oracle(cuda, sums, rng.integers(15_000, 40_000, (2, 40)))


@pytest.mark.parametrize("size", [1, 30, 31, 99, 100, 101, 130])
def test_forced_entries_come_first(cuda: Any, rng: np.random.Generator, size: int) -> None:
    """The first 30 columns and the last 100 diagonals, the lower ones where not all of them fit."""
    sums = np.stack([probabilities(rng, 2, 5001), probabilities(rng, 2, 5001)])
    sums[0, :, :30] = sums[1, :, -100:] = 0.0
    assert_equal_to_the_oracle(cuda, sums, np.full((2, 2), size))


def test_many_heads_with_sizes_of_their_own(cuda: Any, rng: np.random.Generator) -> None:
    sums = np.stack([probabilities(rng, 40, 70001), probabilities(rng, 40, 70001)])
    assert_equal_to_the_oracle(cuda, sums, rng.integers(30, 20000, (2, 40)))


def test_sizes_are_cut_to_the_width_of_the_output(cuda: Any, rng: np.random.Generator) -> None:
    """Sizes are read on the device, where nobody can refuse one that is too large."""
    sums = np.stack([probabilities(rng, 2, 3000), probabilities(rng, 2, 3000)]).astype(np.float32)
    got = select(cuda, sums, np.full((2, 2), 500), widths=(200, 300))
    expected = oracle.select_critical(*sums, np.full(2, 200), np.full(2, 300), 200, 300)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
