"""What lies in a page behind the last token is never-written memory: it changes no bit of any result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import attention_cases as cases  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length, rows", [(1599, 60), (1025, 1), (130, 130), (1700, 164)])
def test_what_lies_behind_the_last_token_reaches_nothing(
    cuda: Any, rng: np.random.Generator, length: int, rows: int, head_dim: int, dtype: torch.dtype
) -> None:
    context = cases.random_context(
        rng, length, rows, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype, page_size=256, sharpness=2.0
    )
    empty = torch.isnan(context.key_pages)
    assert empty.any()
    columns = torch.arange(0, length, 37, dtype=torch.int32, device="cuda").repeat(4, 1)
    slashes = torch.arange(max(0, length - 200), length, dtype=torch.int32, device="cuda").repeat(4, 1)
    index = cases.convert(cuda, context, columns, slashes)
    results = []
    for value in (float("nan"), float("inf"), 0.0, 3e4):
        pools = (pool.masked_fill(empty, value) for pool in (context.key_pages, context.value_pages))
        filled = replace(context, **dict(zip(("key_pages", "value_pages"), pools)))
        last = replace(filled, q=filled.q[:, -64:].contiguous())
        parts = (*cases.run_dense(cuda, filled), *cases.run_sparse(cuda, filled, index))
        results.append((*parts, cases.run_decode(cuda, [filled]), *cases.run_probe(cuda, last)))
    for other in results[1:]:
        for expected, got in zip(results[0], other):
            assert torch.isfinite(expected).all() and torch.equal(expected, got)


def test_decode_of_an_empty_row_is_zero(cuda: Any, rng: np.random.Generator) -> None:
    """Rows of length 0, such as a captured batch has that is not full; the others come out as they do alone."""
    shape = {"heads": 10, "kv_heads": 2, "chunk_len": 512, "page_size": 64}
    contexts = [cases.random_context(rng, length, 1, **shape) for length in (5, 1300)]
    batch = [contexts[0], replace(contexts[0], keys=contexts[0].keys[:0]), contexts[1]]
    out = cases.run_decode(cuda, batch)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    for row, context in ((0, contexts[0]), (2, contexts[1])):
        assert cases.worst(out[row : row + 1], cases.reference(context, [0])) <= 1e-2
