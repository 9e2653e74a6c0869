"""8-bit keys and values: ops that read them against the oracle on what they stand for, and how they are written."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import oracle
import paddle
import pytest
from cases import CHUNK_LEN, CHUNK_SIZE, Prompt, make_prompt, paged_cache
from faces import OpFace, OracleFace, array, error, stored, tensor, visits

from paddle_qwen1m import ops

TOKENS = 407
"""Inside the fourth DCA chunk and inside a page."""
LARGEST = 448.0
FP8_NUMBERS = oracle.numbers_of("fp8")
face = OpFace()


@pytest.fixture(params=["int8", "fp8"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Pages8(NamedTuple):
    """Pages of 8-bit numbers, what makes keys of them, and these in float64; where no token lies, scales are NaN."""

    keys: paddle.Tensor
    values: paddle.Tensor
    quantised: ops.Quantised
    real_keys: np.ndarray
    real_values: np.ndarray


def random_frame(rng: np.random.Generator, kv_heads: int, head_dim: int) -> np.ndarray:
    """Powers from 1/4 to 256, the same for the two dims of a rotation pair, and centres of the size of keys."""
    powers = np.exp2(rng.integers(-2, 9, (kv_heads, head_dim // 2)))
    return np.stack([np.tile(powers, 2), 5 * rng.standard_normal((kv_heads, head_dim))])


def quantise(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and float16 scales [...] of rows [..., D]; NaN scales for NaN rows."""
    scales = stored(np.abs(x).max(axis=-1) / (127 if kind == "int8" else LARGEST), "float16")
    with np.errstate(invalid="ignore"):
        numbers = np.nan_to_num(x / scales[..., None])
    return np.rint(numbers).clip(-127, 127).astype(np.int8) if kind == "int8" else oracle.round_to(
        "fp8", numbers
    ), scales


def meant(numbers: np.ndarray) -> np.ndarray:
    """What bytes stand for, float64."""
    return FP8_NUMBERS[numbers] if numbers.dtype == np.uint8 else numbers.astype(np.float64)


def pages_of(kind: str, keys: np.ndarray, values: np.ndarray, frame: np.ndarray) -> Pages8:
    """Pages float64 [pages, page_size, G, D] as they lie in an 8-bit cache."""
    frame = stored(frame, "float32")
    numbers, scales = quantise(keys / frame[0] - frame[1], kind)
    value_numbers, value_scales = quantise(values, kind)
    return Pages8(
        paddle.to_tensor(numbers),
        paddle.to_tensor(value_numbers),
        ops.Quantised(tensor(np.stack([scales, value_scales]), "float16"), tensor(frame)),
        (meant(numbers) * scales[..., None] + frame[1]) * frame[0],
        meant(value_numbers) * value_scales[..., None],
    )


def prompt_of(kind: str, rng: np.random.Generator, tokens: int = TOKENS, head_dim: int = 64) -> tuple[Prompt, Pages8]:
    """A prompt with keys as large as their frame's powers, and queries as small; the oracle sees what is cached."""
    prompt = make_prompt(rng, tokens, head_dim=head_dim)
    frame = random_frame(rng, 2, head_dim)
    for queries in (prompt.queries, prompt.critical):
        queries /= np.repeat(frame[0], 2, axis=0)
    keys, values, _ = prompt.caches
    pages = pages_of(kind, (keys + frame[1]) * frame[0], values, frame)
    keys[:], values[:] = pages.real_keys, pages.real_values
    return prompt, pages


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_kernel_reads_what_the_numbers_stand_for(rng: np.random.Generator, kind: str, head_dim: int) -> None:
    prompt, pages = prompt_of(kind, rng, head_dim=head_dim)
    keys, values, table = prompt.caches
    assert np.isnan(array(pages.quantised.scales)).any(), "memory that was never written has no scale"
    exact, scale = OracleFace(), tensor(np.array([prompt.scale]))
    caches, tables = (pages.keys, pages.values), tensor(table[None])

    out, sums = tensor(np.full(prompt.q.shape, np.nan)), tensor(np.full(prompt.q.shape[:2], np.nan))
    pieces = paddle.to_tensor(prompt.pieces([0]))
    ops.dca_prefill(
        tensor(prompt.queries), out, *caches, tables, pieces, scale, CHUNK_LEN, sums, quantised=pages.quantised
    )
    assert error(array(out), prompt.dense(exact)) < face.tolerance
    assert error(array(sums)[384:], prompt.dense_lse(384, TOKENS).T) < face.tolerance

    length = np.array([TOKENS])
    decoded = ops.dca_decode(
        tensor(prompt.queries[:, -1:]), *caches, tables, paddle.to_tensor(length.astype(np.int32)), scale, CHUNK_LEN,
        pages.quantised,
    )  # fmt: skip
    expected = exact.dca_decode(prompt.queries[:, -1:], keys, values, table[None], length, [prompt.scale], CHUNK_LEN)
    assert error(array(decoded), expected) < face.tolerance

    critical = prompt.critical[:, 384:]
    probed = ops.dca_probe(
        tensor(critical), pages.keys, tensor(table), TOKENS, CHUNK_LEN, prompt.scale, pages.quantised
    )
    for got, wanted in zip(probed, exact.dca_probe(critical, keys, table, TOKENS, CHUNK_LEN, prompt.scale)):
        assert error(array(got), wanted) < face.tolerance

    index = prompt.index(exact, 384, TOKENS, 60, 101)
    sparse = tensor(np.full(prompt.q.shape, np.nan))
    ops.dca_sparse_prefill(
        tensor(prompt.queries), sparse, *caches, tensor(table), visits(index), 384, 384, TOKENS - 384, CHUNK_LEN,
        prompt.scale, quantised=pages.quantised,
    )  # fmt: skip
    assert error(array(sparse)[384:], prompt.sparse(exact, 384, TOKENS, index)[0]) < face.tolerance


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_pages_are_dequantised_in_the_order_asked_for(rng: np.random.Generator, kind: str, storage: str) -> None:
    prompt, pages = prompt_of(kind, rng)
    used = prompt.cache.tables[0][[3, 0, 7]]
    keys, values = (tensor(np.full((5, *pages.real_keys.shape[1:]), 7.0), storage) for _ in range(2))
    ops.dequantize_pages(*pages[:3], paddle.to_tensor(used), keys, values)
    for got, real in ((keys, pages.real_keys), (values, pages.real_values)):
        close = 2.0**-22 if storage == "float32" else 2.0**-8
        np.testing.assert_allclose(array(got)[:3], real[used], rtol=close, atol=1e-4)
        np.testing.assert_array_equal(array(got)[3:], 7.0)


def written(
    kind: str, rng: np.random.Generator, qkv: np.ndarray, frame: np.ndarray
) -> tuple[Pages8, np.ndarray, np.ndarray]:
    """What rotate_and_cache makes of projections [T, (4 + 2 + 2) * 64], and the exact keys and values."""
    tokens, heads, kv_heads, head_dim = len(qkv), 4, 2, 64
    empty = np.zeros((tokens, kv_heads, head_dim))
    cache = paged_cache(rng, [empty], [empty], 16)
    slots = cache.slots(0, 0, tokens)
    positions = oracle.query_positions(np.arange(tokens), CHUNK_LEN, CHUNK_SIZE)
    table = face.rotary_table(positions[:1], oracle.inverse_frequencies(head_dim, 1e7))
    bias = stored(rng.standard_normal(qkv.shape[1]), "float32")
    pages = pages_of(kind, cache.keys, cache.values, frame)
    ops.rotate_and_cache(
        tensor(qkv), tensor(bias), tensor(table), paddle.to_tensor(slots), pages.keys, pages.values, pages.quantised
    )
    biased = (stored(qkv, "float32") + bias).reshape(tokens, -1, head_dim)
    rows = slots // 16, slots % 16
    numbers = tuple(meant(array(pool)[rows]) for pool in pages[:2])
    scales = array(pages.quantised.scales)[:, rows[0], rows[1]][..., None]
    frame = array(pages.quantised.frame)
    got = Pages8(*pages[:3], (numbers[0] * scales[0] + frame[1]) * frame[0], numbers[1] * scales[1])
    return got, oracle.rotate(biased[:, heads : heads + kv_heads], table[0][:, None]), biased[:, heads + kv_heads :]


def test_keys_and_values_are_rounded_to_the_nearest_of_127_steps(rng: np.random.Generator) -> None:
    frame = random_frame(rng, 2, 64)
    got, keys, values = written("int8", rng, rng.standard_normal((300, 8 * 64)), frame)
    key_steps = np.abs(keys / frame[0] - frame[1]).max(axis=-1, keepdims=True) / 127 * frame[0]
    value_steps = np.abs(values).max(axis=-1, keepdims=True) / 127
    for real, exact, steps in ((got.real_keys, keys, key_steps), (got.real_values, values, value_steps)):
        off = np.abs(real - exact)
        assert (off <= 0.5 * steps * (1 + 2.0**-3)).all(), "half a step, and what the scale's own rounding adds"
        assert off.mean() > 0.1 * steps.mean(), "and they are rounded"


def test_keys_and_values_are_rounded_to_the_nearest_number_of_fp8(rng: np.random.Generator) -> None:
    """Half a step of three bits of mantissa, or of the smallest exponent; sizes from 1 to 1e-6 of the largest."""
    frame = random_frame(rng, 2, 64)
    qkv = rng.standard_normal((300, 8 * 64)) * 10.0 ** -rng.uniform(0, 6, (300, 8 * 64))
    got, keys, values = written("fp8", rng, qkv, frame)
    framed = keys / frame[0] - frame[1], got.real_keys / frame[0] - frame[1]
    for exact, real in (framed, (values, got.real_values)):
        scale = np.abs(exact).max(axis=-1, keepdims=True) / LARGEST
        half_steps = scale * np.maximum(2.0**-10, 2.0 ** (np.floor(np.log2(np.abs(exact / scale))) - 4))
        assert (np.abs(real - exact) <= half_steps * (1 + 2.0**-8) + 1e-6 * np.abs(frame[1]).max()).all()


def test_every_byte_of_fp8_is_read_as_it_is_written() -> None:
    """All 254 numbers there are, as one token's values each, with those beside them that round to them."""
    numbers = np.array([byte for byte in range(256) if byte % 128 != 127], np.uint8)
    exact = FP8_NUMBERS[numbers]
    rows = np.full((len(numbers), 1, 64), LARGEST)
    rows[:, 0, 0], rows[:, 0, 1], rows[:, 0, 2] = exact, exact * (1 + 2.0**-5.01), exact * (1 - 2.0**-5.99)
    rows = rows.clip(-LARGEST, LARGEST)  # so that all scales are 1
    qkv = np.concatenate([np.zeros_like(rows), np.zeros_like(rows), rows], axis=1).reshape(len(rows), -1)
    pages = [paddle.zeros([16, 16, 1, 64], "uint8") for _ in range(2)]
    frame = tensor(np.stack([np.ones((1, 64)), np.zeros((1, 64))]))
    quantised = ops.Quantised(tensor(np.ones((2, 16, 16, 1)), "float16"), frame)
    unrotated = tensor(np.tile(np.repeat([1.0, 0.0], 32), (1, len(rows), 1)))
    slots = paddle.to_tensor(np.arange(len(rows)))
    no_bias = tensor(np.full(3 * 64, -0.0))  # which is nothing to -0, too
    ops.rotate_and_cache(tensor(qkv), no_bias, unrotated, slots, *pages, quantised)
    written = array(pages[1]).reshape(256, 64)[: len(rows)]
    np.testing.assert_array_equal(written[:, 0], numbers)
    np.testing.assert_array_equal(written[:, 1:3], oracle.round_to("fp8", rows[:, 0, 1:3].astype(np.float32)))
    keys, values = tensor(np.zeros((16, 16, 1, 64))), tensor(np.zeros((16, 16, 1, 64)))
    ops.dequantize_pages(*pages, quantised, paddle.to_tensor(np.arange(16, dtype=np.int32)), keys, values)
    np.testing.assert_array_equal(array(values).reshape(256, 64)[: len(rows), 0], exact)


def test_a_huge_token_spoils_no_other(rng: np.random.Generator, kind: str) -> None:
    qkv, frame, seed = rng.standard_normal((64, 8 * 64)), random_frame(rng, 2, 64), 5
    before = written(kind, np.random.default_rng(seed), qkv, frame)[0]
    qkv[30] *= 1e4
    after = written(kind, np.random.default_rng(seed), qkv, frame)[0]
    others = np.arange(64) != 30
    np.testing.assert_array_equal(after.real_keys[others], before.real_keys[others])
    np.testing.assert_array_equal(after.real_values[others], before.real_values[others])
    assert np.abs(after.real_keys[30]).max() > 100 * np.abs(before.real_keys[30]).max()


def test_zeros_stay_zeros(rng: np.random.Generator, kind: str) -> None:
    """A token whose centred key is nothing has a scale of 0, and comes back as the centre."""
    frame = random_frame(rng, 2, 64)
    numbers, scales = (
        np.zeros((2, 1, 16, 2, 64), np.int8 if kind == "int8" else np.uint8),
        np.full((2, 1, 16, 2), np.nan),
    )
    pages = [paddle.to_tensor(part) for part in numbers]
    quantised = ops.Quantised(tensor(scales, "float16"), tensor(frame))
    qkv = np.zeros((1, 8 * 64))
    qkv[0, 4 * 64 : 6 * 64] = (frame[1] * frame[0]).reshape(-1)
    unrotated = tensor(np.concatenate([np.ones((1, 1, 32)), np.zeros((1, 1, 32))], axis=-1))
    slots = paddle.to_tensor(np.array([3]))
    ops.rotate_and_cache(tensor(qkv), tensor(np.zeros(8 * 64)), unrotated, slots, *pages, quantised)
    keys, values = tensor(np.zeros((1, 16, 2, 64))), tensor(np.zeros((1, 16, 2, 64)))
    ops.dequantize_pages(*pages, quantised, paddle.to_tensor(np.array([0], np.int32)), keys, values)
    np.testing.assert_allclose(array(keys)[0, 3], frame[1] * frame[0], rtol=1e-6)
    np.testing.assert_array_equal(array(values)[0, 3], 0.0)


@pytest.mark.parametrize("length", [128, 512, 4096])
def test_what_rounding_costs_does_not_grow_with_the_length(rng: np.random.Generator, kind: str, length: int) -> None:
    """Relative error of a row's attention over normal keys and values: at every length below 2 %, or 5 % with FP8."""
    prompt = make_prompt(rng, length, chunk_len=4096)
    keys, values, table = prompt.caches
    exact = OracleFace().dca_decode(prompt.queries[:, -1:], keys, values, table[None], [length], [prompt.scale], 4096)
    pages = pages_of(kind, keys, values, np.stack([np.ones((2, 64)), np.zeros((2, 64))]))
    got = ops.dca_decode(
        tensor(prompt.queries[:, -1:]), pages.keys, pages.values, tensor(table[None]),
        paddle.to_tensor(np.array([length], np.int32)), tensor(np.array([prompt.scale])), 4096, pages.quantised,
    )  # fmt: skip
    assert 1e-4 < np.linalg.norm(array(got) - exact) / np.linalg.norm(exact) < (2e-2 if kind == "int8" else 5e-2)


def test_a_copied_page_takes_its_scales_along(rng: np.random.Generator, kind: str) -> None:
    _, pages = prompt_of(kind, rng)
    before = [array(part) for part in (pages.keys, pages.values, *pages.quantised.scales)]
    source, target = 2, 9
    ops.copy_page(pages.keys, pages.values, source, target, 7, pages.quantised)
    for old, part in zip(before, (pages.keys, pages.values, *pages.quantised.scales)):
        old[target, :7] = old[source, :7]
        np.testing.assert_array_equal(array(part), old)


def test_numbers_and_their_meaning_come_together(rng: np.random.Generator, kind: str) -> None:
    _, pages = prompt_of(kind, rng)
    with pytest.raises(ValueError, match="copy_page: scales and frame belong to a cache of int8 or uint8"):
        ops.copy_page(pages.keys, pages.values, 0, 1, 1)
    floating = tensor(np.zeros(pages.keys.shape))
    with pytest.raises(ValueError, match="copy_page: scales and frame belong to a cache of int8 or uint8"):
        ops.copy_page(floating, floating.clone(), 0, 1, 1, pages.quantised)
    narrow = ops.Quantised(pages.quantised.scales[:, :1], pages.quantised.frame)
    with pytest.raises(ValueError, match="copy_page: scales must have shape"):
        ops.copy_page(pages.keys, pages.values, 0, 1, 1, narrow)
