"""Perplexity by position: how likely a user's own text is to a model, the further it has read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_qwen1m.evaluate.samples import TooShort

TASK = "perplexity"
FIRST_EDGE = 256


@dataclass(frozen=True)
class Window:
    """The `number`-th part of the text, of `length` tokens, read on its own."""

    length: int
    number: int
    ids: Sequence[int]


def windows(ids: Sequence[int], length: int, count: int) -> list[Window]:
    """Up to `count` windows that do not overlap, from the beginning of the text on. TooShort where there is not one."""
    if length < 2:
        raise TooShort(f"{TASK}: a window has at least 2 tokens, got {length}")
    if len(ids) < length:
        raise TooShort(f"{TASK}: the text has {len(ids):,} tokens, fewer than a window of {length:,}")
    number = min(count, len(ids) // length)
    return [Window(length, one, ids[one * length : (one + 1) * length]) for one in range(number)]


def edges(length: int) -> list[int]:
    """Borders of the ranges of positions: 1, FIRST_EDGE, and doubled up to the length."""
    borders = [1]
    while max(borders[-1] * 2, FIRST_EDGE) < length:
        borders.append(max(borders[-1] * 2, FIRST_EDGE))
    return [*borders, length]


def by_position(logprobs: npt.NDArray[np.float64]) -> list[dict[str, Any]]:
    """Sums of -log p, in nats, of the tokens at positions `begin` to `end`; logprobs [n - 1]: of tokens 1 to n - 1."""
    borders = edges(len(logprobs) + 1)
    return [
        {"begin": begin, "end": end, "tokens": end - begin, "nats": -float(logprobs[begin - 1 : end - 1].sum())}
        for begin, end in zip(borders, borders[1:])
    ]


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean; infinite where a float cannot hold it."""
    mean = nats / tokens
    return math.exp(mean) if mean < math.log(np.finfo(np.float64).max) else math.inf
