"""Requests through add, step and abort: each gets what it gets alone, and the cache outlives all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_model import BUDGETS, CONFIG, random_model

from paddle_qwen1m.engine import (
    Completion,
    Engine,
    Finished,
    Logits,
    NotEnoughMemory,
    Prefilled,
    Request,
    SamplingParams,
    TokenChosen,
    engine,
)
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
SEEDED = SamplingParams(max_tokens=9, temperature=1.3, seed=5)


@pytest.fixture
def model(rng: np.random.Generator) -> Qwen2OneM:
    return random_model(rng)


@pytest.fixture
def prompts(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.integers(0, CONFIG.vocab_size, length) for length in (300, 17, 140)]


def run(one: Engine) -> dict[str, Completion]:
    done = {}
    while not one.is_idle:
        done.update({event.id: event.completions[0] for event in one.step() if isinstance(event, Finished)})
    return done


def test_requests_that_come_while_others_run_get_what_they_get_alone(
    model: Qwen2OneM, prompts: list[np.ndarray]
) -> None:
    options = EngineOptions(max_num_batched_tokens=64, cache_tokens=1024)
    alone = [Engine(model, options).generate([prompt], SEEDED)[0] for prompt in prompts]
    busy, completions = Engine(model, options), {}
    for number, prompt in enumerate(prompts):
        busy.add(Request(f"request {number}", prompt, SEEDED))
        for _ in range(6):
            completions.update({event.id: event.completions[0] for event in busy.step() if isinstance(event, Finished)})
    completions.update(run(busy))
    assert [completions[f"request {number}"] for number in range(3)] == alone


def test_no_prompts_are_no_work(model: Qwen2OneM) -> None:
    assert Engine(model, EngineOptions()).generate([], GREEDY) == []


def test_events_tell_the_whole_story(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one = Engine(model, EngineOptions(max_num_batched_tokens=100))
    one.add(Request("story", prompts[2], GREEDY))
    events = [event for _ in iter(lambda: one.is_idle, True) for event in one.step()]
    assert all(event.id == "story" for event in events)
    read = [event for event in events if isinstance(event, Prefilled)]
    assert [(event.done_tokens, event.total_tokens, event.reused_tokens) for event in read] == [
        (100, 140, 0),
        (140, 140, 0),
    ]
    tokens = [event.token for event in events if isinstance(event, TokenChosen)]
    assert isinstance(events[-1], Finished) and events[-1].completions[0].token_ids == tokens and len(tokens) == 6


def test_logits_are_a_request_too(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one = Engine(model, EngineOptions(max_num_batched_tokens=64))
    one.add(Request("read", prompts[0], logit_positions=(0, 70, 71, 299)))
    events = [event for _ in iter(lambda: one.is_idle, True) for event in one.step()]
    values = np.concatenate([event.values for event in events if isinstance(event, Logits)])
    np.testing.assert_array_equal(values, one.logits(prompts[0], [0, 70, 71, 299]))
    assert events[-1] == Finished("read", ())


def test_a_request_may_ask_for_logits_and_an_answer(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one = Engine(model, EngineOptions(max_num_batched_tokens=64))
    one.add(Request("both", prompts[0], GREEDY, logit_positions=(5, 298, 299)))
    events = [event for _ in iter(lambda: one.is_idle, True) for event in one.step()]
    values = np.concatenate([event.values for event in events if isinstance(event, Logits)])
    np.testing.assert_array_equal(values, one.logits(prompts[0], [5, 298, 299]))
    assert events[-1] == Finished("both", tuple(one.generate(prompts[:1], GREEDY)))


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_an_aborted_request_leaves_nothing_behind(model: Qwen2OneM, prompts: list[np.ndarray], steps: int) -> None:
    """Dropped while it waits, is read, or answers: the others get what they would have got."""
    expected = Engine(model, EngineOptions()).generate(prompts[:1], GREEDY)[0]
    one = Engine(model, EngineOptions(max_num_batched_tokens=128, cache_tokens=1024))
    for name, prompt in zip("abc", prompts):
        one.add(Request(name, prompt, GREEDY))
    for _ in range(steps):
        one.step()
    assert one.abort("b") and one.abort("c") and not one.abort("b") and not one.abort("nobody")
    assert run(one) == {"a": expected}
    assert not one.pool.in_use


def test_an_id_is_used_once_at_a_time(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one = Engine(model, EngineOptions(cache_tokens=1024))
    one.add(Request("a", prompts[0], GREEDY))
    with pytest.raises(ValueError, match="there is a request with the id 'a' already"):
        one.add(Request("a", prompts[1], GREEDY))
    with pytest.raises(ValueError, match="options cannot change while requests run: a"):
        one.configure(EngineOptions())
    run(one)
    one.add(Request("a", prompts[1], GREEDY))


def test_a_request_that_never_fits_is_refused_and_the_others_run_on(
    model: Qwen2OneM, prompts: list[np.ndarray]
) -> None:
    one = Engine(model, EngineOptions(cache_tokens=200))
    with pytest.raises(ValueError, match="exceeds the capacity of the KV cache"):
        one.generate(prompts[:1], GREEDY)
    assert one.is_idle and len(one.generate(prompts[1:], GREEDY)) == 2


def test_a_batch_that_does_not_fit_at_once_takes_turns(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    expected = Engine(model, EngineOptions()).generate(prompts, GREEDY)
    assert Engine(model, EngineOptions(cache_tokens=384)).generate(prompts, GREEDY) == expected


def test_the_cache_is_kept_and_remade_only_when_a_call_needs_more(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one = Engine(model, EngineOptions(max_num_batched_tokens=128))
    one.generate(prompts[1:2], GREEDY)
    first = one.pool
    assert first.num_pages == 1 + 1  # the call's, and max_num_batched_tokens more
    one.generate(prompts[2:], GREEDY)
    assert one.pool is first
    one.generate(prompts, GREEDY)
    second = one.pool
    assert second is not first and second.num_pages == (3 + 1 + 2) + 3 * 1
    one.configure(one.options)
    one.generate(prompts[1:2], GREEDY)
    assert one.pool is not second
    one.release_cache()
    assert one.generate(prompts[1:2], GREEDY)


def test_too_little_memory_is_said_before_any_is_asked_for(
    model: Qwen2OneM, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "available_host_memory", lambda: 400_000)
    one = Engine(model, EngineOptions())
    with pytest.raises(NotEnoughMemory, match=r"306 tokens|384 tokens"):
        one.generate(prompts[:1], GREEDY)
    assert one.is_idle


def test_the_rank_with_the_least_memory_decides(
    model: Qwen2OneM, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks take turns alike: each must have as many pages as the others."""
    monkeypatch.setattr(engine, "available_host_memory", lambda: 1 << 40)
    monkeypatch.setattr(model.group, "smallest", lambda megabytes: min(megabytes, 1), raising=False)
    one = Engine(model, EngineOptions(max_num_batched_tokens=64))
    with monkeypatch.context() as patched:
        patched.setattr(engine, "activation_bytes", lambda *_: 0)
        one.generate(prompts, GREEDY)
    page_bytes = 128 * 2 * 2 * 2 * 64 * 4
    assert one.pool.num_pages == engine.MEGABYTE // page_bytes < 3 + 1 + 2


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("chunk", [64, 100])
def test_a_shared_beginning_is_computed_once_and_changes_no_bit(
    model: Qwen2OneM, prompts: list[np.ndarray], rng: np.random.Generator, sparse: bool, chunk: int
) -> None:
    """Chunks of 100 tokens end inside pages of 128. Equal lengths: beyond 160 tokens m depends on them."""
    plain = EngineOptions(max_num_batched_tokens=chunk, sparse_threshold=0 if sparse else 10_000)
    options = replace(plain, enable_prefix_caching=True, cache_tokens=2048)
    questions = [np.concatenate([prompts[0], rng.integers(0, CONFIG.vocab_size, 20)]) for _ in range(3)]
    expected = [Engine(model, plain, BUDGETS).generate([question], SEEDED)[0] for question in questions]
    one, read = Engine(model, options, BUDGETS), []
    for number, question in enumerate(questions):
        one.add(Request(str(number), question, SEEDED))
    done: dict[str, Completion] = {}
    while not one.is_idle:
        for event in one.step():
            if isinstance(event, Prefilled):
                read.append((event.id, event.reused_tokens))
            elif isinstance(event, Finished):
                (done[event.id],) = event.completions
    assert [done[str(number)] for number in range(3)] == expected
    assert {reused for name, reused in read if name == "0"} == {0}
    assert {reused for name, reused in read if name != "0"} == {256}


def test_keys_of_another_temperature_are_not_reused(
    model: Qwen2OneM, prompts: list[np.ndarray], rng: np.random.Generator
) -> None:
    one = Engine(model, EngineOptions(max_num_batched_tokens=64, enable_prefix_caching=True, cache_tokens=2048))
    longer = np.concatenate([prompts[0], rng.integers(0, CONFIG.vocab_size, 9)])
    expected = Engine(model, EngineOptions(max_num_batched_tokens=64)).generate([longer], GREEDY)
    one.generate(prompts[:1], GREEDY)
    assert one.generate([longer], GREEDY) == expected
