"""Golden vectors of the index conversion (section 6 of the specification), for the tests of every device."""

from __future__ import annotations

# rows, keys, causal, block, columns, offsets of one stage, and for every row block (blocks, single columns)
GOLDEN: dict[str, tuple[int, int, bool, int, list[int], list[int], list[tuple[list[int], list[int]]]]] = {
    "causal-256": (256, 256, True, 64, [0, 1, 2, 70, 130, 200], [150, 64, 10, 0], [
        ([0], []), ([0, 64], []), ([0, 64, 128], []), ([42, 128, 192], [0, 1, 2]),
    ]),
    "causal-200": (200, 200, True, 64, [0, 5, 100], [128, 3, 0], [
        ([0], []), ([61, 125], [0, 5]), ([0, 125, 189], [100]), ([64, 189], [0, 5]),
    ]),
    "causal-130-of-258": (130, 258, True, 64, [0, 100, 180, 250], [200, 70, 1, 0], [
        ([58, 127, 191], [0]), ([0, 122, 191, 255], [100]), ([56, 186, 255], [0, 180, 250]),
    ]),
    "full-128-of-256": (128, 256, False, 64, [3, 90, 200, 255], [300, 200, 100, 20], [
        ([0, 64, 156, 236], []), ([20, 120, 220], [3, 90, 200]),
    ]),
    "full-100-of-192": (100, 192, False, 64, [0, 191], [5, 1], [([187], [0]), ([], [0, 191])]),
    "full-192-of-320": (192, 320, False, 64, [10, 64, 128], [500, 383, 128, 127], [
        ([0, 192, 256], [64, 128]), ([1, 256], [128]), ([0, 65], [64]),
    ]),
    "causal-blocks-of-2": (4, 4, True, 2, [1, 3], [2], [([0], []), ([0], [])]),
    "full-blocks-of-2": (4, 4, False, 2, [1, 3], [2], [([2], [1]), ([], [1, 3])]),
}  # fmt: skip
