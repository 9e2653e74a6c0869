"""tools/benchmark_gpu_model.py: what it makes before a run is timed, and what it counts of one; that needs no GPU."""

from __future__ import annotations

from itertools import count
from typing import Any

import benchmark_gpu_model
import numpy as np
import pytest
from small_model import BUDGETS, CONFIG, random_model

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.attention.selector import Selector
from paddle_qwen1m.attention.step import SparsePiece
from paddle_qwen1m.engine import Engine, SamplingParams
from paddle_qwen1m.options import EngineOptions


@pytest.mark.parametrize("tokens", [512, 700, 1000])
def test_lines_are_made_for_the_pieces_that_are_asked_for(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """Chunks that end at a border of a DCA chunk, and a last one in parts, among them."""
    asked, choose = set[tuple[int, int]](), Selector.choose

    def noted(selector: Selector, sparse: SparsePiece, *arguments: Any, **options: Any) -> Any:
        asked.add((sparse.piece.begin, sparse.piece.end))
        return choose(selector, sparse, *arguments, **options)

    monkeypatch.setattr(Selector, "choose", noted)
    options = EngineOptions(max_num_batched_tokens=96, page_size=16, sparse_threshold=64, prefix_border_parts=2)
    engine = Engine(random_model(rng), options, BUDGETS)
    prompt = rng.integers(0, CONFIG.vocab_size, tokens)
    engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0))
    made: list[Piece] = benchmark_gpu_model.prompt_pieces(tokens, engine.chunking)
    assert asked == {(piece.begin, piece.end) for piece in made if piece.worth_choosing}
    assert sum(piece.rows for piece in made) == tokens


class CountingClock(benchmark_gpu_model.DeviceClock):
    """A millisecond from one mark to the next."""

    def __init__(self) -> None:
        self._marks = count()

    def mark(self) -> Any:
        return next(self._marks)

    def milliseconds(self, start: Any, end: Any) -> float:
        return float(end - start)


def test_an_ops_time_is_without_that_of_ops_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "cast", lambda: None)
    monkeypatch.setattr(ops, "linear", lambda: [ops.cast(), ops.cast()])
    watch = benchmark_gpu_model.OpTimes(CountingClock())
    with watch.watch():
        ops.linear()
        ops.cast()
        watch.stop()
        ops.cast()
    ops.cast()
    assert watch.totals() == {"linear": 5.0 - 2.0, "cast": 3.0}


def test_what_happens_at_the_first_token_happens_once(rng: np.random.Generator) -> None:
    engine, calls = Engine(random_model(rng), EngineOptions(sparse=False)), list[int]()
    times = benchmark_gpu_model.token_seconds(engine, np.arange(9), 4, lambda: calls.append(1))
    assert len(times) == 4 and times == sorted(times) and calls == [1]
