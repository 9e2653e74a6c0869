"""Questions: few rows behind a cached prefix, read by steps that are captured once; on a CPU with stand-in graphs."""

from __future__ import annotations

import numpy as np
import pytest
from runner_setup import Made, fill_with_nan, head, rows
from small_model import BUDGETS, CONFIG, random_model
from stand_in_graph import StandInGraph, stand_in

from paddle_qwen1m import ops
from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.config import QUESTION_ROWS
from paddle_qwen1m.engine.orders import Prefill, Rows
from paddle_qwen1m.engine.runner import Runner
from paddle_qwen1m.model import Qwen2OneM

PAGE, PAGES = 32, 64
CHUNK = CONFIG.dual_chunk.chunk_len
PROMPT = 5 * CHUNK


@pytest.fixture
def model(rng: np.random.Generator) -> Qwen2OneM:
    return random_model(rng)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StandInGraph]:
    return stand_in(monkeypatch)


def make(model: Qwen2OneM, *, replay: bool) -> Made:
    """A runner over a cache that holds nothing but NaN."""
    cache = PagedCache(CONFIG, PAGES, PAGE, "float32")
    fill_with_nan(cache)
    runner = Runner(model, BUDGETS, 0, replay=replay)
    runner.use(cache, None, max_num_seqs=1, max_model_len=PAGE * PAGES)
    return Made(runner, cache)


def read(made: Made, prompt: np.ndarray, begin: int, *, sparse: bool, wanted: tuple[int, ...]) -> np.ndarray:
    """The prompt from `begin` on, behind the rest: logits of the rows that are wanted."""
    pages = range(3, 3 + len(prompt) // PAGE + 1)
    for first, last, which in ((0, begin, ()), (begin, len(prompt), wanted)):
        if first < last:
            own = Rows(prompt[first:last], first, tuple(pages), len(prompt), sparse, which)
            made.runner.run(Prefill((own,), points=0))
    return head(made.runner, 0, len(wanted)) if wanted else np.empty([0, CONFIG.vocab_size], np.float32)


def kept(made: Made) -> np.ndarray:
    return np.stack([pages.numpy() for layer in made.cache.layers for pages in layer[:2]])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_replayed_step_reads_questions_of_any_length_anywhere(
    model: Qwen2OneM, rng: np.random.Generator, graphs: list[StandInGraph], sparse: bool
) -> None:
    """In turn, longer and shorter ones, within a DCA chunk and across a border, at a prompt's beginning too: keys,
    values and logits are those of a prefill.
    """
    asking = make(model, replay=True)
    for length, count in (
        (300, 1),
        (300, 8),
        (301, 8),
        (CHUNK + 3, 7),
        (40, 40),
        (2 * CHUNK + 20, 64),
        (3 * CHUNK + 9, 33),
        (PROMPT, 9),
        (1, 1),
    ):
        prompt = rng.integers(0, CONFIG.vocab_size, length)
        wanted = tuple(sorted({0, count // 2, count - 1}))
        plain = make(model, replay=False)
        fill_with_nan(asking.cache)
        expected, got = (read(made, prompt, length - count, sparse=sparse, wanted=wanted) for made in (plain, asking))
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
        np.testing.assert_allclose(kept(asking), kept(plain), rtol=0, atol=2e-5)  # NaN where nothing was written
    assert len(graphs) == len(QUESTION_ROWS) and all(one.replays >= 2 for one in graphs)
    asking.runner.use(None)
    assert all(one.was_reset for one in graphs)


@pytest.mark.parametrize("wanted", [(), (6,), (0, 1, 2), (1, 4, 6)])
def test_the_rows_that_are_wanted_go_on(
    model: Qwen2OneM, rng: np.random.Generator, graphs: list[StandInGraph], wanted: tuple[int, ...]
) -> None:
    prompt = rng.integers(0, CONFIG.vocab_size, 207)
    expected, got = (
        read(make(model, replay=replay), prompt, 200, sparse=False, wanted=wanted) for replay in (False, True)
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_all_of_them_attend_to_all_keys_in_a_sparse_prompt_too() -> None:
    assert max(QUESTION_ROWS) <= ops.PROBE_ROWS


def test_more_rows_and_several_prompts_are_no_question(
    model: Qwen2OneM, rng: np.random.Generator, graphs: list[StandInGraph]
) -> None:
    made = make(model, replay=True)
    one, other = (rng.integers(0, CONFIG.vocab_size, length) for length in (QUESTION_ROWS[-1] + 1, 5))
    for _ in range(3):
        made.runner.run(Prefill((rows(one, range(3), wanted=(64,)),), points=0))
        made.runner.run(Prefill((rows(other, [4], wanted=(4,)), rows(other, [5], wanted=(4,))), points=0))
    logits = head(made.runner, 0, 2)
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=2e-5)
    assert not graphs
