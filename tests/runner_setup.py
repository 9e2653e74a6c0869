"""A runner over a cache of its own, and the rows of its orders, as tests of one rank and of several need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.engine.orders import Head, Rows
from paddle_qwen1m.engine.runner import Runner
from paddle_qwen1m.model import Qwen2OneM


class Made(NamedTuple):
    runner: Runner
    cache: PagedCache


def make_runner(
    model: Qwen2OneM,
    budgets: SparseBudgets | None,
    sampling: Any,
    *,
    sparse_threshold: int,
    num_pages: int,
    page_size: int,
    max_num_seqs: int,
) -> Made:
    cache = PagedCache(model.local, num_pages, page_size, "float32")
    runner = Runner(model, budgets, sparse_threshold, replay=False)
    runner.use(cache, sampling, max_num_seqs=max_num_seqs, max_model_len=2048)
    return Made(runner, cache)


def fill_with_nan(cache: PagedCache) -> None:
    """So that a page which nobody wrote shows when it is read; and the memory of all pages is taken now."""
    for layer in cache.layers:
        for pages in (layer.keys, layer.values):
            ops.upload(pages, np.full(pages.shape, np.nan, np.float32))


def rows(
    prompt: np.ndarray, pages: Sequence[int], *, begin: int = 0, sparse: bool = False, wanted: Sequence[int] = ()
) -> Rows:
    """The prompt from `begin` to its end."""
    return Rows(prompt[begin:], begin, tuple(pages), len(prompt), sparse, tuple(wanted))


def whole(logits: paddle.Tensor) -> list[paddle.Tensor]:
    """What to read of logits: all."""
    return [logits]


def head(runner: Runner, first: int, count: int) -> np.ndarray:
    """Logits float32 [count, vocab] of the last chunk's wanted rows from number `first` on."""
    post = runner.run(Head(first, count), whole)
    assert post is not None
    (logits,) = post.result()
    return logits
