"""Where prompts are cut: the rule against a search of all prompts, and what two prompts that begin alike share."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paddle_qwen1m.engine.borders import Chunking

GPU = Chunking(32768, 253_952, 256)


@st.composite
def chunkings(draw: st.DrawFn) -> Chunking:
    page = draw(st.sampled_from([1, 2, 4]))
    chunk_len = page * draw(st.integers(1, 12))
    return Chunking(draw(st.integers(1, 30)), chunk_len, page, draw(st.integers(1, 9)))


def full_ends(chunking: Chunking) -> list[int]:
    """0 and where the chunks of an endless prompt end, written down from the rule, up to position 200."""
    ends = [0]
    while ends[-1] < 200:
        reach = ends[-1] + chunking.chunk_tokens
        borders = [border for border in range(0, reach + 1, chunking.chunk_len) if ends[-1] < border]
        ends.append(borders[-1] if borders else reach)
    return ends


def last_begin(chunking: Chunking, length: int) -> int:
    """Where the last chunk begins: the first place from which no more than a chunk is left."""
    return next(end for end in full_ends(chunking) if length - end <= chunking.chunk_tokens)


def is_incomplete(chunking: Chunking, length: int) -> bool:
    return length - last_begin(chunking, length) < chunking.chunk_tokens


def alike(one: list[int], two: list[int]) -> list[int]:
    return [end for end, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two))]


@pytest.mark.parametrize(
    "max_tokens, page_size, parts, chunk, part",
    [
        (32768, 256, 8, 32768, 4096),
        (2048, 256, 8, 2048, 256),
        (10_000, 256, 8, 9984, 1024),  # both rounded down
        (1000, 256, 8, 768, 256),  # an eighth is less than a page: a page
        (255, 256, 8, 255, 256),
        (1, 256, 8, 1, 256),
        (32768, 256, 1, 32768, 32768),
    ],
)
def test_chunks_and_their_parts_are_whole_pages_where_they_are_a_page(
    max_tokens: int, page_size: int, parts: int, chunk: int, part: int
) -> None:
    chunking = Chunking(max_tokens, 253_952, page_size, parts)
    assert (chunking.chunk_tokens, chunking.part_tokens) == (chunk, part)


def test_published_lengths_at_a_gpus_default() -> None:
    whole = list(range(32768, 229_377, 32768))
    assert GPU.ends(229_375, sparse=True) == [*whole[:6], *range(200_704, 225_281, 4096), 229_375]  # seven cuts
    assert GPU.ends(262_144, sparse=True) == [*whole, 262_144]  # none: the last chunk is a whole one
    assert GPU.ends(262_200, sparse=True) == [*whole, 253_952, 258_048, 262_144, 262_200]  # a DCA chunk ends between
    assert GPU.ends(229_375, sparse=False) == [*whole[:6], 229_375]
    assert len(GPU.ends(1_010_000, sparse=True)) <= 32 + 4 + 7


@settings(max_examples=200, deadline=None)
@given(chunkings(), st.integers(1, 150), st.booleans())
def test_chunks_follow_each_other_to_the_prompts_end(chunking: Chunking, length: int, sparse: bool) -> None:
    ends, begin = chunking.ends(length, sparse=sparse), last_begin(chunking, length)
    expected = [end for end in full_ends(chunking)[1:] if end <= begin]
    if sparse and is_incomplete(chunking, length):
        expected += [place for place in range(begin + 1, length) if place % chunking.part_tokens == 0]
    assert ends == [*expected, length]
    assert all(0 < end - start <= chunking.chunk_tokens for start, end in zip([0, *ends], ends))


@settings(max_examples=200, deadline=None)
@given(chunkings(), st.integers(1, 150), st.integers(1, 150), st.data())
def test_sparse_prompts_that_begin_alike_are_cut_alike_in_all_chunks_that_both_fill_or_both_leave_incomplete(
    chunking: Chunking, one: int, two: int, data: st.DataObject
) -> None:
    shared = data.draw(st.integers(0, min(one, two) - 1), "shared tokens")
    ends = [chunking.ends(length, sparse=True) for length in (one, two)]
    begins = [last_begin(chunking, length) for length in (one, two)]
    expected = [end for end in full_ends(chunking)[1:] if end <= min(shared, *begins)]
    if begins[0] == begins[1] and all(is_incomplete(chunking, length) for length in (one, two)):
        expected += [place for place in range(begins[0] + 1, shared + 1) if place % chunking.part_tokens == 0]
    found = [end for end in alike(*ends) if end <= shared]
    assert found[: len(expected)] == expected
    if len(found) > len(expected):  # the chunk that one leaves incomplete ends early in the other, where a part does
        assert found[len(expected)] % chunking.chunk_len == 0


@settings(max_examples=200, deadline=None)
@given(chunkings(), st.integers(1, 100))
def test_a_prompts_own_end_is_a_cut_where_longer_prompts_are_cut_alike(chunking: Chunking, length: int) -> None:
    assume(chunking.page_size > 1 and chunking.chunk_tokens >= chunking.page_size)
    ends = chunking.ends(length, sparse=True)
    longer = (chunking.ends(length + more, sparse=True) for more in range(1, 2 * chunking.chunk_tokens + 2))
    useful = any(other[: len(ends)] == ends for other in longer)
    assert list(chunking.cuts(length, sparse=True)) == (ends if useful else ends[:-1])


def test_dense_prompts_can_be_cut_at_every_page_whatever_their_chunks_are() -> None:
    for tokens in (1, 7, 32):
        assert list(Chunking(tokens, 16, 4).cuts(16, sparse=False)) == [4, 8, 12, 16]
    assert list(Chunking(8, 16, 4).cuts(3, sparse=False)) == []


@settings(max_examples=200, deadline=None)
@given(chunkings(), st.integers(1, 100), st.integers(1, 100))
def test_other_cuts_are_those_of_prompts_that_left_the_chunk_incomplete(
    chunking: Chunking, length: int, earlier: int
) -> None:
    begin = last_begin(chunking, earlier)
    assume(earlier < length and is_incomplete(chunking, earlier) and last_begin(chunking, length) > begin)
    end = next(end for end in full_ends(chunking) if end > begin)
    left = [cut for cut in chunking.ends(earlier, sparse=True)[:-1] if begin < cut <= end]
    other = list(chunking.other_cuts(begin, length))
    assert other[: len(left)] == left
    assert all(cut <= end for cut in other)
