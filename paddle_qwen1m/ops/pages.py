"""Ops on the pages of a paged cache."""

from __future__ import annotations

import paddle

from paddle_qwen1m.ops.library import call


def copy_page(key_cache: paddle.Tensor, value_cache: paddle.Tensor, source: int, target: int, rows: int) -> None:
    """The first `rows` tokens of page `source` become those of page `target`, keys and values, in place."""
    call("copy_page", key_cache, value_cache, source, target, rows)
