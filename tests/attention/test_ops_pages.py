"""Copies of pages: the rows asked for and nothing else, in every type that a cache has."""

from __future__ import annotations

import numpy as np
import pytest
from faces import STORAGE, array, tensor

from paddle_qwen1m import ops


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rows", [0, 1, 7, 16])
def test_the_first_rows_of_a_page_are_copied(rng: np.random.Generator, storage: str, rows: int) -> None:
    caches = [tensor(rng.standard_normal((5, 16, 2, 64)), storage) for _ in range(2)]
    expected = [array(cache) for cache in caches]
    for cache in expected:
        cache[4, :rows] = cache[1, :rows]
    ops.copy_page(*caches, 1, 4, rows)
    for cache, numbers in zip(caches, expected):
        np.testing.assert_array_equal(array(cache), numbers)


@pytest.mark.parametrize("source, target, rows", [(5, 0, 1), (0, -1, 1), (2, 2, 1), (0, 1, 17), (0, 1, -1)])
def test_what_is_no_page_is_refused(source: int, target: int, rows: int) -> None:
    cache = tensor(np.zeros((5, 16, 2, 64)))
    with pytest.raises(ValueError, match=r"copy_page: (source and target|rows) must be"):
        ops.copy_page(cache, cache.clone(), source, target, rows)
