"""tools/benchmark_gpu_model.py: the pieces that lines are made for before a run is timed are those of the run."""

from __future__ import annotations

from typing import Any

import benchmark_gpu_model
import numpy as np
import pytest
from small_model import BUDGETS, CONFIG, random_model

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
