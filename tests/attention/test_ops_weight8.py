"""Linear layers of 8-bit weights against float64 on the same scales, and the rounding against every number there is."""

from __future__ import annotations

import numpy as np
import oracle
import paddle
import pytest
from faces import STORAGE, array, error, stored, tensor

from paddle_qwen1m import ops

each_kind = pytest.mark.parametrize("kind", ["int8", "fp8"])
SPELLED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def rounded(values: np.ndarray, storage: str, kind: str, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and scales of values as a type has them, by the package."""
    held = tensor(values, storage)
    bits = held.view("uint16").numpy() if storage == "bfloat16" else held.numpy()
    numbers = np.zeros(values.shape, np.uint8)
    scales = np.zeros((values.shape[0] // rows, values.shape[1] // columns), np.float32)
    assert ops.round_weight(bits, SPELLED[storage], kind, numbers, scales)
    return numbers, scales


def weight(numbers: np.ndarray, scales: np.ndarray, kind: str) -> ops.Weight8:
    return ops.Weight8(paddle.to_tensor(numbers), tensor(scales), kind)


@each_kind
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rows, columns", [(1, 128), (128, 128), (32, 16)])
def test_every_value_becomes_the_nearest_number(
    rng: np.random.Generator, kind: str, storage: str, rows: int, columns: int
) -> None:
    """Values from the smallest to the largest of a block, zeros of either sign and a block of zeros among them."""
    values = rng.standard_normal((256, 256)) * 10.0 ** rng.uniform(-5, 1, (256, 256))
    values[0, :4] = 0.0, -0.0, values.max() * 2, -1e-7
    values[128:, 128:] = 0.0
    values = stored(values, storage)
    numbers, scales = rounded(values, storage, kind, rows, columns)
    expected, expected_scales = oracle.round_weight(kind, values, rows, columns)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(numbers, expected)


@each_kind
def test_numbers_and_what_lies_between_two_of_them(kind: str) -> None:
    """Every number stays itself, and halfway between two of them the even one is taken."""
    numbers = np.sort(oracle.numbers_of(kind)[~np.isnan(oracle.numbers_of(kind))])
    numbers = numbers[np.abs(numbers) <= (127 if kind == "int8" else 448)]
    values = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, [numbers[-1]]])
    values = np.pad(values, (0, -len(values) % 16)).reshape(1, -1)
    values[0, ::16] = numbers[-1]  # the scale of every block is 1
    got, scales = rounded(values, "float32", kind, 1, 16)
    assert (scales == 1).all()
    np.testing.assert_array_equal(got, oracle.round_to(kind, values))


@each_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_told(kind: str, bad: float) -> None:
    values = np.ones((2, 32), np.float32)
    values[1, 17] = bad
    assert not ops.round_weight(values, "F32", kind, np.zeros((2, 32), np.uint8), np.zeros((2, 2), np.float32))


@each_kind
def test_subnormal_weights_have_finite_numbers(kind: str) -> None:
    values = np.full((1, 16), 1e-44, np.float32)
    numbers, scales = rounded(values, "float32", kind, 1, 16)
    assert np.isfinite(oracle.widen_weight(kind, numbers, scales)).all()


@each_kind
@pytest.mark.parametrize("storage", STORAGE)
def test_product_of_every_byte_widened(kind: str, storage: str) -> None:
    """All numbers of both kinds, in blocks of several scales, rounded once to each type."""
    finite = np.flatnonzero(~np.isnan(oracle.numbers_of(kind)))
    numbers = np.resize(finite, (2, 256)).astype(np.uint8)
    scales = np.array([[0.5, 1.7], [3.0, 1e-3]], np.float32)
    got = array(ops.widen_weight(weight(numbers, scales, kind), storage))
    expected = np.float32(oracle.widen_weight(kind, numbers, scales))
    np.testing.assert_array_equal(got, stored(expected, storage))


SHAPES = [
    (1, 64, 7, 1, 64),
    (1, 4864, 896, 128, 128),
    (2, 896, 1152, 64, 128),
    (4, 512, 257, 1, 128),
    (5, 80, 33, 1, 16),
    (8, 256, 64, 64, 32),
    (9, 128, 96, 32, 128),
    (65, 256, 130, 2, 64),
    (300, 1792, 1024, 128, 128),
]


@each_kind
@pytest.mark.parametrize("rows, inner, outer, block_rows, block_columns", SHAPES)
def test_product(
    rng: np.random.Generator, kind: str, rows: int, inner: int, outer: int, block_rows: int, block_columns: int
) -> None:
    """One row, few and many, blocks of every form: the product with what bytes and scales stand for."""
    x = stored(rng.standard_normal((rows, inner)), "float32")
    finite = np.flatnonzero(~np.isnan(oracle.numbers_of(kind)))
    numbers = rng.choice(finite, (outer, inner)).astype(np.uint8)
    scales = rng.uniform(0.001, 0.1, (outer // block_rows, inner // block_columns)).astype(np.float32)
    got = array(ops.linear(tensor(x), weight(numbers, scales, kind)))
    assert error(got, oracle.linear(x, oracle.widen_weight(kind, numbers, scales))) < 1e-5


def test_a_product_refuses_what_does_not_fit() -> None:
    """Another width, scales of blocks that are none, a kind that does not exist: the error names it."""
    x, numbers, scales = tensor(np.zeros((1, 64))), paddle.to_tensor(np.zeros((4, 64), np.uint8)), np.ones((4, 1))
    ops.linear(x, ops.Weight8(numbers, tensor(scales), "int8"))
    with pytest.raises(ValueError, match=r"linear8.*numbers.*\[\*, 48\].*\[4, 64\]"):
        ops.linear(tensor(np.zeros((1, 48))), ops.Weight8(numbers, tensor(scales), "int8"))
    for strange in ((3, 1), (4, 3), (4, 8), (0, 1)):
        with pytest.raises(ValueError, match=r"linear8.*blocks.*powers of two"):
            ops.linear(x, ops.Weight8(numbers, tensor(np.ones(strange)), "int8"))
    with pytest.raises(ValueError, match="kind must be int8 or fp8, got int4"):
        ops.linear(x, ops.Weight8(numbers, tensor(scales), "int4"))
    with pytest.raises(ValueError, match="takes no bias"):
        ops.linear(x, ops.Weight8(numbers, tensor(scales), "int8"), tensor(np.zeros(4)))


@each_kind
def test_a_weight_of_several_products_is_widened_once(rng: np.random.Generator, kind: str) -> None:
    numbers, scales = rounded(rng.standard_normal((64, 64)), "float32", kind, 1, 64)
    plain = weight(numbers, scales, kind)
    kept = ops.WidenedOnce(*plain)
    first = kept.widened("float32")
    assert kept.widened("float32") is first and plain.widened("float32") is not plain.widened("float32")
    np.testing.assert_array_equal(array(first), array(ops.widen_weight(plain, "float32")))
    x = rng.standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_array_equal(array(ops.linear(tensor(x), kept)), array(ops.linear(tensor(x), plain)))


def assert_rounded(found: ops.Rows8, values: np.ndarray) -> None:
    """Rows in FP8 are the oracle's of values that differ from these by float32's rounding: a number in a thousand may
    be the next one.
    """
    numbers, scales = oracle.round_rows(values)
    assert found.tokens == len(values)
    np.testing.assert_allclose(found.scales.numpy(), scales, rtol=1e-5)
    same = found.numbers.numpy() == numbers
    assert same.mean() > 0.999 and same[len(values) :].all()
    got = oracle.widen_rows(found.numbers.numpy(), found.scales.numpy())[: len(values)]
    largest = np.repeat(np.abs(values).reshape(len(values), -1, 128).max(-1), 128, 1)
    assert (np.abs(got - values) <= np.abs(values) / 16 * 1.001 + largest / 400_000).all()


@pytest.mark.parametrize("tokens, width", [(1, 128), (4, 512), (7, 3584), (66, 256)])
def test_rows_are_rounded_as_they_are_made(rng: np.random.Generator, tokens: int, width: int) -> None:
    """By a norm, with something added or not, and by themselves; a row of zeros, and one of large values."""
    values = stored(rng.standard_normal((tokens, width)), "float32")
    values[0] *= 1e6
    values[-1] = 0.0
    found = ops.round_rows(tensor(values))
    numbers, scales = oracle.round_rows(values)
    np.testing.assert_array_equal(found.numbers.numpy(), numbers)
    np.testing.assert_array_equal(found.scales.numpy(), scales)
    assert (scales[:, tokens - 1 :] == 1).all()

    gain, delta = stored(rng.standard_normal(width), "bfloat16"), stored(rng.standard_normal(values.shape), "float32")
    assert_rounded(ops.rms_norm8(tensor(values), tensor(gain, "bfloat16"), 1e-6), oracle.rms_norm(values, gain, 1e-6))
    sums = tensor(values), values.copy()
    normed = oracle.add_rms_norm(delta, sums[1], gain, 1e-6)
    assert_rounded(ops.add_rms_norm8(tensor(delta), sums[0], tensor(gain, "bfloat16"), 1e-6), normed)
    assert error(array(sums[0]), sums[1]) < 2e-7


@pytest.mark.parametrize("tokens, inner, outer", [(1, 128, 128), (5, 512, 384), (70, 896, 256)])
def test_product_of_fp8_rows(rng: np.random.Generator, tokens: int, inner: int, outer: int) -> None:
    """With float64 on the same numbers and scales, for as many rows as there are."""
    rows = ops.round_rows(tensor(rng.standard_normal((tokens, inner)) * 10.0 ** rng.uniform(-3, 3, (tokens, 1))))
    numbers, scales = rounded(rng.standard_normal((outer, inner)), "float32", "fp8", 128, 128)
    got = array(ops.product8(rows, weight(numbers, scales, "fp8"), "float32"))
    exact = oracle.widen_rows(rows.numbers.numpy(), rows.scales.numpy())[:tokens]
    expected = oracle.linear(exact, oracle.widen_weight("fp8", numbers, scales))
    assert got.shape == (tokens, outer)
    for row, wanted in zip(got, expected):
        assert error(row, wanted) < 1e-5


@pytest.mark.parametrize("tokens, inner, outer", [(1, 128, 128), (5, 512, 384), (70, 896, 256)])
def test_product_of_gate_and_up(rng: np.random.Generator, tokens: int, inner: int, outer: int) -> None:
    """SiLU of float64's products of the same numbers, rounded."""
    rows = ops.round_rows(tensor(rng.standard_normal((tokens, inner))))
    numbers, scales = rounded(rng.standard_normal((2 * outer, inner)), "float32", "fp8", 128, 128)
    found = ops.gated_product8(rows, weight(numbers, scales, "fp8"))
    exact = oracle.widen_rows(rows.numbers.numpy(), rows.scales.numpy())[:tokens]
    assert found.tokens == tokens
    assert_rounded(found, oracle.silu_mul(oracle.linear(exact, oracle.widen_weight("fp8", numbers, scales))))


def test_fp8_rows_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"round_rows.*multiple of 128 values, got 64"):
        ops.round_rows(tensor(np.zeros((4, 64))))
    rows = ops.round_rows(tensor(np.zeros((4, 128))))
    numbers = paddle.to_tensor(np.zeros((128, 128), np.uint8))
    with pytest.raises(ValueError, match="blocks of 128 x 128, got 64 x 128"):
        ops.product8(rows, ops.Weight8(numbers, tensor(np.ones((2, 1))), "fp8"), "float32")
    with pytest.raises(ValueError, match="multiple of 128 features each, got 128 together"):
        ops.gated_product8(rows, ops.Weight8(numbers, tensor(np.ones((1, 1))), "fp8"))


def test_products_of_fp8_rows_in_parts(rng: np.random.Generator) -> None:
    """As of the rows together, whose last part ends anywhere."""
    values = rng.standard_normal((71, 256))
    numbers, scales = rounded(rng.standard_normal((384, 256)), "float32", "fp8", 128, 128)
    parts = [ops.round_rows(tensor(part)) for part in (values[:32], values[32:48], values[48:])]
    held = weight(numbers, scales, "fp8")
    together = array(ops.product8(ops.round_rows(tensor(values)), held, "float32"))
    got = array(ops.product8(parts, held, "float32"))
    assert got.shape == together.shape
    assert error(got, together) < 1e-6
