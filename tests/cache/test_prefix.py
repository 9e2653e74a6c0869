"""The prefix index against one that keeps every token: no wrong hit, none missed, no page lost, and who is given up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paddle_qwen1m.cache import (
    CacheFull,
    MadeUnder,
    PagePool,
    PrefixChain,
    PrefixIndex,
    SparseRule,
    budgets_digest,
)
from paddle_qwen1m.cache.prefix import digests
from paddle_qwen1m.engine.borders import Chunking

CHUNKING = Chunking(max_tokens=8, chunk_len=20, page_size=2, parts=4)
PAGE = CHUNKING.page_size
INSIDE_PAGES = Chunking(max_tokens=3, chunk_len=20, page_size=4)  # most chunks end inside a page
TEMPERATURES = (1.0, 1.0006, 1.0012, 1.01)
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Written:
    """What the keys in a page depend on: all tokens before its end, how they were cut, and every m^2 on the way."""

    name: str
    tokens: tuple[int, ...]
    cuts: tuple[int, ...]
    m2: frozenset[float]


@dataclass(eq=False)
class Reader:
    """A sequence: its prompt is read chunk by chunk, then it answers where it is dense."""

    name: str
    tokens: list[int]
    sparse: bool
    m2: float
    chain: PrefixChain
    chunking: Chunking
    pages: list[int]
    reused: int = 0
    cached: int = 0

    @property
    def length(self) -> int:
        return self.chain.length

    def cuts(self, end: int) -> tuple[int, ...]:
        """How its keys up to `end` were cut, as far as that decides about them."""
        ends = self.chunking.ends(self.length, sparse=True) if self.sparse else []
        return tuple(cut for cut in ends if cut <= end)


class World:
    """A pool whose pages say what is in them, an index, and a naive index of all that was ever added."""

    def __init__(self, num_pages: int, tolerance: float, chunking: Chunking = CHUNKING) -> None:
        self.chunking, self.page_size = chunking, chunking.page_size
        self.pool = PagePool(
            num_pages, self.page_size, lambda source, target, tokens: pytest.fail("whole pages are shared")
        )
        self.index = PrefixIndex(self.pool, tolerance)
        self.tolerance = tolerance
        self.memory: dict[int, Written] = {}
        self.added: dict[tuple[str, tuple[int, ...], tuple[int, ...]], set[frozenset[float]]] = {}
        self.readers: list[Reader] = []

    def start(self, tokens: Sequence[int], *, sparse: bool = False, m2: float = 1.0, salt: str = "") -> Reader | None:
        """Looks a prompt up, checks what is found, and takes its pages; None where they are too many."""
        name, prompt = f"{salt} {sparse}", np.asarray(tokens, np.int64)
        cuts = self.chunking.cuts(len(prompt), sparse=sparse)
        chain = PrefixChain.of(prompt, cuts, name, m2, self.page_size)
        reader = Reader(name, list(tokens), sparse, m2, chain, self.chunking, [])
        prefix = self.index.find(chain)
        assert prefix.tokens <= self.naive(reader)
        if not self.index.counters.evicted_pages:
            assert prefix.tokens == self.naive(reader)
        reader.reused = reader.cached = prefix.tokens
        reader.pages = self.pool.fork(prefix.pages, prefix.tokens)
        self.check(reader)
        try:
            self.pool.grow(reader.pages, len(tokens) + 4)
        except CacheFull:
            self.pool.release(reader.pages)
            return None
        self.readers.append(reader)
        return reader

    def read(self, reader: Reader, chunks: int = 1000) -> None:
        ends = [end for end in self.chunking.ends(reader.length, sparse=reader.sparse) if end > reader.cached]
        for end in ends[:chunks]:
            self._write(reader, end, reader.m2)
            self.index.add(reader.chain, reader.reused, reader.cached, reader.pages)
            self._record(reader, reader.chain)

    def answer(self, reader: Reader, tokens: Sequence[int], m2: float = 1.0) -> None:
        """The end of a dense sequence: all of its tokens but the last are cached, and join."""
        reader.tokens += tokens
        self._write(reader, len(reader.tokens) - 1, m2)
        chain = reader.chain.extended(np.asarray(reader.tokens[: reader.cached], np.int64))
        self.index.add(chain, reader.reused, reader.cached, reader.pages, answered_m2=m2)
        self._record(reader, chain)

    def stop(self, reader: Reader) -> None:
        self.readers.remove(reader)
        self.pool.release(reader.pages)

    def naive(self, reader: Reader) -> int:
        """How many tokens a cache of unlimited size that compares every token would have."""
        found = 0
        for border in reader.chain.borders:
            key = (reader.name, tuple(reader.tokens[:border]), reader.cuts(border))
            if border >= reader.length or not any(self._is_near(m2, reader.m2) for m2 in self.added.get(key, ())):
                break
            found = border
        return found

    def check(self, reader: Reader) -> None:
        """Every page of the cached tokens was written for the same tokens, cuts and name, and an m^2 that is near."""
        for number in range(reader.cached // self.page_size):
            written, end = self.memory[reader.pages[number]], (number + 1) * self.page_size
            assert (written.name, written.tokens) == (reader.name, tuple(reader.tokens[:end]))
            assert written.cuts == reader.cuts(written.cuts[-1] if written.cuts else 0)
            if end <= reader.length:
                assert self._is_near(written.m2, reader.m2)

    def _is_near(self, made_with: frozenset[float], m2: float) -> bool:
        return all(abs(one - m2) <= self.tolerance * m2 for one in made_with)

    def _write(self, reader: Reader, end: int, m2: float) -> None:
        before = (self.memory[page].m2 for page in reader.pages[: reader.cached // self.page_size])
        made_with = frozenset({m2, reader.m2}.union(*before))
        for number in range(reader.cached // self.page_size, self.pool.pages_for(end)):
            tokens = tuple(reader.tokens[: min(end, (number + 1) * self.page_size)])
            self.memory[reader.pages[number]] = Written(reader.name, tokens, reader.cuts(end), made_with)
        reader.cached = end

    def _record(self, reader: Reader, chain: PrefixChain) -> None:
        for border in chain.borders:
            if border <= reader.cached:
                key = (reader.name, tuple(reader.tokens[:border]), reader.cuts(border))
                self.added.setdefault(key, set()).add(self.memory[reader.pages[border // self.page_size - 1]].m2)


class RandomEvents(RuleBasedStateMachine):
    """Prompts that begin alike come, are read a little, answer, and go, at several temperatures and names."""

    num_pages, tolerance, chunking = 40, TOLERANCE, CHUNKING

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.num_pages, self.tolerance, self.chunking)

    @rule(
        shared=st.integers(0, 24),
        other=st.lists(st.integers(0, 1), max_size=8),
        sparse=st.booleans(),
        m2=st.sampled_from(TEMPERATURES),
        salt=st.sampled_from(["", "", "salt"]),
    )
    def start(self, shared: int, other: list[int], sparse: bool, m2: float, salt: str) -> None:
        tokens = [5] * shared + other
        if tokens:
            self.world.start(tokens, sparse=sparse, m2=m2, salt=salt)

    @precondition(lambda self: self.world.readers)
    @rule(data=st.data(), chunks=st.integers(1, 5))
    def read(self, data: st.DataObject, chunks: int) -> None:
        self.world.read(data.draw(st.sampled_from(self.world.readers)), chunks)

    @precondition(lambda self: self.world.readers)
    @rule(data=st.data(), tokens=st.lists(st.integers(4, 5), min_size=1, max_size=4))
    def answer(self, data: st.DataObject, tokens: list[int]) -> None:
        reader = data.draw(st.sampled_from(self.world.readers))
        if not reader.sparse:
            self.world.read(reader)
            self.world.answer(reader, tokens, reader.m2)
        self.world.stop(reader)

    @precondition(lambda self: self.world.readers)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        self.world.stop(data.draw(st.sampled_from(self.world.readers)))

    @precondition(lambda self: not self.world.readers)
    @rule()
    def reset(self) -> None:
        self.world.index.reset()
        self.world.added.clear()
        assert len(self.world.index) == 0 and not self.world.pool.in_use

    @invariant()
    def what_is_cached_is_right(self) -> None:
        for reader in self.world.readers:
            self.world.check(reader)

    @invariant()
    def every_page_is_held_or_can_be_taken(self) -> None:
        pool = self.world.pool
        held = {page for reader in self.world.readers for page in reader.pages}
        assert pool.available == pool.num_pages - len(held)

    def teardown(self) -> None:
        world = self.world
        for reader in list(world.readers):
            world.stop(reader)
        pages = world.pool.take(world.pool.num_pages)  # nothing is lost, and the index gives up all it has
        assert sorted(pages) == list(range(world.pool.num_pages)) and len(world.index) == 0


class RandomEventsStrictly(RandomEvents):
    tolerance = 0.0


class RandomEventsInPlenty(RandomEvents):
    num_pages = 2000  # nothing is given up: every prefix that was ever added is found


class RandomEventsWithCutsInsidePages(RandomEvents):
    num_pages, chunking = 1000, INSIDE_PAGES


for machine in (RandomEvents, RandomEventsStrictly, RandomEventsInPlenty, RandomEventsWithCutsInsidePages):
    machine.TestCase.settings = settings(
        max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
test_random_events = RandomEvents.TestCase
test_random_events_strictly = RandomEventsStrictly.TestCase
test_random_events_in_plenty = RandomEventsInPlenty.TestCase
test_random_events_with_cuts_inside_pages = RandomEventsWithCutsInsidePages.TestCase


def finish(world: World, tokens: Sequence[int], **options: object) -> int:
    """Reads a prompt alone to its end and lets it go; how many tokens it found."""
    reader = world.start(tokens, **options)
    assert reader is not None
    world.read(reader)
    world.stop(reader)
    return reader.reused


def found(world: World, tokens: Sequence[int], limit: int | None = None) -> int:
    cuts = CHUNKING.cuts(len(tokens), sparse=False)
    return world.index.find(PrefixChain.of(np.asarray(tokens), cuts, " False", 1.0, PAGE), limit).tokens


def tokens(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_prompt_finds_what_one_of_the_same_beginning_left(sparse: bool) -> None:
    world = World(60, 0.0)
    assert finish(world, [*tokens(23), 1, 2], sparse=sparse) == 0
    assert finish(world, [*tokens(23), 3, 4], sparse=sparse) == 22
    assert finish(world, [*tokens(21), 5, 6, 7, 8], sparse=sparse) == 20
    assert finish(world, [*tokens(23), 1, 2], sparse=not sparse) == 0
    assert finish(world, [*tokens(23), 1, 2], sparse=sparse, salt="another") == 0


def test_the_last_token_is_always_computed_and_a_limit_is_kept() -> None:
    world = World(40, 0.0)
    assert [finish(world, tokens(24)) for _ in range(2)] == [0, 22]
    assert [found(world, tokens(24), limit) for limit in (0, 1, 9, 10, 99)] == [0, 0, 8, 10, 22]


def test_a_whole_prompt_is_there_for_one_that_goes_on_behind_it() -> None:
    """24 tokens end a page, and a part of a chunk; 28 fill a chunk."""
    for sparse in (False, True):
        world = World(60, 0.0)
        finish(world, tokens(22), sparse=sparse)
        assert finish(world, tokens(23), sparse=sparse) == 22
        assert finish(world, tokens(28), sparse=sparse) == (22 if not sparse else 16)


def test_two_that_computed_the_same_leave_it_once() -> None:
    world = World(40, 0.0)
    for reader in [world.start(tokens(9)) for _ in range(2)]:
        world.read(reader)
        world.stop(reader)
    assert len(world.index) == 4


def test_an_answer_joins_where_prompt_and_answer_are_dense() -> None:
    world = World(60, 0.0)
    reader = world.start(tokens(9))
    world.read(reader)
    world.answer(reader, [1, 2, 3, 4])
    world.stop(reader)
    assert finish(world, [*tokens(9), 1, 2, 3, 4, 7, 8]) == 12  # the key of the answer's last token was never needed


def test_only_near_temperatures_share_and_the_nearest_is_taken() -> None:
    world = World(100, TOLERANCE)
    assert finish(world, tokens(9), m2=1.0) == 0
    assert finish(world, tokens(9), m2=1.0011) == 0
    assert finish(world, tokens(9), m2=1.0006) == 8
    near = world.index.find(PrefixChain.of(np.asarray(tokens(9)), range(2, 10, 2), " False", 1.0009, PAGE))
    assert {world.memory[page].m2 for page in near.pages} == {frozenset({1.0011})}
    assert finish(world, tokens(9), m2=0.9985) == 0
    strict = World(100, 0.0)
    assert [finish(strict, tokens(9), m2=m2) for m2 in (1.0, 1.0 + 1e-15, 1.0)] == [0, 0, 8]


def test_differences_of_temperature_do_not_add_up() -> None:
    """What was computed behind keys of another m^2 depends on both: it serves nobody who is far from either."""
    world = World(100, TOLERANCE)
    finish(world, tokens(9), m2=1.0)
    assert finish(world, tokens(17), m2=1.0008) == 8
    assert finish(world, tokens(9), m2=1.0016) == 0  # fresh keys for the first 8 tokens, near to 1.0008
    assert finish(world, tokens(17), m2=1.0016) == 8
    assert finish(world, tokens(17), m2=1.0008) == 16


def test_an_answers_temperature_counts() -> None:
    world = World(100, TOLERANCE)
    reader = world.start(tokens(9), m2=1.0)
    world.read(reader)
    world.answer(reader, [1, 2, 3, 4], m2=1.002)
    world.stop(reader)
    assert finish(world, [*tokens(9), 1, 2, 3, 4, 7], m2=1.001) == 8 + 4
    assert finish(world, [*tokens(9), 1, 2, 3, 4, 7], m2=1.0) == 8


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    world = World(11, 0.0)
    finish(world, tokens(17))  # 8 pages stay
    world.pool.take(3 + 1)
    assert found(world, tokens(17)) == 14


def test_what_was_used_last_goes_last() -> None:
    world = World(16, 0.0)
    for first in (100, 200):
        finish(world, tokens(9, first))  # 4 pages stay of each
    finish(world, tokens(5, 100))  # the beginning of the older one is used again
    world.pool.take(8 + 2)
    assert [found(world, tokens(9, first)) for first in (100, 200)] == [4, 8]
    world.pool.take(3)
    assert [found(world, tokens(9, first)) for first in (100, 200)] == [0, 6]


def test_pages_that_a_sequence_uses_stay_in_the_index() -> None:
    world = World(20, 0.0)
    first = world.start(tokens(9))
    world.read(first)
    finish(world, tokens(9, 200))
    held = world.pool.take(world.pool.available)
    assert world.index.counters.evicted_pages == 4
    world.pool.release(held)
    assert finish(world, tokens(9)) == 8
    world.stop(first)


def test_more_pages_than_all_that_can_be_given_up_are_refused_and_nothing_is_lost() -> None:
    world = World(12, 0.0)
    finish(world, tokens(9))
    assert world.start(tokens(23)) is None
    assert finish(world, tokens(9)) == 8 and world.pool.available == 12


def test_reset_forgets_everything_and_what_was_reused_does_not_come_back_by_itself() -> None:
    world = World(60, TOLERANCE)
    finish(world, tokens(9), m2=1.0)
    reuses = world.start(tokens(17), m2=1.0008)
    computes = world.start(tokens(9, 200))
    world.read(computes, 1)
    world.index.reset()
    world.read(reuses)
    world.read(computes)
    for reader in (reuses, computes):
        world.stop(reader)
    world.added.clear()
    assert world.index.find(reuses.chain).tokens == 0
    assert world.index.find(computes.chain).tokens == 8
    assert not world.pool.in_use


def test_a_chunk_that_an_earlier_prompt_left_incomplete_is_computed_anew_once() -> None:
    world = World(100, 0.0)
    finish(world, tokens(27), sparse=True)  # cut at 20, 22, 24, 26
    longer = world.start([*tokens(27), *tokens(4, 300)], sparse=True)  # 20, 28
    assert longer.reused == 20
    prompt = np.asarray(longer.tokens, np.int64)
    other = CHUNKING.other_cuts(20, len(prompt))
    assert world.index.other_cut_tokens(longer.chain, 20, prompt, other) == 6
    world.read(longer)
    again = world.start([*tokens(27), *tokens(4, 300)], sparse=True)
    assert again.reused == 30
    assert world.index.other_cut_tokens(again.chain, 30, prompt, CHUNKING.other_cuts(30, len(prompt))) == 0
    stranger = world.start(tokens(31, 500), sparse=True)
    cuts = CHUNKING.other_cuts(0, 31)
    assert world.index.other_cut_tokens(stranger.chain, 0, np.asarray(stranger.tokens), cuts) == 0


def test_ten_turns_of_a_chat_compute_what_is_new() -> None:
    """Dense: the new text and the last page. Sparse: also the last answer and a part of a chunk, or, in a turn that
    fills it, one chunk.
    """
    for sparse in (False, True):
        world, text, anew = World(200, 0.0), tokens(30), 0
        finish(world, text, sparse=sparse)
        begin = CHUNKING.ends(30, sparse=False)[-2]
        for turn in range(10):
            answer, question = tokens(3, 1000 + 10 * turn), tokens(2, 2000 + 10 * turn)
            reader = world.start([*text, *question], sparse=sparse)
            world.read(reader)
            text = [*text, *question]
            if not sparse:
                world.answer(reader, answer)
            world.stop(reader)
            computed, fills = len(text) - reader.reused, CHUNKING.ends(len(text), sparse=False)[-2] != begin
            begin, new = CHUNKING.ends(len(text), sparse=False)[-2], len(question) + len(answer) * sparse
            text = [*text, *answer]
            if not sparse:
                assert computed <= new + PAGE
            else:
                anew += fills
                assert computed <= new + (CHUNKING.chunk_tokens if fills else CHUNKING.part_tokens)
        assert not sparse or anew


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.integers(0, 40), st.integers(1, 12), st.booleans())
def test_how_much_one_prompt_will_leave_for_another(one: list[int], shared: int, more: int, sparse: bool) -> None:
    two = one[:shared] + [9] * more if shared < len(one) else one[:shared] + [1] * (more % 2)
    world = World(1000, TOLERANCE)
    chains = [
        PrefixChain.of(np.asarray(prompt), CHUNKING.cuts(len(prompt), sparse=sparse), f" {sparse}", m2, PAGE)
        for prompt, m2 in ((one, 1.0), (two, 1.0005), (two, 1.002))
    ]
    promised = world.index.shared_border(chains[0], chains[1])
    finish(world, one, sparse=sparse, m2=1.0)
    assert world.index.find(chains[1]).tokens == promised
    assert world.index.shared_border(chains[0], chains[2]) == 0


SPARSE = SparseRule(budgets="b", chunk_tokens=8, part_tokens=2)
MADE_UNDER = MadeUnder("w", "bfloat16", "bfloat16", 2, "placed", "salt", SPARSE)
OTHERS = {
    "weights": "v",
    "compute_dtype": "float32",
    "cache_dtype": "float32",
    "ranks": 1,
    "placement": "otherwise",
    "salt": "",
    "sparse": None,
}


@pytest.mark.parametrize("field", [one.name for one in fields(MadeUnder)])
def test_everything_that_keys_were_made_under_is_in_their_name(field: str) -> None:
    assert replace(MADE_UNDER, **{field: OTHERS[field]}).name != MADE_UNDER.name
    assert replace(MADE_UNDER).name == MADE_UNDER.name


def test_the_rule_of_sparse_prefill_is_in_the_name_and_not_in_that_of_dense_keys() -> None:
    for change in ({"budgets": "c"}, {"chunk_tokens": 16}, {"part_tokens": 4}):
        assert replace(MADE_UNDER, sparse=replace(SPARSE, **change)).name != MADE_UNDER.name
    vertical, slash = np.full((2, 3), 40, np.int32), np.full((2, 3), 110, np.int32)
    changed = vertical.copy()
    changed[1, 2] += 1
    names = [budgets_digest(*pair) for pair in ((vertical, slash), (changed, slash), (slash, vertical))]
    names.append(budgets_digest(vertical.reshape(3, 2), slash.reshape(3, 2)))
    assert len(set(names)) == 4 and names[0] == budgets_digest(vertical.astype(np.int64), slash)


@pytest.mark.parametrize("step", [64, 8192, 50000])
def test_names_do_not_depend_on_how_many_are_made_at_once(rng: np.random.Generator, step: int) -> None:
    prompt = rng.integers(0, 152064, 100_000)
    cuts = range(step, len(prompt) + 1, step)
    together = list(digests(prompt, cuts, b"root"))
    parent, begin = b"root", 0
    for cut, digest in together:
        ((_, parent),) = digests(prompt[:cut], [cut], parent, begin)
        assert parent == digest
        begin = cut
    assert len(together) == len(prompt) // step and len({digest for _, digest in together}) == len(together)


def test_a_million_tokens_are_named_and_found_in_milliseconds(rng: np.random.Generator) -> None:
    length, chunking = 1_000_000, Chunking(32768, 253_952, 256)
    prompt = rng.integers(0, 152_064, length)
    pool = PagePool(4000, 256, lambda source, target, count: None)
    index, pages = PrefixIndex(pool), pool.take(3907)
    begun = time.perf_counter()
    chain = PrefixChain.of(prompt, chunking.cuts(length, sparse=False), "dense", 1.0, 256)
    index.add(chain, 0, length, pages)
    assert index.find(chain).tokens == 3906 * 256
    pool.release(pages)
    pool.take(4000)
    assert time.perf_counter() - begun < 1.0  # 0.05 s where nothing else runs
