"""Which pages a prompt can reuse: those that hold the keys of the same tokens, computed in the same way."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np

from paddle_qwen1m.cache.pool import PagePool

DIGEST_BYTES = 32
LONG_SECTION = 4096
"""Tokens between two cuts from which on, on average, several are digested at once."""


@dataclass(frozen=True)
class SparseRule:
    """What chooses the keys of sparse prefill. budgets: budgets_digest of the whole model's. chunk_tokens and
    part_tokens: of a prefill chunk and of the parts of an incomplete one, in tokens.
    """

    budgets: str
    chunk_tokens: int
    part_tokens: int


@dataclass(frozen=True)
class MadeUnder:
    """What decides about a prompt's keys but its tokens, its cuts and m: prefixes are shared under the same alone.

    weights: the checkpoint's digest, its configuration included. compute_dtype, cache_dtype: what is computed in, and
    what keys are kept in. ranks: how many share the model. placement: the digest of which rank has which heads. salt: a
    digest of the request's cache_salt. sparse: None for a prompt that is prefilled densely, whose keys do not depend on
    chunks.
    """

    weights: str
    compute_dtype: str
    cache_dtype: str
    ranks: int
    placement: str
    salt: str = ""
    sparse: SparseRule | None = None

    @property
    def name(self) -> str:
        """The same for the same values alone, in every process."""
        return json.dumps(asdict(self), sort_keys=True)


def salt_digest(salt: str) -> str:
    """Stands for a cache_salt, which is nobody else's business; none for none."""
    return hashlib.blake2b(salt.encode(), digest_size=DIGEST_BYTES).hexdigest() if salt else ""


def budgets_digest(vertical: np.ndarray, slash: np.ndarray) -> str:
    """Of the columns and diagonals that each head keeps, int32 [layers, heads] each."""
    data = np.stack([vertical, slash]).astype("<i4")
    return hashlib.blake2b(repr(data.shape).encode() + data.tobytes(), digest_size=DIGEST_BYTES).hexdigest()


def digests(tokens: np.ndarray, cuts: Iterable[int], parent: bytes, begin: int = 0) -> Iterator[tuple[int, bytes]]:
    """Each cut with the digest of the cut before it (`parent` of the first) and of the digest of the tokens between.

    tokens: int64 [n], of which 32 bits count. cuts: ascending, above `begin`, where the parent's tokens end.
    """
    borders = [begin, *cuts]
    assert all(one < other for one, other in zip(borders, borders[1:])) and borders[-1] <= len(tokens)

    at_once = borders[-1] - begin >= LONG_SECTION * len(borders)
    data = tokens if at_once else np.ascontiguousarray(tokens, "<u4")

    def between(first: int, last: int) -> bytes:
        return hashlib.blake2b(np.ascontiguousarray(data[first:last], "<u4").data, digest_size=DIGEST_BYTES).digest()

    for cut, section in zip(borders[1:], (_threads().map if at_once else map)(between, borders, borders[1:])):
        parent = hashlib.blake2b(parent + section, digest_size=DIGEST_BYTES).digest()
        yield cut, parent


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """What is between two cuts is digested while other threads of Python run."""
    return ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), "digests")


os.register_at_fork(after_in_child=_threads.cache_clear)


@dataclass(frozen=True, eq=False)
class PrefixChain:
    """The names of a prompt's prefixes: `digests[i]` stands for its first `borders[i]` tokens and how they were cut.

    borders: ascending multiples of page_size. m2: the square of the temperature m that the prompt is read with.
    length: of the prompt. root: digest of what else decides about the keys.
    """

    borders: Sequence[int]
    digests: Sequence[bytes]
    m2: float
    length: int
    page_size: int
    root: bytes

    @classmethod
    def of(cls, prompt: np.ndarray, cuts: Iterable[int], made_under: str, m2: float, page_size: int) -> PrefixChain:
        """The chain of a prompt int64 [n] that is cut at `cuts`, Chunking.cuts; those inside a page are no borders."""
        root = hashlib.blake2b(made_under.encode(), digest_size=DIGEST_BYTES).digest()
        chain = cls((), (), m2, len(prompt), page_size, root)
        return chain._with(digests(prompt, cuts, root))

    def extended(self, tokens: np.ndarray) -> PrefixChain:
        """With the whole pages of an answer: `tokens` int64 are prompt and answer. Dense alone: what an answer leaves
        behind a sparse prompt is not what sparse prefill of the same tokens would.
        """
        begin, parent = self._end
        assert len(self.borders) * self.page_size == begin, "a chain that is not cut at every page is a sparse prompt's"
        cuts = range(begin + self.page_size, len(tokens) + 1, self.page_size)
        return self._with(digests(tokens, cuts, parent, begin))

    def recut(self, begin: int, tokens: np.ndarray, cuts: Iterable[int]) -> PrefixChain:
        """The same up to its border `begin` (or 0), and cut otherwise from there on."""
        count = bisect_right(self.borders, begin)
        chain = replace(self, borders=self.borders[:count], digests=self.digests[:count])
        assert chain._end[0] == begin, f"{begin} is no border"
        return chain._with(digests(tokens, cuts, chain._end[1], begin))

    def common(self, other: PrefixChain) -> int:
        """How many tokens both begin with, up to a border of both: a search by halves, for equal digests mean that all
        before them is equal.
        """
        equal, differing = 0, min(len(self.digests), len(other.digests)) + 1
        while differing - equal > 1:
            middle = (equal + differing) // 2
            if self.digests[middle - 1] == other.digests[middle - 1]:
                equal = middle
            else:
                differing = middle
        return self.borders[equal - 1] if equal else 0

    @property
    def _end(self) -> tuple[int, bytes]:
        return (self.borders[-1], self.digests[-1]) if self.borders else (0, self.root)

    def _with(self, more: Iterable[tuple[int, bytes]]) -> PrefixChain:
        found = [(cut, digest) for cut, digest in more if cut % self.page_size == 0]
        return replace(
            self,
            borders=(*self.borders, *(cut for cut, _ in found)),
            digests=(*self.digests, *(digest for _, digest in found)),
        )


class M2Range(NamedTuple):
    """The least and the largest m^2 that keys depend on."""

    low: float
    high: float

    def distance(self, m2: float) -> float:
        """The largest difference from m2, relative to it."""
        return max(abs(self.low - m2), abs(self.high - m2)) / m2

    def and_of(self, other: M2Range) -> M2Range:
        return M2Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True, eq=False)
class Segment:
    """An entry: the pages between a border and the one before it, and the m^2 that they and those before depend on."""

    digest: bytes
    pages: tuple[int, ...]
    m2: M2Range


class Prefix(NamedTuple):
    """The first `tokens` tokens of a prompt, 0 at worst, and the pages that hold their keys, all of them whole."""

    tokens: int
    pages: list[int]


@dataclass
class PrefixCounters:
    """Sums over admitted requests: tokens asked for, tokens reused, and tokens that were computed although an earlier
    prompt had left them under other cuts; and pages that were given up.
    """

    queried_tokens: int = 0
    reused_tokens: int = 0
    recut_tokens: int = 0
    evicted_pages: int = 0


class PrefixIndex:
    """Prefixes by digest: each border's entry holds the pages behind the border before it, in the pool's name.

    An entry serves a request whose m^2 differs by at most `tolerance`, relatively, from every m^2 that its keys depend
    on; 0 is strict. Under one digest there is an entry for each m^2. When the pool asks for pages, entries that no
    sequence uses are given up, the least recently used first, and the end of a prefix before its beginning.
    """

    def __init__(self, pool: PagePool, tolerance: float = 0.0) -> None:
        self._pool, self._tolerance = pool, tolerance
        self._entries: dict[bytes, list[Segment]] = {}
        self._by_use: OrderedDict[Segment, None] = OrderedDict()
        self.counters = PrefixCounters()
        pool.reclaim = self._give_up

    def __len__(self) -> int:
        return len(self._by_use)

    def find(self, chain: PrefixChain, limit: int | None = None) -> Prefix:
        """The longest prefix of the chain's prompt that is here, at most `limit` tokens; its last token never is.

        Its pages are held by the index alone, perhaps: hold them (PagePool.fork) before any are taken.
        """
        path = self._path(chain, chain.length - 1 if limit is None else min(limit, chain.length - 1))
        self._touch(path)
        return Prefix(chain.borders[len(path) - 1] if path else 0, [page for one in path for page in one.pages])

    def add(
        self,
        chain: PrefixChain,
        reused: int,
        cached: int,
        pages: Sequence[int],
        *,
        answered_m2: float | None = None,
        restored: Sequence[tuple[int, M2Range]] = (),
    ) -> None:
        """Remembers the `cached` first tokens of a sequence, whose keys are in `pages`, up to the last border in them.

        reused: how many of them it found here; had those been dropped (reset), nothing is added. answered_m2: the last
        m^2 that an answer was computed with, where `chain` goes on behind the prompt. restored: where segments end
        that were not computed, ascending, with the m^2 that they depend on. Adding again does nothing more.
        """
        path: list[Segment] = []
        joining: list[int] = []
        m2, begin = M2Range(chain.m2, chain.m2), 0
        for border, digest in zip(chain.borders, chain.digests):
            if border > cached:
                break
            own = tuple(pages[begin // chain.page_size : border // chain.page_size])
            if border > chain.length and answered_m2 is not None:
                m2 = m2.and_of(M2Range(answered_m2, answered_m2))
            m2 = next((m2.and_of(other) for end, other in restored if border <= end), m2)
            segment = self._own_or_equal(digest, own, m2)
            if border <= reused:
                if segment is None or segment.pages != own:
                    return
                m2 = m2.and_of(segment.m2)
            elif segment is None:
                segment = Segment(digest, own, m2)
                self._entries.setdefault(digest, []).append(segment)
                self._by_use[segment] = None
                joining += own
            path.append(segment)
            begin = border
        self._pool.hold(joining, index=True)
        self._touch(path)

    def entries(self, chain: PrefixChain) -> list[tuple[int, Segment]]:
        """What is here of a chain's prompt: each border with the entry that ends there."""
        return list(zip(chain.borders, self._path(chain, chain.length)))

    def shared_border(self, reading: PrefixChain, waiting: PrefixChain) -> int:
        """How many tokens of the prompt that waits another one, which is being read, is going to leave for it."""
        m2 = M2Range(reading.m2, reading.m2)
        if m2.distance(waiting.m2) > self._tolerance:
            return 0
        common = min(reading.common(waiting), waiting.length - 1)
        count = bisect_right(waiting.borders, common)
        return waiting.borders[count - 1] if count else 0

    def count(self, asked: int, reused: int, recut: int = 0) -> None:
        """Adds a request that was admitted to the counters; recut: what `other_cut_tokens` said."""
        self.counters.queried_tokens += asked
        self.counters.reused_tokens += reused
        self.counters.recut_tokens += recut

    def other_cut_tokens(self, chain: PrefixChain, begin: int, prompt: np.ndarray, cuts: Sequence[int]) -> int:
        """How many tokens behind the border `begin` are here for prompts that were cut at `cuts` (Chunking.other_cuts)
        but not for the chain's: computed anew.
        """
        if not cuts:
            return 0
        other = chain.recut(begin, prompt, cuts)
        path = self._path(other, other.borders[-1])
        return max(0, other.borders[len(path) - 1] - begin) if path else 0

    def reset(self) -> None:
        """Drops every entry; pages that no sequence holds are free."""
        pages = [page for segment in self._by_use for page in segment.pages]
        self._entries.clear()
        self._by_use.clear()
        self._pool.release(pages, index=True)

    def _path(self, chain: PrefixChain, limit: int) -> list[Segment]:
        """The entries of a chain's longest prefix, each the one of the closest m^2."""
        path: list[Segment] = []
        for border, digest in zip(chain.borders, chain.digests):
            entries = self._entries.get(digest)
            if entries is None or border > limit:
                break
            closest = entries[0] if len(entries) == 1 else min(entries, key=lambda one: one.m2.distance(chain.m2))
            if closest.m2.distance(chain.m2) > self._tolerance:
                break
            path.append(closest)
        return path

    def _own_or_equal(self, digest: bytes, pages: tuple[int, ...], m2: M2Range) -> Segment | None:
        """The entry of these very pages, or one that has the same keys in others."""
        entries = self._entries.get(digest, ())
        own = next((one for one in entries if one.pages == pages), None)
        return own or next((one for one in entries if one.m2 == m2), None)

    def _touch(self, path: Sequence[Segment]) -> None:
        """These were used; the first of them last, so that it is given up last."""
        for segment in reversed(path):
            self._by_use.move_to_end(segment)

    def _give_up(self, count: int) -> None:
        """Frees at least so many of the pages that only the index holds. What sequences hold counts as used now."""
        given_up: list[int] = []
        freed = 0
        for _ in range(len(self._by_use)):
            if freed >= count:
                break
            segment, _ = self._by_use.popitem(last=False)
            alone = self._pool.count_only_indexed(segment.pages)
            if alone == 0:
                self._by_use[segment] = None
                continue
            freed += alone
            given_up += segment.pages
            entries = self._entries[segment.digest]
            entries.remove(segment)
            if not entries:
                del self._entries[segment.digest]
        self._pool.release(given_up, index=True)
        self.counters.evicted_pages += freed
