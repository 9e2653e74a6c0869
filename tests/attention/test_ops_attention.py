"""Attention ops against the oracle: storage types, head sizes, groups, page sizes, mixed batches, poisoned memory."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from cases import Prompt, make_prompt, paged_cache
from faces import STORAGE, Face, OpFace, OracleFace, error, stored

from paddle_qwen1m import ops
from paddle_qwen1m.threads import default_num_threads

ORACLE = OracleFace()
SHAPES = [(1, 1, 64), (4, 2, 64), (5, 1, 64), (14, 2, 64), (2, 2, 128), (2, 1, 128), (10, 2, 128), (7, 1, 128)]


def batch(rng: np.random.Generator, lengths: list[int], page_size: int, storage: str, **shape: int) -> list[Prompt]:
    """Prompts of the given lengths whose keys and values lie in one shared pool of pages; the others' tables differ."""
    prompts = [make_prompt(rng, n, page_size=page_size, storage=storage, **shape) for n in lengths]
    rotated = [oracle.read_pages(p.caches[0], p.caches[2], 0, n) for p, n in zip(prompts, lengths)]
    values = [oracle.read_pages(p.caches[1], p.caches[2], 0, n) for p, n in zip(prompts, lengths)]
    pool = paged_cache(rng, rotated, values, page_size)
    for prompt in prompts:
        object.__setattr__(prompt, "cache", pool)
    return prompts


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
def test_prefill_of_mixed_pieces(
    rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int, storage: str
) -> None:
    """Pieces of several sequences in one call: starts mid-chunk, chunk borders, odd lengths, one to three stages.

    Rows no piece names stay as they were, and NaN in slots past a sequence's end reaches nothing.
    """
    lengths, chunk_len, page_size = [1, 77, 130, 289, 64, 395], 128, 32
    begins = [0, 13, 126, 250, 0, 391]
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    prompts = batch(rng, lengths, page_size, storage, **shape)
    rows, gap = [], 3
    queries = [np.full((3, gap, heads, head_dim), np.nan)]
    pieces = []
    for sequence, (prompt, begin) in enumerate(zip(prompts, begins)):
        row = sum(q.shape[1] for q in queries)
        for first, last in oracle.pieces_of(begin, len(prompt.q), chunk_len):
            pieces.append((sequence, row + first - begin, last - first, first))
        queries.append(prompt.queries[:, begin:])
        rows += range(row, row + len(prompt.q) - begin)
    queries.append(np.full((3, gap, heads, head_dim), np.nan))
    q, pieces = np.concatenate(queries, axis=1), np.array(pieces)
    scale = np.array([prompt.scale * (1 + 0.1 * n) for n, prompt in enumerate(prompts)])
    pool = prompts[0].cache
    results = []
    for face in (ORACLE, OpFace(storage)):
        out, lse = np.full(q.shape[1:], np.nan), np.full(q.shape[1:3], np.nan)
        face.dca_prefill(q, out, pool.keys, pool.values, pool.tables, rng.permutation(pieces), scale, chunk_len, lse)
        untouched = np.setdiff1d(np.arange(len(out)), rows)
        assert len(untouched) == 2 * gap and np.isnan(out[untouched]).all() and np.isnan(lse[untouched]).all()
        results.append((out[rows], lse[rows]))
    (expected, expected_lse), (got, lse) = results
    assert error(got, expected) < OpFace.tolerance
    assert np.abs(lse - expected_lse).max() < 10 * OpFace.tolerance


BORDERS = sorted({border + step for border in (64, 192, 256, 384, 512, 768) for step in (-1, 0, 1)} | {1, 1100})


@pytest.mark.parametrize("chunk_len, page_size", [(256, 1), (256, 16), (256, 256), (1024, 8), (1024, 64)])
@pytest.mark.parametrize("tokens", BORDERS)
def test_prefill_at_tile_page_and_chunk_borders(
    rng: np.random.Generator, tokens: int, chunk_len: int, page_size: int
) -> None:
    """Lengths on both sides of every border of tiles, pages and DCA chunks, in one prefill chunk."""
    prompt = make_prompt(rng, tokens, chunk_len, 64, heads=2, kv_heads=1, page_size=page_size)
    assert error(prompt.dense(OpFace()), prompt.dense(ORACLE)) < OpFace.tolerance


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing_but_rounding(rng: np.random.Generator, threads: int) -> None:
    """Prefill, decode, sparse prefill and linear with one thread, two, and more than there are tiles for."""
    prompt = make_prompt(rng, 400)
    keys, values, table = prompt.caches
    last = prompt.queries[:, -1:], keys, values, table[None], np.array([400]), [prompt.scale], 128
    index = prompt.index(ORACLE, 384, 400, 70, 102)
    x, weight = rng.standard_normal((70, 130)), rng.standard_normal((90, 130))
    try:
        ops.set_num_threads(threads)
        assert error(prompt.dense(OpFace()), prompt.dense(ORACLE)) < OpFace.tolerance
        assert error(OpFace().dca_decode(*last), ORACLE.dca_decode(*last)) < OpFace.tolerance
        sparse = prompt.sparse(OpFace(), 384, 400, index)[0]
        assert error(sparse, prompt.sparse(ORACLE, 384, 400, index)[0]) < OpFace.tolerance
        assert error(OpFace().linear(x, weight), ORACLE.linear(x, weight)) < OpFace.tolerance
    finally:
        ops.set_num_threads(default_num_threads())


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
def test_decode_of_mixed_lengths(
    rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int, storage: str
) -> None:
    """Every combination of stages in one batch, each sequence with its own scale."""
    lengths, chunk_len = [1, 17, 128, 129, 200, 256, 257, 300, 385, 641], 128
    prompts = batch(rng, lengths, 16, storage, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    q = np.stack([p.queries[:, -1] for p in prompts], axis=1)
    scale = np.array([p.scale * (1 + 0.05 * n) for n, p in enumerate(prompts)])
    pool = prompts[0].cache
    arguments = q, pool.keys, pool.values, pool.tables, np.array(lengths), scale, chunk_len
    assert error(OpFace(storage).dca_decode(*arguments), ORACLE.dca_decode(*arguments)) < OpFace.tolerance


@pytest.mark.parametrize("face", [ORACLE, *map(OpFace, STORAGE)], ids=lambda face: face.name)
def test_decode_of_an_empty_row_is_zero(rng: np.random.Generator, face: Face) -> None:
    """Rows of length 0, such as a captured batch has that is not full; the others come out as they do without them."""
    prompts = batch(rng, [17, 300], 16, "bfloat16", heads=4, kv_heads=2, head_dim=64)
    pool, scale = prompts[0].cache, prompts[0].scale
    q = np.stack([prompt.queries[:, -1] for prompt in prompts], axis=1)

    def decode(rows: list[int], lengths: list[int]) -> np.ndarray:
        tables = np.maximum(pool.tables[rows], 0)
        return face.dca_decode(q[:, rows], pool.keys, pool.values, tables, np.array(lengths), [scale] * len(rows), 128)

    with_empty = decode([0, 0, 1], [17, 0, 300])
    np.testing.assert_array_equal(with_empty[1], 0)
    np.testing.assert_array_equal(with_empty[[0, 2]], decode([0, 1], [17, 300]))
    np.testing.assert_array_equal(decode([0], [0]), 0)


@pytest.mark.parametrize("tokens", [1, 500, 1024, 1500, 3000])
def test_decode_of_one_long_sequence(rng: np.random.Generator, tokens: int) -> None:
    """A lone sequence, whose keys the op may split over threads."""
    prompt = make_prompt(rng, tokens, 1024, 64, heads=4, kv_heads=1, page_size=64)
    keys, values, table = prompt.caches
    arguments = prompt.queries[:, -1:], keys, values, table[None], np.array([tokens]), [prompt.scale], 1024
    assert error(OpFace().dca_decode(*arguments), ORACLE.dca_decode(*arguments)) < OpFace.tolerance


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
@pytest.mark.parametrize("rows, end", [(1, 129), (64, 200), (33, 289), (64, 520)])
def test_probe(
    rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int, rows: int, end: int, storage: str
) -> None:
    """Column and diagonal sums; every sum is of at most 64 probabilities."""
    prompt = make_prompt(rng, end, heads=heads, kv_heads=kv_heads, head_dim=head_dim, storage=storage, temperature=1.2)
    rows = min(rows, (end - 1) % 128 + 1)
    arguments = prompt.critical[:, end - rows :], prompt.caches[0], prompt.caches[2], end, 128, prompt.scale
    for got, expected in zip(OpFace(storage).dca_probe(*arguments), ORACLE.dca_probe(*arguments)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2 * OpFace.tolerance)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
@pytest.mark.parametrize("begin, end", [(0, 100), (250, 256), (260, 384), (512, 577)])
def test_sparse_prefill(
    rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int, begin: int, end: int, storage: str
) -> None:
    """Sparse attention over the oracle's index, with blocks and columns in every stage that the piece has."""
    prompt = make_prompt(rng, end, heads=heads, kv_heads=kv_heads, head_dim=head_dim, storage=storage, temperature=1.1)
    index = prompt.index(ORACLE, begin, end, 70, 102)
    got, lse = prompt.sparse(OpFace(storage), begin, end, index)
    expected, expected_lse = prompt.sparse(ORACLE, begin, end, index)
    assert error(got, expected) < OpFace.tolerance
    assert np.abs(lse - expected_lse).max() < 10 * OpFace.tolerance


def test_entries_past_the_counts_are_not_read(rng: np.random.Generator) -> None:
    """An index may be wider than its counts; what lies behind them, valid keys or not, is ignored, and so are bits of
    columns behind the last stage's, set or not. The first head has no columns at all.
    """
    begin, end = 310, 384
    prompt = make_prompt(rng, end)
    index = prompt.index(ORACLE, begin, end, 70, 102)
    index.counts[0, :, 3:] = 0
    expected, _ = prompt.sparse(ORACLE, begin, end, index)
    tables = oracle.index_tables(index)
    ends = np.array([oracle.used_width(counts) for counts in tables.column_counts])
    assert ends[0] == 0 < ends[1:].min() and ends.max() == tables.columns.shape[1]
    wider = ((0, 0), (0, 0), (0, 9)), ((0, 0), (0, 128)), ((0, 0), (0, 0), (0, 4))
    for filler in (0, end - 1, -(2**31), 2**31 - 1, -1):
        blocks, columns, listed = (
            np.pad(part, widths) for part, widths in zip((tables.blocks, tables.columns, tables.listed), wider)
        )
        blocks[np.arange(blocks.shape[-1]) >= index.counts[..., :3].sum(-1)[..., None]] = filler
        columns[np.arange(columns.shape[-1]) >= ends[:, None]] = filler
        listed[np.broadcast_to(np.arange(listed.shape[-1]) >= ends[:, None, None] // 32, listed.shape)] = filler
        filled = tables._replace(blocks=blocks, columns=columns, listed=listed)
        got, _ = prompt.sparse(OpFace(), begin, end, filled)
        assert error(got, expected) < OpFace.tolerance


def test_large_logits_do_not_overflow(rng: np.random.Generator) -> None:
    """Logits of a few thousand: one-hot softmax rows, no overflow, and the log of the sum stays exact to float32."""
    tokens = 300
    prompt = make_prompt(rng, tokens, temperature=15.0)
    lse = np.full(prompt.q.shape[:2], np.nan)
    out = np.full(prompt.q.shape, np.nan)
    keys, values, table = prompt.caches
    arguments = keys, values, table[None], prompt.pieces([0]), [prompt.scale], 128, lse
    OpFace().dca_prefill(prompt.queries, out, *arguments)
    expected = np.concatenate([prompt.dense_lse(b, e) for b, e in oracle.pieces_of(0, tokens, 128)], axis=1)
    assert np.abs(expected).max() > 500
    assert error(lse, expected.T) < OpFace.tolerance
    assert error(out, prompt.dense(ORACLE)) < 100 * OpFace.tolerance


def test_the_whole_sparse_path_through_the_ops(rng: np.random.Generator) -> None:
    """Probe, selection, index and attention, each by its op: the oracle's output, as no selection is near a tie."""
    for begin, end in ((0, 128), (140, 250), (384, 500)):
        prompt = make_prompt(rng, end)
        prompt.queries[:] = stored(prompt.queries, "float32")
        by_ops, by_oracle = (
            prompt.sparse(face, begin, end, prompt.index(face, begin, end, 50, 110))[0] for face in (OpFace(), ORACLE)
        )
        assert error(by_ops, by_oracle) < OpFace.tolerance


def test_attention_ops_refuse_what_does_not_fit(rng: np.random.Generator) -> None:
    """Shapes that do not belong together raise ValueError naming the op, before anything is written."""
    prompt = make_prompt(rng, 300)
    keys, values, table = prompt.caches
    op, scale = OpFace(), [prompt.scale]
    out = np.zeros(prompt.q.shape)

    def prefill(q: np.ndarray, pieces: list[tuple[int, int, int, int]], tables: np.ndarray = table[None]) -> None:
        op.dca_prefill(q, out, keys, values, tables, np.array(pieces), scale, 128)

    with pytest.raises(ValueError, match="dca_prefill"):
        prefill(prompt.queries[..., :32], [(0, 0, 128, 0)])
    with pytest.raises(ValueError, match="dca_prefill"):
        prefill(prompt.queries, [(0, 0, 129, 0)])
    with pytest.raises(ValueError, match="dca_prefill"):
        prefill(prompt.queries, [(1, 0, 128, 0)])
    with pytest.raises(ValueError, match="dca_prefill"):
        prefill(prompt.queries, [(0, 290, 20, 290)])
    with pytest.raises(ValueError, match="dca_prefill"):
        prefill(prompt.queries, [(0, 256, 44, 256)], table[None, :10])
    with pytest.raises(ValueError, match="dca_prefill"):
        prefill(prompt.queries[:1], [(0, 256, 44, 256)])
    with pytest.raises(ValueError, match="dca_decode"):
        op.dca_decode(prompt.queries[:, -1:], keys, values, table[None], np.array([-1]), scale, 128)
    with pytest.raises(ValueError, match="dca_decode"):
        op.dca_decode(prompt.queries[:, -1:], keys, values, table[None], np.array([5000]), scale, 128)
    with pytest.raises(ValueError, match="dca_probe"):
        op.dca_probe(prompt.critical[:, -65:], keys, table, 300, 128, prompt.scale)
    index = prompt.index(ORACLE, 256, 300, 50, 110)
    with pytest.raises(ValueError, match="dca_sparse_prefill"):
        op.dca_sparse_prefill(prompt.queries, out, keys, values, table, index, 256, 240, 44, 128, prompt.scale)
    with pytest.raises(ValueError, match="dca_sparse_prefill"):
        op.dca_sparse_prefill(prompt.queries, out, keys, values, table, index, 280, 256, 44, 128, prompt.scale)
    tables = oracle.index_tables(index)
    for misfit, named in (
        ({"columns": tables.columns[:, :-32], "listed": tables.listed[..., :-1]}, "must be a multiple of 64 wide"),
        ({"listed": tables.listed[..., :-1]}, "listed"),
        ({"listed": tables.listed[:1]}, "listed"),
        ({"columns": tables.columns[:1]}, "columns"),
        ({"column_counts": tables.column_counts[:, :2]}, "column_counts"),
    ):
        with pytest.raises(ValueError, match=f"dca_sparse_prefill.*{named}"):
            wrong = tables._replace(**misfit)
            op.dca_sparse_prefill(prompt.queries, out, keys, values, table, wrong, 256, 256, 44, 128, prompt.scale)
    assert (out == 0).all()
