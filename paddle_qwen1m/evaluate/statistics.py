"""Means with their uncertainty, and paired differences: two configurations that answered the same questions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 10_000
FEWEST = 8
"""Documents of which an interval can be given."""
UNSEEN = 3.0
"""With n documents, a kind that none of them is has a share of at most UNSEEN / n, with 95 % confidence."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval of CONFIDENCE; nan where there are fewer than FEWEST documents."""

    mean: float
    low: float
    high: float


def paired_difference(
    one: Sequence[float], other: Sequence[float], documents: Sequence[Hashable], *, width: float | None = 1.0
) -> Interval:
    """Of the mean of `one` less that of `other`, question by question; the interval is a bootstrap over documents.

    Questions of one document are right or wrong together, so documents are drawn, not questions (the percentile method
    of Efron). Where no document differs from another the bootstrap knows nothing: the interval is UNSEEN / n times
    `width`, the largest difference of a question (None: without bound, and then not widened).
    """
    if not len(one) == len(other) == len(documents) > 0:
        raise ValueError(f"pairs must be as many, and some: got {len(one)}, {len(other)}, {len(documents)}")
    sums, counts = _by_document(np.asarray(one, np.float64) - np.asarray(other, np.float64), documents)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < FEWEST:
        return Interval(mean, math.nan, math.nan)
    shares = sums / counts
    if np.ptp(shares) == 0.0:
        most = 0.0 if width is None else min(width, UNSEEN / len(sums) * width)
        return Interval(mean, mean - most, mean + most)
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    means = (drawn @ sums) / (drawn @ counts)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, float(low), float(high))


def standard_error(scores: Sequence[float], documents: Sequence[Hashable]) -> float:
    """Of the mean, as if documents were drawn at random; nan for a single one."""
    sums, counts = _by_document(np.asarray(scores, np.float64), documents)
    n = len(sums)
    if n < 2:
        return math.nan
    mean = sums.sum() / counts.sum()
    return float(np.sqrt(((sums - mean * counts) ** 2).sum() * n / (n - 1)) / counts.sum())


def _by_document(
    values: npt.NDArray[np.float64], documents: Sequence[Hashable]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums and counts of the values of each document."""
    number = {document: place for place, document in enumerate(dict.fromkeys(documents))}
    places = [number[document] for document in documents]
    sums, counts = np.bincount(places, weights=values), np.bincount(places)
    return np.asarray(sums, np.float64), np.asarray(counts, np.float64)
