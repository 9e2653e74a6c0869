"""Where the prefill of a prompt is cut into chunks, and at which of the cuts others can reuse what is before it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


def chunk_end(begin: int, prompt_length: int, max_tokens: int, chunk_len: int) -> int:
    """Where the prefill chunk that starts at `begin` ends: after max_tokens at most.

    A chunk that would end inside a DCA chunk which it did not begin in stops at that chunk's border: the critical keys
    are chosen anew for each part of a DCA chunk, so that fewer parts cost fewer probes.
    """
    end = min(begin + max_tokens, prompt_length)
    border = end // chunk_len * chunk_len
    return border if end < prompt_length and begin < border else end


@dataclass(frozen=True)
class Chunking:
    """How prompts are cut; a prompt's cuts depend on this and its own length, never on load or on what it reuses.

    max_tokens: of a chunk; used is `chunk_tokens`, whole pages where it is a page or more. chunk_len: L, of a DCA
    chunk, whole pages. parts: a sparse prompt's last chunk, where it has fewer than chunk_tokens, is cut at every
    multiple of `part_tokens`: whole pages, and at least one.

    Sparse keys depend on every cut before them. Prompts that begin alike are cut alike up to where the shorter one's
    last chunk begins, and within that chunk where it is the last one, and incomplete, of both. So a prompt that fills
    a chunk which an earlier one left incomplete computes that chunk anew, once: prompts behind it share it whole.
    """

    max_tokens: int
    chunk_len: int
    page_size: int
    parts: int = 8

    def __post_init__(self) -> None:
        assert self.max_tokens > 0 and self.parts > 0 and self.chunk_len % self.page_size == 0

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk at most."""
        return self.max_tokens // self.page_size * self.page_size or self.max_tokens

    @property
    def part_tokens(self) -> int:
        """Tokens between two cuts of a sparse prompt's last chunk."""
        return max(1, self.chunk_tokens // self.parts // self.page_size) * self.page_size

    def ends(self, length: int, *, sparse: bool) -> list[int]:
        """Where the chunks of a prompt of `length` tokens end, ascending; the last one is `length`.

        A prompt that starts from a reused border goes on to the first end behind it.
        """
        ends, begin = self._up_to_last(length)
        if sparse and length - begin < self.chunk_tokens:
            ends += self._parts(begin, length)
        return [*ends, length]

    def cuts(self, length: int, *, sparse: bool) -> Sequence[int]:
        """At which positions, up to `length`, others can have the same keys before them: what a PrefixChain is cut at.

        Dense: every page, whatever the chunks are. Sparse: the ends of chunks, `length` among them only where longer
        prompts end one there too. Those that are whole pages are the borders.
        """
        if not sparse:
            return range(self.page_size, length + 1, self.page_size)
        ends, begin = self.ends(length, sparse=True), self._up_to_last(length)[1]
        endless = chunk_end(begin, length + self.chunk_tokens, self.chunk_tokens, self.chunk_len)
        filled = length == endless and [0, *ends][-2] == begin
        part_of_more = length - begin < self.chunk_tokens and length % self.part_tokens == 0
        return ends if filled or part_of_more else ends[:-1]

    def other_cuts(self, begin: int, length: int) -> Sequence[int]:
        """Where sparse prompts are cut that left the chunk incomplete which begins at `begin` and a prompt of `length`
        tokens fills: the keys that they left there are of no use to it.
        """
        ends = self.ends(length, sparse=True)
        end = ends[bisect_right(ends, begin)]
        return self._parts(begin, end + 1)

    def _up_to_last(self, length: int) -> tuple[list[int], int]:
        """Where the chunks before a prompt's last one end, and where that one begins."""
        ends, begin = [], 0
        while (end := chunk_end(begin, length, self.chunk_tokens, self.chunk_len)) < length:
            ends.append(end)
            begin = end
        return ends, begin

    def _parts(self, begin: int, end: int) -> range:
        """The multiples of part_tokens between the two."""
        return range(begin // self.part_tokens * self.part_tokens + self.part_tokens, end, self.part_tokens)
