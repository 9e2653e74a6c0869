"""E4M3 by its definition: what each byte stands for, and the nearest one of a number."""

from __future__ import annotations

import numpy as np


def _value(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if byte & 128 else size


VALUES = np.array([_value(byte) for byte in range(256)])
"""Of every byte, float64; 127 and 255 stand for no number, 480 here, and come from nowhere."""
LARGEST = 448.0


def nearest(x: np.ndarray) -> np.ndarray:
    """uint8 bytes of the nearest numbers, of two as near the one with an even mantissa; beyond the largest that."""
    positive = VALUES[:127]
    size = np.minimum(np.abs(x), LARGEST)
    above = np.clip(np.searchsorted(positive, size), 1, 126)
    lower, upper = size - positive[above - 1], positive[above] - size
    take_upper = (upper < lower) | ((upper == lower) & (above % 2 == 0))
    return (np.where(take_upper, above, above - 1) | np.where(np.signbit(x), 128, 0)).astype(np.uint8)
