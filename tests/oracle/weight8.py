"""Weights of 8 bits: every number there is, the nearest one to a value, and what numbers and scales stand for."""

from __future__ import annotations

import numpy as np

from .arrays import Array, wide


def numbers_of(kind: str) -> Array:
    """What each of the 256 bytes stands for, float64; NaN for the two of FP8 that are none (OCP 8-bit floating point
    specification, E4M3).
    """
    bytes_ = np.arange(256)
    if kind == "int8":
        return np.where(bytes_ < 128, bytes_, bytes_ - 256).astype(np.float64)
    exponent, mantissa = bytes_ >> 3 & 15, bytes_ & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size = np.where(bytes_ & 127 == 127, np.nan, size)
    return np.where(bytes_ & 128, -size, size)


def round_to(kind: str, values: Array) -> Array:
    """The byte of the number nearest to each value; of two as near the one whose last bit is 0. Zeros keep their sign
    where the kind has one.
    """
    numbers = numbers_of(kind)
    negative = np.signbit(values)
    half = np.array([n for n in range(256) if numbers[n] >= 0 and (kind == "int8" or n < 128)])
    if kind == "int8":
        return np.round(values).astype(np.int8).view(np.uint8)
    sizes, order = np.sort(numbers[half]), half[np.argsort(numbers[half])]
    above = np.clip(np.searchsorted(sizes, np.abs(values)), 1, len(sizes) - 1)
    up, down = sizes[above] - np.abs(values), np.abs(values) - sizes[above - 1]
    take_up = (up < down) | ((up == down) & (order[above] % 2 == 0))
    return (order[np.where(take_up, above, above - 1)] + 128 * negative).astype(np.uint8)


def over_blocks(scales: Array, shape: tuple[int, ...]) -> Array:
    """The scale of every value of a weight [N, K], of scales [N / rows, K / columns]."""
    return np.repeat(np.repeat(scales, shape[0] // scales.shape[0], 0), shape[1] // scales.shape[1], 1)


def round_weight(kind: str, values: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """Bytes uint8 [N, K] and scales float32 [N / rows, K / columns]: the largest of a block is the largest number."""
    height, width = values.shape
    blocks = np.abs(values).reshape(height // rows, rows, width // columns, columns).max((1, 3))
    largest = np.float32(448 if kind == "fp8" else 127)
    scales = np.where(blocks > 0, np.float32(blocks) / largest, np.float32(1)).astype(np.float32)
    return round_to(kind, np.float32(values) / over_blocks(scales, values.shape)), scales


def widen_weight(kind: str, numbers: Array, scales: Array) -> Array:
    """What bytes and scales stand for, float64 [N, K]."""
    result: Array = numbers_of(kind)[numbers] * over_blocks(wide(scales), numbers.shape)
    return result
