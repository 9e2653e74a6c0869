"""Perplexity by position: which tokens count where."""

from __future__ import annotations

import math

import numpy as np
import pytest

from paddle_qwen1m.evaluate import perplexity
from paddle_qwen1m.evaluate.samples import TooShort


def test_windows_do_not_overlap_and_begin_at_the_text() -> None:
    cut = perplexity.windows(range(1000), 300, 10)
    assert [list(one.ids) for one in cut] == [list(range(begin, begin + 300)) for begin in (0, 300, 600)]
    assert len(perplexity.windows(range(1000), 300, 2)) == 2


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(TooShort, match="the text has 1,000 tokens, fewer than a window of 1,001"):
        perplexity.windows(range(1000), 1001, 1)


@pytest.mark.parametrize("length", [2, 255, 256, 257, 1024, 3000])
def test_every_token_but_the_first_counts_once_at_its_position(length: int) -> None:
    logprobs = -np.arange(1, length, dtype=np.float64)  # of the token at position p: -p
    ranges = perplexity.by_position(logprobs)
    assert [one["begin"] for one in ranges] == [1, *(one["end"] for one in ranges[:-1])]
    assert ranges[-1]["end"] == length
    for one in ranges:
        assert one["nats"] == sum(range(one["begin"], one["end"]))
        assert one["tokens"] == one["end"] - one["begin"] > 0


def test_perplexity_is_the_inverse_of_the_mean_probability() -> None:
    assert perplexity.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert perplexity.perplexity(1e6, 1) == math.inf
