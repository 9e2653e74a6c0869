"""What computing a chunk takes of memory is what the plan counts."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
from paddle.base import core
from runner_setup import fill_with_nan, make_runner, rows
from small_model import CONFIG, random_model

from paddle_qwen1m import config, model, plan
from paddle_qwen1m.config import DualChunkConfig, SparseBudgets
from paddle_qwen1m.engine.orders import Prefill

TOKENS, PAGE, AT_ONCE = 4096, 256, 512
WIDE = replace(
    CONFIG,
    num_layers=3,
    num_heads=8,
    hidden_size=512,
    intermediate_size=512,
    dual_chunk=DualChunkConfig(chunk_size=8192, local_size=1024, original_max_position_embeddings=8192),
)
"""Attention takes more than its MLP."""


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_chunk_takes_what_the_plan_counts(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, is_sparse: bool
) -> None:
    """In parts, of several layers: whatever a layer leaves behind would show in the next one."""
    monkeypatch.setattr(config, "ROWS_AT_ONCE", AT_ONCE)
    for module in (model, plan):
        monkeypatch.setattr(module, "LANE_ROWS", AT_ONCE)
    budgets = SparseBudgets.uniform(64, 256, WIDE.num_layers, WIDE.num_heads) if is_sparse else None
    pages = TOKENS // PAGE
    runner, cache = make_runner(
        random_model(rng, WIDE), budgets, None, sparse_threshold=0, num_pages=pages, page_size=PAGE, max_num_seqs=1
    )
    fill_with_nan(cache)
    prompt = rng.integers(0, WIDE.vocab_size, TOKENS)
    gc.collect()  # what other tests have left behind would be freed meanwhile
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    runner.run(Prefill((rows(prompt, range(pages), sparse=is_sparse, wanted=(TOKENS - 1,)),), points=0))
    taken = core.host_memory_stat_peak_value("Allocated", 0) - before
    assert taken == pytest.approx(plan.activation_bytes(WIDE, TOKENS, TOKENS, budgets), rel=0.02)
