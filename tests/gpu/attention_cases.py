"""Inputs of the attention kernels on a GPU, and attention in float64 by the definition: one row, one key at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import torch
from cuda_library import index_shapes

INTRA, SUCC, INTER = 0, 1, 2
Tensor = torch.Tensor


@dataclass
class Context:
    """One sequence: rotated queries q [V, T, H, D] of its last T tokens, keys and values [N, G, D], and their pages.

    `pages` are [P, page_size, G, D], runs of one to four of them in shuffled order, NaN where no token lies; `table` is
    int32 [W] of one sequence.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    key_pages: Tensor
    value_pages: Tensor
    table: Tensor
    chunk_len: int
    scale: float

    @property
    def length(self) -> int:
        return self.keys.shape[0]

    @property
    def begin(self) -> int:
        """Position of the first query."""
        return self.length - self.q.shape[1]

    @property
    def cache(self) -> dict[str, Any]:
        """The fields of qwen1m_cache."""
        _, page_size, kv_heads, head_dim = self.key_pages.shape
        return {
            "key": self.key_pages,
            "value": self.value_pages,
            "dtype": str(self.key_pages.dtype),
            "page_size": page_size,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        }


def random_context(
    rng: np.random.Generator,
    length: int,
    rows: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int = 128,
    chunk_len: int = 512,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    sharpness: float = 1.0,
) -> Context:
    """Normal queries, keys and values; `sharpness` multiplies the logits."""
    generator = torch.Generator("cuda").manual_seed(int(rng.integers(2**62)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.float32, generator=generator).to(dtype)

    variants = min(3, (length - 1) // chunk_len + 1)
    return paged(
        rng,
        normal(variants, rows, heads, head_dim),
        normal(length, kv_heads, head_dim),
        normal(length, kv_heads, head_dim),
        chunk_len,
        page_size,
        sharpness * head_dim**-0.5,
    )


def planted_context(
    rng: np.random.Generator, length: int, rows: int, planted: Sequence[int], **shape: Any
) -> tuple[Context, list[int]]:
    """A context whose mass lies on the planted keys: each has nearly the same high logit for every row and head."""
    context = random_context(rng, length, rows, **shape)
    head_dim = context.q.shape[-1]
    direction = torch.sign(torch.randn(head_dim, device="cuda", generator=torch.Generator("cuda").manual_seed(1)))
    q = 0.1 * context.q.float() + direction
    keys = 0.1 * context.keys.float()
    keys[list(planted)] += direction * (20.0 / head_dim**0.5)  # a logit 20 above all others
    dtype = context.q.dtype
    return paged(
        rng, q.to(dtype), keys.to(dtype), context.values, context.chunk_len, context.key_pages.shape[1], context.scale
    ), list(planted)


def in_shuffled_runs(rng: np.random.Generator, pages: int) -> np.ndarray:
    """Numbers below `pages`, int32, of which one to four go on where the one before ends."""
    runs, first = [], 0
    while first < pages:
        runs.append(range(first, min(first + int(rng.integers(1, 5)), pages)))
        first = runs[-1].stop
    return np.array([page for number in rng.permutation(len(runs)) for page in runs[number]], np.int32)


def paged(
    rng: np.random.Generator, q: Tensor, keys: Tensor, values: Tensor, chunk_len: int, page_size: int, scale: float
) -> Context:
    length, kv_heads, head_dim = keys.shape
    needed, spare = -(-length // page_size), 3
    order = torch.from_numpy(in_shuffled_runs(rng, needed + spare)).cuda()
    pools = []
    for source in (keys, values):
        pool = torch.full((needed + spare, page_size, kv_heads, head_dim), float("nan"), dtype=q.dtype, device="cuda")
        padded = torch.full((needed * page_size, kv_heads, head_dim), float("nan"), dtype=q.dtype, device="cuda")
        padded[:length] = source
        pool[order[:needed].long()] = padded.view(needed, page_size, kv_heads, head_dim)
        pools.append(pool)
    return Context(q.contiguous(), keys, values, pools[0], pools[1], order[:needed].contiguous(), chunk_len, scale)


@dataclass
class Reference:
    """Attention of some rows in float64: out [R, H, D]; mass [R, H] = || p |v| ||, the scale of rounding; lse."""

    out: Tensor
    mass: Tensor
    lse: Tensor


def reference(context: Context, rows: Sequence[int], keep: Tensor | None = None) -> Reference:
    """Rows (numbers within q) by the definition: each key meets the rotation that its chunk's distance asks for.

    keep: bool [R, H, N], the keys that each row of each head may visit; default: all.
    """
    length, kv_heads, _ = context.keys.shape
    heads = context.q.shape[2]
    group = heads // kv_heads
    key_chunk = torch.arange(length, device="cuda") // context.chunk_len
    key_position = torch.arange(length, device="cuda")
    outs, masses, lses = [], [], []
    for number, row in enumerate(rows):
        position = context.begin + row
        distance = position // context.chunk_len - key_chunk
        per_head = []
        for kv_head in range(kv_heads):
            span = slice(kv_head * group, (kv_head + 1) * group)
            keys, values = context.keys[:, kv_head].double(), context.values[:, kv_head].double()
            scores = torch.full((group, length), float("-inf"), dtype=torch.float64, device="cuda")
            for stage in range(context.q.shape[0]):
                met = distance == stage if stage < INTER else distance >= INTER
                met &= key_position <= position
                if met.any():
                    scores[:, met] = context.scale * (context.q[stage, row, span].double() @ keys[met].T)
            if keep is not None:
                scores = scores.masked_fill(~keep[number, span], float("-inf"))
            lse = torch.logsumexp(scores, 1)
            weights = torch.exp(scores - lse[:, None])
            per_head.append((weights @ values, (weights @ values.abs()).norm(dim=1), lse))
        out, mass, lse = (torch.cat(parts) for parts in zip(*per_head))
        outs.append(out), masses.append(mass), lses.append(lse)
    return Reference(torch.stack(outs), torch.stack(masses), torch.stack(lses))


def worst(out: Tensor, expected: Reference, relative_to_out: bool = False) -> float:
    """Largest ||out - expected|| over rows and heads, by || p |v| || or by ||expected||; infinite where not finite."""
    if not torch.isfinite(out).all():
        return float("inf")
    scale = expected.out.norm(dim=-1) if relative_to_out else expected.mass
    return float(((out.double() - expected.out).norm(dim=-1) / scale).max())


def sampled_rows(rng: np.random.Generator, rows: int, count: int = 24) -> list[int]:
    """The first, the last, and some between."""
    return sorted({0, rows - 1, *rng.integers(0, rows, count).tolist()})


def pieces_of(begin: int, end: int, chunk_len: int) -> np.ndarray:
    """int32 [P, 4]: (sequence 0, row, rows, position) of the pieces of [begin, end)."""
    pieces, row = [], 0
    while begin < end:
        stop = min((begin // chunk_len + 1) * chunk_len, end)
        pieces.append((0, row, stop - begin, begin))
        row += stop - begin
        begin = stop
    return np.asarray(pieces, np.int32)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def run_dense(
    cuda: Any, context: Context, pieces: np.ndarray | Tensor | None = None, *, waits: bool = True
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [T, H] of the dense prefill kernel, on `pieces` in place of the context's own; those of a
    tensor are on the device.
    """
    _, tokens, heads, head_dim = context.q.shape
    out, lse = poisoned(tokens, heads, head_dim, dtype=context.q.dtype), poisoned(tokens, heads)
    if pieces is None:
        pieces = pieces_of(context.begin, context.length, context.chunk_len)
    cuda(
        "dca_prefill",
        q=context.q,
        out=out,
        lse=lse,
        cache=context.cache,
        block_tables=context.table,
        pieces=pieces,
        scale=torch.full((1,), context.scale, device="cuda"),
        activation=str(context.q.dtype),
        tokens=tokens,
        heads=heads,
        table_width=len(context.table),
        num_pieces=len(pieces),
        on_device=int(isinstance(pieces, Tensor)),
        chunk_len=context.chunk_len,
    )
    if waits:
        torch.cuda.synchronize()
    return out, lse


def run_decode(cuda: Any, contexts: Sequence[Context], *, width: int = 1) -> Tensor:
    """out [B, H, D] of the decode kernel: the last row of each context, all in one batch over one pool, their tables
    `width` pages long at least.
    """
    heads, head_dim = contexts[0].q.shape[2:]
    width = max(width, *(len(context.table) for context in contexts))
    tables = torch.zeros(len(contexts), width, dtype=torch.int32, device="cuda")
    offset = 0
    for table, context in zip(tables, contexts):
        table[: len(context.table)] = context.table + offset
        offset += len(context.key_pages)
    q = torch.full((3, len(contexts), heads, head_dim), float("nan"), dtype=contexts[0].q.dtype, device="cuda")
    for number, context in enumerate(contexts):
        q[: context.q.shape[0], number] = context.q[:, -1]
    key_pages = torch.cat([context.key_pages for context in contexts])
    value_pages = torch.cat([context.value_pages for context in contexts])
    out = poisoned(len(contexts), heads, head_dim, dtype=q.dtype)
    cuda(
        "dca_decode",
        q=q,
        out=out,
        cache={**contexts[0].cache, "key": key_pages, "value": value_pages},
        block_tables=tables,
        lengths=torch.tensor([context.length for context in contexts], dtype=torch.int32, device="cuda"),
        scale=torch.tensor([context.scale for context in contexts], device="cuda"),
        activation=str(q.dtype),
        batch=len(contexts),
        heads=heads,
        table_width=width,
        chunk_len=contexts[0].chunk_len,
    )
    torch.cuda.synchronize()
    return out


@dataclass
class Index:
    """int32 tables of the sparse prefill, as qwen1m_index_tables has them."""

    tables: dict[str, Tensor]

    @property
    def fields(self) -> dict[str, Any]:
        widths = {"block_width": self.tables["blocks"].shape[2], "column_width": self.tables["columns"].shape[1]}
        return {**self.tables, **widths}

    @property
    def all_columns(self) -> int:
        """Of all heads, with every stage filled up."""
        return sum(map(oracle.used_width, self.tables["column_counts"].cpu().numpy()))

    def visited(self, context: Context, rows: Sequence[int]) -> Tensor:
        """bool [R, H, N]: what the tables let each row see, causality left to the reference."""
        blocks, columns, counts = oracle.listed_columns(
            oracle.IndexTables(**{name: table.cpu().numpy() for name, table in self.tables.items()})
        )
        heads = len(blocks)
        first = context.begin // context.chunk_len * context.chunk_len
        ends = {INTER: max(0, first - context.chunk_len), SUCC: first, INTRA: context.length}
        keep = torch.zeros(len(rows), heads, context.length + 64, dtype=torch.bool, device="cuda")
        for number, row in enumerate(rows):
            for head in range(heads):
                at = head, row // 64
                block = column = 0
                for stage in (INTER, SUCC, INTRA):
                    for start in blocks[at][block : block + counts[at][stage]]:
                        keep[number, head, start : min(start + 64, ends[stage])] = True
                    block += counts[at][stage]
                    own = columns[at][column : column + counts[at][3 + stage]]
                    keep[number, head, torch.from_numpy(own.astype(np.int64)).cuda()] = True
                    column += counts[at][3 + stage]
        return keep[:, :, : context.length]


def convert(cuda: Any, context: Context, columns: Tensor, slashes: Tensor) -> Index:
    """The index of the context's one piece from selected columns and slashes int32 [H, k], ascending."""
    heads, rows = len(columns), context.q.shape[1]
    row_blocks = -(-rows // 64)
    shapes = index_shapes(heads, row_blocks, columns.shape[1], slashes.shape[1], context.length)
    index = Index({name: torch.full(shape, -1, dtype=torch.int32, device="cuda") for name, shape in shapes.items()})
    cuda(
        "sparse_index",
        columns=columns,
        slashes=slashes,
        chains=None,
        tables=index.fields,
        heads=heads,
        selected_columns=columns.shape[1],
        selected_slashes=slashes.shape[1],
        begin=context.begin,
        rows=rows,
        chunk_len=context.chunk_len,
        block=64,
        first_block=0,
        num_blocks=row_blocks,
    )
    torch.cuda.synchronize()
    return index


def sparse_fields(context: Context, index: Index, others: int = 0) -> dict[str, Any]:
    """Of the sparse prefill kernel, on the context's one piece between so many other rows of a step on either side."""
    rows, heads, head_dim = context.q.shape[1:]
    tokens = others + rows + others
    q = torch.nn.functional.pad(context.q, (0, 0, 0, 0, others, others), value=float("nan"))
    return {
        "q": q,
        "out": poisoned(tokens, heads, head_dim, dtype=q.dtype),
        "lse": poisoned(tokens, heads),
        "cache": context.cache,
        "block_table": context.table,
        "tables": index.fields,
        "order": None,
        "activation": str(q.dtype),
        "scale": context.scale,
        "tokens": tokens,
        "heads": heads,
        "all_columns": index.all_columns,
        "row": others,
        "begin": context.begin,
        "rows": rows,
        "chunk_len": context.chunk_len,
        "first_block": 0,
        "num_blocks": -(-rows // 64),
    }


def run_sparse(
    cuda: Any,
    context: Context,
    index: Index,
    cuts: Sequence[int] = (),
    *,
    others: int = 0,
    order: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [T, H] of the sparse prefill kernel on the context's one piece, cut at those row blocks,
    its heads begun in that order.
    """
    fields = sparse_fields(context, index, others)
    if order is not None:
        fields["order"] = torch.tensor(order, dtype=torch.int32, device="cuda")
    borders = [0, *cuts, fields["num_blocks"]]
    for first, last in zip(borders, borders[1:]):
        cuda("dca_sparse_prefill", **{**fields, "first_block": first, "num_blocks": last - first})
    torch.cuda.synchronize()
    return fields["out"], fields["lse"]


def run_probe(cuda: Any, context: Context) -> tuple[Tensor, Tensor]:
    """vertical and slash [H, N] of the probe kernel for the context's rows (64 at most)."""
    _, rows, heads, _ = context.q.shape
    vertical, slash = poisoned(heads, context.length), poisoned(heads, context.length)
    cuda(
        "dca_probe",
        q=context.q,
        cache=context.cache,
        block_table=context.table,
        vertical=vertical,
        slash=slash,
        activation=str(context.q.dtype),
        scale=context.scale,
        rows=rows,
        heads=heads,
        end=context.length,
        chunk_len=context.chunk_len,
    )
    torch.cuda.synchronize()
    return vertical, slash
