"""Ops on the pages of a paged cache, and what the numbers of 8-bit pages stand for."""

from __future__ import annotations

from typing import NamedTuple

import paddle

from paddle_qwen1m.ops.library import call


class Quantised(NamedTuple):
    """What the numbers of 8-bit pages, int8 or E4M3, stand for: a key is (number * scale + centre) * power, a value
    number * scale.

    scales: float16 [2, pages, page_size, G], of keys and of values. frame: float32 [2, G, D], powers of two, one of the
    two dims d and d + D / 2 that a rotation mixes, and centres.
    """

    scales: paddle.Tensor
    frame: paddle.Tensor


NOT_QUANTISED: tuple[paddle.Tensor | None, paddle.Tensor | None] = (None, None)
"""In place of a Quantised, for pages of a floating type."""


def copy_page(
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    source: int,
    target: int,
    rows: int,
    quantised: Quantised | None = None,
) -> None:
    """The first `rows` tokens of page `source` become those of page `target`, keys and values, in place."""
    call("copy_page", key_cache, value_cache, *(quantised or NOT_QUANTISED), source, target, rows)


def dequantize_pages(
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    quantised: Quantised,
    pages: paddle.Tensor,
    keys: paddle.Tensor,
    values: paddle.Tensor,
) -> None:
    """Page n of `keys` and `values`, [n or more, page_size, G, D] of a floating type, becomes what page pages[n] (int32
    [n]) of an 8-bit cache stands for, rounded once.
    """
    call("dequantize_pages", key_cache, value_cache, *quantised, pages, keys, values)
