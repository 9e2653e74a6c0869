"""What the scheduler decides, without a model: order, waiting, refusal, reuse, abort, and pages that all come back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paddle_qwen1m.cache import PagePool, PrefixIndex
from paddle_qwen1m.engine import Request, SamplingParams
from paddle_qwen1m.engine.borders import Chunking
from paddle_qwen1m.engine.core import Sequence
from paddle_qwen1m.engine.scheduler import DecodeStep, PrefillChunk, Scheduler, Work

PAGE_SIZE, MAX_TOKENS, CHUNK_LEN = 4, 6, 16  # chunks of 4 tokens


class World:
    """A scheduler over pages that hold token ids, and the loop that an engine is."""

    def __init__(self, num_pages: int, *, reuse: bool = False) -> None:
        self.memory = np.full((num_pages, PAGE_SIZE), -1, np.int64)
        self.pool = PagePool(num_pages, PAGE_SIZE, self._copy)
        self.prefixes = PrefixIndex(self.pool)
        self.scheduler = Scheduler(
            self.pool, Chunking(MAX_TOKENS, CHUNK_LEN, PAGE_SIZE), self.prefixes if reuse else None
        )
        self.live: dict[str, Sequence] = {}

    def _copy(self, source: int, target: int, tokens: int) -> None:
        self.memory[target, :tokens] = self.memory[source, :tokens]

    def add(self, name: str, prompt: list[int], new_tokens: int = 3) -> Sequence:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0)
        sequence = Sequence(Request(name, np.asarray(prompt, np.int64), params), 0, len(prompt), "dense 1.0")
        self.scheduler.add(sequence)
        self.live[name] = sequence
        return sequence

    def step(self) -> Work | None:
        """Does what the scheduler says: tokens are written where their keys would be, and every answer is 7 7 7 ..."""
        work = self.scheduler.next()
        if isinstance(work, PrefillChunk):
            sequence = work.sequence
            self._write(sequence, sequence.prompt[sequence.num_cached : work.end])
            self.scheduler.cached(sequence)
            if sequence.is_prefilled:
                self._append(sequence)
        elif isinstance(work, DecodeStep):
            for sequence in work.sequences:
                self._write(sequence, np.asarray([sequence.token_ids[-1]]))
                self._append(sequence)
        return work

    def abort(self, name: str) -> None:
        self.scheduler.retire(self.live.pop(name))

    def _write(self, sequence: Sequence, tokens: np.ndarray) -> None:
        for token in tokens:
            page, place = divmod(sequence.num_cached, PAGE_SIZE)
            self.memory[sequence.pages[page], place] = token
            sequence.num_cached += 1

    def _append(self, sequence: Sequence) -> None:
        sequence.append(7, 0.0)
        if sequence.is_finished:
            self.abort(sequence.id)

    def contents(self, sequence: Sequence) -> np.ndarray:
        return self.memory[sequence.pages].reshape(-1)[: sequence.num_cached]


def tokens(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


def test_prompts_are_read_in_the_order_in_which_they_came() -> None:
    world = World(20)
    for name, length in (("a", 5), ("b", 13), ("c", 2)):
        world.add(name, tokens(length))
    seen = [(work.sequence.id, work.end) for work in iter(world.step, None) if isinstance(work, PrefillChunk)]
    assert seen == [("a", 4), ("a", 5), ("b", 4), ("b", 8), ("b", 12), ("b", 13), ("c", 2)]


def test_running_sequences_go_on_together_once_every_prompt_is_read() -> None:
    world = World(20)
    world.add("a", tokens(5), new_tokens=3)
    world.add("b", tokens(7), new_tokens=2)
    works = list(iter(world.step, None))
    assert [type(work) for work in works] == [PrefillChunk] * 4 + [DecodeStep] * 2
    assert [[sequence.id for sequence in work.sequences] for work in works[4:]] == [["a", "b"], ["a"]]
    assert world.scheduler.is_idle and world.pool.available == 20


def test_who_comes_first_waits_for_pages_and_nobody_overtakes() -> None:
    world = World(6)
    world.add("large", tokens(13), new_tokens=3)  # 4 pages
    world.add("larger", tokens(17), new_tokens=3)  # 5 pages
    world.add("small", tokens(1), new_tokens=1)  # would fit beside the first
    order = [work.sequence.id for work in iter(world.step, None) if isinstance(work, PrefillChunk)]
    assert order == ["large"] * 4 + ["larger"] * 5 + ["small"]


def test_what_can_never_run_is_refused_with_both_numbers() -> None:
    world = World(6)
    with pytest.raises(ValueError, match=r"request big: 25 tokens.*cache of 24 tokens"):
        world.add("big", tokens(22), new_tokens=3)
    assert world.scheduler.is_idle and world.pool.available == 6


@pytest.mark.parametrize("steps, state", [(0, "waiting"), (1, "being read"), (4, "answering")])
def test_abort_in_every_state_gives_all_pages_back(steps: int, state: str) -> None:
    world = World(10)
    world.add("a", tokens(13))
    world.add("b", tokens(13))
    for _ in range(steps):
        world.step()
    for name in ("a", "b") if state != "answering" else ("b", "a"):
        world.abort(name)
    assert world.scheduler.is_idle and world.pool.available == 10 and world.step() is None


def test_an_abort_lets_the_next_one_in() -> None:
    world = World(5)
    world.add("a", tokens(15))
    world.add("b", tokens(15))
    world.step()
    world.abort("a")
    work = world.step()
    assert isinstance(work, PrefillChunk) and work.sequence.id == "b"


def test_sequences_with_equal_prompts_are_told_apart() -> None:
    """Identity is what is meant: comparing arrays by value raises inside `in` and `remove`."""
    world = World(20)
    first, second = (world.add(name, tokens(5)) for name in ("a", "b"))
    world.step(), world.step()
    world.abort("b")
    assert first in [first, second] and first != second
    assert [work.sequences for work in iter(world.step, None)] == [(first,), (first,)]


def test_a_prompt_reuses_whole_chunks_of_an_earlier_one() -> None:
    world = World(20, reuse=True)
    world.add("a", tokens(15))
    while world.step() is not None:
        pass
    again = world.add("b", [*tokens(13), 1, 2, 3])
    work = world.step()
    assert isinstance(work, PrefillChunk) and again.num_reused == 12
    np.testing.assert_array_equal(world.contents(again), again.prompt)


def test_the_last_tokens_of_a_prompt_are_always_computed() -> None:
    world = World(20, reuse=True)
    for name in ("a", "b"):
        sequence = world.add(name, tokens(12))
        while world.step() is not None:
            pass
    assert sequence.num_reused == 8


def test_two_that_share_pages_write_into_pages_of_their_own() -> None:
    world = World(20, reuse=True)
    one = world.add("a", tokens(6) + [1] * 4, new_tokens=5)
    world.step()
    two = world.add("b", tokens(6) + [2] * 4, new_tokens=5)
    while world.scheduler.next() is not None and len(two.token_ids) < 3:
        world.step()
        for sequence in (one, two):
            np.testing.assert_array_equal(
                world.contents(sequence), [*sequence.prompt, *sequence.token_ids][: sequence.num_cached]
            )
    assert two.num_reused == 4 and one.pages[0] == two.pages[0] and not set(one.pages[1:]) & set(two.pages[1:])


def test_pages_that_only_the_index_holds_count_as_free_and_the_oldest_go_first() -> None:
    world = World(10, reuse=True)
    for name, first in (("a", 100), ("b", 200)):
        world.add(name, tokens(9, first), new_tokens=1)
        while world.step() is not None:
            pass
    assert world.pool.available == 10 and len(world.prefixes) == 4  # two pages each
    world.add("c", tokens(25, 300), new_tokens=1)  # 7 pages
    world.step()
    world.abort("c")
    for name, first, reused in (("b again", 200, 8), ("a again", 100, 4)):  # its end alone was taken
        again = world.add(name, tokens(9, first), new_tokens=1)
        world.step()
        assert again.num_reused == reused


class RandomEvents(RuleBasedStateMachine):
    """Requests that share beginnings come, run and are dropped: what is cached is always what it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(14, reuse=True)
        self.count = 0

    @rule(shared=st.integers(0, 30), family=st.integers(0, 1), tail=st.integers(0, 9), new=st.integers(1, 6))
    def add(self, shared: int, family: int, tail: int, new: int) -> None:
        self.count += 1
        prompt = tokens(shared, 1000 * family) + [-self.count] * tail
        if prompt:
            self.world.add(str(self.count), prompt, new)

    @rule()
    def step(self) -> None:
        self.world.step()

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.world.abort(data.draw(st.sampled_from(sorted(self.world.live))))

    @invariant()
    def what_is_cached_is_right(self) -> None:
        for sequence in self.world.live.values():
            expected = [*sequence.prompt, *sequence.token_ids][: sequence.num_cached]
            np.testing.assert_array_equal(self.world.contents(sequence), expected)

    @invariant()
    def whoever_waits_has_a_reason(self) -> None:
        pool = self.world.pool
        assert 0 <= pool.available <= pool.num_pages
        assert self.world.live or pool.available == pool.num_pages

    def teardown(self) -> None:
        for name in list(self.world.live):
            self.world.abort(name)
        assert self.world.pool.available == self.world.pool.num_pages and self.world.scheduler.is_idle


RandomEvents.TestCase.settings = settings(
    max_examples=100, stateful_step_count=100, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_ten_thousand_random_events = RandomEvents.TestCase
