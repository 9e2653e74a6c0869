"""How large a cache becomes: arithmetic over pages, activations and what is available."""

from __future__ import annotations

import pytest

from paddle_qwen1m.engine import NotEnoughMemory
from paddle_qwen1m.engine.admission import Budget, cache_pages

PAGE = 1000


@pytest.mark.parametrize(
    "needed, spare, available, expected",
    [
        ([4], 2, 10_000, 6),  # everything fits
        ([4, 3], 2, 100_000, 11),  # more for each of two
        ([4, 3], 2, 9_999, 9),  # as far as memory allows
        ([4, 3], 2, 6_000, 6),  # too little for both at once: they take turns
        ([4, 3], 2, 4_000, 4),
        ([4, 3], 2, None, 11),  # nobody knows: nothing is refused
    ],
)
def test_pages_of_a_cache(needed: list[int], spare: int, available: int | None, expected: int) -> None:
    assert cache_pages(needed, spare, Budget(PAGE, 0, available), page_size=256) == expected


def test_activations_come_first() -> None:
    assert cache_pages([4], 100, Budget(PAGE, 3_500, 10_000), page_size=256) == 6


def test_what_cannot_fit_is_refused_with_every_number() -> None:
    with pytest.raises(NotEnoughMemory) as error:
        cache_pages([2, 4], 1, Budget(int(2e9), int(1e9), int(8.9e9)), page_size=256)
    for part in (
        "1,024 tokens",
        "9.0 GB",
        "8.0 GB of keys and values",
        "1.0 GB of activations",
        "8.9 GB are available",
    ):
        assert part in str(error.value)
