"""Dense prefill, sparse prefill and decode on a GPU beside float64: fresh inputs, poisoned outputs, shuffled pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import attention_cases as cases  # noqa: E402
from cuda_library import LIBRARY, REFERENCE, CudaLibrary  # noqa: E402

BOUND = 1e-2
"""Of ||out - expected|| / || p |v| ||."""
PLANTED_BOUND = 2e-2
"""Of ||out - expected|| / ||expected||, where at most 16 keys carry the mass."""
SHAPES = [(1, 1, 128), (2, 1, 64), (5, 1, 128), (7, 1, 128), (10, 2, 128), (14, 2, 64), (40, 8, 128), (17, 1, 128)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="session", params=[LIBRARY, REFERENCE], ids=["chosen", "sm80"])
def cuda(cuda: CudaLibrary, request: Any) -> CudaLibrary:
    """The kernels that the device's architecture asks for, and those that cards other than Hopper run."""
    return CudaLibrary(request.param)


def check_dense(cuda: Any, context: cases.Context, rng: np.random.Generator) -> None:
    out, lse = cases.run_dense(cuda, context)
    rows = cases.sampled_rows(rng, context.q.shape[1])
    expected = cases.reference(context, rows)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    assert cases.worst(out[rows], expected) <= BOUND
    assert float((lse[rows].double() - expected.lse).abs().max()) < 1e-3


def check_sparse(
    cuda: Any, context: cases.Context, rng: np.random.Generator, budget: tuple[int, int], rows: int
) -> None:
    """Of a random selection, so many columns and diagonals; `rows` of the output are looked at."""
    index = cases.convert(cuda, context, *random_selection(rng, context, *budget))
    out, lse = cases.run_sparse(cuda, context, index)
    chosen = cases.sampled_rows(rng, context.q.shape[1], rows)
    expected = cases.reference(context, chosen, index.visited(context, chosen))
    assert torch.isfinite(out).all()
    assert cases.worst(out[chosen], expected) <= BOUND
    assert float((lse[chosen].double() - expected.lse).abs().max()) < 1e-3
    if max(budget) >= context.length:
        assert cases.worst(out[chosen], cases.reference(context, chosen)) <= BOUND


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
def test_dense_prefill_of_every_shape(
    cuda: Any, rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Groups of 1 to 17 query heads, both head sizes, five DCA chunks, rows that begin inside the third."""
    context = cases.random_context(
        rng, 2311, 1100, heads=heads, kv_heads=kv_heads, head_dim=head_dim, chunk_len=512, dtype=dtype, sharpness=2.0
    )
    check_dense(cuda, context, rng)


BORDERS = [1, 2, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 1536, 1537, 3001]


@pytest.mark.parametrize("length", BORDERS)
@pytest.mark.parametrize("page_size", [64, 256])
def test_dense_prefill_at_borders(cuda: Any, rng: np.random.Generator, length: int, page_size: int) -> None:
    """Whole prompts and last rows alone on both sides of tiles, pages and chunks."""
    for rows in sorted({length, min(length, 3), min(length, 129)}):
        context = cases.random_context(
            rng, length, rows, heads=4, kv_heads=2, chunk_len=512, page_size=page_size, sharpness=3.0
        )
        check_dense(cuda, context, rng)


@pytest.mark.parametrize("length, rows, chunk_len", [(16384, 16384, 16384), (131071, 777, 32768), (300001, 333, 65536)])
def test_dense_prefill_of_long_contexts(
    cuda: Any, rng: np.random.Generator, length: int, rows: int, chunk_len: int
) -> None:
    context = cases.random_context(
        rng, length, rows, heads=4, kv_heads=2, chunk_len=chunk_len, page_size=256, sharpness=4.0
    )
    check_dense(cuda, context, rng)


@pytest.mark.parametrize("heads, kv_heads", [(28, 4), (40, 8), (7, 1), (17, 1), (6, 6)])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 64, 65, 200, 512])
def test_few_rows_over_many_keys(cuda: Any, rng: np.random.Generator, rows: int, heads: int, kv_heads: int) -> None:
    """A question on a cached document: its last rows alone, begun anywhere, with one to three stages behind them."""
    chunk_len = int(rng.choice([8192, 16384, 65536]))
    length = int(rng.integers(30000, 40000)) if rng.integers(2) else 2 * 16384 + rows // 2 + 1
    context = cases.random_context(
        rng, length, rows, heads=heads, kv_heads=kv_heads, chunk_len=chunk_len, page_size=256, sharpness=4.0
    )
    check_dense(cuda, context, rng)
    if len(cases.pieces_of(context.begin, context.length, chunk_len)) == 1:
        check_sparse(cuda, context, rng, (700, 900), 6)


@pytest.mark.parametrize("heads, kv_heads", [(28, 4), (40, 8), (6, 6)])
@pytest.mark.parametrize("room", [8, 64])
def test_one_graph_serves_pieces_anywhere(
    cuda: Any, rng: np.random.Generator, room: int, heads: int, kv_heads: int
) -> None:
    """Pieces on the device: what a graph captured is replayed on other rows at other positions of as long a table, in
    one DCA chunk or two. Rows behind theirs are anything.
    """
    length, chunk_len = 40000, 8192
    whole = cases.random_context(
        rng, length, room, heads=heads, kv_heads=kv_heads, chunk_len=chunk_len, page_size=256, sharpness=4.0
    )
    pieces = torch.zeros(2, 4, dtype=torch.int32, device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    cases.run_dense(cuda, whole, pieces)  # what is loaded at a first launch
    with torch.cuda.graph(graph, stream=stream):
        out, lse = cases.run_dense(cuda, whole, pieces, waits=False)
    for rows, end in ((room, length), (1, 1), (room - 1, 4 * chunk_len + room // 2), (room, room), (3, 20000)):
        own = cases.pieces_of(end - rows, end, chunk_len)
        pieces.copy_(torch.from_numpy(np.concatenate([own, np.zeros((2 - len(own), 4), np.int32)])))
        graph.replay()
        torch.cuda.synchronize()
        context = replace(whole, q=whole.q[:, :rows], keys=whole.keys[:end], values=whole.values[:end])
        chosen = cases.sampled_rows(rng, rows, 6)
        expected = cases.reference(context, chosen)
        assert cases.worst(out[chosen], expected) <= BOUND, (rows, end)
        assert float((lse[chosen].double() - expected.lse).abs().max()) < 1e-3


@pytest.mark.parametrize("rows", [1, 70, 300])
def test_the_key_that_carries_the_mass_is_met_by_few_rows(cuda: Any, rng: np.random.Generator, rows: int) -> None:
    """Every share of the keys is met, at its ends too: keys around all multiples of 1,024 carry the mass in turn."""
    length = 16384 + rows
    for multiple in range(1024, length, 1024):
        keys = [min(int(rng.choice([multiple - 1, multiple, multiple + 1])), length - 1)]
        context, _ = cases.planted_context(rng, length, rows, keys, heads=7, kv_heads=1, chunk_len=6144, page_size=256)
        chosen = cases.sampled_rows(rng, rows, 3)
        expected = cases.reference(context, chosen)
        out, _ = cases.run_dense(cuda, context)
        assert cases.worst(out[chosen], expected, relative_to_out=True) <= PLANTED_BOUND


@pytest.mark.parametrize("rows, cuts", [(130, [1]), (512, [1, 2, 5]), (1000, [3, 8])])
def test_few_rows_do_not_depend_on_how_a_piece_is_cut(
    cuda: Any, rng: np.random.Generator, rows: int, cuts: list[int]
) -> None:
    """Ranges of a piece's row blocks, each in a call of its own, bit by bit, where the keys are shared out."""
    context = cases.random_context(rng, 60001, rows, heads=10, kv_heads=2, chunk_len=32768, page_size=256)
    borders = [0, *(64 * cut for cut in cuts), rows]
    whole, whole_lse = cases.run_dense(cuda, context)
    for first, last in zip(borders, borders[1:]):
        piece = np.asarray([(0, first, last - first, context.begin + first)], np.int32)
        out, lse = cases.run_dense(cuda, context, piece)
        assert torch.equal(out[first:last], whole[first:last]) and torch.equal(lse[first:last], whole_lse[first:last])
        assert torch.isnan(out[:first].float()).all() and torch.isnan(out[last:].float()).all()
    index = cases.convert(cuda, context, *random_selection(rng, context, 900, 2500))
    for expected, got in zip(cases.run_sparse(cuda, context, index), cases.run_sparse(cuda, context, index, cuts)):
        assert torch.isfinite(expected).all() and torch.equal(expected, got)


@pytest.mark.parametrize("rows", [300, 1500])
def test_heads_may_be_begun_in_any_order(cuda: Any, rng: np.random.Generator, rows: int) -> None:
    """They get what they get in their own, bit by bit."""
    context = cases.random_context(rng, 30001, rows, heads=10, kv_heads=2, chunk_len=32768, page_size=256)
    index = cases.convert(cuda, context, *random_selection(rng, context, 300, 900))
    order = [7, 2, 9, 0, 5, 1, 8, 3, 6, 4]
    for expected, got in zip(
        cases.run_sparse(cuda, context, index), cases.run_sparse(cuda, context, index, order=order)
    ):
        assert torch.isfinite(expected).all() and torch.equal(expected, got)


@pytest.mark.parametrize("rows", [1, 100, 1000])
def test_few_rows_among_many_of_a_step(cuda: Any, rng: np.random.Generator, rows: int) -> None:
    """A sparse piece's workspace is as large as its own rows ask for, and they get what they get alone, bit by bit."""
    context = cases.random_context(rng, 60001, rows, heads=10, kv_heads=2, chunk_len=65536, page_size=256)
    index = cases.convert(cuda, context, *random_selection(rng, context, 900, 2500))
    alone, among = (
        cuda.workspace_bytes("dca_sparse_prefill", **cases.sparse_fields(context, index, others)) for others in (0, 777)
    )
    assert alone == among <= 8192 * 10 * (4 * 128 + 8) + 2 * index.all_columns * 128 * 2
    by_itself, inside = (cases.run_sparse(cuda, context, index, others=others) for others in (0, 777))
    for expected, got in zip(by_itself, inside):
        assert torch.isfinite(expected).all() and torch.equal(expected, got[777:-777])
        assert torch.isnan(got[:777]).all() and torch.isnan(got[-777:]).all()


def test_pieces_of_many_sequences_in_one_call(cuda: Any, rng: np.random.Generator) -> None:
    """Rows that no piece names stay as they were; more pieces than one launch takes."""
    lengths = [int(n) for n in rng.integers(1, 700, 90)]
    contexts = [
        cases.random_context(rng, n, min(n, 40), heads=2, kv_heads=1, chunk_len=256, page_size=64) for n in lengths
    ]
    width = max(len(context.table) for context in contexts)
    tables = torch.zeros(len(contexts), width, dtype=torch.int32, device="cuda")
    pieces, queries, spans, row, pages = [], [], [], 3, 0
    for number, context in enumerate(contexts):
        tables[number, : len(context.table)] = context.table + pages
        pages += len(context.key_pages)
        own = cases.pieces_of(context.begin, context.length, context.chunk_len)
        pieces.append(own + np.asarray([number, row, 0, 0], np.int32))
        q = torch.full((3, context.q.shape[1], 2, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
        q[: context.q.shape[0]] = context.q
        queries.append(q)
        spans.append((row, row + q.shape[1]))
        row += q.shape[1]
    gap = torch.full((3, 3, 2, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    q = torch.cat([gap, *queries, gap], 1).contiguous()
    every = rng.permutation(np.concatenate(pieces))
    out = cases.poisoned(*q.shape[1:], dtype=q.dtype)
    scale = torch.tensor([context.scale * (1 + 0.01 * n) for n, context in enumerate(contexts)], device="cuda")
    cuda(
        "dca_prefill",
        q=q,
        out=out,
        lse=None,
        cache={
            **contexts[0].cache,
            "key": torch.cat([context.key_pages for context in contexts]),
            "value": torch.cat([context.value_pages for context in contexts]),
        },
        block_tables=tables,
        pieces=np.ascontiguousarray(every),
        scale=scale,
        activation="bfloat16",
        tokens=q.shape[1],
        heads=2,
        table_width=width,
        num_pieces=len(every),
        on_device=0,
        chunk_len=256,
    )
    torch.cuda.synchronize()
    assert torch.isnan(out[:3]).all() and torch.isnan(out[-3:]).all()
    for number, (context, (first, last)) in enumerate(zip(contexts, spans)):
        context.scale *= 1 + 0.01 * number
        expected = cases.reference(context, range(last - first))
        assert cases.worst(out[first:last], expected) <= BOUND, number


# Keys of a tile's, page's and stage's first and last places around L = 512, for rows at the end of 1,536 and more keys.
EDGES = [0, 1, 63, 64, 255, 256, 511, 512, 575, 576, 767, 1023, 1024, 1087, 1500, 1535]


def planted(cuda: Any, rng: np.random.Generator, keys: list[int], rows: int = 1) -> cases.Context:
    return cases.planted_context(rng, 1600, rows, keys, heads=5, kv_heads=1, chunk_len=512, page_size=256)[0]


@pytest.mark.parametrize("key", EDGES)
def test_the_key_that_carries_the_mass_is_met_wherever_it_lies(cuda: Any, rng: np.random.Generator, key: int) -> None:
    """One key in turn in every stage and at every edge, through all three kernels."""
    context = planted(cuda, rng, [key], rows=64)
    expected = cases.reference(context, range(64))
    assert cases.worst(cases.run_dense(cuda, context)[0], expected, relative_to_out=True) <= PLANTED_BOUND
    last = cases.Reference(*(part[-1:] for part in (expected.out, expected.mass, expected.lse)))
    assert cases.worst(cases.run_decode(cuda, [context]), last, relative_to_out=True) <= PLANTED_BOUND
    for columns, slashes in (([key], [1599]), ([0], sorted({min(key + 3, 1599), 1599}))):
        index = cases.convert(cuda, context, *(as_table(part, heads=5) for part in (columns, slashes)))
        keep = index.visited(context, range(64))
        visible = cases.reference(context, range(64), keep)
        assert cases.worst(cases.run_sparse(cuda, context, index)[0], visible, relative_to_out=True) <= PLANTED_BOUND


def test_sixteen_keys_share_the_mass(cuda: Any, rng: np.random.Generator) -> None:
    context = planted(cuda, rng, EDGES, rows=64)
    expected = cases.reference(context, range(64))
    assert cases.worst(cases.run_dense(cuda, context)[0], expected, relative_to_out=True) <= PLANTED_BOUND


def as_table(values: list[int], heads: int) -> torch.Tensor:
    return torch.tensor([values] * heads, dtype=torch.int32, device="cuda")


def test_faults_are_seen(cuda: Any, rng: np.random.Generator) -> None:
    """A zero output, and a reference without one tile, stage or column, are all rejected."""
    context = planted(cuda, rng, EDGES, rows=64)
    out, _ = cases.run_dense(cuda, context)
    expected = cases.reference(context, range(64))
    assert cases.worst(torch.zeros_like(out), expected) > BOUND
    everything = torch.ones(64, 5, 1600, dtype=torch.bool, device="cuda")
    for dropped in (slice(0, 64), slice(1024, 1088), slice(0, 512), slice(512, 1024), slice(1024, 1600), [1500]):
        keep = everything.clone()
        keep[:, :, dropped] = False
        assert cases.worst(out, cases.reference(context, range(64), keep), relative_to_out=True) > PLANTED_BOUND
    flat = cases.random_context(rng, 1600, 64, heads=2, kv_heads=1)
    result, _ = cases.run_dense(cuda, flat)
    keep = torch.ones(64, 2, 1600, dtype=torch.bool, device="cuda")
    keep[:, :, 256:320] = False
    assert cases.worst(result, cases.reference(flat, range(64), keep)) > BOUND


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
def test_decode_batch_of_different_lengths(
    cuda: Any, rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """One to three stages in one batch; each row as it would be alone."""
    lengths = [1, 63, 64, 65, 512, 513, 1024, 1025, 2500, 5]
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "chunk_len": 512, "dtype": dtype}
    contexts = [cases.random_context(rng, n, 1, page_size=64, sharpness=2.0, **shape) for n in lengths]
    out = cases.run_decode(cuda, contexts)
    for number, context in enumerate(contexts):
        assert cases.worst(out[number : number + 1], cases.reference(context, [0])) <= BOUND, lengths[number]


@pytest.mark.parametrize("heads, kv_heads", [(40, 8), (28, 4), (8, 1), (3, 3), (12, 1)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 1025, 4095, 4096, 4097, 8192])
def test_decode_of_few_keys(cuda: Any, rng: np.random.Generator, length: int, heads: int, kv_heads: int) -> None:
    """In a table that holds no more, and in one that could hold many: by a cluster of blocks and without, on Hopper."""
    context = cases.random_context(rng, length, 1, heads=heads, kv_heads=kv_heads, chunk_len=2048, sharpness=2.0)
    expected = cases.reference(context, [0])
    for width in (1, 1000):
        out = cases.run_decode(cuda, [context], width=width)
        assert cases.worst(out, expected) <= BOUND, width
        assert torch.equal(out, cases.run_decode(cuda, [context], width=width))


@pytest.mark.parametrize("length", [16385, 131071, 300001])
def test_decode_of_long_contexts(cuda: Any, rng: np.random.Generator, length: int) -> None:
    context = cases.random_context(rng, length, 1, heads=10, kv_heads=2, chunk_len=65536, page_size=256, sharpness=4.0)
    assert cases.worst(cases.run_decode(cuda, [context]), cases.reference(context, [0])) <= BOUND


def test_decode_of_an_odd_number_of_shares(cuda: Any, rng: np.random.Generator) -> None:
    """Seven heads of one KV head: 37 shares of each of seven sequences on 132 processors, 79 of one sequence alone."""
    shape = {"heads": 7, "kv_heads": 1, "chunk_len": 65536, "page_size": 64}
    contexts = [cases.random_context(rng, 5000 + number, 1, **shape) for number in range(7)]
    for batch in (contexts, contexts[:1]):
        out = cases.run_decode(cuda, batch)
        for number, context in enumerate(batch):
            assert cases.worst(out[number : number + 1], cases.reference(context, [0])) <= BOUND


def random_selection(
    rng: np.random.Generator, context: cases.Context, columns: int, slashes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and slashes int32 [H, k]: offset 0 and its neighbours always, the others anywhere."""
    heads, length = context.q.shape[2], context.length
    picked: list[list[np.ndarray]] = [[], []]
    for _ in range(heads):
        picked[0].append(np.sort(rng.choice(length, min(columns, length), replace=False)))
        local = np.arange(max(0, length - min(100, slashes)), length)
        others = rng.permutation(max(0, length - len(local)))[: max(0, min(slashes, length) - len(local))]
        picked[1].append(np.sort(np.concatenate([others, local])))
    tables = (torch.from_numpy(np.stack(part).astype(np.int32)).cuda() for part in picked)
    return tuple(tables)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(5, 1, 128), (7, 1, 128), (4, 2, 64)])
@pytest.mark.parametrize(
    "length, rows", [(100, 100), (512, 200), (513, 1), (900, 130), (1024, 64), (1100, 70), (2500, 450), (1537, 1)]
)
@pytest.mark.parametrize("budget", [(1, 100), (30, 160), (100, 700), (5000, 100), (1, 5000)])
def test_sparse_prefill_attends_to_what_its_index_names(
    cuda: Any,
    rng: np.random.Generator,
    length: int,
    rows: int,
    budget: tuple[int, int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """Pieces that begin anywhere in a chunk, empty stages, budgets from the forced sets alone to everything."""
    context = cases.random_context(
        rng, length, rows, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, sharpness=2.0
    )
    check_sparse(cuda, context, rng, budget, 8)


def test_sparse_prefill_of_a_long_context(cuda: Any, rng: np.random.Generator) -> None:
    context = cases.random_context(
        rng, 300032, 2048, heads=4, kv_heads=2, chunk_len=131072, page_size=256, sharpness=4.0
    )
    check_sparse(cuda, context, rng, (1000, 3000), 6)


@pytest.mark.parametrize("cuts", [[1], [3, 4], [32], [1, 2, 3, 5, 8, 13, 21]])
def test_rows_do_not_depend_on_how_a_piece_is_cut(cuda: Any, rng: np.random.Generator, cuts: list[int]) -> None:
    """Ranges of a piece's row blocks, dense and sparse, bit by bit."""
    context = cases.random_context(rng, 70001, 2101, heads=4, kv_heads=2, chunk_len=32768, page_size=256, sharpness=4.0)
    whole = cases.pieces_of(context.begin, context.length, context.chunk_len)
    assert len(whole) == 1
    borders = [0, *(64 * cut for cut in cuts), 2101]
    pieces = [(0, first, last - first, context.begin + first) for first, last in zip(borders, borders[1:])]
    index = cases.convert(cuda, context, *random_selection(rng, context, 500, 1500))
    pairs = [
        (cases.run_dense(cuda, context), cases.run_dense(cuda, context, np.asarray(pieces, np.int32))),
        (cases.run_sparse(cuda, context, index), cases.run_sparse(cuda, context, index, cuts)),
    ]
    for at_once, cut in pairs:
        for expected, got in zip(at_once, cut):
            assert torch.isfinite(expected).all() and torch.equal(expected, got)


@pytest.mark.parametrize("rows", [0, 1, 100, 256])
def test_the_first_rows_of_a_page_are_copied(cuda: Any, rows: int) -> None:
    pages = [torch.randn(5, 256, 2, 128, device="cuda").to(torch.bfloat16) for _ in range(2)]
    expected = [pool.clone() for pool in pages]
    for pool in expected:
        pool[4, :rows] = pool[1, :rows]
    cache = dict(key=pages[0], value=pages[1], dtype="bfloat16", page_size=256, kv_heads=2, head_dim=128)
    cuda("copy_page", cache=cache, source=1, target=4, rows=rows)
    torch.cuda.synchronize()
    for pool, numbers in zip(pages, expected):
        assert torch.equal(pool, numbers)
