"""How long things are expected to take, and what follows from it: the time between tokens while prompts are read."""

from __future__ import annotations

import numpy as np
import pytest
from simulation import LAYERS, Speed, World

from paddle_qwen1m.engine.core import Finished, TokenChosen
from paddle_qwen1m.engine.orders import Decode, Prefill
from paddle_qwen1m.engine.pacing import PLANNED, LayerWork, Pacer

BOUND = 0.2
DECODE = 0.012
LONG, CHUNK = 12_000, 2_048


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pacer(clock: Clock) -> Pacer:
    return Pacer(BOUND, LayerWork(1.0, 0.001), 10, clock)


def busy_world(speed: Speed, *, ahead: int, answering: int = 8, seed: int = 0) -> World:
    """Answers that go on for as long as anything else does, and the prompts that came before."""
    world = World(
        2000, page_size=16, chunk=CHUNK, chunk_len=16_384, short=64, slots=16, ahead=ahead, bound=BOUND, speed=speed,
        seed=seed,
    )  # fmt: skip
    world.add("before", np.arange(CHUNK * 2) % 1000, None)  # what a chunk takes is known since
    for number in range(answering):
        world.add(f"answer {number}", np.arange(9) + number, 500)
    while len(world.of("answer 7", TokenChosen)) < 5:
        world.step()
    return world


def largest_gaps(world: World, since: float, until: float) -> list[float]:
    """The longest time between two tokens of each answer within a period."""
    gaps = []
    for number in range(8):
        times = [at for at, _ in world.of(f"answer {number}", TokenChosen) if since <= at <= until]
        gaps.append(max(b - a for a, b in zip(times, times[1:])))
    return gaps


SPEEDS = {
    "layers of 10 ms": Speed(host=2e-4, decode=DECODE, of_row=4e-6, of_key=1e-10),
    "layers of 150 ms": Speed(host=2e-4, decode=DECODE, of_row=6e-5, of_key=2e-9),
    "layers of 0.5 s, most of it attention": Speed(host=2e-4, decode=DECODE, of_row=2e-5, of_key=3e-8),
    "times that vary": Speed(host=2e-4, decode=DECODE, of_row=3e-5, of_key=4e-9, jitter=0.3),
}

STEADY = {name: speed for name, speed in SPEEDS.items() if not speed.jitter}


@pytest.mark.parametrize("speed", SPEEDS.values(), ids=SPEEDS)
@pytest.mark.parametrize("ahead", [0, 1])
def test_the_time_between_tokens_is_bounded_while_a_long_prompt_is_read(speed: Speed, ahead: int) -> None:
    world = busy_world(speed, ahead=ahead)
    world.add("long", np.arange(LONG) % 1000, None)
    begin = world.device.now
    while not world.of("long", Finished):
        world.step()
    end = world.device.now
    assert max(largest_gaps(world, begin, end)) <= BOUND + 2 * DECODE
    steps = sum(isinstance(task.order, Decode) for at, task in world.tasks if begin <= at <= end)
    assert steps >= (end - begin) / (BOUND + 2 * DECODE) - 1


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_bound_holds_where_a_sparse_prompt_begins_behind_the_end_of_another(ahead: int) -> None:
    """A sparse chunk's time grows less than its place in the prompt: what the last one took says little of a first."""
    speed = Speed(host=2e-4, decode=DECODE, of_row=1e-5, of_key=1e-8, sparse_keys=500)
    world = busy_world(speed, ahead=ahead)
    for name in ("long", "another"):
        world.add(name, np.arange(LONG) % 1000, None, sparse=True)
        begin = world.device.now
        while not world.of(name, Finished):
            world.step()
        assert max(largest_gaps(world, begin, world.device.now)) <= BOUND + 2 * DECODE


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_bound_holds_where_the_few_tokens_at_a_long_prompts_end_take_long(ahead: int) -> None:
    """As many as a short prompt has, which takes next to nothing; but keys are chosen among all before them."""
    few, whole = 40, 0.15
    speed = Speed(host=2e-4, decode=DECODE, of_row=4e-6, of_key=1e-10, sparse_keys=500, of_choice=whole / LAYERS / LONG)
    for length in range(5 * CHUNK, 6 * CHUNK, CHUNK // 8):
        world = busy_world(speed, ahead=ahead)
        world.add("long", np.arange(length + few) % 1000, None, sparse=True)
        begin = world.device.now
        while not (ended := world.of("long", Finished)) or world.device.now < ended[0][0] + BOUND:
            world.step()
        assert max(largest_gaps(world, begin, world.device.now)) <= BOUND + 2 * DECODE


@pytest.mark.parametrize("speed", STEADY.values(), ids=STEADY)
def test_a_long_prompt_costs_its_own_time_and_that_of_the_decode_steps(speed: Speed) -> None:
    """And the device has something to do all the while."""
    alone = busy_world(speed, ahead=1)
    for number in range(8):
        alone.scheduler.abort(f"answer {number}")
    times = []
    for world in (alone, busy_world(speed, ahead=1)):
        world.add("long", np.arange(LONG) % 1000, None)
        begin, idle, orders = world.device.now, world.device.idle, len(world.tasks)
        while not world.of("long", Finished):
            world.step()
        times.append(world.device.now - begin)
        steps = sum(isinstance(task.order, Decode) for _, task in world.tasks[orders:])
    assert times[1] <= times[0] + 1.05 * steps * DECODE + 0.02 * times[0]
    assert world.device.idle - idle <= 0.02 * times[1]
    assert steps <= times[1] / (BOUND / 2), "decode steps run when they are due, not more often"


@pytest.mark.parametrize("speed", SPEEDS.values(), ids=SPEEDS)
def test_a_short_prompt_gets_its_first_token_within_twice_the_bound(speed: Speed) -> None:
    world = busy_world(speed, ahead=1)
    world.add("long", np.arange(LONG) % 1000, None)
    waited = []
    for number in range(20):
        for _ in range(4):
            world.step()
        if world.of("long", Finished):
            break
        came, name = world.device.now, f"short {number}"
        world.add(name, np.arange(20) + number, 1)
        while not world.of(name, Finished):
            world.step()
        waited.append(world.of(name, TokenChosen)[0][0] - came)
    assert len(waited) > 1 and max(waited) <= 2 * BOUND


def test_layers_within_the_bound_are_not_cut_and_longer_ones_are_cut_in_their_attention() -> None:
    cut = {}
    for name in ("layers of 10 ms", "layers of 0.5 s, most of it attention"):
        world = busy_world(SPEEDS[name], ahead=1)
        world.add("long", np.arange(LONG) % 1000, None)
        world.run()
        cut[name] = [task.order.row_blocks for _, task in world.tasks if isinstance(task.order, Prefill)]
    assert not any(cut["layers of 10 ms"]) and 0 < cut["layers of 0.5 s, most of it attention"][-1] < CHUNK // 64


# --- the pacer itself ---


def test_what_is_queued_ends_when_all_before_it_has(pacer: Pacer, clock: Clock) -> None:
    for seconds in (0.010, 0.020):
        pacer.queue("decode")
        clock.now += seconds
        pacer.finished()
    assert pacer.expected("decode") == pytest.approx(0.020)
    first, second = pacer.queue("decode"), pacer.queue("head", 0.005)
    assert pacer.end_of(first) == pytest.approx(0.050) and pacer.end_of(second) == pytest.approx(0.055)
    clock.now += 0.015
    assert pacer.end_of() == pytest.approx(0.055), "15 of its 20 ms are over"
    clock.now += 0.015
    assert pacer.end_of() == pytest.approx(clock.now + 0.005), "late, it may end any moment"


def test_a_result_that_waits_behind_another_took_only_its_own_time(pacer: Pacer, clock: Clock) -> None:
    pacer.queue("head")
    pacer.queue("decode")
    clock.now = 0.100
    pacer.finished()
    clock.now = 0.103
    pacer.finished()
    assert pacer.expected("decode") == pytest.approx(0.003)


def test_estimates_follow_what_grows_at_once_and_what_shrinks_slowly(pacer: Pacer, clock: Clock) -> None:
    for seconds in (0.1, 0.02, 0.02):
        pacer.queue("decode")
        clock.now += seconds
        pacer.finished()
    assert 0.02 < pacer.expected("decode") < 0.1


def test_room_is_what_the_bound_leaves_beside_a_decode_step(pacer: Pacer, clock: Clock) -> None:
    pacer.queue("decode")
    clock.now = 0.030
    pacer.finished()
    assert pacer.room(since=clock.now) == pytest.approx(PLANNED * BOUND - 0.030)
    pacer.queue("head", 0.050)
    assert pacer.room(since=clock.now) == pytest.approx(PLANNED * BOUND - 0.030 - 0.050)


def test_a_chunk_tells_how_long_the_next_one_takes(pacer: Pacer, clock: Clock) -> None:
    """Ten layers of 1000 rows behind nothing: 1500 operations each, a millisecond an operation in all layers."""
    pace = pacer.begin(1000, 0, sparse=False)
    assert (pace.seconds_a_point, pace.row_blocks, pacer.points(pace, 1.0)) == (0.0, 0, 1), "nothing is known"
    pacer.queue_points(pace, 20)
    clock.now = 0.150
    pacer.finished(at_end=True)
    second = pacer.begin(1000, 1000, sparse=False)
    assert second.seconds_a_point == pytest.approx(0.150 / 20 * 2500 / 1500)
    assert pacer.points(second, room=1.0) == 1, "it has not been timed itself"
    pacer.queue_points(second, 1)
    clock.now += second.seconds_a_point
    pacer.finished()
    assert pacer.points(second, room=1.0) == int(BOUND / 4 / second.seconds_a_point)
    assert pacer.points(second, room=0.026) == 2 and pacer.points(second, room=-1.0) == 1
    assert pacer.begin(64_000, 1_000_000, sparse=False).row_blocks > 0


def test_row_blocks_that_a_kernel_takes_together_are_not_parted(pacer: Pacer, clock: Clock) -> None:
    """Two densely and three sparsely, where so many fit an advance."""
    pacer.queue_points(pacer.begin(1000, 0, sparse=False), 20)
    clock.now = 0.150
    pacer.finished(at_end=True)
    whole = 0
    rows = 2000, 4000, 8000
    cut = {pacer.begin(n, begin, sparse=False).row_blocks for n in rows for begin in range(0, 50_000, 50)}
    assert cut == {whole, 1, 2, 3, 4, 5, 6, 12, 18}


def read(pacer: Pacer, clock: Clock, rows: int, begin: int, seconds: float, *, sparse: bool = False) -> int:
    """Reads a chunk; the row blocks between two points of a layer, 0: it is not cut."""
    pace = pacer.begin(rows, begin, sparse)
    pacer.queue_points(pace, 20)
    clock.now += seconds
    pacer.finished(at_end=True)
    return pace.row_blocks


def test_sparse_chunks_that_take_as_long_as_each_other_are_not_cut_however_many_keys_lie_before(clock: Clock) -> None:
    """A layer takes 80 ms, half of it no more than an advance may. By all keys it would seem to take 40 times that."""
    pacer = Pacer(BOUND, LayerWork(1.0, 0.001, chosen=2000), 10, clock)
    cut = [read(pacer, clock, 8192, begin, 0.8, sparse=True) for begin in range(0, 1_000_000, 8192)]
    assert set(cut) == {0}


def test_a_chunk_that_was_slow_once_has_none_cut_but_the_next(pacer: Pacer, clock: Clock) -> None:
    """As the first one is, while libraries are loaded."""
    cut = [read(pacer, clock, 8192, 0, seconds) for seconds in (8.0, 0.8, 0.8, 0.8)]
    assert cut[1] > 0 and cut == [0, cut[1], 0, 0]


def test_the_few_tokens_of_a_prompts_end_say_nothing_of_a_chunk(pacer: Pacer, clock: Clock) -> None:
    """A hundredth of a chunk's rows that take a tenth of its time; a chunk of which others are not told anew."""
    for _ in range(3):
        assert read(pacer, clock, 8192, 0, 0.8) == 0
        read(pacer, clock, 80, 8192, 0.08)


def test_chunks_that_stay_small_are_what_there_is(pacer: Pacer, clock: Clock) -> None:
    """Behind large ones, and ten times slower a row."""
    read(pacer, clock, 8192, 0, 0.8)
    for _ in range(10):
        read(pacer, clock, 100, 0, 0.1)
    assert pacer.begin(100, 0, sparse=False).seconds_a_point == pytest.approx(0.1 / 10 / 2)


def test_what_attention_works_on_at_once_is_not_parted_where_that_is_soon_enough(clock: Clock) -> None:
    pacer = Pacer(BOUND, LayerWork(1.0, 0.001, row_blocks=100), 10, clock)
    read(pacer, clock, 1000, 0, 0.0015)
    rows = 10_000, 50_000
    cut = {pacer.begin(n, begin, sparse=False).row_blocks for n in rows for begin in range(0, 50_000, 50)}
    large = {one for one in cut if one >= 100}
    assert large and all(one % 100 == 0 for one in large) and all(one % 6 == 0 for one in cut - large if one > 6)


def test_what_has_failed_is_forgotten(pacer: Pacer, clock: Clock) -> None:
    pacer.queue("head", 5.0)
    pacer.forget()
    assert pacer.end_of() == clock.now
