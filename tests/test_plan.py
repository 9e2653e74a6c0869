"""The memory arithmetic gives the published figures and grows the way the engine does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from paddle_qwen1m.config import LANE_ROWS, ROWS_AT_ONCE, ModelConfig, SparseBudgets, published_budgets
from paddle_qwen1m.parallel.group import GPU_LANE_ROWS
from paddle_qwen1m.parallel.room import lane_borders, lanes_of
from paddle_qwen1m.parallel.split import degrees, local_config
from paddle_qwen1m.plan import (
    FEW_ROWS,
    SHARED_ROWS,
    MemoryPlan,
    Workspace,
    activation_bytes,
    cache_bytes_per_token,
    lane_rows,
    longest_context,
    parameters,
    plan_memory,
    plan_workspace,
    prefill_bytes,
    sampling_bytes,
    sparse_bytes,
)
from paddle_qwen1m.planning import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
MODEL_7B, MODEL_14B = PUBLISHED["7B"], PUBLISHED["14B"]


@pytest.mark.parametrize(("config", "expected"), [(MODEL_7B, 57_344), (MODEL_14B, 196_608)], ids=["7B", "14B"])
def test_bf16_cache_bytes_of_one_token_are_the_published_ones(config: ModelConfig, expected: int) -> None:
    assert cache_bytes_per_token(config, "bfloat16") == expected
    assert cache_bytes_per_token(config, "float32") == 2 * expected


def test_parameters_are_those_of_the_published_models() -> None:
    assert parameters(MODEL_7B) == 7_615_616_512
    assert parameters(MODEL_14B) == 14_770_033_664


def test_tied_embeddings_are_counted_once() -> None:
    tied = dataclasses.replace(MODEL_7B, tie_word_embeddings=True)
    assert parameters(MODEL_7B) - parameters(tied) == 152_064 * 3584


def test_activations_grow_with_the_chunk_not_with_the_context_when_dense() -> None:
    short = activation_bytes(MODEL_14B, 4096, 800_000)
    assert activation_bytes(MODEL_14B, 4096, 1_000_000) == short
    assert activation_bytes(MODEL_14B, 8192, 1_000_000) > 1.9 * short


@pytest.mark.parametrize(("config", "of_row"), [(MODEL_7B, 23_040), (MODEL_14B, 46_592)], ids=["7B", "14B"])
def test_beyond_the_rows_that_are_there_at_once_a_row_takes_little(config: ModelConfig, of_row: int) -> None:
    """Its residual and rotary tables, 4 bytes a number, and what the MLP takes, or the projections and what attention
    makes of them.
    """
    taken = {28: 6 * 3584, 48: 4 * 5120 + 2 * (5120 + 2 * 1024 + 5120)}[config.num_layers]
    assert of_row == taken + 4 * 3 * 128
    budgets = published_budgets(config)
    large, larger = (activation_bytes(config, rows, 1_000_000, budgets, "bfloat16") for rows in (40_000, 50_000))
    assert larger - large == 10_000 * of_row


def test_choosing_keys_takes_sums_over_all_of_them_and_a_table_for_each_block_of_rows() -> None:
    """1,000 columns: 1,204 with up to five more a stage, and each stage filled up to groups of 64, which is 18."""
    budgets = SparseBudgets.uniform(1000, 6096, 48, 40)
    lines, chains, width = 1000 + 6096, 3 * 6096, 18 * 64
    assert sparse_bytes(MODEL_14B, 4096, 1_000_000, budgets) == 4 * 40 * (lines + 2_000_000)
    assert sparse_bytes(MODEL_14B, 16_384, 1_000_000, budgets) == 2 * 40 * 2 * (lines + 2_000_000)
    tables = 512 * (4 * 6096 + width // 8) + 4 * width
    assert sparse_bytes(MODEL_14B, 32_768, 500_000, budgets) == 40 * (4 * lines + tables + 4 * chains)
    blocks = 64_000 // 64
    tables = 128 * (4 * blocks + width // 8) + 4 * width
    assert sparse_bytes(MODEL_14B, 8192, 64_000, budgets) == 40 * (4 * lines + tables + 4 * chains)


def test_keys_and_values_of_columns_are_copied_once_in_16_bits() -> None:
    budgets = SparseBudgets.uniform(1000, 6096, 48, 40)
    wide, *narrow = (sparse_bytes(MODEL_14B, 32_768, 500_000, budgets, d) for d in ("float32", "bfloat16", "float16"))
    assert [size - wide for size in narrow] == [40 * 2 * 1152 * 128 * 2] * 2
    budgets.vertical[7, 3] = 13_000  # of one head alone: 13,204 with what is filled up, whole groups of 64
    uneven = [sparse_bytes(MODEL_14B, 32_768, 500_000, budgets, d) for d in ("float32", "bfloat16")]
    assert uneven[1] - uneven[0] == (39 * 1152 + 206 * 64) * 2 * 128 * 2
    budgets.vertical[7, 3] = 1000
    assert sparse_bytes(MODEL_14B, 64, 1_000_000, budgets, "bfloat16") == 4 * 40 * (1000 + 6096 + 2_000_000)


def test_choosing_keys_counts_where_attention_takes_more_than_the_mlp() -> None:
    budgets = SparseBudgets.uniform(1000, 6096, 48, 40)
    grown = [activation_bytes(MODEL_14B, 64, length, budgets) for length in (800_000, 1_000_000)]
    assert grown[1] - grown[0] == 2 * 4 * 40 * 200_000
    assert activation_bytes(MODEL_14B, 32_768, 40_000, budgets) == activation_bytes(MODEL_14B, 32_768, 40_000)


@pytest.mark.parametrize(("config", "expected"), [(MODEL_7B, 119_275_520), (MODEL_14B, 170_393_600)], ids=["7B", "14B"])
def test_few_rows_that_share_their_keys_out_count_where_more_rows_take_less(config: ModelConfig, expected: int) -> None:
    """On a GPU, where what is computed has 16 bits: a float32 row, its maximum and sum for each of 8,192 shares."""

    def difference(rows: int, dtype: str) -> int:
        return prefill_bytes(config, rows, 10**6, None, dtype) - activation_bytes(config, rows, 10**6, None, dtype)

    assert difference(64, "bfloat16") == difference(1024, "bfloat16") == expected
    assert difference(32_768, "bfloat16") == difference(64, "float32") == 0


@pytest.mark.parametrize("rows", [1, 127, 12_672, 12_799, 12_800, 25_471, 32_768, 84_736, 126_976])
def test_no_lane_has_more_rows_than_the_plan_counts(rows: int) -> None:
    borders = lane_borders(rows, LANE_ROWS)
    assert max(last - first for first, last in zip(borders, borders[1:])) <= lane_rows(rows, 1) <= rows
    for degree in (2, 4, 8):
        assert -(-rows // lanes_of(rows, GPU_LANE_ROWS)) <= lane_rows(rows, degree) <= rows


def test_the_kernels_share_out_what_the_plan_counts() -> None:
    source = (ROOT / "custom_ops" / "cuda" / "shares.cuh").read_text(encoding="utf-8")
    constants = {name: int(value) for name, value in re.findall(r"constexpr int32_t (\w+) = (\d+);", source)}
    assert (constants["kFewRows"], constants["kSharedRows"]) == (FEW_ROWS, SHARED_ROWS)


def test_in_16_bits_residual_rotary_tables_and_logits_keep_32() -> None:
    wide, narrow = (activation_bytes(MODEL_7B, 2048, 2048, dtype=d) for d in ("float32", "bfloat16"))
    assert wide - narrow == 2 * 2048 * (3584 + 3 * 18_944 + 3584)


def plan_of_rank(config: ModelConfig, degree: int, rows: int) -> MemoryPlan:
    """1,010,000 tokens on a GPU of several, all in bfloat16, in chunks of so many rows, published budgets."""
    local = local_config(config, degree)
    return plan_memory(
        local,
        1_010_000,
        max_num_batched_tokens=rows,
        cache_dtype="bfloat16",
        weight_bytes=2 * parameters(local),
        budgets=published_budgets(config),
        dtype="bfloat16",
        degree=degree,
    )


@pytest.mark.parametrize(
    ("config", "degree", "rows", "measured"),
    [(MODEL_7B, 2, 126_976, 41.10), (MODEL_7B, 4, 126_976, 22.52), (MODEL_14B, 4, 126_976, 62.76)],
)
def test_ranks_take_what_was_measured(config: ModelConfig, degree: int, rows: int, measured: float) -> None:
    """Peak GB of 1,009,936 tokens and 64 more on a GPU (docs/performance.md, "Several GPUs")."""
    plan = plan_of_rank(config, degree, rows)
    assert plan.total / 1e9 == pytest.approx(measured, rel=0.01)


def workspace_of_rank(degree: int, dtype: str, max_num_seqs: int) -> Workspace:
    """Of contexts of 131,072 tokens, the 7B."""
    return plan_workspace(
        local_config(MODEL_7B, degree),
        131_072,
        max_num_batched_tokens=32_768,
        max_pause_tokens=2048,
        max_num_seqs=max_num_seqs,
        dtype=dtype,
        degree=degree,
    )


@pytest.mark.parametrize(("degree", "rooms"), [(1, 0.0), (2, 1.5), (4, 1.75)])
def test_rooms_and_what_is_sampled_by_stay_beside_steps(degree: int, rooms: float) -> None:
    """A room has a chunk's rows, and each other rank's part of this rank's share of them; on a GPU."""
    sampling = 2 * sampling_bytes(16, 152_064)
    assert workspace_of_rank(degree, "bfloat16", 16).kept == rooms * 32_768 * 3584 * 2 + sampling
    assert workspace_of_rank(degree, "float32", 16).kept == sampling


def test_captured_steps_hold_what_a_step_of_all_answers_takes_and_what_questions_do() -> None:
    """Their logits alone are 4 bytes a token and answer, of ranks with a share beside them. On a CPU nothing is."""
    for degree, logits in ((1, 152_064), (2, 152_064 + 76_032)):
        few, many = (workspace_of_rank(degree, "bfloat16", rows) for rows in (16, 64))
        assert 4 * 48 * logits < many.graphs - few.graphs < 1.5 * 4 * 48 * logits
        assert few.total == few.steps + few.kept + few.graphs
    assert workspace_of_rank(1, "float32", 16).graphs == 0


def test_a_plan_adds_up_and_counts_no_more_rows_than_there_are_tokens() -> None:
    plan = plan_memory(MODEL_7B, 1000, max_num_batched_tokens=4096, cache_dtype="bfloat16", weight_bytes=10**9)
    assert plan.cache == 57_344_000
    assert plan.activations == activation_bytes(MODEL_7B, 1000, 1000)
    assert plan.total == plan.weights + plan.cache + plan.activations


def test_longest_context_is_the_last_that_fits() -> None:
    def plan(length: int) -> Any:
        return plan_memory(
            MODEL_7B, length, max_num_batched_tokens=4096, cache_dtype="bfloat16", weight_bytes=15 * 10**9
        )

    def longest(available: int) -> int | None:
        return longest_context(1_010_000, lambda length: plan(length).total <= available)

    found = longest(32 * 10**9)
    assert found is not None
    assert plan(found).total <= 32 * 10**9 < plan(found + 1).total
    assert longest(10**12) == 1_010_000
    assert longest(10**9) is None


def test_an_unknown_dtype_or_an_empty_context_is_refused() -> None:
    with pytest.raises(ValueError, match="'int4'"):
        cache_bytes_per_token(MODEL_7B, "int4")
    with pytest.raises(ValueError, match="got 0 and 4096"):
        plan_memory(MODEL_7B, 0, max_num_batched_tokens=4096, cache_dtype="float32", weight_bytes=0)


@pytest.mark.parametrize(("name", "config"), [("7B", MODEL_7B), ("14B", MODEL_14B)], ids=["7B", "14B"])
def test_the_readme_states_what_a_rank_needs(name: str, config: ModelConfig) -> None:
    for degree in degrees(config)[1:]:
        local = local_config(config, degree)
        plan = plan_of_rank(config, degree, 32_768)
        short = 131_072 * cache_bytes_per_token(local, "bfloat16")
        sizes = [f"{n / 1e9:.1f} GB" for n in (plan.weights, short, plan.cache, plan.activations, plan.total)]
        assert f"| {' | '.join([name, str(degree), *sizes])} |" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "config"), [("7B", MODEL_7B), ("14B", MODEL_14B)], ids=["7B", "14B"])
def test_the_readme_states_these_figures(name: str, config: ModelConfig) -> None:
    weights, token = 2 * parameters(config), cache_bytes_per_token(config, "bfloat16")
    on_cpu = activation_bytes(config, 2048, 1_010_000, published_budgets(config))
    on_gpu = activation_bytes(config, 32_768, 1_010_000, published_budgets(config), "bfloat16")
    sizes = [f"{size / 1e9:.1f} GB" for size in (weights, 131_072 * token, 1_010_000 * token, on_cpu, on_gpu)]
    row = " | ".join([name, sizes[0], f"{token:,} B", *sizes[1:]])
    assert f"| {row} |" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("config", "degree", "parts"), [(MODEL_7B, 2, 2), (MODEL_7B, 8, 4), (MODEL_14B, 8, 8)])
def test_a_rank_with_a_part_of_the_heads_takes_as_many_more_rows_at_once(
    config: ModelConfig, degree: int, parts: int
) -> None:
    """Of the 7B's eight ranks two have the same heads. What row blocks visit takes no more memory than on one card."""
    local, budgets = local_config(config, degree), SparseBudgets.uniform(1000, 6096, 1, config.num_heads)
    assert local.rows_at_once == parts * config.rows_at_once == parts * ROWS_AT_ONCE
    whole, part = (sparse_bytes(one, one.rows_at_once, 1_000_000, budgets, "bfloat16") for one in (config, local))
    assert part <= whole
