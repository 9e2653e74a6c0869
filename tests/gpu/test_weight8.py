"""The CUDA kernels of 8-bit weights and of rows in FP8 against float64 on the same numbers and scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from test_step_ops import DEVICE, ROUNDING, check, each_half, exact, poisoned, same_bits, stored  # noqa: E402

Array = npt.NDArray[Any]
KINDS = {"int8": "int8", "fp8": "e4m3"}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Weight:
    """Random numbers, every byte among them, and scales of blocks, on the GPU and as float64."""

    def __init__(
        self, rng: np.random.Generator, kind: str, features: int, depth: int, rows: int, columns: int = 128
    ) -> None:
        finite = np.flatnonzero(~np.isnan(oracle.numbers_of(kind)))
        numbers = rng.choice(finite, (features, depth)).astype(np.uint8)
        scales = rng.uniform(0.5, 1.5, (features // rows, depth // columns)).astype(np.float32) / (
            448 if kind == "fp8" else 127
        )
        self.exact = oracle.widen_weight(kind, numbers, scales)
        self.numbers, self.scales = torch.from_numpy(numbers).to(DEVICE), torch.from_numpy(scales).to(DEVICE)
        self.fields = {
            "numbers": self.numbers,
            "scales": self.scales,
            "kind": KINDS[kind],
            "rows": rows,
            "columns": columns,
        }


class Rows:
    """Memory for FP8 rows, poisoned."""

    def __init__(self, tokens: int, width: int) -> None:
        rows = -(-tokens // 4) * 4
        self.tokens, self.rows = tokens, rows
        self.numbers = poisoned(rows, width, dtype=torch.uint8)
        self.scales = poisoned(width // 128, rows, dtype=torch.float32)
        self.fields = {"numbers": self.numbers, "scales": self.scales, "rows": rows}

    @property
    def exact(self) -> Array:
        return oracle.widen_rows(self.numbers.cpu().numpy(), self.scales.cpu().numpy())


def run_linear8(cuda: Any, x: torch.Tensor, weight: Weight, spare_rows: int = 0) -> torch.Tensor:
    tokens, (features, depth) = len(x), weight.numbers.shape
    y = poisoned(tokens + spare_rows, features, dtype=x.dtype)
    cuda(
        "linear8",
        x=x,
        weight=weight.fields,
        y=y,
        tokens=tokens,
        in_features=depth,
        out_features=features,
        activation=x.dtype,
        out_dtype=x.dtype,
    )
    return y


SHAPES = [(64, 1, 1, 64), (64, 16, 16, 64), (128, 17, 1, 128), (192, 100, 4, 64), (3584, 4608, 128, 128),
          (5120, 1544, 1, 128), (8320, 1496, 1, 128), (18944, 264, 8, 128), (1728, 512, 64, 64)]  # fmt: skip


@each_kind
@each_half
@pytest.mark.parametrize("depth, features, rows, columns", SHAPES)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 33, 64])
def test_few_rows(
    cuda: Any,
    rng: np.random.Generator,
    tokens: int,
    depth: int,
    features: int,
    rows: int,
    columns: int,
    kind: str,
    dtype: torch.dtype,
) -> None:
    """Depths and features that fill no step or tile, blocks of every form, rows in several turns; nothing behind y."""
    x = stored(rng.standard_normal((tokens, depth)), dtype)
    weight = Weight(rng, kind, features, depth, rows, columns)
    y = run_linear8(cuda, x, weight, spare_rows=16)
    check(y[:tokens], oracle.linear(exact(x), weight.exact), 2e-5 * depth**0.5)
    assert same_bits(y[tokens:], poisoned(16, features, dtype=dtype))


@each_kind
@pytest.mark.parametrize("tokens", range(1, 17))
def test_rows_behind_those_of_x_have_no_part_in_it(cuda: Any, rng: np.random.Generator, tokens: int, kind: str) -> None:
    x = stored(np.concatenate([rng.standard_normal((tokens, 896)), np.full((16, 896), np.nan)]), torch.bfloat16)
    weight = Weight(rng, kind, 1200, 896, 1)
    check(run_linear8(cuda, x[:tokens], weight), oracle.linear(exact(x[:tokens]), weight.exact), 2e-5 * 30)


@each_kind
@pytest.mark.parametrize("depth, features, tokens", [(18944, 3584, 2), (13824, 5120, 3), (13824, 5120, 4)])
def test_long_rows_in_low_tiles(
    cuda: Any, rng: np.random.Generator, depth: int, features: int, tokens: int, kind: str
) -> None:
    """The MLP's second product: as many rows as there is room for, of tiles that are no 16 features high."""
    x = stored(rng.standard_normal((tokens, depth)), torch.bfloat16)
    weight = Weight(rng, kind, features, depth, 128)
    y = run_linear8(cuda, x, weight, spare_rows=16)
    check(y[:tokens], oracle.linear(exact(x), weight.exact), 2e-5 * depth**0.5)
    assert same_bits(y[tokens:], poisoned(16, features, dtype=torch.bfloat16))


@each_kind
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e5, 1e30])
def test_rows_of_any_size(cuda: Any, rng: np.random.Generator, size: float, tokens: int, kind: str) -> None:
    """Each of another; values a thousand times smaller among the large ones, and a block of zeros."""
    sizes = size * 4.0 ** -np.arange(tokens)[:, None]
    values = rng.standard_normal((tokens, 896)) * 10.0 ** rng.uniform(-3, 0, (tokens, 896)) * sizes
    values[:, 128:256] = 0
    x, weight = stored(values, torch.bfloat16), Weight(rng, kind, 100, 896, 1)
    check(run_linear8(cuda, x, weight), oracle.linear(exact(x), weight.exact), 2e-5 * 30 * sizes)


@pytest.mark.parametrize("depth, columns", [(96, 32), (64, 32), (48, 16)])
def test_blocks_that_are_too_narrow_are_refused(cuda: Any, rng: np.random.Generator, depth: int, columns: int) -> None:
    x = torch.zeros(1, depth, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(RuntimeError, match="linear8: CUDA error 1"):
        run_linear8(cuda, x, Weight(rng, "int8", 16, depth, 1, columns))


@each_kind
@each_half
@pytest.mark.parametrize("depth, features, rows, columns", SHAPES)
def test_widened_weights_are_rounded_once(
    cuda: Any,
    rng: np.random.Generator,
    depth: int,
    features: int,
    rows: int,
    columns: int,
    kind: str,
    dtype: torch.dtype,
) -> None:
    weight = Weight(rng, kind, features, depth, rows, columns)
    out = poisoned(features, depth, dtype=dtype)
    cuda(
        "widen_weight",
        weight=weight.fields,
        out=out,
        in_features=depth,
        out_features=features,
        out_dtype=dtype,
    )
    expected = stored(weight.exact.astype(np.float32), dtype)
    assert same_bits(out, expected)


def assert_rounded(found: Rows, values: Array, dtype: torch.dtype) -> None:
    """Within a step of FP8 of values that are known to a rounding of float32 functions; zeros behind them."""
    tokens = found.tokens
    got = found.exact
    assert (got[tokens:] == 0).all() and (found.scales[:, tokens:] == 1).all()
    largest = np.repeat(np.abs(values).reshape(tokens, -1, 128).max(-1), 128, 1)
    bound = np.abs(values) * (1 / 16 + ROUNDING[dtype]) + largest / 400_000
    bad = ~(np.abs(got[:tokens] - values) <= bound)
    assert not bad.any(), f"{bad.sum()} of {bad.size}, first at {np.argwhere(bad)[0]}"
    scales = found.scales.cpu().numpy()[:, :tokens].T
    wanted = np.where(largest[:, ::128] > 0, largest[:, ::128] / 448, 1.0)
    np.testing.assert_allclose(scales, wanted, rtol=1e-4)


@pytest.mark.usefixtures("hopper")
@each_half
@pytest.mark.parametrize("tokens, width", [(1, 128), (7, 3584), (66, 5120), (300, 896), (70001, 128)])
def test_rows_are_rounded_as_they_are_made(
    cuda: Any, rng: np.random.Generator, tokens: int, width: int, dtype: torch.dtype
) -> None:
    """By a norm, with something added or not, and by themselves; large rows, and one of zeros."""
    values = rng.standard_normal((tokens, width)) * 10.0 ** rng.uniform(-2, 2, (tokens, 1))
    values[-1] = 0.0
    plain = stored(values, dtype)
    rows = Rows(tokens, width)
    cuda("round_rows", values=plain, out=rows.fields, tokens=tokens, width=width, activation=dtype)
    numbers, _ = oracle.round_rows(exact(plain))
    assert (rows.numbers.cpu().numpy() == numbers).mean() > 0.999
    assert_rounded(rows, exact(plain), dtype)

    gain, delta = stored(rng.standard_normal(width), dtype), stored(rng.standard_normal((tokens, width)), dtype)
    for added in (None, delta):
        residual, rows = stored(values, torch.float32), Rows(tokens, width)
        total = exact(residual) + (0.0 if added is None else exact(added))
        norm = {
            "delta": added,
            "residual": residual,
            "weight": gain,
            "out": None,
            "tokens": tokens,
            "width": width,
            "eps": 1e-6,
            "activation": dtype,
            "dtype": dtype,
        }
        cuda("rms_norm8", norm=norm, out=rows.fields)
        assert_rounded(rows, oracle.rms_norm(total, exact(gain), 1e-6), torch.bfloat16)
        np.testing.assert_allclose(exact(residual), total, rtol=1e-6, atol=1e-6)


PRODUCTS = [(128, 128), (256, 384), (896, 512), (3584, 4608), (1792, 3584), (5120, 1024)]


def fp8_rows(cuda: Any, rng: np.random.Generator, tokens: int, depth: int, dtype: torch.dtype) -> Rows:
    """Of all sizes, and scales that are all different: an order that a product does not have would show."""
    x = stored(rng.standard_normal((tokens, depth)) * 10.0 ** rng.uniform(-1, 1, (tokens, 1)), dtype)
    rows = Rows(tokens, depth)
    cuda("round_rows", values=x, out=rows.fields, tokens=tokens, width=depth, activation=dtype)
    return rows


def compared(rng: np.random.Generator, tokens: int) -> list[int]:
    """Rows that float64 has the time for: all of few, and some of many."""
    return sorted({0, tokens - 1, *(rng.integers(0, tokens, 100) if tokens > 1000 else range(tokens))})


def product_fields(rows: Rows, weight: Weight, y: Any, dtype: torch.dtype) -> dict[str, Any]:
    features, depth = weight.numbers.shape
    shape = {"in_features": depth, "out_features": features, "out_dtype": dtype}
    return {"x": rows.fields, "weight": weight.fields, "y": y, **shape}


@pytest.mark.usefixtures("hopper")
@each_half
@pytest.mark.parametrize("depth, features", PRODUCTS)
@pytest.mark.parametrize("tokens", [1, 66, 129, 515, 4099])
def test_fp8_products(
    cuda: Any, rng: np.random.Generator, tokens: int, depth: int, features: int, dtype: torch.dtype
) -> None:
    """Few rows, which cuBLASLt may multiply, and many. Odd numbers of blocks and rows; nothing behind y is written."""
    rows, weight = fp8_rows(cuda, rng, tokens, depth, dtype), Weight(rng, "fp8", features, depth, 128)
    y = poisoned(rows.rows + 16, features, dtype=dtype)
    cuda("product8", **product_fields(rows, weight, y, dtype))
    some = compared(rng, tokens)
    expected = oracle.linear(rows.exact[some], weight.exact)
    # the tensor cores keep some 14 bits of a sum of 128 products
    check(y[some], expected, 2e-3 * np.abs(expected).max(-1, keepdims=True))
    assert (y[tokens : rows.rows] == 0).all()
    assert same_bits(y[rows.rows :], poisoned(16, features, dtype=dtype))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("depth, width", [(128, 128), (256, 384), (3584, 2304), (1792, 512)])
@pytest.mark.parametrize("tokens", [1, 66, 129, 4099])
def test_fp8_product_of_gate_and_up(cuda: Any, rng: np.random.Generator, tokens: int, depth: int, width: int) -> None:
    """With SiLU, rounded: what the product and SiLU of float64 give, within a step of FP8."""
    rows, weight = fp8_rows(cuda, rng, tokens, depth, torch.bfloat16), Weight(rng, "fp8", 2 * width, depth, 128)
    out = Rows(tokens, width)
    cuda("gated_product8", product=product_fields(rows, weight, None, torch.bfloat16), out=out.fields)
    some = compared(rng, tokens)
    gate_up = oracle.linear(rows.exact[some], weight.exact)
    expected = oracle.silu_mul(gate_up)
    got = out.exact[some]
    largest = np.repeat(np.abs(expected).reshape(len(some), -1, 128).max(-1), 128, 1)
    off = 2e-3 * np.abs(gate_up).max(-1, keepdims=True)  # of a product; SiLU grows by 1.1 of that at most
    both = np.abs(gate_up[:, :width]) + np.abs(gate_up[:, width:])
    bound = (np.abs(expected) + 1.1 * off * (both + off)) * (1 + 1 / 16) - np.abs(expected) + largest / 400_000
    assert (np.abs(got - expected) <= bound).all()
    assert np.linalg.norm(got - expected) < 0.03 * np.linalg.norm(expected)
    assert (out.exact[tokens:] == 0).all() and (out.scales[:, tokens:] == 1).all()
