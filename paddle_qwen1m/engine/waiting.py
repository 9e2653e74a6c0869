"""Who is admitted when, with which pages: all that a request will ever need, those of a known prefix among them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as ManyOf
from typing import Callable

import numpy as np

from paddle_qwen1m.cache import CacheFull, PagePool, PrefixChain, PrefixIndex
from paddle_qwen1m.engine.borders import Chunking
from paddle_qwen1m.engine.core import Answer, Request, Sequence
from paddle_qwen1m.engine.keeping import Keeper
from paddle_qwen1m.engine.orders import CopyPage

MOST_PASSED = 8
"""How often a request lets others that came later go before it."""


def next_turn(sequences: ManyOf[Sequence]) -> Sequence:
    """Which of these prompts, in the order in which they came, is read on: the one with fewest tokens left, but nobody
    is passed by one that came later more than MOST_PASSED times.
    """
    impatient = next((one for one in sequences if one.passed >= MOST_PASSED), None)
    return impatient or min(sequences, key=lambda one: one.remaining)


def take_turn(chosen: Sequence, sequences: ManyOf[Sequence]) -> None:
    """It is read on: those that came before it have been passed once more."""
    for one in sequences:
        if one is chosen:
            break
        one.passed += 1
    chosen.passed = 0


def pages_needed(request: Request, page_size: int) -> tuple[int, int]:
    """Pages of a prompt and its longest answer, and of its other answers, which share the prompt's whole pages."""
    longest, whole = -(-request.max_length // page_size), len(request.prompt) // page_size
    others = request.params.n - 1 if request.params is not None else 0
    return longest, others * (longest - whole)


class WaitingRoom:
    """Requests that wait, in the order in which they came, and the pages of those that do not.

    max_num_seqs: answers at a time. short_tokens: a prompt with at most so many tokens to compute is short. m2: the
    square of the temperature at a length. prefixes: None where nothing is reused. keeper: of prefixes in a store; who
    is admitted waits on until what there is of its prompt has come.
    """

    def __init__(
        self,
        pool: PagePool,
        chunking: Chunking,
        max_num_seqs: int,
        short_tokens: int,
        m2: Callable[[int], float],
        prefixes: PrefixIndex | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self._pool, self._chunking, self._prefixes, self._m2 = pool, chunking, prefixes, m2
        self._keeper = keeper
        self._max_num_seqs, self._short_tokens = max_num_seqs, short_tokens
        self._waiting: list[Sequence] = []
        self._restoring: list[Sequence] = []
        self._seats = max_num_seqs
        self._has_changed = False

    def __len__(self) -> int:
        return len(self._waiting) + len(self._restoring)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._waiting or sequence in self._restoring

    def add(self, sequence: Sequence) -> None:
        """Lines a sequence up; one that has pages already brings them along. ValueError when it can never run."""
        answers = len(sequence.answers)
        if answers > self._max_num_seqs:
            raise ValueError(
                f"request {sequence.id}: n must be at most max_num_seqs, {self._max_num_seqs} answers at a time, got "
                f"{answers}"
            )
        if sum(pages_needed(sequence.request, self._pool.page_size)) > self._pool.num_pages:
            raise ValueError(
                f"request {sequence.id}: {sequence.max_length:,} tokens, prompt and answer together"
                f"{f', {answers} times but for the prompt' if answers > 1 else ''}, do not fit the KV cache of "
                f"{self._pool.num_pages * self._pool.page_size:,} tokens"
            )
        length = len(sequence.prompt)
        sequence.ends = self._chunking.ends(length, sparse=sequence.sparse)
        if self._prefixes is not None and sequence.made_under:
            cuts = self._chunking.cuts(length, sparse=sequence.sparse)
            page_size = self._pool.page_size
            sequence.chain = PrefixChain.of(sequence.prompt, cuts, sequence.made_under, sequence.m2, page_size)
        self._waiting.append(sequence)
        self._has_changed = True

    def remove(self, sequence: Sequence) -> None:
        """It waits no more, and holds nothing."""
        if sequence in self._restoring:
            assert self._keeper is not None
            self._keeper.drop(sequence)
            self._restoring.remove(sequence)
            self._seats += len(sequence.answers)
        else:
            self._waiting.remove(sequence)
        self.leave(sequence)

    def admit(self, reading: ManyOf[Sequence]) -> list[Sequence]:
        """Those who come in now: first come, and of those behind who fits beside them; `reading` are being read."""
        restored = self._restored()
        if not self._has_changed:
            return restored
        self._has_changed = False
        admitted: list[Sequence] = []
        passed: list[Sequence] = []
        busy = [*reading, *restored]
        for sequence in self._waiting:
            if any(one.passed >= MOST_PASSED for one in passed):
                break
            if self._expects_pages(sequence, [*busy, *self._restoring, *admitted]):
                continue
            if not self._take_pages(sequence) and not (self._give_up_writes() and self._take_pages(sequence)):
                passed.append(sequence)
                continue
            for one in passed:
                one.passed += 1
            sequence.passed = 0
            if self._keeper is not None and self._keeper.restore(sequence):
                self._restoring.append(sequence)
            else:
                self._count(sequence)
                admitted.append(sequence)
        self._waiting = [one for one in self._waiting if one not in admitted and one not in self._restoring]
        return [*restored, *admitted]

    def _restored(self) -> list[Sequence]:
        """Those for whom what the store had of their prompts has come."""
        if self._keeper is None:
            return []
        restored = self._keeper.poll()
        for sequence in restored:
            self._restoring.remove(sequence)
            self._count(sequence)
            self._has_changed = True
        return restored

    def _give_up_writes(self) -> bool:
        return self._keeper is not None and self._keeper.give_up_writes()

    def keep(self, sequence: Sequence) -> None:
        """A chunk of the sequence's prompt is in the cache: others may reuse it now."""
        if self._prefixes is not None and sequence.chain is not None:
            self._prefixes.add(sequence.chain, sequence.num_reused, sequence.num_cached, sequence.pages)
        self._has_changed = True

    def hand_out(self, sequence: Sequence) -> list[CopyPage]:
        """The prompt has been read: each answer gets its pages. They share the whole ones, and copies of the last one.

        The copies have to be the next thing that the device does.
        """
        if self._keeper is not None:
            self._keeper.save(sequence)
        if not sequence.answers:
            return []
        first, *others = sequence.answers
        whole, rest = divmod(len(sequence.prompt), self._pool.page_size)
        shared, copies = sequence.pages[:whole], []
        own = len(sequence.spare) // max(1, len(others))
        for number, answer in enumerate(others):
            self._pool.hold(shared)
            answer.pages = shared + sequence.spare[number * own : (number + 1) * own]
            if rest and own:
                copies.append(CopyPage(sequence.pages[whole], answer.pages[whole], rest))
        first.pages, sequence.pages, sequence.spare = sequence.pages, [], []
        return copies

    def retire(self, sequence: Sequence, answer: Answer) -> None:
        """An answer has ended: its whole pages can be reused where prompt and answer are dense. It holds none now."""
        if answer.token_ids and not sequence.sparse and self._prefixes is not None and sequence.chain is not None:
            tokens = np.concatenate([sequence.prompt, np.asarray(answer.token_ids[:-1], np.int64)])
            chain, answered_m2 = sequence.chain.extended(tokens), self._m2(len(tokens))
            self._prefixes.add(chain, sequence.num_reused, len(tokens), answer.pages, answered_m2=answered_m2)
        self._give_back(answer.pages)
        self._seats += 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence whose answers have ended is gone: it holds nothing now."""
        self._give_back(sequence.pages)
        self._give_back(sequence.spare)

    def _give_back(self, pages: list[int]) -> None:
        self._pool.release(pages)
        pages.clear()
        self._has_changed = True

    def _expects_pages(self, sequence: Sequence, reading: Iterable[Sequence]) -> bool:
        """Whether another one is about to compute what this one can reuse. A short prompt waits for short ones alone:
        reading on a long one would take longer than it takes itself.
        """
        chain, limit = sequence.chain, sequence.reuse_limit
        if self._prefixes is None or chain is None:
            return False
        found: int | None = None
        for other in reading:
            if other.chain is None:
                continue
            shared = self._prefixes.shared_border(other.chain, chain)
            if min(shared, len(sequence.prompt) if limit is None else limit) <= other.num_cached:
                continue
            if found is None:
                found = self._prefixes.find(chain, limit).tokens
            is_short = len(sequence.prompt) - found <= self._short_tokens
            if shared > found and (not is_short or other.remaining <= self._short_tokens):
                return True
        return False

    def _take_pages(self, sequence: Sequence) -> bool:
        """Takes a place for every answer and all pages; takes nothing where there are too few."""
        answers = len(sequence.answers)
        if answers > self._seats:
            return False
        brought, cached = len(sequence.pages), sequence.num_cached
        _, others = pages_needed(sequence.request, self._pool.page_size)
        try:
            if self._prefixes is not None and sequence.chain is not None:
                prefix = self._prefixes.find(sequence.chain, sequence.reuse_limit)
                sequence.pages = self._pool.fork(prefix.pages, prefix.tokens)
                sequence.num_cached = sequence.num_reused = prefix.tokens
            self._pool.grow(sequence.pages, sequence.max_length)
            sequence.spare = self._pool.take(others)
        except CacheFull:
            self._pool.release(sequence.pages[brought:])
            del sequence.pages[brought:]
            sequence.num_cached, sequence.num_reused = cached, 0
            return False
        self._seats -= answers
        return True

    def _count(self, sequence: Sequence) -> None:
        """Tells the index what was asked for, reused, and has to be computed again for it was cut otherwise."""
        if self._prefixes is None or sequence.chain is None:
            return
        prompt, reused, recut = sequence.prompt, sequence.num_reused, 0
        if sequence.sparse:
            others = self._chunking.other_cuts(reused, len(prompt))
            recut = self._prefixes.other_cut_tokens(sequence.chain, reused, prompt, others)
        self._prefixes.count(len(prompt), reused, recut)
