"""Requests through add, step and abort: each gets what it gets alone, and the cache outlives all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

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
    PromptLogprobs,
    Request,
    SamplingParams,
    StructuredOutputsParams,
    TokenChosen,
    engine,
)
from paddle_qwen1m.engine.runner import Runner
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.plan import Workspace

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
    assert_same(run(one)["a"], expected)
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
        patched.setattr(engine, "plan_workspace", lambda *_, **__: Workspace(0, 0, 0))
        one.generate(prompts, GREEDY)
    page_bytes = 128 * 2 * 2 * 2 * 64 * 4
    assert one.pool.num_pages == engine.MEGABYTE // page_bytes < 3 + 1 + 2


def test_steps_have_a_gpus_memory_in_one_piece_beside_the_room_of_a_chunk(
    model: Qwen2OneM, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, int]] = []

    @contextmanager
    def piece(size: int) -> Iterator[None]:
        taken.append(("begin", size))
        yield
        taken.append(("end", size))

    monkeypatch.setattr(engine, "kept_in_one_piece", piece)
    monkeypatch.setattr(engine, "plan_workspace", lambda *_, **__: Workspace(steps=100, kept=10, graphs=1))
    monkeypatch.setattr(model.group, "open_copies", lambda rows, *_: taken.append(("room", rows)), raising=False)
    monkeypatch.setattr(model, "on_gpu", True)
    options = EngineOptions(max_num_batched_tokens=128, cache_tokens=1024, cuda_graph=False)
    Engine(model, options).reserve()
    Engine(model, replace(options, max_model_len=96)).reserve()
    rooms = 128, 96
    assert taken == [step for rows in rooms for step in (("begin", 100), ("room", rows), ("end", 100))]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("chunk", [64, 100])
def test_a_shared_beginning_is_computed_once_and_changes_nothing(
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
    for number in range(3):
        assert_same(done[str(number)], expected[number])
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


def mixed_requests(rng: np.random.Generator, count: int) -> list[Request]:
    """Of every kind, half of them beginning like one of two documents; most of those are so short that m is 1."""
    documents = [rng.integers(0, CONFIG.vocab_size, 130) for _ in range(2)]
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 3},
        {"temperature": 1.0, "n": 3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "logit_bias": {5: 3.0, 9: -100.0}},
        {"temperature": 0.0, "allowed_token_ids": list(range(20, 60)), "prompt_logprobs": 2, "logprobs": 0},
        {"temperature": 1.2, "min_tokens": 4, "stop_token_ids": list(range(50)), "skip_reading_prefix_cache": True},
    ]
    requests = []
    for number in range(count):
        own = rng.integers(0, CONFIG.vocab_size, int(np.exp(rng.uniform(0, np.log(250)))))
        prompt = np.concatenate([documents[number % 4], own]) if number % 4 < 2 else own
        options = {"max_tokens": int(rng.integers(4, 12)), "seed": number, **kinds[number % len(kinds)]}
        params = SamplingParams(**options)  # type: ignore[arg-type]
        bad_words = ((7,), (3, 4)) if number % 5 == 0 else ()
        requests.append(Request(str(number), prompt, params, eos_token_ids=(1, 2), bad_words=bad_words))
    return requests


def assert_same(one: Completion, other: Completion) -> None:
    """The same answer; its log-probabilities to float32, whose sums depend on how many rows a product has."""
    assert replace(one, logprobs=[], token_logprobs=None) == replace(other, logprobs=[], token_logprobs=None)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    for told, others in zip(one.token_logprobs or (), other.token_logprobs or ()):
        assert (told.token, told.rank, told.top_ids) == (others.token, others.rank, others.top_ids)


@pytest.mark.parametrize("sparse", [False, True])
def test_forty_requests_of_all_kinds_get_what_each_gets_alone(
    model: Qwen2OneM, rng: np.random.Generator, sparse: bool
) -> None:
    """They come while others run, some are dropped, prefixes are shared, the pool is too small for all of them."""
    options = EngineOptions(
        max_num_batched_tokens=64, max_pause_tokens=24, sparse_threshold=100 if sparse else 10_000, cache_tokens=1536,
        max_num_seqs=8,
    )  # fmt: skip
    requests = mixed_requests(rng, 40)
    alone = Engine(model, options, BUDGETS)
    expected, told = {}, {}
    for request in requests:
        alone.add(request)
        events = [event for _ in iter(lambda: alone.is_idle, True) for event in alone.step()]
        expected[request.id] = events[-1]
        told[request.id] = [event for event in events if isinstance(event, PromptLogprobs)]
    shared = replace(options, enable_prefix_caching=True, prefix_temperature_tolerance=0.0)
    busy = Engine(model, shared, BUDGETS)
    dropped = {str(number) for number in rng.choice(40, 8, replace=False)}
    events, waiting = [], deque(requests)
    while waiting or not busy.is_idle:
        if waiting and rng.random() < 0.3:
            busy.add(waiting.popleft())
        events += busy.step()
        if dropped and rng.random() < 0.1 and busy.abort(sorted(dropped)[0]):
            dropped.remove(sorted(dropped)[0])
    finished = {event.id: event for event in events if isinstance(event, Finished)}
    assert len(finished) >= 32
    for name, event in finished.items():
        for completion, other in zip(event.completions, expected[name].completions):
            assert_same(completion, other)
        asked = [event for event in events if event.id == name and isinstance(event, PromptLogprobs)]
        ours, others = ([one for event in part for one in event.tokens] for part in (asked, told[name]))
        assert [one.token for one in ours] == [one.token for one in others]
        np.testing.assert_allclose([one.logprob for one in ours], [one.logprob for one in others], atol=1e-4)
    metrics = busy.metrics
    assert metrics.prefix_reused_tokens > 0 and not busy.pool.in_use
    assert (metrics.waiting, metrics.running, metrics.pages_held) == (0, 0, 0)
    assert metrics.finished == len(finished) and metrics.aborted == 40 - len(finished)
    assert metrics.generated_tokens == sum(isinstance(event, TokenChosen) for event in events)


def test_log_probabilities_are_those_of_the_logits(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one, prompt = Engine(model, EngineOptions(max_num_batched_tokens=64)), prompts[2]
    one.add(Request("a", prompt, SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, prompt_logprobs=1)))
    events = [event for _ in iter(lambda: one.is_idle, True) for event in one.step()]
    logits = one.logits(prompt, list(range(len(prompt)))).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    parts = [event for event in events if isinstance(event, PromptLogprobs)]
    assert [event.begin for event in parts] == [1, 65, 129]
    for place, told in enumerate((told for event in parts for told in event.tokens), start=1):
        row = logprobs[place - 1]
        assert told.token == prompt[place] and told.rank == (row >= row[told.token]).sum()
        assert told.logprob == pytest.approx(row[told.token], abs=1e-4)
        assert told.top_ids == (row.argmax(),) and told.top_logprobs == pytest.approx((row.max(),), abs=1e-4)
    (chosen,) = (event for event in events if isinstance(event, TokenChosen))
    assert chosen.logprobs is not None and chosen.logprobs.rank == 1 and len(chosen.logprobs.top_ids) == 2
    assert chosen.logprobs.logprob == pytest.approx(logprobs[-1].max(), abs=1e-4)


def test_the_jth_answer_is_what_its_seed_gives(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one = Engine(model, EngineOptions())
    params = SamplingParams(max_tokens=8, temperature=1.4, seed=11, n=3)
    one.add(Request("a", prompts[0], params))
    events = [event for _ in iter(lambda: one.is_idle, True) for event in one.step()]
    alone = [one.generate(prompts[:1], replace(params, n=1, seed=11 + number))[0] for number in range(3)]
    assert isinstance(events[-1], Finished)
    assert [completion.token_ids for completion in events[-1].completions] == [one.token_ids for one in alone]
    assert [completion.index for completion in events[-1].completions] == [0, 1, 2]


def test_the_models_own_ends_end_an_answer_unless_they_are_ignored(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one = Engine(model, EngineOptions())
    whole = one.generate(prompts[:1], GREEDY)[0].token_ids
    end = whole[2]
    first = whole.index(end) + 1
    for ignore, length, reason in ((False, first, "stop"), (True, 6, "length")):
        one.add(Request("a", prompts[0], replace(GREEDY, ignore_eos=ignore), eos_token_ids=(end,)))
        (completion,) = run(one).values()
        assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == (
            whole[:length],
            reason,
            None,
        )
    one.add(Request("a", prompts[0], replace(GREEDY, min_tokens=6), eos_token_ids=(end,)))
    (completion,) = run(one).values()
    assert len(completion.token_ids) == 6 and end not in completion.token_ids[:-1]


def test_without_max_tokens_an_answer_has_what_the_length_leaves(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one = Engine(model, EngineOptions(max_model_len=30))
    (completion,) = one.generate(prompts[1:2], replace(GREEDY, max_tokens=None))
    assert len(completion.token_ids) == 30 - 17 and completion.finish_reason == "length"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"allowed_token_ids": [3, 101]}, "allowed_token_ids must be 0 to 100, .* got 101"),
        ({"logit_bias": {200: 1.0}}, "logit_bias must be 0 to 100, .* got 200"),
        ({"stop_token_ids": [1000]}, "stop_token_ids must be 0 to 100, .* got 1000"),
        ({"n": 33, "temperature": 1.0}, "n must be at most max_num_seqs, 32"),
        ({"structured_outputs": StructuredOutputsParams(json_object=True)}, "structured_outputs needs .* tokenizer"),
    ],
)
def test_params_that_the_model_cannot_follow_are_refused(
    model: Qwen2OneM, prompts: list[np.ndarray], options: dict[str, Any], message: str
) -> None:
    one = Engine(model, EngineOptions())
    with pytest.raises(ValueError, match=message):
        one.add(Request("a", prompts[1], replace(GREEDY, **options)))
    assert one.is_idle and one.generate(prompts[1:2], GREEDY)


def test_a_stopped_answer_finishes_with_its_reason(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one = Engine(model, EngineOptions())
    one.add(Request("a", prompts[1], replace(GREEDY, max_tokens=50)))
    seen: list[Any] = []
    while sum(isinstance(event, TokenChosen) for event in seen) < 3:
        seen += one.step()
    assert one.stop("a", 0, "\n\n") and not one.stop("a", 0, "again") and not one.is_idle
    (finished,) = one.step()
    assert isinstance(finished, Finished) and one.is_idle and not one.pool.in_use
    assert (finished.completions[0].finish_reason, finished.completions[0].stop_reason) == ("stop", "\n\n")


@pytest.mark.parametrize("ahead", [False, True])
def test_who_hears_tokens_may_end_an_answer_whatever_was_chosen_meanwhile(
    model: Qwen2OneM, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    one, heard = Engine(model, EngineOptions()), []
    plain = one.generate(prompts[:2], SamplingParams(temperature=0.0, max_tokens=9))
    if ahead:  # as if every token had been chosen before the first one is heard
        steps = one._steps
        monkeypatch.setattr(one, "_steps", lambda: iter(list(steps())))

    def hear(index: int, token: int) -> str | None:
        heard.append((index, token))
        return "enough" if index == 1 and token == plain[1].token_ids[3] else None

    kept, ended = one.generate(prompts[:2], SamplingParams(temperature=0.0, max_tokens=9), on_token=hear)
    length = plain[1].token_ids.index(plain[1].token_ids[3]) + 1
    assert kept == plain[0] and one.is_idle
    assert (ended.token_ids, ended.logprobs) == (plain[1].token_ids[:length], plain[1].logprobs[:length])
    assert (ended.finish_reason, ended.stop_reason) == ("stop", "enough")
    assert [token for index, token in heard if index == 1] == ended.token_ids


def test_a_step_that_fails_leaves_an_engine_that_works(
    model: Qwen2OneM, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, run_order = Engine(model, EngineOptions(max_num_batched_tokens=64)), Runner.run
    expected = one.generate(prompts, GREEDY)
    for fatal in range(1, 12, 2):
        count = iter(range(1000))

        def fail(runner: Runner, order: Any, *rest: Any, fatal: int = fatal, count: Any = count) -> Any:
            if next(count) == fatal:
                raise RuntimeError("the device is gone")
            return run_order(runner, order, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(Runner, "run", fail)
            with pytest.raises(RuntimeError, match="the device is gone"):
                one.generate(prompts, GREEDY)
        assert one.is_idle and not one.pool.in_use
        assert one.generate(prompts, GREEDY) == expected


def test_prefixes_can_be_forgotten_but_not_while_requests_run(model: Qwen2OneM, prompts: list[np.ndarray]) -> None:
    one = Engine(model, EngineOptions(enable_prefix_caching=True, cache_tokens=1024))
    one.reserve()
    one.add(Request("a", prompts[0], GREEDY))
    assert not one.reset_prefix_cache()
    run(one)
    assert one.reset_prefix_cache() and one.pool.take(8) and one.metrics.pages == 8
    one.close()
    one.close()


def test_a_conversation_that_becomes_sparse_is_read_anew_once_and_says_so(
    model: Qwen2OneM, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    options = EngineOptions(
        sparse_threshold=150, max_num_batched_tokens=128, enable_prefix_caching=True, cache_tokens=2048,
        prefix_temperature_tolerance=1.0,
    )  # fmt: skip
    one = Engine(model, options, BUDGETS)
    conversation, reused = rng.integers(0, CONFIG.vocab_size, 140), []
    for turn in range(3):
        one.add(Request(str(turn), conversation, GREEDY))
        while not one.is_idle:
            reused += [event.reused_tokens for event in one.step() if isinstance(event, Prefilled)][-1:]
        conversation = np.concatenate([conversation, rng.integers(0, CONFIG.vocab_size, 140)])
    assert reused[0] == 0 and reused[-1] >= 128 and one.metrics.prefix_dense_tokens >= 128
    (line,) = caplog.messages
    assert line.startswith("request 1: 128 of its tokens are cached, but as of a dense prompt")
