"""Launches that overlap on Hopper: a decode step in a graph gives what its launches give one by one, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from decode_step import DecodeStep, Model  # noqa: E402


@pytest.mark.parametrize("batch, keys", [(1, 100), (1, 5000), (5, 700), (16, 300)])
def test_a_captured_step_equals_its_launches_one_by_one(cuda: Any, batch: int, keys: int) -> None:
    step = DecodeStep(cuda, Model(1280, 2048, 10, 2, layers=6, vocabulary=5000), batch, keys, page_size=64)
    step(torch.cuda.synchronize)
    expected = step.logits.clone()
    assert torch.isfinite(expected).all() and expected.std() > 0.1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(20):
        step.lengths.fill_(keys)
        step.logits.fill_(float("nan"))
        graph.replay()
        assert torch.equal(step.logits, expected)
    graph.replay()
    assert not torch.equal(step.logits, expected), "a longer sequence should give other logits"
