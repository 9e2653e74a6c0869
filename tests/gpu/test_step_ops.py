"""The CUDA kernels around attention against the float64 oracle: fresh inputs, poisoned outputs, one rounding."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

Array = npt.NDArray[Any]
DEVICE = "cuda"
TYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The relative error of one rounding."""
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}
"""Its absolute error among subnormal numbers, where they are not small beyond mention."""
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def stored(values: Array, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(values, order="C")).to(DEVICE, dtype)


def exact(tensor: torch.Tensor) -> Array:
    return tensor.double().cpu().numpy()


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Ones in every bit: NaN, or -1."""
    tensor = torch.empty(shape, dtype=dtype, device=DEVICE)
    tensor.view(torch.uint8).fill_(0xFF)
    return tensor


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8)))


def largest(values: Array) -> Array:
    """Of each row."""
    return np.abs(values).max(axis=-1, keepdims=True)


def mismatch(got: torch.Tensor, expected: Array, slack: Array | float) -> str | None:
    """Where `got` is not `expected` within `slack` rounded once to its type; None when it is so everywhere."""
    assert got.shape == expected.shape
    values = exact(got)
    bound = ROUNDING[got.dtype] * np.abs(expected) + SMALLEST[got.dtype] + slack
    bad = ~(np.abs(values - expected) <= bound)
    if not bad.any():
        return None
    excess = np.where(np.isfinite(values), np.abs(values - expected) / bound, np.inf)
    at = np.unravel_index(np.argmax(np.where(bad, excess, -1.0)), bad.shape)
    return (
        f"{bad.sum()} of {bad.size} values of {tuple(bad.shape)} are off, the worst at {tuple(map(int, at))}: got "
        f"{values[at]:.9g}, expected {expected[at]:.9g}, bound {np.broadcast_to(bound, bad.shape)[at]:.3g}; "
        f"first at {tuple(map(int, np.argwhere(bad)[0]))}, last at {tuple(map(int, np.argwhere(bad)[-1]))}"
    )


def check(got: torch.Tensor, expected: Array, slack: Array | float) -> None:
    """Fails where `got` differs; and where the bound is so wide that zeros would pass."""
    problem = mismatch(got, expected, slack)
    assert problem is None, problem
    assert mismatch(torch.zeros_like(got), expected, slack) is not None, "zeros pass"


# Rows and values


ROWS = [(1, 8), (3, 896), (17, 3584), (2, 5120), (1000, 1000), (70000, 8)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens, width", ROWS)
def test_embedding(cuda: Any, rng: np.random.Generator, tokens: int, width: int, dtype: torch.dtype) -> None:
    """Rows as stored, in float32 and in the table's type; the first and the last id, repeated and out of order.

    A table that begins at another id gives zeros for what it does not hold.
    """
    vocab, first = 1531, 97
    table = stored(rng.standard_normal((vocab, width)), dtype)
    ids = torch.from_numpy(rng.integers(0, vocab, tokens))
    ids[0], ids[-1] = vocab - 1, 0 if tokens > 1 else vocab - 1
    for out_dtype, begin, rows in itertools.product({torch.float32, dtype}, (0, first), (vocab, 1000)):
        out = poisoned(tokens, width, dtype=out_dtype)
        cuda(
            "embedding",
            ids=ids.to(DEVICE),
            table=table,
            out=out,
            tokens=tokens,
            width=width,
            rows=rows,
            first=begin,
            dtype=dtype,
            out_dtype=out_dtype,
        )
        at = ids - begin
        held = (at >= 0) & (at < rows)
        expected = torch.where(held[:, None], table.cpu()[at.clamp(0, rows - 1)], torch.zeros((), dtype=dtype))
        assert same_bits(out, expected.to(out_dtype))


@pytest.mark.parametrize("dtype, out_dtype", list(itertools.product(TYPES, TYPES)))
@pytest.mark.parametrize("count", [1, 7, 1000, 4099, 100003])
def test_cast(cuda: Any, rng: np.random.Generator, count: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """Rounded to nearest, ties to even; subnormal, infinite and too large values; nothing beyond the last."""
    values = (10.0 ** rng.uniform(-9, 6, count) * rng.choice([-1.0, 1.0], count)).astype(np.float32)
    ties = np.float32([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -0.0, 65520.0, np.inf])
    values[: len(ties)] = ties[:count]
    rng.shuffle(values)
    source = stored(values, dtype)
    out = poisoned(count + 16, dtype=out_dtype)
    cuda("cast", values=source, out=out, count=count, dtype=dtype, out_dtype=out_dtype)
    assert same_bits(out[:count], source.cpu().to(out_dtype))
    assert same_bits(out[count:], poisoned(16, dtype=out_dtype))


@each_half
@pytest.mark.parametrize("tokens, width", [*ROWS[:-1], (5, 8192), (70000, 64)])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("added", [False, True])
def test_rms_norm(
    cuda: Any, rng: np.random.Generator, tokens: int, width: int, magnitude: float, added: bool, dtype: torch.dtype
) -> None:
    """The norm of the float32 residual, which holds the sum afterwards where a delta is added."""
    before = stored(magnitude * rng.standard_normal((tokens, width)), torch.float32)
    delta = stored(magnitude * rng.standard_normal((tokens, width)), dtype) if added else None
    weight = stored(rng.standard_normal(width), dtype)
    residual, out = before.clone(), poisoned(tokens, width, dtype=dtype)
    cuda(
        "rms_norm",
        delta=delta,
        residual=residual,
        weight=weight,
        out=out,
        tokens=tokens,
        width=width,
        eps=1e-6,
        activation=dtype,
        dtype=dtype,
    )
    assert same_bits(residual, before if delta is None else before + delta.float())
    expected = oracle.rms_norm(exact(residual), exact(weight), 1e-6)
    check(out, expected, 1e-6 * largest(expected))


@each_half
@pytest.mark.parametrize("tokens, width", [(1, 8), (3, 104), (17, 18944), (2, 13824), (1000, 1000), (70000, 8)])
def test_silu_mul(cuda: Any, rng: np.random.Generator, tokens: int, width: int, dtype: torch.dtype) -> None:
    """SiLU of the gate half times the up half, out to gates where exp overflows."""
    magnitudes = 10.0 ** rng.uniform(-2, 1.5, (tokens, 2 * width))
    gate_up = stored(magnitudes * rng.standard_normal((tokens, 2 * width)), dtype)
    gate_up[0, :2] = torch.tensor([-1000.0, 100.0])
    out = poisoned(tokens, width, dtype=dtype)
    cuda("silu_mul", gate_up=gate_up, out=out, tokens=tokens, width=width, activation=dtype)
    expected = oracle.silu_mul(exact(gate_up))
    check(out, expected, 2e-6 * largest(expected))


@pytest.mark.parametrize(
    "ranks, rows, share, columns",
    [(1, 3, 7, 5), (2, 1, 499, 997), (2, 33, 75_833, 151_665), (4, 17, 37_912, 151_646), (8, 70_000, 3, 23)],
)
def test_join_columns(cuda: Any, rng: np.random.Generator, ranks: int, rows: int, share: int, columns: int) -> None:
    """Shares of any width, and nothing is written behind the last column."""
    parts = torch.from_numpy(rng.standard_normal((ranks, rows, share)).astype(np.float32)).to(DEVICE)
    out = poisoned(rows * columns + 16, dtype=torch.float32)
    cuda("join_columns", parts=parts, out=out, rows=rows, share=share, columns=columns)
    joined = torch.cat(list(parts), dim=1)[:, :columns]
    assert same_bits(out[:-16].reshape(rows, columns), joined)
    assert same_bits(out[-16:], poisoned(16, dtype=torch.float32))


# Rotations


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("variants, tokens", [(1, 1), (3, 17), (2, 1000)])
def test_rotary_table(cuda: Any, rng: np.random.Generator, variants: int, tokens: int, head_dim: int) -> None:
    """Cosines and sines of float32 angles as far out as the positions of critical queries."""
    positions = rng.integers(0, 516096, (variants, tokens)).astype(np.int32)
    positions[-1, -1] = 516095
    inv_freq = oracle.inverse_frequencies(head_dim, 1e7)
    table = poisoned(variants, tokens, head_dim, dtype=torch.float32)
    cuda(
        "rotary_table",
        positions=stored(positions, torch.int32),
        inv_freq=stored(inv_freq, torch.float32),
        table=table,
        rows=variants * tokens,
        head_dim=head_dim,
    )
    check(table, oracle.rotary_table(positions, inv_freq), 1e-6)


HEADS = [(1, 1, 64), (10, 2, 64), (7, 1, 128), (28, 4, 128), (40, 8, 128)]


def rotation_inputs(
    rng: np.random.Generator, tokens: int, rows: int, variants: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv of `tokens` rows, its bias, and a rotary table of `rows`."""
    heads, kv_heads, head_dim = shape
    width = (heads + 2 * kv_heads) * head_dim
    positions = rng.integers(0, 262145, (variants, rows))
    table = oracle.rotary_table(positions, oracle.inverse_frequencies(head_dim, 1e7))
    qkv, bias = rng.standard_normal((tokens, width)), rng.standard_normal(width)
    return stored(qkv, dtype), stored(bias, dtype), stored(table, torch.float32)


@each_half
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("tokens, variants", [(1, 3), (3, 1), (17, 2), (1000, 3)])
def test_rotate_and_cache(
    cuda: Any,
    rng: np.random.Generator,
    tokens: int,
    variants: int,
    queries: bool,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """Biased queries in every rotation, or none of them; keys and values in shuffled slots, some rows in none; no other
    is touched.
    """
    heads, kv_heads, head_dim = shape
    page_size = 64
    qkv, bias, table = rotation_inputs(rng, tokens, tokens, variants, shape, dtype)
    pages = tokens // page_size + 2
    slots = rng.permutation(pages * page_size)[:tokens]
    slots[1:][rng.random(tokens - 1) < 0.2] = -1
    q = poisoned(variants, tokens, heads, head_dim, dtype=dtype)
    key, value = (poisoned(pages, page_size, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    cuda(
        "rotate_and_cache",
        qkv=qkv,
        bias=bias,
        table=table,
        slots=stored(slots, torch.int64),
        q=q if queries else None,
        cache={
            "key": key,
            "value": value,
            "dtype": dtype,
            "page_size": page_size,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        },
        activation=dtype,
        bias_dtype=dtype,
        variants=variants,
        tokens=tokens,
        heads=heads,
    )
    keys, values = np.full(key.shape, np.nan), np.full(value.shape, np.nan)
    expected = oracle.rotate_and_cache(exact(qkv), exact(bias), exact(table), slots, keys, values)
    if queries:
        check(q, expected, 1e-6 * largest(expected))
    for got, wanted in ((key, keys), (value, values)):
        np.testing.assert_array_equal(np.isnan(exact(got)), np.isnan(wanted))
        page, offset = np.divmod(slots[slots >= 0], page_size)
        written = wanted[page, offset]
        check(got[page, offset], written, 1e-6 * largest(written))


@each_half
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("row, rows, variants, table_row", [(0, 1, 1, 0), (5, 64, 3, 0), (29, 11, 2, 0), (5, 64, 3, 7)])
def test_rotate_queries(
    cuda: Any,
    rng: np.random.Generator,
    row: int,
    rows: int,
    variants: int,
    table_row: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """Biased queries of some rows alone, by as many rows of a table."""
    heads, kv_heads, head_dim = shape
    table_rows = table_row + rows + (2 if table_row else 0)
    qkv, bias, table = rotation_inputs(rng, row + rows + 3, table_rows, variants, shape, dtype)
    q = poisoned(variants, rows, heads, head_dim, dtype=dtype)
    cuda(
        "rotate_queries",
        qkv=qkv,
        bias=bias,
        table=table,
        q=q,
        activation=dtype,
        bias_dtype=dtype,
        variants=variants,
        row=row,
        rows=rows,
        table_row=table_row,
        table_rows=table_rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    own = exact(table)[:, table_row : table_row + rows]
    expected = oracle.rotate_queries(exact(qkv), exact(bias), own, row, heads)
    check(q, expected, 1e-6 * largest(expected))


class DecodeInputs:
    """The inputs and poisoned outputs of decode_inputs for some lengths, in shuffled pages."""

    def __init__(self, rng: np.random.Generator, lengths: Array, head_dim: int, page_size: int) -> None:
        batch, width = len(lengths), int(lengths.max()) // page_size + 2
        self.inv_freq = oracle.inverse_frequencies(head_dim, 1e7)
        self.block_tables = rng.permutation(batch * width).reshape(batch, width).astype(np.int32)
        self.page_size = page_size
        self.lengths = stored(lengths, torch.int32)
        self.slots = poisoned(batch, dtype=torch.int64)
        self.table = poisoned(3, batch, head_dim, dtype=torch.float32)
        self.scale = poisoned(batch, dtype=torch.float32)
        self._inputs = {
            "block_tables": stored(self.block_tables, torch.int32),
            "inv_freq": stored(self.inv_freq, torch.float32),
            "batch": batch,
            "table_width": width,
            "page_size": page_size,
            "head_dim": head_dim,
        }

    def run(self, cuda: Any, chunk_len: int, chunk_size: int, original: int) -> None:
        cuda(
            "decode_inputs",
            lengths=self.lengths,
            slots=self.slots,
            table=self.table,
            scale=self.scale,
            chunk_len=chunk_len,
            chunk_size=chunk_size,
            original_max_position_embeddings=original,
            **self._inputs,
        )

    def check(self, lengths: Array, chunk_len: int, chunk_size: int, original: int) -> None:
        """Compares with the oracle, which grows `lengths` as well."""
        slots, table, scale = oracle.decode_inputs(
            lengths, self.block_tables, self.inv_freq, self.page_size, chunk_len, chunk_size, original
        )
        np.testing.assert_array_equal(self.lengths.cpu().numpy(), lengths)
        np.testing.assert_array_equal(self.slots.cpu().numpy(), slots)
        check(self.table, table, 1e-6)
        check(self.scale, scale, 1e-7)


CHUNKS = [(253952, 262144, 262144, 1_010_000), (128, 192, 0, 1000), (192, 224, 256, 3000), (64, 1000, 50, 500)]


@pytest.mark.parametrize("chunk_len, chunk_size, original, longest", CHUNKS)
@pytest.mark.parametrize("batch, head_dim, page_size", [(1, 128, 64), (5, 64, 256), (17, 128, 128)])
def test_decode_inputs(
    cuda: Any,
    rng: np.random.Generator,
    batch: int,
    head_dim: int,
    page_size: int,
    chunk_len: int,
    chunk_size: int,
    original: int,
    longest: int,
) -> None:
    """Slots, rotations and temperatures of three tokens in a row, across borders of pages and chunks."""
    borders = [0, page_size - 1, chunk_len - 1, 2 * chunk_len - 2, max(chunk_size - chunk_len - 1, 0), original]
    lengths = rng.integers(0, longest, batch).astype(np.int32)
    lengths[:6] = rng.permutation(borders)[:batch]
    inputs = DecodeInputs(rng, lengths, head_dim, page_size)
    for _ in range(3):
        inputs.run(cuda, chunk_len, chunk_size, original)
        inputs.check(lengths, chunk_len, chunk_size, original)


def test_decode_inputs_advance_in_a_graph(cuda: Any, rng: np.random.Generator) -> None:
    """Every replay of a CUDA graph is the next token."""
    lengths = rng.integers(0, 1000, 4).astype(np.int32)
    inputs = DecodeInputs(rng, lengths, 128, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.run(cuda, 192, 224, 256)
    for _ in range(3):
        graph.replay()
        inputs.check(lengths, 192, 224, 256)


# Linear layers


def linear_fields(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor | None) -> dict[str, Any]:
    return {
        "x": x,
        "weight": weight,
        "bias": None,
        "y": y,
        "tokens": x.shape[0],
        "in_features": x.shape[1],
        "out_features": weight.shape[0],
        "activation": x.dtype,
        "out_dtype": x.dtype,
        "dtype": x.dtype,
    }


def run_linear(
    cuda: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    spare_rows: int = 0,
) -> torch.Tensor:
    """y, with poisoned rows after its own."""
    y = poisoned(x.shape[0] + spare_rows, weight.shape[0], dtype=out_dtype)
    cuda("linear", **{**linear_fields(x, weight, y), "bias": bias, "out_dtype": out_dtype})
    return y


def linear_slack(depth: int) -> float:
    """2e-5 of what a sum of `depth` products of standard normal numbers is like: tensor cores truncate as they add."""
    return 2e-5 * depth**0.5


LINEAR_SHAPES = [(8, 1), (64, 16), (72, 17), (520, 4300), (1000, 100), (3584, 4608), (5120, 1544), (18944, 264)]


@each_half
@pytest.mark.parametrize("depth, features", LINEAR_SHAPES)
@pytest.mark.parametrize("tokens, biased", [(1, False), (1, True), (3, True), (8, True), (9, False), (16, True)])
def test_linear(
    cuda: Any, rng: np.random.Generator, tokens: int, depth: int, features: int, biased: bool, dtype: torch.dtype
) -> None:
    """One row and few, depths and features that fill no step or tile, in the activation's type and in float32."""
    x = stored(rng.standard_normal((tokens, depth)), dtype)
    weight = stored(rng.standard_normal((features, depth)), dtype)
    bias = stored(depth**0.5 * rng.standard_normal(features), dtype) if biased else None
    expected = oracle.linear(exact(x), exact(weight), None if bias is None else exact(bias))
    for out_dtype in (dtype, torch.float32):
        check(run_linear(cuda, x, weight, bias, out_dtype), expected, linear_slack(depth))


@each_half
@pytest.mark.parametrize("depth, width", [(8, 1), (72, 17), (520, 2152), (3584, 9472), (5120, 776), (896, 4864)])
@pytest.mark.parametrize("tokens", [1, 3, 9, 16, 37])
def test_gated_linear(
    cuda: Any, rng: np.random.Generator, tokens: int, depth: int, width: int, dtype: torch.dtype
) -> None:
    """What SiLU makes of the product in memory, bit for bit where it takes that; nothing behind its rows is written."""
    x = stored(rng.standard_normal((tokens, depth)), dtype)
    weight = stored(depth**-0.5 * rng.standard_normal((2 * width, depth)), dtype)
    y = poisoned(tokens + 16, width, dtype=dtype)
    cuda("gated_linear", **linear_fields(x, weight, y))
    assert same_bits(y[tokens:], poisoned(16, width, dtype=dtype))
    product = run_linear(cuda, x, weight, None, dtype)
    expected = oracle.silu_mul(exact(product))
    check(y[:tokens], expected, 2e-6 * largest(expected))
    if width % 8 == 0:
        apart = poisoned(tokens, width, dtype=dtype)
        cuda("silu_mul", gate_up=product, out=apart, tokens=tokens, width=width, activation=dtype)
        assert same_bits(y[:tokens], apart)


def many_rows(rng: np.random.Generator, tokens: int, depth: int, dtype: torch.dtype) -> torch.Tensor:
    """Of all sizes, so that none stands for another, before others that are poisoned."""
    x = poisoned(tokens + 64, depth, dtype=dtype)
    x[:tokens] = stored(rng.standard_normal((tokens, depth)) * 2.0 ** rng.integers(-3, 3, (tokens, 1)), dtype)
    return x[:tokens]


def product_of_some(
    rng: np.random.Generator, x: torch.Tensor, weight: torch.Tensor
) -> tuple[list[int], Array, Array | float]:
    """Which rows, their exact product, and by how much its sums may be off."""
    some = sorted({0, len(x) - 1, *rng.integers(0, len(x), 200).tolist()})
    rows, depth = exact(x[some]), weight.shape[1]
    return some, oracle.linear(rows, exact(weight)), linear_slack(depth) * depth**-0.5 * largest(rows) / 3


each_many = pytest.mark.parametrize("tokens", [4096, 4097, 4995])


@pytest.mark.usefixtures("hopper")
@each_half
@each_many
@pytest.mark.parametrize("depth, features", [(8, 8), (64, 4608), (72, 264), (3584, 4608), (4736, 3584), (5120, 128)])
def test_linear_of_many_rows(
    cuda: Any, rng: np.random.Generator, tokens: int, depth: int, features: int, dtype: torch.dtype
) -> None:
    """Depths, features and rows that fill no step or tile; nothing behind the rows is read or written."""
    x = many_rows(rng, tokens, depth, dtype)
    weight = stored(depth**-0.5 * rng.standard_normal((features, depth)), dtype)
    y = run_linear(cuda, x, weight, None, dtype, spare_rows=64)
    some, expected, off = product_of_some(rng, x, weight)
    check(y[some], expected, off)
    assert same_bits(y[tokens:], poisoned(64, features, dtype=dtype))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("op", ["linear", "gated_linear"])
def test_many_rows_take_one_launch(cuda: Any, op: str) -> None:
    """Where few of them at a time would take hundreds."""
    x, weight = (torch.ones(rows, 64, dtype=torch.bfloat16, device=DEVICE) for rows in (4096, 256))
    y = torch.empty(4096, 128 if op == "gated_linear" else 256, dtype=torch.bfloat16, device=DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        cuda(op, **linear_fields(x, weight, y))
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if "kernel" in event.name and "qwen1m" in event.name]
    assert len(launched) == 1 and "product_kernel" in launched[0]


@pytest.mark.usefixtures("hopper")
def test_which_rows_are_multiplied_without_a_library(cuda: Any) -> None:
    """Many, of features in whole sixteens, whose tiles of 192 rows by 256 nearly fill all rounds of the processors."""
    if torch.cuda.get_device_properties(0).multi_processor_count != 132:
        pytest.skip("rounds are of 132 processors here")
    assert all(cuda.multiplies_many_rows(12_672, features) for features in (3584, 4608, 5120, 37_888))
    assert cuda.multiplies_many_rows(17_088, 37_888) and not cuda.multiplies_many_rows(7424, 3584)
    assert not cuda.multiplies_many_rows(4095, 37_888) and not cuda.multiplies_many_rows(12_672, 3592)


@pytest.mark.usefixtures("hopper")
@each_half
@each_many
@pytest.mark.parametrize("depth, width", [(8, 8), (64, 2304), (72, 264), (1800, 1000), (3584, 2368), (5120, 128)])
def test_gated_linear_of_many_rows(
    cuda: Any, rng: np.random.Generator, tokens: int, depth: int, width: int, dtype: torch.dtype
) -> None:
    """What SiLU makes of the product, rounded as in memory; likewise."""
    x = many_rows(rng, tokens, depth, dtype)
    weight = stored(depth**-0.5 * rng.standard_normal((2 * width, depth)), dtype)
    y = poisoned(tokens + 64, width, dtype=dtype)
    cuda("gated_linear", **linear_fields(x, weight, y))
    assert same_bits(y[tokens:], poisoned(64, width, dtype=dtype))
    some, product, off_sums = product_of_some(rng, x, weight)
    off = ROUNDING[dtype] * np.abs(product) + off_sums
    (gate, up), (gate_off, up_off) = np.split(np.abs(product), 2, -1), np.split(off, 2, -1)
    # SiLU grows by 1.1 of what its argument does at most
    check(y[some], oracle.silu_mul(product), 1.1 * gate_off * (up + up_off) + gate * up_off)


@each_half
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("tokens, variants", [(1, 3), (3, 1), (8, 3), (9, 2), (16, 3)])
def test_rotating_linear(
    cuda: Any,
    rng: np.random.Generator,
    tokens: int,
    variants: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """Bit for bit what the rotations make of the product in memory, some rows in no slot; no other slot is touched."""
    heads, kv_heads, head_dim = shape
    depth, page_size = 328, 64
    qkv, bias, table = rotation_inputs(rng, tokens, tokens, variants, shape, dtype)
    x = stored(rng.standard_normal((tokens, depth)), dtype)
    weight = stored(depth**-0.5 * rng.standard_normal((qkv.shape[1], depth)), dtype)
    slots = rng.permutation(2 * page_size)[:tokens]
    slots[1::4] = -1
    results = []
    for product in (run_linear(cuda, x, weight, None, dtype), None):
        q = poisoned(variants, tokens, heads, head_dim, dtype=dtype)
        key, value = (poisoned(2, page_size, kv_heads, head_dim, dtype=dtype) for _ in range(2))
        cache = {"key": key, "value": value, "dtype": dtype}
        rotation = {
            "qkv": product,
            "bias": bias,
            "table": table,
            "slots": stored(slots, torch.int64),
            "q": q,
            "cache": {**cache, "page_size": page_size, "kv_heads": kv_heads, "head_dim": head_dim},
            "activation": dtype,
            "bias_dtype": dtype,
            "variants": variants,
            "tokens": tokens,
            "heads": heads,
        }
        if product is None:
            cuda("rotating_linear", linear=linear_fields(x, weight, None), rotation=rotation)
        else:
            cuda("rotate_and_cache", **rotation)
        results.append((q, key, value))
    for apart, at_once in zip(*results):
        assert same_bits(at_once, apart)
    assert exact(results[1][0]).std() > 0.5, "queries of projections and biases that vary"


@pytest.mark.parametrize("tokens", range(1, 17))
def test_linear_of_any_few_rows(cuda: Any, rng: np.random.Generator, tokens: int) -> None:
    """Tiles have room for eight rows or sixteen: what lies behind those of x and y has no part in it."""
    depth, features = 896, 1200
    x = stored(np.concatenate([rng.standard_normal((tokens, depth)), np.full((16, depth), np.nan)]), torch.bfloat16)
    weight = stored(rng.standard_normal((features, depth)), torch.bfloat16)
    y = run_linear(cuda, x[:tokens], weight, None, torch.float32, spare_rows=16)
    check(y[:tokens], oracle.linear(exact(x[:tokens]), exact(weight)), linear_slack(depth))
    assert same_bits(y[tokens:], poisoned(16, features, dtype=torch.float32))


@pytest.mark.parametrize("tokens", [1, 16])
def test_linear_over_the_vocabulary(cuda: Any, tokens: int) -> None:
    """The largest weight, 1.6 GB, beside PyTorch in float64; twice the same bits."""
    depth, features, share = 5120, 152064, 9504
    x = torch.randn(tokens, depth, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.randn(features, depth, dtype=torch.bfloat16, device=DEVICE)
    y = run_linear(cuda, x, weight, None, torch.float32)
    assert same_bits(y, run_linear(cuda, x, weight, None, torch.float32))
    expected = torch.cat([x.double() @ rows.double().T for rows in weight.split(share)], dim=1)
    check(y, exact(expected), linear_slack(depth))


@pytest.mark.parametrize("tokens", [17, 31, 32, 100])
def test_linear_of_many_rows_is_not_rounded_on_the_way(cuda: Any, rng: np.random.Generator, tokens: int) -> None:
    """Logits of many positions in float32: to the last bit those of the same rows taken sixteen at a time."""
    x = stored(rng.standard_normal((tokens, 896)), torch.bfloat16)
    weight = stored(rng.standard_normal((1000, 896)), torch.bfloat16)
    y = run_linear(cuda, x, weight, None, torch.float32, spare_rows=16)
    check(y[:tokens], oracle.linear(exact(x), exact(weight)), linear_slack(896))
    assert same_bits(y[tokens:], poisoned(16, 1000, dtype=torch.float32))
    assert same_bits(y[16:tokens][:16], run_linear(cuda, x[16:][:16], weight, None, torch.float32))


@pytest.mark.parametrize("depth", [12, 60])
def test_linear_refuses_what_it_is_not_for(cuda: Any, depth: int) -> None:
    """Depths that are no whole number of 16-byte packs."""
    x = torch.zeros(1, depth, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(16, depth, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(RuntimeError, match="linear: CUDA error 1"):
        run_linear(cuda, x, weight, None, torch.bfloat16)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", TYPES)
def test_the_comparison_notices_faults(rng: np.random.Generator, dtype: torch.dtype) -> None:
    """A pack of K left out, two rows swapped and one value never written do not pass as rounding."""
    depth = 5120
    x, weight = rng.standard_normal((2, depth)), rng.standard_normal((48, depth))
    expected = oracle.linear(x, weight)
    assert mismatch(stored(expected, dtype), expected, linear_slack(depth)) is None
    unwritten = stored(expected, dtype)
    unwritten[1, 47] = float("nan")
    for fault in (
        stored(oracle.linear(x[:, 8:], weight[:, 8:]), dtype),
        stored(expected[::-1], dtype),
        unwritten,
    ):
        assert mismatch(fault, expected, linear_slack(depth)) is not None
