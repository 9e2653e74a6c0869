"""The probe on a GPU beside float64: column and diagonal sums of the last rows' softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import attention_cases as cases  # noqa: E402


def exact_sums(context: cases.Context) -> tuple[torch.Tensor, torch.Tensor]:
    """vertical and slash [H, N] in float64 by the definition."""
    _, rows, heads, _ = context.q.shape
    length, kv_heads, _ = context.keys.shape
    vertical = torch.zeros(heads, length, dtype=torch.float64, device="cuda")
    slash = torch.zeros_like(vertical)
    chunk = torch.arange(length, device="cuda") // context.chunk_len
    distance = ((length - 1) // context.chunk_len - chunk).clamp(max=2)
    for head in range(heads):
        keys = context.keys[:, head // (heads // kv_heads)].double()
        scores = torch.empty(rows, length, dtype=torch.float64, device="cuda")
        for stage in range(context.q.shape[0]):
            met = distance == stage
            scores[:, met] = context.scale * (context.q[stage, :, head].double() @ keys[met].T)
        position = torch.arange(length - rows, length, device="cuda")
        scores.masked_fill_(torch.arange(length, device="cuda")[None] > position[:, None], float("-inf"))
        weights = torch.softmax(scores, 1)
        vertical[head] = weights.sum(0)
        for row in range(rows):
            shift = rows - 1 - row
            slash[head, shift:] += weights[row, : length - shift]
    return vertical, slash


def largest_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of every entry; entries that add nothing to any sum are compared with the smallest that counts."""
    if not torch.isfinite(got).all():
        return float("inf")
    floor = 1e-30
    return float(((got.double() - expected).abs() / expected.clamp(min=floor)).max())


CASES = [(1, 1), (2, 2), (40, 40), (63, 63), (64, 64), (65, 64), (96, 33), (511, 64), (512, 64), (513, 1), (577, 64)]
CASES += [(600, 64), (1025, 1), (1088, 64), (1500, 64), (1600, 50), (5000, 64), (20000, 64)]


@pytest.mark.parametrize("length, rows", CASES)
@pytest.mark.parametrize(
    "dtype, head_dim, group",
    [(torch.bfloat16, 128, 5), (torch.float16, 128, 7), (torch.bfloat16, 128, 3), (torch.float16, 64, 5)],
)
def test_sums_of_columns_and_diagonals(
    cuda: Any, rng: np.random.Generator, length: int, rows: int, dtype: torch.dtype, head_dim: int, group: int
) -> None:
    """Few rows, few keys, one to three stages: every sum is exact to float32."""
    context = cases.random_context(
        rng, length, rows, heads=group, kv_heads=1, head_dim=head_dim, dtype=dtype, chunk_len=512, sharpness=3.0
    )
    for got, expected in zip(cases.run_probe(cuda, context), exact_sums(context)):
        assert largest_error(got, expected) < 2e-4


@pytest.mark.parametrize("length, heads", [(131072, 10), (300001, 10), (300001, 14)])
def test_sums_of_long_contexts(cuda: Any, rng: np.random.Generator, length: int, heads: int) -> None:
    """Every span of keys, and the diagonals that pass from one to the next."""
    context = cases.random_context(
        rng, length, 64, heads=heads, kv_heads=2, chunk_len=65536, page_size=256, sharpness=4.0
    )
    for got, expected in zip(cases.run_probe(cuda, context), exact_sums(context)):
        assert largest_error(got, expected) < 2e-4


def test_the_same_sums_every_time(cuda: Any, rng: np.random.Generator) -> None:
    context = cases.random_context(rng, 70001, 64, heads=10, kv_heads=2, chunk_len=16384, page_size=64)
    first, second = cases.run_probe(cuda, context), cases.run_probe(cuda, context)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_keys_far_above_the_budget_are_selected(cuda: Any, rng: np.random.Generator) -> None:
    """Every key whose float64 sum beats the k-th by 1e-3 relative is among the k selected."""
    context = cases.random_context(rng, 100003, 64, heads=10, kv_heads=2, chunk_len=32768, page_size=256, sharpness=4.0)
    sums, exact = cases.run_probe(cuda, context), exact_sums(context)
    heads, length, sizes = 10, context.length, (1000, 6096)
    size_tables = [torch.full((heads,), size, dtype=torch.int32, device="cuda") for size in sizes]
    selected = [torch.full((heads, size), -1, dtype=torch.int32, device="cuda") for size in sizes]
    cuda(
        "select_critical",
        vertical=sums[0],
        slash=sums[1],
        vertical_sizes=size_tables[0],
        slash_sizes=size_tables[1],
        columns=selected[0],
        slashes=selected[1],
        heads=heads,
        keys=length,
        column_width=sizes[0],
        slash_width=sizes[1],
        forced_columns=30,
        forced_diagonals=100,
    )
    forced = [torch.arange(30), torch.arange(length - 100, length)]
    for scores, size, chosen, always in zip(exact, sizes, selected, forced):
        for head in range(heads):
            ranked = scores[head].clone()
            ranked[always.cuda()] = float("inf")
            kth = ranked.sort(descending=True).values[size - 1]
            must = torch.nonzero(ranked > kth * (1 + 1e-3)).flatten()
            assert torch.isin(must, chosen[head].long()).all()
