"""Sums over ranks through mailboxes, the ranks being streams of one GPU: values, turns, graphs, who waits for whom."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from test_step_ops import (  # noqa: E402
    DEVICE,
    check,
    each_half,
    exact,
    largest,
    linear_fields,
    poisoned,
    run_linear,
    same_bits,
    stored,
)

EPS = 1e-6


class Ranks:
    """Of one sum after the other; each has a stream, a mailbox and a residual stream of zeros."""

    def __init__(self, cuda: Any, degree: int, rows: int, width: int, dtype: torch.dtype) -> None:
        self.cuda, self.degree, self.width, self.dtype = cuda, degree, width, dtype
        self.boxes = [torch.zeros(cuda.mailbox_bytes(degree), dtype=torch.uint8, device=DEVICE) for _ in range(degree)]
        self.streams = [torch.cuda.Stream() for _ in range(degree)]
        self.residuals = [torch.zeros(rows, width, dtype=torch.float32, device=DEVICE) for _ in range(degree)]
        self.outs = [poisoned(rows, width, dtype=dtype) for _ in range(degree)]
        self._addresses = np.array([box.data_ptr() for box in self.boxes])
        torch.cuda.synchronize()

    def add(self, rank: int, delta: torch.Tensor, weight: torch.Tensor, *, sent: bool = False) -> None:
        """Launches a rank's part of a sum of as many rows as delta has, on the current stream."""
        norm = {"delta": delta, "residual": self.residuals[rank], "weight": weight, "out": self.outs[rank], "eps": EPS}
        norm |= {"tokens": len(delta), "width": self.width, "activation": self.dtype, "dtype": self.dtype}
        self.cuda("sum_rms_norm", norm=norm, **self._at(rank), sent=int(sent))

    def multiply(self, rank: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Launches a product whose result is sent as the rank's part of the next sum."""
        delta = poisoned(len(x), self.width, dtype=self.dtype)
        self.cuda("sending_linear", linear=linear_fields(x, weight, delta), **self._at(rank))
        return delta

    def _at(self, rank: int) -> dict[str, Any]:
        return {"boxes": self._addresses, "rank": rank, "degree": self.degree}

    def add_all(self, deltas: list[torch.Tensor], weight: torch.Tensor) -> None:
        for rank, (stream, delta) in enumerate(zip(self.streams, deltas)):
            with torch.cuda.stream(stream):
                self.add(rank, delta, weight)


def drawn(rng: np.random.Generator, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return stored(rng.standard_normal((rows, width)), dtype)


@each_half
@pytest.mark.parametrize("degree, width", [(2, 3584), (3, 104), (4, 5120), (4, 6144), (8, 3584)])
def test_every_rank_has_the_sum_of_all_in_their_order(
    cuda: Any, rng: np.random.Generator, degree: int, width: int, dtype: torch.dtype
) -> None:
    """Turn after turn, of one row and of more: float32 sums, bit by bit, and their norm, the same on every rank."""
    weight, most = drawn(rng, 1, width, dtype)[0], 128 // degree  # a processor each: blocks wait for other ranks'
    ranks = Ranks(cuda, degree, most, width, dtype)
    expected = torch.zeros(most, width, dtype=torch.float32, device=DEVICE)
    for rows in [1, most, 1, 3, most, 3, 1, 1]:
        deltas = [drawn(rng, rows, width, dtype) for _ in range(degree)]
        torch.cuda.synchronize()
        ranks.add_all(deltas, weight)
        torch.cuda.synchronize()
        total = torch.zeros(rows, width, dtype=torch.float32, device=DEVICE)
        for delta in deltas:
            total += delta.float()
        expected[:rows] += total
        for residual, out in zip(ranks.residuals, ranks.outs):
            assert same_bits(residual, expected) and same_bits(out, ranks.outs[0])
        normed = oracle.rms_norm(exact(expected[:rows]), exact(weight), EPS)
        check(ranks.outs[0][:rows], normed, 1e-6 * largest(normed))


@each_half
@pytest.mark.parametrize("degree, depth, width", [(2, 1792, 3584), (3, 520, 104), (4, 328, 5120), (8, 72, 6144)])
def test_products_are_sent_as_they_are_made(
    cuda: Any, rng: np.random.Generator, degree: int, depth: int, width: int, dtype: torch.dtype
) -> None:
    """Turn after turn, of one row and of more, beside sums whose parts are not: bit by bit the sums of the products."""
    norm, ranks = drawn(rng, 1, width, dtype)[0], Ranks(cuda, degree, 16, width, dtype)
    weights = [stored(depth**-0.5 * rng.standard_normal((width, depth)), dtype) for _ in range(degree)]
    expected = torch.zeros(16, width, dtype=torch.float32, device=DEVICE)
    for number, rows in enumerate([1, 16, 1, 3, 9, 1, 1, 4]):
        given = [drawn(rng, rows, depth, dtype) for _ in range(degree)]
        products = [run_linear(cuda, x, weight, None, dtype) for x, weight in zip(given, weights)]
        torch.cuda.synchronize()
        deltas = []
        for rank, stream in enumerate(ranks.streams):
            with torch.cuda.stream(stream):
                sent = number % 3 < 2
                deltas.append(ranks.multiply(rank, given[rank], weights[rank]) if sent else products[rank])
                ranks.add(rank, deltas[-1], norm, sent=sent)
        torch.cuda.synchronize()
        total = torch.zeros(rows, width, dtype=torch.float32, device=DEVICE)
        for delta, product in zip(deltas, products):
            assert same_bits(delta, product)
            total += product.float()
        expected[:rows] += total
        for residual, out in zip(ranks.residuals, ranks.outs):
            assert same_bits(residual, expected) and same_bits(out, ranks.outs[0])


def test_a_rank_waits_for_those_that_come_late(cuda: Any, rng: np.random.Generator) -> None:
    ranks, weight = Ranks(cuda, 3, 2, 512, torch.bfloat16), drawn(rng, 1, 512, torch.bfloat16)[0]
    deltas = [drawn(rng, 2, 512, torch.bfloat16) for _ in range(3)]
    torch.cuda.synchronize()
    for rank in (2, 0, 1):
        time.sleep(0.05)
        assert not ranks.streams[2].query() or rank == 2
        with torch.cuda.stream(ranks.streams[rank]):
            ranks.add(rank, deltas[rank], weight)
    torch.cuda.synchronize()
    total = deltas[0].float() + deltas[1].float() + deltas[2].float()
    assert all(same_bits(residual, total) for residual in ranks.residuals)


def test_turns_go_on_behind_the_largest_number(cuda: Any, rng: np.random.Generator) -> None:
    ranks, weight = Ranks(cuda, 2, 1, 256, torch.float16), drawn(rng, 1, 256, torch.float16)[0]
    for box in ranks.boxes:
        box[:256].view(torch.int32).fill_(-4)
    expected = torch.zeros(1, 256, dtype=torch.float32, device=DEVICE)
    for _ in range(9):
        deltas = [drawn(rng, 1, 256, torch.float16) for _ in range(2)]
        torch.cuda.synchronize()
        ranks.add_all(deltas, weight)
        torch.cuda.synchronize()
        expected += deltas[0].float() + deltas[1].float()
        assert all(same_bits(residual, expected) for residual in ranks.residuals)


def test_replayed_from_graphs_the_ranks_stay_in_turn(cuda: Any, rng: np.random.Generator) -> None:
    """Two thousand sums behind each other: lines of an earlier turn would be those of other rows.

    Norms let the next launch begin before they wait: a graph's sums are all under way at once, and those of all ranks
    must have room on the one GPU.
    """
    degree, rows, width, captured, replays = 4, 4, 1024, 20, 100
    ranks, weight = Ranks(cuda, degree, rows, width, torch.bfloat16), drawn(rng, 1, width, torch.bfloat16)[0]
    deltas = [[drawn(rng, rows, width, torch.bfloat16) for _ in range(degree)] for _ in range(captured)]
    graphs = [torch.cuda.CUDAGraph() for _ in range(degree)]
    for rank, graph in enumerate(graphs):
        with torch.cuda.graph(graph, stream=ranks.streams[rank]):
            for delta in deltas:
                ranks.add(rank, delta[rank], weight)
    for _ in range(replays):
        for graph, stream in zip(graphs, ranks.streams):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    totals = [((one.float() + two.float()) + three.float()) + four.float() for one, two, three, four in deltas]
    expected = torch.zeros(rows, width, dtype=torch.float32, device=DEVICE)
    for total in totals * replays:
        expected += total
    assert all(same_bits(residual, expected) for residual in ranks.residuals)


@pytest.mark.parametrize("change", [{"degree": 1}, {"degree": 9}, {"rank": 2}, {"tokens": 65}, {"width": 6152}])
def test_what_a_mailbox_does_not_take_is_refused(cuda: Any, change: dict[str, int]) -> None:
    ranks, given = Ranks(cuda, 2, 1, 64, torch.bfloat16), {"degree": 2, "rank": 0, "tokens": 1, "width": 64} | change
    row = poisoned(1, 64, dtype=torch.bfloat16)
    norm = {"delta": row, "residual": ranks.residuals[0], "weight": row, "out": row, "eps": EPS}
    norm |= {"tokens": given["tokens"], "width": given["width"], "activation": row.dtype, "dtype": row.dtype}
    boxes = np.array([box.data_ptr() for box in ranks.boxes] * 5)
    with pytest.raises(RuntimeError, match="CUDA error"):
        cuda("sum_rms_norm", norm=norm, boxes=boxes, rank=given["rank"], degree=given["degree"], sent=0)


@pytest.mark.parametrize("change", [{"degree": 1}, {"rank": -1}, {"tokens": 17}, {"width": 6152}, {"width": 60}])
def test_a_product_that_cannot_be_sent_is_refused(cuda: Any, change: dict[str, int]) -> None:
    ranks, given = Ranks(cuda, 2, 1, 64, torch.bfloat16), {"degree": 2, "rank": 0, "tokens": 1, "width": 64} | change
    row = poisoned(given["tokens"], 64, dtype=torch.bfloat16)
    weight = poisoned(given["width"], 64, dtype=torch.bfloat16)
    boxes = np.array([box.data_ptr() for box in ranks.boxes])
    with pytest.raises(RuntimeError, match="CUDA error"):
        linear = linear_fields(row, weight, poisoned(given["tokens"], given["width"], dtype=torch.bfloat16))
        cuda("sending_linear", linear=linear, boxes=boxes, rank=given["rank"], degree=given["degree"])
