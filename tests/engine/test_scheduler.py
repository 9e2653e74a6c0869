"""What the scheduler decides, without a model: see simulation.py. Every key that is read is what should be there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulation import Device, Speed, World, answer_to

from paddle_qwen1m.engine.core import Finished, Logits, Prefilled, PromptLogprobs, TokenChosen
from paddle_qwen1m.engine.orders import Advance, CopyPage, Decode, Drop, Prefill
from paddle_qwen1m.engine.tasks import DecodeStep
from paddle_qwen1m.engine.waiting import MOST_PASSED


def tokens(length: int, first: int = 100) -> list[int]:
    return [number % 1000 for number in range(first, first + length)]


def answers(world: World, name: str) -> list[list[int]]:
    ((_, finished),) = world.of(name, Finished)
    return [completion.token_ids for completion in finished.completions]


def begun(world: World) -> list[str]:
    """Whose chunks were begun, in order; short prompts that share one with a + between them."""
    return [
        "+".join(part.sequence.id for part in task.chunk.parts)  # type: ignore[union-attr]
        for _, task in world.tasks
        if isinstance(task.order, Prefill)
    ]


def decoded(world: World) -> list[Decode]:
    return [order for order in world.orders if isinstance(order, Decode)]


# --- admission ---


def test_what_can_never_fit_is_refused_at_once_with_both_numbers() -> None:
    world = World(6)
    with pytest.raises(ValueError, match=r"request big: 25 tokens.*cache of 24 tokens"):
        world.add("big", tokens(22), 3)
    with pytest.raises(ValueError, match="n must be at most max_num_seqs, 4 answers at a time, got 5"):
        world.add("many", tokens(2), 1, n=5)
    with pytest.raises(ValueError, match=r"request wide: 12 tokens.* 4 times"):
        world.add("wide", tokens(5), 7, n=4)  # 3 pages, and 3 * 2 behind the one that is shared
    assert not world.scheduler.requests and world.pool.available == 6


def test_what_can_fit_later_waits_and_nothing_that_was_admitted_lacks_pages() -> None:
    world = World(6)
    for name, length in (("a", 13), ("b", 17), ("c", 1)):
        world.add(name, tokens(length), 3)
    world.run()
    assert [answers(world, name)[0] for name in "abc"] == [answer_to(tokens(n), 3) for n in (13, 17, 1)]
    assert world.pool.available == 6


def test_a_small_request_may_pass_one_that_waits_for_pages_but_not_more_than_eight_times() -> None:
    world = World(8, slots=8)
    world.add("first", tokens(20), 8)  # 7 of 8 pages
    world.step()
    world.add("large", tokens(25), 4)  # 8 pages: waits for all of the others
    names = [f"small {number}" for number in range(12)]
    for number, name in enumerate(names):
        world.add(name, tokens(2, 10 * number), 2)
        world.step()
    world.run()
    order = [event.id for _, event in world.events if isinstance(event, Finished)]
    before = order.index("large") - 1
    assert before <= MOST_PASSED and order.index("large") > 1, "some passed, not all"
    assert sorted(order) == sorted(["first", "large", *names])


def test_answers_never_take_more_slots_than_there_are() -> None:
    world = World(64, slots=4)
    for number in range(9):
        world.add(str(number), tokens(3, 50 * number), 6, n=1 + number % 3)
    world.run()
    assert max(order.slots for order in decoded(world)) <= 4
    for number in range(9):
        assert answers(world, str(number)) == [answer_to(tokens(3, 50 * number), 6)] * (1 + number % 3)


@pytest.mark.parametrize("length", [8, 10])
def test_answers_to_a_prompt_share_its_whole_pages_and_copy_its_last_one(length: int) -> None:
    world = World(20)
    world.add("a", tokens(length), 6, n=3)
    while not decoded(world):
        world.step()
    pages = [answer.pages for answer in world.sequences["a"].answers]
    assert all(one[:2] == pages[0][:2] for one in pages)
    assert len({page for one in pages for page in one[2:]}) == sum(len(one[2:]) for one in pages)
    assert sum(isinstance(order, CopyPage) for order in world.orders) == (2 if length % 4 else 0)
    world.run()
    assert answers(world, "a") == [answer_to(tokens(length), 6)] * 3 and world.pool.available == 20


# --- turns ---


def test_long_prompts_take_turns_at_the_ends_of_chunks_fewest_tokens_left_first() -> None:
    world = World(64)
    for name, length in (("a", 64), ("b", 32), ("c", 48)):
        world.add(name, tokens(length), None)
    world.run()
    assert begun(world) == ["b"] * 2 + ["c"] * 3 + ["a"] * 4


def test_no_prompt_is_passed_more_than_eight_times_by_later_ones() -> None:
    world = World(400, slots=64)
    world.add("long", tokens(160), None)
    world.step()
    for number in range(40):
        world.add(str(number), tokens(32, 7 * number), None)
    world.run()
    own = [place for place, name in enumerate(begun(world)) if name == "long"]
    assert len(own) == 10 and max(b - a - 1 for a, b in zip(own, own[1:])) == MOST_PASSED


def test_one_long_chunk_at_a_time_is_on_the_device() -> None:
    """The device refuses a second one."""
    world = World(200, slots=16)
    for number in range(12):
        world.add(str(number), tokens(20 + number, 30 * number), 4)
        world.step()
    world.run()
    assert len([1 for _, event in world.events if isinstance(event, Finished)]) == 12


def test_short_prompts_share_a_chunk_and_run_whole() -> None:
    world = World(64, short=10)
    for name, length in (("a", 4), ("b", 5), ("c", 3), ("d", 10)):
        world.add(name, tokens(length), 1)
    world.run()
    assert begun(world) == ["a+b", "c", "d"]
    assert all(order.points == 0 for order in world.orders if isinstance(order, Prefill))


def test_a_short_prompt_runs_at_the_next_point_of_a_long_one() -> None:
    world = World(64, chunk=64, short=8, speed=Speed(of_row=2e-3))
    world.add("long", tokens(60), 1)
    while not any(isinstance(order, Advance) for order in world.orders):
        world.step()
    world.add("short", tokens(5), 1)
    count = len(world.orders)
    world.run()
    assert isinstance(world.orders[count], Prefill) and world.cuts("short") == [(0, 5)]
    assert any(isinstance(order, Advance) for order in world.orders[count:]), "the long one goes on afterwards"
    assert answers(world, "short") == [answer_to(tokens(5), 1)]


def test_many_short_prompts_do_not_stop_a_long_one() -> None:
    world = World(200, chunk=64, short=8, slots=64, speed=Speed(of_row=1e-3))
    world.add("long", tokens(60), None)
    world.step()
    for number in range(60):
        world.add(str(number), tokens(8, 9 * number), None)
    world.run()
    order = [event.id for _, event in world.events if isinstance(event, Finished)]
    assert order.index("long") < 30


def test_cuts_depend_on_a_prompt_alone_not_on_load() -> None:
    def cuts(load: int) -> dict[str, list[tuple[int, int]]]:
        world = World(400, short=8, slots=8, speed=Speed(jitter=3.0), seed=load)
        rng = np.random.default_rng(load)
        for number in range(load):
            world.add(f"load {number}", tokens(int(rng.integers(1, 90)), 11 * number), int(rng.integers(1, 9)))
            for _ in range(rng.integers(0, 9)):
                world.step()
        for length in (5, 37, 130):
            world.add(str(length), tokens(length), 3, sparse=length == 130)
        world.run()
        return {str(length): world.cuts(str(length)) for length in (5, 37, 130)}

    alone = cuts(0)
    assert alone["37"] == [(0, 16), (16, 32), (32, 37)] and alone["130"][-1] == (128, 130)
    assert all(cuts(load) == alone for load in (1, 7, 20))


# --- running answers ---


def test_without_prompts_to_read_every_step_decodes() -> None:
    world = World(64)
    world.add("a", tokens(5), 9)
    world.add("b", tokens(6), 4)
    world.run()
    first = next(place for place, order in enumerate(world.orders) if isinstance(order, Decode))
    assert all(isinstance(order, Decode) for order in world.orders[first:])
    assert len(decoded(world)) == 8


def test_the_batch_shrinks_when_answers_end() -> None:
    """Slots behind the smallest power of two that holds all move into holes."""
    world = World(64, slots=8)
    for number in range(8):
        world.add(str(number), tokens(3, 20 * number), 20 if number in (5, 7) else 4)
    world.run()
    slots = [order.slots for order in decoded(world)]
    assert slots[0] <= 8 and slots[-1] == 2
    for order in decoded(world)[-10:]:
        assert not order.join and not order.leave
    for number in (5, 7):
        assert answers(world, str(number)) == [answer_to(tokens(3, 20 * number), 20)]


def test_at_most_two_things_are_on_their_way() -> None:
    world = World(200, chunk=32, slots=8, ahead=1, short=4, speed=Speed(host=1e-5))
    for number in range(10):
        world.add(str(number), tokens(10 + 9 * number, 20 * number), 6)
    seen = []
    while world.step():
        seen.append([type(task).__name__ for task, _ in world.posts])
    assert max(map(len, seen)) <= 2
    assert any(len(names) == 2 for names in seen), "the device has something to do while the host decides"


def test_the_device_does_not_wait_for_the_host_between_decode_steps() -> None:
    """The step behind one that is under way starts from what that chooses; what ended meanwhile is passed over."""
    world = World(200, slots=8, ahead=1, speed=Speed(host=2e-3, decode=0.01))
    lengths = {"long": 40, "short": 9, "stopped": 40}
    stop = answer_to(tokens(5, 200), 7)[6]
    world.add("long", tokens(5), 40)
    world.add("short", tokens(5, 100), 9)
    world.add("stopped", tokens(5, 200), 40, stop_token_ids=[stop])
    while min(len(world.of(name, TokenChosen)) for name in lengths) < 2:
        world.step()
    idle = world.device.idle
    world.run()
    assert world.device.idle == idle
    assert answers(world, "long") == [answer_to(tokens(5), 40)]
    assert answers(world, "short") == [answer_to(tokens(5, 100), 9)]
    assert answers(world, "stopped") == [answer_to(tokens(5, 200), 7)]
    assert sum(isinstance(order, Decode) for order in world.orders) == 39, (
        "none is run for answers that are at their end"
    )
    assert world.pool.available == 200


def test_an_answer_with_rules_is_not_decoded_ahead() -> None:
    """What its next token may be is known when the one before it is."""

    class Anything:
        def words(self) -> None:
            return None

        def accept(self, token: int) -> bool:
            return False

    world = World(200, ahead=1)
    world.add("free", tokens(5), 20)
    world.add("ruled", tokens(5, 100), 10).answers[0].rules = Anything()
    together = []
    while world.step():
        steps = [task for task, _ in world.posts if isinstance(task, DecodeStep)]
        together.append((len(steps), any(answer.rules for step in steps for _, answer in step.held)))
    assert (2, False) in together and (2, True) not in together and (1, True) in together
    assert answers(world, "ruled") == [answer_to(tokens(5, 100), 10)]


def test_ends_of_an_answer() -> None:
    whole = answer_to(tokens(5), 6)
    world = World(64)
    world.add("stop", tokens(5), 6, stop_token_ids=[whole[2]])
    world.add("length", tokens(5), 6)
    world.run()
    (stopped,), (full,) = (world.of(name, Finished)[0][1].completions for name in ("stop", "length"))
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (whole[:3], "stop", whole[2])
    assert (full.token_ids, full.finish_reason, full.stop_reason) == (whole, "length", None)
    assert [event.finish_reason for _, event in world.of("stop", TokenChosen)] == [None, None, "stop"]


def test_a_face_stops_one_answer_and_the_others_go_on() -> None:
    world = World(64)
    world.add("a", tokens(5), 9, n=2)
    while len(world.of("a", TokenChosen)) < 6:
        world.step()
    assert world.scheduler.stop("a", 0, "END") == [] and world.scheduler.stop("a", 0, "END") is None
    assert world.scheduler.stop("a", 2, "END") is None and world.scheduler.stop("b", 0, "END") is None
    world.run()
    first, second = world.of("a", Finished)[0][1].completions
    assert (len(first.token_ids), first.finish_reason, first.stop_reason) == (3, "stop", "END")
    assert (len(second.token_ids), second.finish_reason) == (9, "length") and world.pool.available == 64


def test_stopping_the_last_answer_finishes_the_request() -> None:
    world = World(64)
    world.add("a", tokens(5), 9)
    while not world.of("a", TokenChosen):
        world.step()
    (finished,) = world.scheduler.stop("a", 0, 7) or []
    assert isinstance(finished, Finished) and finished.completions[0].stop_reason == 7
    assert not world.scheduler.requests and world.pool.available == 64


# --- what is asked of a prompt ---


def test_logits_of_a_prompt_come_in_their_order_beside_its_answer() -> None:
    world = World(64)
    world.add("a", tokens(40), 2, positions=(3, 15, 16, 38, 39))
    world.add("b", tokens(7), None, positions=(0, 6))
    world.run()
    assert [len(event.values) for _, event in world.of("a", Logits)] == [2, 1, 2]
    assert sum(len(event.values) for _, event in world.of("b", Logits)) == 2
    assert answers(world, "a") == [answer_to(tokens(40), 2)] and answers(world, "b") == []


def test_log_probabilities_of_a_prompt_cover_all_its_tokens_but_the_first() -> None:
    world = World(300, chunk=512, chunk_len=512, reuse=True)
    world.add("before", tokens(600), None)
    world.run()
    world.add("a", tokens(600), 1, prompt_logprobs=0)
    world.run()
    told = [(event.begin, token.token) for _, event in world.of("a", PromptLogprobs) for token in event.tokens]
    begins = [event.begin for _, event in world.of("a", PromptLogprobs)]
    assert [token for _, token in told] == tokens(600)[1:] and begins == [1, 257, 513]
    assert world.sequences["a"].num_reused == 0


# --- drop ---


@pytest.mark.parametrize("state", ["waits", "is read", "stands at a point", "answers"])
def test_abort_in_every_state_gives_its_pages_back_at_once(state: str) -> None:
    world = World(20, chunk=32, chunk_len=32, speed=Speed(of_row=4e-3))
    if state == "waits":
        world.add("other", tokens(60), 3)
        world.step()
    before = world.pool.available
    world.add("a", tokens(40), 5)
    ready = {
        "waits": lambda: True,
        "is read": lambda: bool(world.of("a", Prefilled)),
        "stands at a point": lambda: world.device.standing is not None,
        "answers": lambda: len(world.of("a", TokenChosen)) > 1,
    }[state]
    while not ready():
        world.step()
    assert world.scheduler.abort("a") and not world.scheduler.abort("a")
    assert world.pool.available == before
    told = len(world.of("a", object))
    world.add("after", tokens(6, 400), 3)
    world.run()
    assert len(world.of("a", object)) == told, "no event of it comes any more"
    assert answers(world, "after") == [answer_to(tokens(6, 400), 3)]
    assert any(isinstance(order, Drop) for order in world.orders) == (state == "stands at a point")


# --- prefixes ---


def test_two_live_requests_with_one_prefix_compute_it_once() -> None:
    world = World(100, reuse=True)
    world.add("a", [*tokens(64), 1, 2, 3], 2)
    world.step()
    world.add("b", [*tokens(64), 4, 5, 6], 2)
    world.run()
    assert world.cuts("b") == [(64, 67)] and world.device.computed == 67 + 3
    assert answers(world, "b") == [answer_to([*tokens(64), 4, 5, 6], 2)]


def test_the_second_takes_over_when_the_first_is_dropped_and_what_that_had_finished_stays() -> None:
    world = World(100, reuse=True)
    world.add("a", [*tokens(64), 1, 2, 3], 2)
    while len(world.of("a", Prefilled)) < 2:
        world.step()
    world.add("b", [*tokens(64), 4, 5, 6], 2)
    world.scheduler.abort("a")
    world.run()
    assert world.cuts("b")[0][0] == 32 and answers(world, "b") == [answer_to([*tokens(64), 4, 5, 6], 2)]


def test_a_short_prompt_waits_for_a_short_one_but_never_for_a_long_one() -> None:
    world = World(100, reuse=True, chunk=32, short=16, speed=Speed(of_row=1e-3))
    world.add("long", tokens(90), None)
    while world.device.standing is None:
        world.step()
    world.add("short", [*tokens(12), 7], 1)
    world.run()
    assert world.cuts("short") == [(0, 13)] and begun(world).index("short") == 1
    world.add("one", [*tokens(12, 500), 7], 1)
    world.add("two", [*tokens(12, 500), 8], 1)
    world.run()
    assert world.cuts("one") == [(0, 13)] and world.cuts("two") == [(12, 13)]


def test_a_prompt_is_never_served_what_was_made_under_other_conditions() -> None:
    world = World(300, reuse=True)
    for name, options in (
        ("dense", {}),
        ("sparse", {"sparse": True}),
        ("salted", {"salt": "mine"}),
        ("hotter", {"m2": 1.1}),
        ("again", {}),
    ):
        world.add(name, tokens(40), 1, **options)
        world.run()
    reused = {name: world.sequences[name].num_reused for name in world.sequences}
    assert reused == {"dense": 0, "sparse": 0, "salted": 0, "hotter": 0, "again": 36}


def test_skip_reading_and_logits_before_a_hit_compute_again() -> None:
    world = World(300, reuse=True)
    world.add("a", tokens(40), 1)
    world.run()
    world.add("skips", tokens(40), 1, skip_reading_prefix_cache=True)
    world.run()
    world.add("early", tokens(40), 1, positions=(9, 39))
    world.run()
    assert (world.sequences["skips"].num_reused, world.sequences["early"].num_reused) == (0, 8)


def test_an_answers_whole_pages_are_reused_where_prompt_and_answer_are_dense() -> None:
    world = World(300, reuse=True)
    for name, sparse in (("dense", False), ("sparse", True)):
        world.add(name, tokens(10), 12, sparse=sparse)
        world.run()
        (answer,) = answers(world, name)
        turn = [*tokens(10), *answer, 5, 6]
        world.add(f"{name} again", turn, 1, sparse=sparse)
        world.run()
    assert world.sequences["dense again"].num_reused == 20, "10 + 11 tokens have keys: five pages"
    assert world.sequences["sparse again"].num_reused <= 10


def test_eviction_under_pressure_keeps_answers_right() -> None:
    world = World(24, reuse=True, slots=8)
    rng = np.random.default_rng(3)
    expected = {}
    for number in range(60):
        prompt = tokens(int(rng.integers(1, 30)), 100 * int(rng.integers(0, 3))) + [number] * int(rng.integers(1, 6))
        world.add(str(number), prompt, 4)
        expected[str(number)] = [answer_to(prompt, 4)]
        for _ in range(rng.integers(0, 6)):
            world.step()
    world.run()
    assert {name: answers(world, name) for name in expected} == expected
    assert world.prefixes is not None and world.prefixes.counters.evicted_pages > 0
    assert world.prefixes.counters.reused_tokens > 0 and world.pool.available == 24


# --- everything at once ---


@pytest.mark.parametrize("ahead", [0, 1])
def test_nothing_leaks_over_ten_thousand_random_steps(ahead: int) -> None:
    """Requests of all kinds come, are stopped and dropped at random: what is read is right at every order (the device
    checks it), every answer is what it is alone, and in the end everything is free.
    """
    rng = np.random.default_rng(ahead)
    speed = Speed(host=1e-4, of_row=1e-3, jitter=1.0)
    world = World(60, chunk=24, chunk_len=32, short=6, slots=6, ahead=ahead, bound=0.05, reuse=True, speed=speed)
    expected: dict[str, tuple[list[int], int, int]] = {}
    dropped: set[str] = set()
    for number in range(5000):
        action = rng.random()
        live = world.scheduler.requests
        if action < 0.15 and len(live) < 20:
            _add_something(world, str(number), rng, expected)
        elif action < 0.17 and live:
            name = str(rng.choice(live))
            assert world.scheduler.abort(name)
            dropped.add(name)
        elif action < 0.18 and live:
            name = str(rng.choice(live))
            events = world.scheduler.stop(name, 0, "face")
            if events is not None:
                dropped.add(name)
        else:
            world.step()
            world.step()
        assert 0 <= world.pool.available <= 60
        for name in [name for name in world.sequences if name not in world.scheduler]:
            del world.sequences[name]
    world.run()
    for name, (prompt, count, n) in expected.items():
        if name not in dropped:
            assert answers(world, name) == [answer_to(prompt, count)] * n
    assert len(expected) - len(dropped) > 200
    assert world.pool.available == 60 and not world.scheduler.requests and not world.posts
    assert world.prefixes is not None
    world.prefixes.reset()
    assert not world.pool.in_use and len(world.pool.take(60)) == 60


def _add_something(world: World, name: str, rng: np.random.Generator, expected: dict[str, Any]) -> None:
    prompt = tokens(int(rng.integers(0, 60)), 100 * int(rng.integers(0, 2))) + tokens(
        int(rng.integers(1, 9)), int(name)
    )
    n, count, options = int(rng.integers(1, 4)), int(rng.integers(1, 9)), {}
    if rng.random() < 0.2:
        options["positions"] = tuple(sorted({int(place) for place in rng.integers(0, len(prompt), 3)}))
    if rng.random() < 0.1:
        options["prompt_logprobs"] = 1
    world.add(name, prompt, count, n=n, sparse=bool(rng.random() < 0.3), **options)
    expected[name] = prompt, count, n


def test_the_simulated_device_finds_what_is_wrong() -> None:
    """A chunk that is left standing writes into its pages again: in those of another request that is seen."""
    world = World(20, chunk=32, chunk_len=32, speed=Speed(of_row=4e-3))
    world.add("a", tokens(40), 5)
    while world.device.standing is None:
        world.step()
    with pytest.raises(AssertionError, match="a chunk begins while another one stands"):
        world.device.run(Prefill(world.device.standing.order.rows))
    assert isinstance(world.device, Device)
