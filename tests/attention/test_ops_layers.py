"""Ops around attention against the oracle: embedding, norms, linears, activation, rotation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import oracle
import pytest
from cases import paged_cache
from faces import STORAGE, OpFace, OracleFace, array, error, stored, tensor

from paddle_qwen1m import ops

ORACLE = OracleFace()
each_storage = pytest.mark.parametrize("storage", STORAGE)


@each_storage
@pytest.mark.parametrize("width", [1, 64, 513])
def test_embedding_rows_are_exact(rng: np.random.Generator, width: int, storage: str) -> None:
    """Widening is exact: rows come back as stored, repeated and out of order."""
    table = stored(rng.standard_normal((50, width)), storage)
    ids = np.array([0, 49, 7, 7, 31, 0], dtype=np.int64)
    np.testing.assert_array_equal(OpFace(storage).embedding(ids, table), ORACLE.embedding(ids, table))


@each_storage
@pytest.mark.parametrize("first", [0, 20, 60])
def test_a_part_of_the_vocabulary_gives_zeros_for_the_rest(rng: np.random.Generator, first: int, storage: str) -> None:
    """The parts' embeddings add up to that of the whole table."""
    table = stored(rng.standard_normal((30, 64)), storage)
    ids = rng.integers(0, 100, 64)
    got = OpFace(storage).embedding(ids, table, first, vocabulary=100)
    np.testing.assert_array_equal(got, oracle.embedding(ids, table, first))
    outside = (ids < first) | (ids >= first + 30)
    assert outside.any() and (got[outside] == 0).all() and (got[~outside] != 0).all()


@pytest.mark.parametrize("ids", [[-1], [50], [0, 1 << 40]])
def test_embedding_refuses_ids_outside_the_vocabulary(ids: list[int]) -> None:
    """An id outside the table is an error that names it, not a read of other memory."""
    with pytest.raises(ValueError, match=rf"embedding.*{ids[-1]}"):
        OpFace().embedding(np.array(ids), np.zeros((50, 8)))


@each_storage
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 64), (17, 896), (2, 3584), (5, 101)])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
def test_rms_norm(rng: np.random.Generator, rows: int, width: int, magnitude: float, storage: str) -> None:
    """The norm of small, ordinary and large rows; sums of squares keep float32's digits."""
    hidden = stored(magnitude * rng.standard_normal((rows, width)), "float32")
    weight = stored(rng.standard_normal(width), storage)
    assert error(OpFace(storage).rms_norm(hidden, weight, 1e-6), ORACLE.rms_norm(hidden, weight, 1e-6)) < 2e-6


@each_storage
@pytest.mark.parametrize("rows, width", [(1, 64), (9, 896), (4, 101)])
def test_add_rms_norm_adds_in_place(rng: np.random.Generator, rows: int, width: int, storage: str) -> None:
    """The residual holds the sum afterwards, and the result is its norm."""
    delta, residual = stored(rng.standard_normal((2, rows, width)), "float32")
    weight = stored(rng.standard_normal(width), storage)
    sums = residual.copy(), residual.copy()
    got = OpFace(storage).add_rms_norm(delta, sums[0], weight, 1e-6)
    expected = ORACLE.add_rms_norm(delta, sums[1], weight, 1e-6)
    assert error(sums[0], sums[1]) < 2e-7 and error(got, expected) < 2e-6
    np.testing.assert_array_equal(sums[1], residual + delta)


LINEAR_SHAPES = [
    (1, 1, 1),
    (1, 64, 7),
    (2, 896, 1152),
    (3, 101, 33),
    (4, 512, 257),
    (8, 130, 64),
    (17, 896, 130),
    (65, 257, 129),
    (300, 512, 100),
    (1, 4864, 896),
]


@each_storage
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows, inner, outer", LINEAR_SHAPES)
def test_linear(rng: np.random.Generator, rows: int, inner: int, outer: int, biased: bool, storage: str) -> None:
    """One row, few rows and many, odd shapes, with and without bias.

    The bound is relative to the largest output; sums of K float32 products stay within 1e-5 for the K used here.
    """
    x = stored(rng.standard_normal((rows, inner)), "float32")
    weight = stored(rng.standard_normal((outer, inner)), storage)
    bias = stored(rng.standard_normal(outer), storage) if biased else None
    assert error(OpFace(storage).linear(x, weight, bias), ORACLE.linear(x, weight, bias)) < 1e-5


@each_storage
def test_linear_keeps_extreme_weights(storage: str) -> None:
    """Subnormal, largest and negative-zero weights survive the widening."""
    largest = {"float32": 1e30, "bfloat16": 1e30, "float16": 65504.0}[storage]
    smallest = {"float32": 1e-30, "bfloat16": 1e-30, "float16": 6e-8}[storage]
    weight = stored(np.array([[largest, -0.0], [smallest, 0.0], [-largest, smallest]]), storage)
    for rows in (1, 40):
        x = np.ones((rows, 2))
        got, expected = OpFace(storage).linear(x, weight), ORACLE.linear(x, weight)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_linear_refuses_weights_of_another_width() -> None:
    """The error names the op and both widths."""
    with pytest.raises(ValueError, match=r"linear.*(12.*16|16.*12)"):
        OpFace().linear(np.zeros((3, 16)), np.zeros((5, 12)))


@pytest.mark.parametrize("rows, width", [(1, 1), (3, 33), (2, 768), (64, 100)])
def test_silu_mul(rng: np.random.Generator, rows: int, width: int) -> None:
    """SiLU of the gate half times the up half, out to gates where exp would overflow.

    exp of a gate of -88 is 2 to a float32 exponent of 127, known to 4e-6: so well is the tiny result known.
    """
    magnitudes = 10.0 ** rng.uniform(-3, 2.5, (rows, 2 * width))
    gate_up = stored(magnitudes * rng.standard_normal((rows, 2 * width)), "float32")
    gate_up[0, 0] = -1000.0
    got, expected = OpFace().silu_mul(gate_up), ORACLE.silu_mul(gate_up)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-30)


@each_storage
@pytest.mark.parametrize("rows, depth, width", [(1, 64, 1), (3, 33, 20), (40, 96, 129)])
def test_gated_linear(rng: np.random.Generator, rows: int, depth: int, width: int, storage: str) -> None:
    """SiLU of one half of a product's features times the other half."""
    x = stored(rng.standard_normal((rows, depth)), "float32")
    weight = stored(rng.standard_normal((2 * width, depth)), storage)
    expected = ORACLE.silu_mul(ORACLE.linear(x, weight))
    assert error(OpFace(storage).gated_linear(x, weight), expected) < 1e-5


def test_few_rows_are_those_of_the_kernels() -> None:
    header = Path(__file__).parents[2] / "custom_ops" / "include" / "qwen1m" / "step.h"
    assert re.findall(r"QWEN1M_FEW_ROWS = (\d+)", header.read_text(encoding="utf-8")) == [str(ops.FEW_ROWS)]


def test_gated_linear_refuses_halves_of_unequal_width() -> None:
    with pytest.raises(ValueError, match="gated_linear: gate and up must have as many features each, got 5 together"):
        OpFace().gated_linear(np.zeros((3, 16)), np.zeros((5, 16)))


def test_gather_rows_copies_rows(rng: np.random.Generator) -> None:
    """Rows in any order, repeated ones too, bit for bit."""
    hidden = stored(rng.standard_normal((20, 37)), "float32")
    rows = np.array([19, 0, 3, 3, 7], dtype=np.int64)
    np.testing.assert_array_equal(OpFace().gather_rows(hidden, rows), ORACLE.gather_rows(hidden, rows))


@pytest.mark.parametrize(
    ("ranks", "rows", "share", "columns"),
    [(1, 1, 5, 5), (2, 1, 4, 7), (2, 3, 499, 997), (4, 5, 251, 1001), (8, 2, 1, 7)],
)
def test_join_columns_puts_shares_side_by_side(
    rng: np.random.Generator, ranks: int, rows: int, share: int, columns: int
) -> None:
    parts = rng.standard_normal((ranks, rows, share)).astype(np.float32)
    joined = OpFace().join_columns(parts, columns)
    np.testing.assert_array_equal(joined, ORACLE.join_columns(parts, columns))


@pytest.mark.parametrize("columns", [0, -1, 13])
def test_join_columns_refuses_columns_that_do_not_exist(columns: int) -> None:
    with pytest.raises(ValueError, match=rf"join_columns.*columns must be 1 to the 12.*got {columns}"):
        OpFace().join_columns(np.zeros((3, 2, 4)), columns)


def test_gather_rows_refuses_rows_that_do_not_exist() -> None:
    """The error names the row."""
    with pytest.raises(ValueError, match=r"gather_rows.*20"):
        OpFace().gather_rows(np.zeros((20, 4)), np.array([3, 20]))


@each_storage
@pytest.mark.parametrize("dtype", STORAGE)
def test_cast_rounds_once(rng: np.random.Generator, storage: str, dtype: str) -> None:
    """Every pair of types, to nearest even, over more values than one thread takes."""
    values = stored(rng.standard_normal((7, 12345)) * 10.0 ** rng.uniform(-4, 4, (7, 1)), storage)
    np.testing.assert_array_equal(OpFace(storage).cast(values, dtype), stored(values, dtype))


def test_cast_refuses_other_types() -> None:
    with pytest.raises(ValueError, match="cast: dtype must be float32, bfloat16 or float16, got int8"):
        OpFace().cast(np.zeros(3), "int8")


@pytest.mark.parametrize("original", [0, 1000, 262144])
@pytest.mark.parametrize("chunk_len, chunk_size", [(256, 288), (256, 511), (253952, 262144)])
def test_decode_inputs(rng: np.random.Generator, chunk_len: int, chunk_size: int, original: int) -> None:
    """Slots through the block tables, three rotations and the scale of the new length, at chunk and page borders.

    A length of 0 stays, and its slot is none.
    """
    lengths = np.array([0, 1, 31, 32, 255, 256, 511, 512, 1023, 262143, 262144, 1009999], np.int32)
    tables = rng.permutation(len(lengths) * 31563).reshape(len(lengths), -1).astype(np.int32)
    inv_freq = oracle.inverse_frequencies(128, 1e7)
    results = []
    for face in (ORACLE, OpFace()):
        grown = lengths.copy()
        results.append((*face.decode_inputs(grown, tables, inv_freq, 32, chunk_len, chunk_size, original), grown))
    (slots, table, scale, grown), (got_slots, got_table, got_scale, got_grown) = results
    np.testing.assert_array_equal(got_grown, np.where(lengths > 0, lengths + 1, 0))
    np.testing.assert_array_equal(grown, got_grown)
    assert got_slots[0] == -1
    np.testing.assert_array_equal(got_slots, slots)
    assert error(got_table, table) < 1e-7 and error(got_scale, scale) < 1e-7


def test_decode_inputs_refuses_a_full_table() -> None:
    """A token that no page of the table could hold is an error, not a read of other memory."""
    with pytest.raises(ValueError, match="decode_inputs: the block table has room for 64 keys, of which 64 are taken"):
        OpFace().decode_inputs(np.array([64]), np.array([[0, 1]]), np.ones(64), 32, 256, 288, 0)


@each_storage
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(1, 1, 64), (4, 2, 64), (7, 1, 128), (10, 2, 128)])
@pytest.mark.parametrize("variants", [1, 2, 3])
def test_rotate_and_cache(
    rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int, variants: int, storage: str
) -> None:
    """Biased queries in every rotation; keys and values land in their slots, rounded once; other slots stay.

    Rows whose slot is -1 are rotated all the same.
    """
    tokens, page_size = 37, 8
    qkv = stored(rng.standard_normal((tokens, (heads + 2 * kv_heads) * head_dim)), "float32")
    bias = stored(rng.standard_normal(qkv.shape[1]), storage)
    positions = rng.integers(0, 262145, (variants, tokens)).astype(np.int32)
    table = ORACLE.rotary_table(positions, oracle.inverse_frequencies(head_dim, 1e7))
    empty = np.zeros((tokens, kv_heads, head_dim))
    cache = paged_cache(rng, [empty], [empty], page_size)
    slots = rng.permutation(cache.slots(0, 0, tokens))
    slots[[0, 30]] = -1
    results = []
    for face in (ORACLE, OpFace(storage)):
        keys, values = np.full_like(cache.keys, np.nan), np.full_like(cache.values, np.nan)
        results.append((face.rotate_and_cache(qkv, bias, table, slots, keys, values), keys, values))
    expected, got = results
    assert error(got[0], expected[0]) < 1e-6
    for written, exact in zip(got[1:], expected[1:]):
        np.testing.assert_array_equal(np.isnan(written), np.isnan(exact))
        inside = ~np.isnan(exact)
        low, high = stored(exact[inside] - 2e-6, storage), stored(exact[inside] + 2e-6, storage)
        assert ((written[inside] >= low) & (written[inside] <= high)).all()


@each_storage
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (7, 1, 128)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rotating_linear(
    rng: np.random.Generator, tokens: int, heads: int, kv_heads: int, head_dim: int, storage: str
) -> None:
    """The projections of rows, rotated and cached as those of a product in memory; other slots stay."""
    depth, features = 96, (heads + 2 * kv_heads) * head_dim
    x = stored(rng.standard_normal((tokens, depth)), "float32")
    weight, bias = (stored(rng.standard_normal(shape), storage) for shape in ((features, depth), (features,)))
    positions = rng.integers(0, 262145, (3, tokens)).astype(np.int32)
    table = ORACLE.rotary_table(positions, oracle.inverse_frequencies(head_dim, 1e7))
    slots = rng.permutation(16)[:tokens]
    slots[1:2] = -1
    pages = (2, 8, kv_heads, head_dim)
    exact, written = np.full((2, 2, *pages), np.nan)
    expected = ORACLE.rotate_and_cache(ORACLE.linear(x, weight), bias, table, slots, *exact)
    got = OpFace(storage).rotating_linear(x, weight, bias, table, slots, *written)
    assert error(got, expected) < 1e-5
    rounding = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[storage]
    np.testing.assert_array_equal(np.isnan(written), np.isnan(exact))
    np.testing.assert_allclose(written, exact, rtol=rounding, atol=1e-5)


@each_storage
@pytest.mark.parametrize("slot", [-2, 32])
def test_rotate_and_cache_refuses_slots_outside_the_cache(slot: int, storage: str) -> None:
    """A slot that is not in the cache is an error that names it."""
    cache = np.zeros((4, 8, 1, 64))
    with pytest.raises(ValueError, match=rf"rotate_and_cache.*{slot}"):
        OpFace(storage).rotate_and_cache(
            np.zeros((1, 192)), np.zeros(192), np.zeros((1, 1, 64)), np.array([slot]), cache, cache
        )


@each_storage
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (7, 1, 128)])
@pytest.mark.parametrize("row, rows", [(0, 1), (5, 64), (29, 11)])
def test_rotate_queries(
    rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int, row: int, rows: int, storage: str
) -> None:
    """Biased queries of some rows, in the rotations of the probe."""
    qkv = stored(rng.standard_normal((80, (heads + 2 * kv_heads) * head_dim)), "float32")
    bias = stored(rng.standard_normal(qkv.shape[1]), storage)
    positions = rng.integers(0, 516096, (3, rows)).astype(np.int32)
    table = ORACLE.rotary_table(positions, oracle.inverse_frequencies(head_dim, 1e7))
    arguments = qkv, bias, table, row, heads
    assert error(OpFace(storage).rotate_queries(*arguments), ORACLE.rotate_queries(*arguments)) < 1e-6


def test_queries_are_rotated_by_the_rows_of_a_table_that_are_theirs(rng: np.random.Generator) -> None:
    qkv, bias = (tensor(rng.standard_normal(shape)) for shape in ((80, 8 * 64), (8 * 64,)))
    table = tensor(rng.standard_normal((3, 80, 64)))
    whole = array(ops.rotate_queries(qkv, bias, table, 4, row=0))
    part = array(ops.rotate_queries(qkv, bias, table, 4, row=17, rows=40, table_row=17))
    np.testing.assert_array_equal(part, whole[:, 17:57])
    with pytest.raises(ValueError, match="rows 50 to 90 are not among table's 80"):
        ops.rotate_queries(qkv, bias, table, 4, row=17, rows=40, table_row=50)


@each_storage
def test_keys_are_cached_without_their_queries(rng: np.random.Generator, storage: str) -> None:
    qkv, bias = tensor(rng.standard_normal((30, 8 * 64))), tensor(rng.standard_normal(8 * 64), storage)
    table, slots = tensor(rng.standard_normal((2, 30, 64))), tensor(rng.permutation(32)[:30])
    caches = [[tensor(np.zeros((4, 8, 2, 64)), storage) for _ in range(2)] for _ in range(2)]
    ops.rotate_and_cache(qkv, bias, table, slots, *caches[0])
    assert ops.rotate_and_cache(qkv, bias, table, slots, *caches[1], queries=False) is None
    for one, other in zip(*caches):
        assert array(one).any()
        np.testing.assert_array_equal(array(other), array(one))


@each_storage
def test_norms_into_the_place_of_others(rng: np.random.Generator, storage: str) -> None:
    """Rows of a larger tensor, with and without something that is added; what lies beside them stays."""
    hidden, delta = (rng.standard_normal((5, 48)).astype(np.float32) for _ in range(2))
    weight = tensor(rng.standard_normal(48), storage)
    room = tensor(np.full((9, 48), 7.0))
    assert ops.rms_norm(tensor(hidden), weight, 1e-6, room[2:7]).shape == [5, 48]
    np.testing.assert_array_equal(array(room)[2:7], array(ops.rms_norm(tensor(hidden), weight, 1e-6)))
    assert (array(room)[[0, 1, 7, 8]] == 7).all()
    sums = [tensor(np.concatenate([hidden, hidden])) for _ in range(2)]
    expected = array(ops.add_rms_norm(tensor(delta), sums[0][5:], weight, 1e-6))
    ops.add_rms_norm(tensor(delta), sums[1][5:], weight, 1e-6, room[4:])
    np.testing.assert_array_equal(array(room)[4:], expected)
    for one in sums:
        np.testing.assert_array_equal(array(one), np.concatenate([hidden, hidden + delta]))
