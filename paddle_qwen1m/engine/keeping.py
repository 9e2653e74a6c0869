"""Decides which prefixes come out of the store, in place of being computed, and which go into it."""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Callable, NamedTuple
from weakref import WeakKeyDictionary

from paddle_qwen1m.cache import M2Range, PagePool, PrefixIndex, PrefixStore, SegmentPages, StoredSegment, Transfers
from paddle_qwen1m.cache.store import NAME_BYTES, m2_of, segment_name, time_of_use, token_digests
from paddle_qwen1m.cache.transfers import UNFINISHED
from paddle_qwen1m.engine.core import Sequence
from paddle_qwen1m.engine.orders import GiveUp, Order, Restore, Save

SEGMENT_TOKENS = 8192
"""Of a dense prompt's segments; a sparse one's end where its chunks do."""
ASK_AGAIN_SECONDS = 0.02


@dataclass
class StoreCounters:
    """Requests that found something in the store, tokens and bytes that came from it, and the seconds that they waited
    for them; bytes that were written, and the seconds that this took.
    """

    hits: int = 0
    tokens: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    written_bytes: int = 0
    write_seconds: float = 0.0


class _Cut(NamedTuple):
    """Where a stored segment of a prompt ends, and the digests in its name; `begin` is where the one before ends."""

    begin: int
    end: int
    tokens: str
    chain: str


@dataclass(eq=False)
class _Transfer:
    """One that is under way: into pages of a sequence that waits for it, or out of pages that are held for it.

    begun, and when to ask whether other ranks are done: by the clock time.perf_counter.
    """

    order: Restore | Save
    begun: float
    sequence: Sequence | None = None
    ask_at: float = 0.0

    @property
    def number(self) -> int:
        return self.order.number

    @property
    def segments(self) -> tuple[StoredSegment, ...]:
        return self.order.what.segments


class Keeper:
    """Rank 0's: every rank does what `order` is given, in its order, and has files of its own. `agree` says how many
    segments of a transfer are whole on every rank, UNFINISHED while one of them is not done.

    A prefix is written once its prompt has been read, where it has min_tokens or more; the write holds its pages, and
    is given up when somebody needs them. tolerance: as PrefixIndex has it.
    """

    def __init__(
        self,
        store: PrefixStore,
        pool: PagePool,
        prefixes: PrefixIndex,
        transfers: Callable[[], Transfers],
        order: Callable[[Order], None],
        agree: Callable[[int], int],
        *,
        min_tokens: int,
        tolerance: float,
    ) -> None:
        self._store, self._pool, self._prefixes, self._transfers = store, pool, prefixes, transfers
        self._order, self._agree = order, agree
        self._min_tokens, self._tolerance = min_tokens, tolerance
        self._numbers = count()
        self._restoring: deque[_Transfer] = deque()
        self._saving: deque[_Transfer] = deque()
        self._incomplete: set[str] = set()
        self._cuts_of: WeakKeyDictionary[Sequence, list[_Cut]] = WeakKeyDictionary()
        self.counters = StoreCounters()

    # --- out of the store ---

    def restore(self, sequence: Sequence) -> bool:
        """Whether more of an admitted sequence's prompt than it found in the cache is on its way into its pages."""
        last = len(sequence.prompt) - 1
        wanted, begin = [], sequence.num_cached
        cuts = self._cuts(sequence, last if sequence.reuse_limit is None else min(last, sequence.reuse_limit))
        for cut in cuts:
            if cut.end <= begin:
                continue
            name = self._closest(cut, sequence.m2)
            if name is None:
                break
            wanted.append(StoredSegment(name, cut.begin, cut.end))
        if not wanted:
            self._say_why(cuts, begin, sequence)
            return False
        size = self._pool.page_size
        pages = tuple(sequence.pages[begin // size : wanted[-1].end // size])
        what = SegmentPages(tuple(wanted), pages, begin, cuts[0].tokens, sequence.made_under, time.time())
        order = Restore(next(self._numbers), what)
        self._restoring.append(_Transfer(order, time.perf_counter(), sequence))
        self._order(order)
        return True

    def drop(self, sequence: Sequence) -> None:
        """Nobody waits for the sequence's pages any more: nothing writes to them when this returns."""
        for transfer in [one for one in self._restoring if one.sequence is sequence]:
            self._restoring.remove(transfer)
            self._order(GiveUp(transfer.number))

    # --- into the store ---

    def save(self, sequence: Sequence) -> None:
        """Begins to write what the store lacks of a prompt that has been read."""
        chain = sequence.chain
        if chain is None:
            return
        entries = self._prefixes.entries(chain)
        cuts = self._cuts(sequence, entries[-1][0] if entries else 0)
        if not cuts or cuts[-1].end < self._min_tokens:
            return
        borders = [border for border, _ in entries]
        queued = time.time()
        for number, cut in enumerate(cuts):
            first, last = bisect_right(borders, cut.begin), bisect_right(borders, cut.end)
            of_cut = [entry for _, entry in entries[first:last]]
            name = segment_name(cut.tokens, cut.chain, of_cut[-1].m2)
            when = time_of_use(queued, number)
            if self._store.path(name).exists() and name not in self._incomplete:
                self._store.touch([name], when)  # so that what follows cannot take its room
                continue
            self._incomplete.discard(name)
            pages = tuple(page for entry in of_cut for page in entry.pages)
            self._pool.hold(pages)
            segments = (StoredSegment(name, cut.begin, cut.end),)
            what = SegmentPages(segments, pages, cut.begin, cuts[0].tokens, sequence.made_under, when)
            order = Save(next(self._numbers), what)
            self._saving.append(_Transfer(order, time.perf_counter()))
            self._order(order)

    def give_up_writes(self) -> bool:
        """Gives back the pages that are held for writing: whether there were any."""
        given_up, self._saving = self._saving, deque()
        for transfer in given_up:
            self._order(GiveUp(transfer.number))
            self._pool.release(transfer.order.what.pages)
        return bool(given_up)

    # --- both ---

    @property
    def is_restoring(self) -> bool:
        return bool(self._restoring)

    def poll(self) -> list[Sequence]:
        """Who has what there was of it in the store; pages that have been written are given back."""
        self._written()
        return list(self._restored())

    def wait(self, seconds: float) -> None:
        """Returns when there is something to poll, or after so many seconds."""
        self._transfers().wait(seconds)

    def finish(self) -> None:
        """Returns when every rank has written everything."""
        assert not self._restoring, "requests wait for what is being restored"
        self._transfers().finish()
        while self._saving:
            self._written()

    def _restored(self) -> Iterator[Sequence]:
        for transfer in list(self._restoring):
            whole = self._whole(transfer)
            if whole == UNFINISHED:
                break
            self._restoring.remove(transfer)
            sequence, segments = transfer.sequence, transfer.segments
            assert sequence is not None and sequence.chain is not None
            counters, nbytes = self.counters, self._forget(transfer)
            counters.read_bytes += nbytes
            counters.read_seconds += time.perf_counter() - transfer.begun
            self._incomplete.update(segment.name for segment in segments[whole:])
            if whole:
                reused, end = sequence.num_cached, segments[whole - 1].end
                m2s: list[tuple[int, M2Range]] = [(one.end, m2_of(one.name)) for one in segments[:whole]]
                self._prefixes.add(sequence.chain, reused, end, sequence.pages, restored=m2s)
                sequence.num_cached = sequence.num_reused = end
                sequence.num_restored = end - reused
                counters.hits += 1
                counters.tokens += end - reused
            yield sequence

    def _written(self) -> None:
        while self._saving and self._whole(self._saving[0]) != UNFINISHED:
            transfer = self._saving.popleft()
            self._pool.release(transfer.order.what.pages)
            self.counters.written_bytes += self._forget(transfer)
            self.counters.write_seconds += time.perf_counter() - transfer.begun

    def _whole(self, transfer: _Transfer) -> int:
        """How many of its segments every rank has; the others are asked once this one is done."""
        if self._transfers().state(transfer.number) == UNFINISHED or time.perf_counter() < transfer.ask_at:
            return UNFINISHED
        whole = self._agree(transfer.number)
        if whole == UNFINISHED:
            transfer.ask_at = time.perf_counter() + ASK_AGAIN_SECONDS
        return whole

    def _forget(self, transfer: _Transfer) -> int:
        """Bytes that went to or came from files of this rank."""
        transfers = self._transfers()
        nbytes = transfers.bytes_of(transfer.number)
        transfers.forget(transfer.number)
        return nbytes

    def _cuts(self, sequence: Sequence, limit: int) -> list[_Cut]:
        """Where the segments of a prompt end, up to `limit`."""
        if sequence not in self._cuts_of:
            self._cuts_of[sequence] = list(self._all_cuts(sequence))
        return [cut for cut in self._cuts_of[sequence] if cut.end <= limit]

    def _all_cuts(self, sequence: Sequence) -> Iterator[_Cut]:
        """Reads all tokens of the prompt."""
        chain = sequence.chain
        if chain is None:
            return
        size = self._pool.page_size
        step = 1 if sequence.sparse else max(1, min(SEGMENT_TOKENS, self._min_tokens) // size)
        borders, digests = chain.borders[step - 1 :: step], chain.digests[step - 1 :: step]
        names = token_digests(sequence.prompt, borders, sequence.request.cache_salt)
        for begin, end, tokens, digest in zip((0, *borders), borders, names, digests):
            yield _Cut(begin, end, tokens, _digest(digest, begin, size))

    def _closest(self, cut: _Cut, m2: float) -> str | None:
        """The stored segment whose m^2 differs least, if not by too much."""
        found = [(m2_of(name).distance(m2), name) for name in self._store.find(cut.tokens, cut.chain)]
        best = min(found, default=None)
        return best[1] if best is not None and best[0] <= self._tolerance else None

    def _say_why(self, cuts: list[_Cut], begin: int, sequence: Sequence) -> None:
        """Why nothing of a prompt can be used that is in the store, made otherwise."""
        missing = next((cut for cut in cuts if cut.end > begin), None)
        reason = None if missing is None else self._store.why_not(missing.tokens, sequence.made_under)
        if reason is not None:
            self._store.say(f"the beginning of a prompt is kept, but was made differently: {reason}")


def _digest(chain: bytes, begin: int, page_size: int) -> str:
    """Names what a file holds of the prefix that `chain` stands for: other options cut it otherwise."""
    return hashlib.blake2b(chain + f"{begin} {page_size}".encode(), digest_size=NAME_BYTES).hexdigest()
