"""Lanes: ranks in threads give what one does, with any number of rows; nothing is under way where all rows are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import oracle
import paddle
import pytest

from paddle_qwen1m import ops
from paddle_qwen1m.config import LANE_ROWS, LANE_ROWS_IN_FP8
from paddle_qwen1m.parallel import group as group_module
from paddle_qwen1m.parallel.group import Group, ProcessGroup
from paddle_qwen1m.parallel.lanes import Lanes
from paddle_qwen1m.parallel.pending import Pending
from paddle_qwen1m.parallel.room import LEAST_LANE_ROWS, lane_borders

WIDTH, INNER, LAYERS, EPS = 32, 24, 3, 1e-6


class Job:
    """What ranks that are threads exchange."""

    def __init__(self, degree: int) -> None:
        self.barrier = threading.Barrier(degree)
        self.values: list[np.ndarray] = [np.zeros(0)] * degree


class Rank(Group):
    """One of them. `log`: its collectives and waits, in order; `under_way`: those that nobody has waited for."""

    def __init__(self, job: Job, rank: int, least: int) -> None:
        self.job, self.rank, self.degree, self._lane_rows = job, rank, len(job.values), least
        self.log: list[str] = []
        self.under_way = 0

    adds_up, lanes, padded = True, ProcessGroup.lanes, ProcessGroup.padded
    take_buffers = ProcessGroup._take_buffers

    def all_reduce(self, values: paddle.Tensor) -> paddle.Tensor:
        self.log.append("all_reduce")
        return paddle.to_tensor(sum(self._all(values)))

    def reduce_scatter(self, values: paddle.Tensor) -> Pending:
        total = sum(self._all(values))
        share = len(total) // self.degree
        return self._pending("reduce_scatter", paddle.to_tensor(total[self.rank * share : (self.rank + 1) * share]))

    def all_gather(self, values: paddle.Tensor, out: paddle.Tensor) -> Pending:
        out.copy_(paddle.to_tensor(np.concatenate(self._all(values))), False)
        return self._pending("all_gather", out)

    def _all(self, values: paddle.Tensor) -> list[np.ndarray]:
        self.job.values[self.rank] = values.numpy()
        self.job.barrier.wait(60)
        found = list(self.job.values)
        self.job.barrier.wait(60)
        return found

    def _pending(self, name: str, values: paddle.Tensor) -> Pending:
        self.log.append(name)
        self.under_way += 1
        rank = self

        class Task:
            def wait(self) -> None:
                rank.under_way -= 1
                rank.log.append(f"wait {name}")

        return Pending(values, Task())


class LocalRank(Group):
    """One rank without others. products: the rows of each."""

    under_way = 0
    products: list[int]


class Layers:
    """Random ones, each two products of which a rank has a part: rows add up over the ranks."""

    def __init__(self, rng: np.random.Generator) -> None:
        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[0]))

        self.norms = [1 + 0.1 * draw(WIDTH) for _ in range(2 * LAYERS + 1)]
        self.output = [draw(WIDTH, WIDTH) for _ in range(LAYERS)]
        self.up = [draw(WIDTH, INNER) for _ in range(LAYERS)]
        self.down = [draw(INNER, WIDTH) for _ in range(LAYERS)]
        self.first = draw(WIDTH, WIDTH)

    def alone(self, rows: np.ndarray) -> list[np.ndarray]:
        """What is behind every layer, in float64."""

        def norm(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + EPS) * weight

        residual = rows.astype(np.float64) @ self.first
        found = [norm(residual, self.norms[0])]
        for layer in range(LAYERS):
            residual = residual + found[-1] @ self.output[layer]
            inner = norm(residual, self.norms[2 * layer + 1])
            residual = residual + np.tanh(inner @ self.up[layer]) @ self.down[layer]
            found.append(norm(residual, self.norms[2 * layer + 2]))
        return found

    def on(self, group: Rank | LocalRank, rows: np.ndarray, at_once: int = LANE_ROWS) -> list[np.ndarray]:
        """The same on one of several ranks, whose rows are padded as it says; there with what memory holds."""
        rank, degree = group.rank, group.degree
        own, inner = (slice(rank * size // degree, (rank + 1) * size // degree) for size in (WIDTH, INNER))

        def product(weight: np.ndarray, act: Any = np.asarray) -> Any:
            def of(values: paddle.Tensor) -> paddle.Tensor:
                if isinstance(group, LocalRank):
                    group.products.append(values.shape[0])
                return paddle.to_tensor(act(values.numpy() @ weight))

            return of

        padded = np.full((group.padded(len(rows)), WIDTH), np.nan, np.float32)
        padded[: len(rows)] = rows
        norms = [paddle.to_tensor(one) for one in self.norms]
        with Lanes(group, len(padded), WIDTH, EPS, at_once=at_once) as lanes:
            lanes.add(paddle.to_tensor(padded[:, own]), [product(self.first[own])], norms[0])
            found = [lanes.all_rows().numpy()]
            for layer in range(LAYERS):
                lanes.add(paddle.to_tensor(found[-1][:, own]), [product(self.output[layer][own])], norms[2 * layer + 1])
                up, down = product(self.up[layer][:, inner], np.tanh), product(self.down[layer][inner])
                lanes.add(None, [up, down], norms[2 * layer + 2])
                found.append(lanes.all_rows().numpy())
                assert group.under_way == 0, "a prefill stands still here"
        return [values[: len(rows)] for values in found]


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 10, 11, 13, 18, 43, 50, 67])
def test_ranks_give_what_one_does_with_any_number_of_rows(rng: np.random.Generator, degree: int, rows: int) -> None:
    """In two lanes from 8 rows on, from 16 on in four, from 40 on in more of twice as many rows, up to eight."""
    layers, given = Layers(rng), rng.standard_normal((rows, WIDTH)).astype(np.float32)
    expected, job = layers.alone(given), Job(degree)
    ranks = [Rank(job, rank, least=4) for rank in range(degree)]
    with ThreadPoolExecutor(degree) as pool:
        results = list(pool.map(lambda rank: layers.on(rank, given), ranks))
    for found in results:
        for one, other in zip(found, expected):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
        for one, other in zip(found, results[0]):
            np.testing.assert_array_equal(one, other)
    assert all(rank.log == ranks[0].log for rank in ranks)
    padded = -(-rows // degree) * degree
    lanes = min(8, padded // 8) if padded >= 40 else min(4, padded // 4) if padded >= 8 else 0
    assert ranks[0].log.count("all_gather") == (2 * LAYERS + 1) * lanes
    assert ("all_reduce" in ranks[0].log) == (lanes == 0) != ("reduce_scatter" in ranks[0].log)


def order(rng: np.random.Generator, rows: int) -> list[str]:
    """Of so many rows in lanes of two or three, between two points: products with their rows, and collectives."""
    log: list[str] = []
    job = Job(1)
    group = Rank(job, 0, least=2)
    group.log = log

    def product(name: str) -> Any:
        def compute(values: paddle.Tensor) -> paddle.Tensor:
            log.append(f"{name}{len(values)}")
            return values + 0.0

        return compute

    weight, lanes = paddle.ones([WIDTH]), Lanes(group, rows, WIDTH, EPS)
    lanes.add(paddle.to_tensor(rng.standard_normal((rows, WIDTH)).astype(np.float32)), [product("embed")], weight)
    whole = lanes.all_rows()
    log.clear()
    lanes.add(whole, [product("output")], weight)
    lanes.add(None, [product("up"), product("down")], weight)
    lanes.all_rows()
    return log


def test_a_lane_computes_while_the_others_sums_are_under_way(rng: np.random.Generator) -> None:
    """The way of a lane's sums, and of its normed rows, lies beside a product of the other one."""
    scatter, gather = "reduce_scatter", "all_gather"
    assert order(rng, 5) == [
        "output2", scatter, "output3", f"wait {scatter}", gather, scatter,
        f"wait {gather}", "up2", f"wait {scatter}", gather, "down2", scatter,
        f"wait {gather}", "up3", f"wait {scatter}", gather, "down3", scatter,
        f"wait {gather}", f"wait {scatter}", gather, f"wait {gather}",
    ]  # fmt: skip


def test_behind_each_product_a_lane_is_normed_and_behind_one_alone_others_may_wait(rng: np.random.Generator) -> None:
    """Behind attention, where the way of a lane's sums may be longer than the next one's product."""
    scatter, gather = "reduce_scatter", "all_gather"
    log = order(rng, 8)
    begin = log.index("up2")
    assert log[: begin + 7] == [
        "output2", scatter, "output2", scatter,
        "output2", f"wait {scatter}", gather, scatter,
        "output2", f"wait {scatter}", gather, scatter,
        f"wait {gather}", "up2", f"wait {scatter}", gather, "down2", f"wait {scatter}", gather, scatter,
    ]  # fmt: skip
    assert [one for one in log[begin:] if one in ("up2", "down2")] == ["up2", "down2"] * 4


@pytest.mark.parametrize("rows", [3, 18])
def test_some_rows_go_on_alone(rng: np.random.Generator, rows: int) -> None:
    """As in a last layer, of which only they are wanted, from one lane or four."""
    layers, given, job = Layers(rng), rng.standard_normal((rows, WIDTH)).astype(np.float32), Job(2)
    wanted = np.array([rows - 1, 0, 1, rows - 1])
    before = (given.astype(np.float64) @ layers.first)[wanted]
    after = before + before @ layers.output[0]
    expected = after / np.sqrt((after**2).mean(axis=-1, keepdims=True) + EPS) * layers.norms[1]

    def on(rank: Rank) -> np.ndarray:
        own = slice(rank.rank * WIDTH // 2, (rank.rank + 1) * WIDTH // 2)
        first, output = (paddle.to_tensor(weight[own]) for weight in (layers.first, layers.output[0]))
        lanes, norm = Lanes(rank, rank.padded(rows), WIDTH, EPS), paddle.to_tensor(layers.norms[1])
        padded = np.pad(given, ((0, rank.padded(rows) - rows), (0, 0)))
        lanes.add(paddle.to_tensor(padded[:, own]), [lambda values: values @ first], norm)
        lanes.all_rows()
        alone = lanes.of_rows(paddle.to_tensor(wanted))
        assert rank.under_way == 0
        values = paddle.to_tensor(before[:, own].astype(np.float32))
        alone.add(values, [lambda values: values @ output], norm)
        return alone.all_rows().numpy()

    ranks = [Rank(job, rank, least=4) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(on, ranks):
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert ("all_gather" in ranks[0].log) == (rows == 18) and ranks[0].log[-1] == "all_reduce"


def test_a_decode_step_is_one_lane_however_many_rows_it_has(rng: np.random.Generator) -> None:
    group, weight = Rank(Job(1), 0, least=2), paddle.ones([WIDTH])
    lanes = Lanes(group, 8, WIDTH, EPS, split=False)
    for _ in range(3):
        lanes.add(paddle.to_tensor(rng.standard_normal((8, WIDTH)).astype(np.float32)), [lambda rows: rows + 0], weight)
        lanes.all_rows()
    assert group.log == ["all_reduce"] * 3


def test_every_kind_of_collective_comes_first_with_few_values_and_with_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which NCCL takes its buffers; nothing is under way afterwards."""
    monkeypatch.setattr(group_module, "FIRST_VALUES", (1, 1000))
    job = Job(2)
    ranks = [Rank(job, rank, least=4) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Rank.take_buffers, ranks))
    scatter, gather = "reduce_scatter", "all_gather"
    assert ranks[0].log == ranks[1].log == ["all_reduce", scatter, f"wait {scatter}", gather, f"wait {gather}"] * 2
    assert all(rank.under_way == 0 for rank in ranks)


def test_an_alone_rank_sends_nothing(rng: np.random.Generator) -> None:
    layers, given = Layers(rng), rng.standard_normal((300, WIDTH)).astype(np.float32)
    rank = Group()
    assert rank.padded(299) == 299
    lanes = Lanes(rank, 300, WIDTH, EPS)
    first, norm = paddle.to_tensor(layers.first), paddle.to_tensor(layers.norms[0])
    lanes.add(paddle.to_tensor(given), [lambda rows: rows @ first], norm)
    np.testing.assert_allclose(lanes.all_rows().numpy(), layers.alone(given)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "heights"),
    [(383, [383]), (384, [256, 128]), (600, [256, 344]), (700, [256, 256, 188]), (1024, [256] * 4)],
)
def test_a_large_chunk_of_one_rank_goes_in_parts(rng: np.random.Generator, rows: int, heights: list[int]) -> None:
    """As rows do that go together; what the last one would have too few of is with the one before."""
    layers, given, alone = Layers(rng), rng.standard_normal((rows, WIDTH)).astype(np.float32), LocalRank()
    seen = alone.products = []
    for one, other in zip(layers.on(alone, given, at_once=256), layers.alone(given)):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    assert seen[: len(heights)] == heights
    assert len(seen) == (1 + 3 * LAYERS) * len(heights)


def test_lanes_of_one_rank_fill_whole_rounds_of_a_hopper() -> None:
    """Of 132 processors, in tiles of 192 and 128 rows by 256 features, whatever the model's width; but for the last."""
    for tile, rows in ((192, LANE_ROWS), (128, LANE_ROWS_IN_FP8)):
        assert all(rows // tile * (width // 256) % 132 == 0 and rows % tile == 0 for width in (3584, 4608, 5120, 7168))
    assert lane_borders(126_976, LANE_ROWS) == [*range(0, 11 * LANE_ROWS, LANE_ROWS), 126_976]
    assert lane_borders(84_736, LANE_ROWS) == [*range(0, 7 * LANE_ROWS, LANE_ROWS), 84_736]
    assert lane_borders(LANE_ROWS + 127, LANE_ROWS) == [0, LANE_ROWS + 127]
    assert lane_borders(1, LANE_ROWS) == [0, 1]
    assert LEAST_LANE_ROWS > ops.FEW_ROWS_OF_8_BITS, "a lane in 16 bits beside those in FP8"
    assert LANE_ROWS_IN_FP8 % 4 == 0, "rows of FP8 that are put one below the other"


def test_the_last_layer_goes_on_with_rows_of_all_parts(rng: np.random.Generator) -> None:
    given, weight = rng.standard_normal((300, WIDTH)).astype(np.float32), paddle.ones([WIDTH])
    lanes = Lanes(Group(), 300, WIDTH, EPS, at_once=128)
    lanes.add(paddle.to_tensor(given), [lambda rows: rows + 0], weight)
    lanes.all_rows()
    wanted = np.array([3, 299, 150, 64])
    few = lanes.of_rows(paddle.to_tensor(wanted))
    few.add(paddle.zeros([4, WIDTH]), [lambda rows: rows], weight)
    expected = given[wanted] / np.sqrt((given[wanted] ** 2).mean(axis=-1, keepdims=True) + EPS)
    np.testing.assert_allclose(few.all_rows().numpy(), expected, rtol=0, atol=2e-6)


def test_rows_in_fp8_stay_in_parts(rng: np.random.Generator) -> None:
    """Each with what its product takes; the norm of an answer's last layer brings all rows together."""
    width = 256
    given, weight = rng.standard_normal((300, width)).astype(np.float32), paddle.ones([width])
    lanes = Lanes(Group(), 300, width, EPS, at_once=128)
    lanes.add(paddle.to_tensor(given), [lambda rows: rows + 0], weight, lambda _rows: True)
    parts = lanes.all_rows()
    assert isinstance(parts, list) and [part.tokens for part in parts] == [128, 172]
    normed = given / np.sqrt((given**2).mean(axis=-1, keepdims=True) + EPS)
    kept = oracle.round_rows(normed)
    np.testing.assert_array_equal(np.concatenate([part.numbers.numpy() for part in parts]), kept[0])
    lanes.add(paddle.zeros([300, width]), [lambda rows: rows], weight)
    np.testing.assert_allclose(lanes.all_rows().numpy(), normed, rtol=0, atol=2e-6)
