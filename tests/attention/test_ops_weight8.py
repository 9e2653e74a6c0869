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
