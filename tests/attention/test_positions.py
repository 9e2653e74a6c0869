"""Positions, temperature and rotation: properties 1 to 5."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from faces import FACES, Face, error

from paddle_qwen1m.attention import positions
from paddle_qwen1m.config import DualChunkConfig

QWEN_L, QWEN_C = 253952, 262144
QWEN = DualChunkConfig(chunk_size=262144, local_size=8192, original_max_position_embeddings=262144)

QWEN_POSITIONS = [
    (0, 0, 253952, 262144, 253952, 262144),
    (8191, 8191, 262143, 262144, 262143, 270335),
    (8192, 8192, 262144, 262144, 262144, 270336),
    (253951, 253951, 262144, 262144, 507903, 516095),
    (253952, 0, 253952, 262144, 253952, 262144),
    (262145, 8193, 262144, 262144, 262145, 270337),
    (507904, 0, 253952, 262144, 253952, 262144),
    (600000, 92096, 262144, 262144, 346048, 354240),
    (1000000, 238144, 262144, 262144, 492096, 500288),
]


@pytest.mark.parametrize("position, r, succ, inter, succ_critical, inter_critical", QWEN_POSITIONS)
def test_p01_rotary_positions_of_the_published_models(
    position: int, r: int, succ: int, inter: int, succ_critical: int, inter_critical: int
) -> None:
    """Property 1: key and query positions for L = 253952 and c = 262144, of the oracle and of the model."""
    at = np.array([position])
    assert QWEN.chunk_len == QWEN_L
    assert oracle.key_positions(at, QWEN_L).tolist() == [r]
    assert oracle.query_positions(at, QWEN_L, QWEN_C)[:, 0].tolist() == [r, succ, inter]
    assert oracle.critical_positions(at, QWEN_L, QWEN_C)[:, 0].tolist() == [r, succ_critical, inter_critical]
    assert positions.query_positions(at, QWEN, 3)[:, 0].tolist() == [r, succ, inter]
    assert positions.critical_positions(at, QWEN, 3)[:, 0].tolist() == [r, succ_critical, inter_critical]


@pytest.mark.parametrize(
    "length, variants", [(1, 1), (QWEN_L, 1), (QWEN_L + 1, 2), (2 * QWEN_L, 2), (2 * QWEN_L + 1, 3)]
)
def test_p09_only_the_variants_of_existing_stages_are_made(length: int, variants: int) -> None:
    """Property 9: for n <= L the model rotates queries once; with succ twice; with inter three times."""
    assert positions.num_variants(length, QWEN_L) == variants == len(oracle.stages_of(length - 1, length, QWEN_L))
    assert len(positions.query_positions(np.arange(3), QWEN, variants)) == variants


@pytest.mark.parametrize(
    "prefill_chunk, count, tail", [(131072, 11, (917504, 1000000)), (32768, 34, (983040, 1000000))]
)
def test_pieces_of_a_million_token_prefill(prefill_chunk: int, count: int, tail: tuple[int, int]) -> None:
    """Section 4.2: the number of pieces of a 1M prompt; each within one DCA chunk; rows and positions advance alike."""
    cut = []
    for begin in range(0, 1000000, prefill_chunk):
        end = min(begin + prefill_chunk, 1000000)
        chunk = list(positions.pieces(begin, end, QWEN_L))
        assert [(p.begin, p.end) for p in chunk] == oracle.pieces_of(begin, end, QWEN_L)
        assert all(p.row == p.begin - begin for p in chunk)
        assert all(p.begin // QWEN_L == (p.end - 1) // QWEN_L for p in chunk)
        cut += chunk
    assert len(cut) == count and (cut[-1].begin, cut[-1].end) == tail
    assert [p.begin for p in cut[1:]] == [p.end for p in cut[:-1]]


TOY_ROWS = [
    (7, False, 8, [7, 6, 5, 4, 3, 3, 2, 1, 0]),
    (7, False, 10, [7, 6, 5, 4, 3, 5, 4, 3, 2, 1, 0]),
    (7, False, 14, [7, 6, 5, 4, 3, 7, 6, 5, 4, 3, 4, 3, 2, 1, 0]),
    (7, True, 8, [8, 7, 6, 5, 4, 3, 2, 1, 0]),
    (7, True, 10, [7, 6, 5, 4, 3, 5, 4, 3, 2, 1, 0]),
    (7, True, 14, [11, 10, 9, 8, 7, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
    (8, False, 8, [8, 7, 6, 5, 4, 3, 2, 1, 0]),
    (8, False, 9, [8, 7, 6, 5, 4, 4, 3, 2, 1, 0]),
    (8, False, 14, [8, 7, 6, 5, 4, 8, 7, 6, 5, 4, 4, 3, 2, 1, 0]),
    (8, True, 14, [12, 11, 10, 9, 8, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
]


@pytest.mark.parametrize("clamp, critical, row, expected", TOY_ROWS)
def test_p02_toy_relative_positions(clamp: int, critical: bool, row: int, expected: list[int]) -> None:
    """Property 2: rows of the technical report's toy figure (L = 5), with its clamp of 7 and the code's of 8."""
    assert oracle.relative_positions([row], np.arange(row + 1), 5, clamp, critical)[0].tolist() == expected


@pytest.mark.parametrize("critical, expected", [(False, [5, 6, 7, 3, 4, 5, 6, 7]), (True, [7, 7, 7, 4, 4, 7, 7, 7])])
def test_p02_toy_diagonal_of_offset_7(critical: bool, expected: list[int]) -> None:
    """Property 2: the figure's diagonal, read from the last row up."""
    matrix = oracle.relative_positions(np.arange(15), np.arange(15), 5, 7, critical)
    assert [int(matrix[i, i - 7]) for i in range(14, 6, -1)] == expected


@pytest.mark.parametrize("critical", [False, True])
@pytest.mark.parametrize("chunk_len, chunk_size", [(5, 8), (16, 20), (64, 80)])
def test_p02_three_stage_rotations_give_the_pairwise_positions(chunk_len: int, chunk_size: int, critical: bool) -> None:
    """Property 2: query position minus key position, by stage, is the relative position of the pair."""
    tokens = np.arange(4 * chunk_len + 3)
    queries = (oracle.critical_positions if critical else oracle.query_positions)(tokens, chunk_len, chunk_size)
    keys = oracle.key_positions(tokens, chunk_len)
    matrix = oracle.relative_positions(tokens, tokens, chunk_len, chunk_size, critical)
    for i in tokens:
        for stage, start, end in oracle.stages_of(i, i + 1, chunk_len):
            assert (queries[stage, i] - keys[start:end] == matrix[i, start:end]).all()


@pytest.mark.parametrize("chunk_len, local_size", [(5, 3), (16, 4), (64, 63)])
def test_p03_relative_positions_span_zero_to_c_and_fall_with_the_key(chunk_len: int, local_size: int) -> None:
    """Property 3: over all causal pairs the largest is c, the smallest 0; in each chunk of keys later ones are nearer.

    (The inter stage spans several chunks of keys and starts anew in each.)
    """
    tokens = np.arange(5 * chunk_len)
    matrix = oracle.relative_positions(tokens, tokens, chunk_len, chunk_len + local_size)
    causal = matrix[np.tril_indices(len(tokens))]
    assert causal.max() == chunk_len + local_size and causal.min() == 0
    for i in tokens:
        for start in range(0, i + 1, chunk_len):
            assert (np.diff(matrix[i, start : min(start + chunk_len, i + 1)]) <= 0).all()


TEMPERATURES = [
    (300000, 1.013489, 1.027160),
    (393216, 1.040547, 1.082737),
    (524288, 1.069315, 1.143434),
    (786432, 1.109861, 1.231792),
    (1000000, 1.133886, 1.285698),
    (1010000, 1.134881, 1.287955),
    (1048576, 1.138629, 1.296477),
]


@pytest.mark.parametrize("length, m, m_squared", TEMPERATURES)
def test_p04_temperature_of_long_sequences(length: int, m: float, m_squared: float) -> None:
    """Property 4: m(n) and m(n)^2 beyond the trained length, to the six digits of the table."""
    for got in (oracle.temperature(length, 262144), QWEN.temperature(length)):
        assert got == pytest.approx(m, abs=5.1e-7)
        assert got**2 == pytest.approx(m_squared, abs=5.1e-7)


@pytest.mark.parametrize("length", [1, 32768, 253953, 262143, 262144])
def test_p04_temperature_is_one_up_to_the_trained_length(length: int) -> None:
    """Property 4: m(n) = 1 for all n <= 262144, and everywhere when scaling is off."""
    assert oracle.temperature(length, 262144) == QWEN.temperature(length) == 1.0
    off = DualChunkConfig(chunk_size=262144, local_size=8192, original_max_position_embeddings=0)
    assert oracle.temperature(4 * length, 0) == off.temperature(4 * length) == 1.0


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)
@pytest.mark.parametrize("a, b", [(0, 0), (5, 5), (17, 3), (262144, 253951), (262144, 0)])
def test_p05_rotated_dot_products_depend_on_distance_alone(
    face: Face, rng: np.random.Generator, a: int, b: int
) -> None:
    """Property 5: q at a with k at b equals q at a - b with k at 0 (frequencies whose float32 angles are exact)."""
    inv_freq = (2.0 ** -np.arange(32)).astype(np.float32)
    q, k = rng.standard_normal((2, 64))
    table = face.rotary_table(np.array([[a, b, a - b, 0]], dtype=np.int32), inv_freq)[0]
    rotated = oracle.rotate(q, table[0]) @ oracle.rotate(k, table[1])
    shifted = oracle.rotate(q, table[2]) @ oracle.rotate(k, table[3])
    assert abs(rotated - shifted) <= 10 * face.tolerance


@pytest.mark.parametrize("base, head_dim", [(1e7, 128), (1e5, 128), (1e6, 64)])
def test_rotary_table_matches_the_oracle_at_every_distance(base: float, head_dim: int) -> None:
    """Section 2.2: angles are float32 products, their cosine and sine are good to float32 even at 262144 radians."""
    tokens = np.array([[0, 1, 2, 63, 8191, 100003], [253951, 253952, 262143, 262144, 507903, 516095]], np.int32)
    inv_freq = oracle.inverse_frequencies(head_dim, base)
    expected = oracle.rotary_table(tokens, inv_freq)
    assert error(FACES[1].rotary_table(tokens, inv_freq), expected) < 2e-7
