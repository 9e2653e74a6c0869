"""Dense dual chunk attention, prefill and decode: properties 6 to 15."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from cases import CHUNK_LEN, CHUNK_SIZE, exact_frequencies, make_prompt, paged_cache, rotations
from faces import FACES, STORAGE, Face, OpFace, error, stored

each_face = pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)


def vanilla(q: np.ndarray, k: np.ndarray, v: np.ndarray, inv_freq: np.ndarray, scale: float) -> np.ndarray:
    """Ordinary causal attention with rotary positions 0, 1, 2, ..."""
    positions = np.arange(len(q))
    q, k = rotations(q, positions[None], inv_freq)[0], rotations(k, positions[None], inv_freq)[0]
    return oracle.attend(q, k, v, np.tri(len(q), dtype=bool), scale)[0]


@each_face
@pytest.mark.parametrize("tokens", [1, 100, CHUNK_LEN + 1, CHUNK_SIZE + 2, 2 * CHUNK_LEN + 1, 4 * CHUNK_LEN + 37])
def test_p06_three_stage_merge_equals_pairwise_softmax(face: Face, rng: np.random.Generator, tokens: int) -> None:
    """Property 6: pieces, stages and paging reproduce one softmax over explicit relative positions."""
    prompt = make_prompt(rng, tokens, temperature=1.13)
    arguments = exact_frequencies(64), prompt.chunk_len, prompt.chunk_size, prompt.scale
    expected = oracle.pairwise_dca(prompt.q, prompt.k, prompt.v, *arguments)
    assert error(prompt.dense(face), expected) < face.tolerance


@each_face
@pytest.mark.parametrize("start", [1, 100, CHUNK_LEN, 200, 2 * CHUNK_LEN + 5, 399])
def test_p07_any_split_into_prefill_chunks_gives_the_same_output(
    face: Face, rng: np.random.Generator, start: int
) -> None:
    """Property 7: a prompt prefilled in one chunk, in two split at `start`, and in uneven small ones."""
    prompt = make_prompt(rng, 400)
    whole = prompt.dense(face)
    assert error(prompt.dense(face, [0, start]), whole) < face.tolerance
    assert error(prompt.dense(face, [*range(0, start, 61), start]), whole) < face.tolerance


@each_face
@pytest.mark.parametrize("tokens", [CHUNK_LEN, CHUNK_SIZE, CHUNK_SIZE + 1])
def test_p08_short_prompts_are_ordinary_rope_attention(face: Face, rng: np.random.Generator, tokens: int) -> None:
    """Property 8: for n <= c + 1 dense dual chunk attention is vanilla causal attention."""
    prompt = make_prompt(rng, tokens)
    expected = vanilla(prompt.q, prompt.k, prompt.v, exact_frequencies(64), prompt.scale)
    assert error(prompt.dense(face), expected) < face.tolerance


@each_face
def test_p08_first_difference_is_the_last_row_at_c_plus_2(face: Face, rng: np.random.Generator) -> None:
    """Property 8: at n = c + 2 the last row, and it alone, departs from vanilla attention."""
    prompt = make_prompt(rng, CHUNK_SIZE + 2)
    expected = vanilla(prompt.q, prompt.k, prompt.v, exact_frequencies(64), prompt.scale)
    got = prompt.dense(face)
    assert error(got[:-1], expected[:-1]) < face.tolerance
    assert error(got[-1], expected[-1]) > 1e-3


@each_face
@pytest.mark.parametrize("tokens", [1, CHUNK_LEN - 1, CHUNK_LEN])
def test_p09_within_one_chunk_only_the_intra_stage_runs(face: Face, rng: np.random.Generator, tokens: int) -> None:
    """Property 9: for n <= L the succ and inter queries are not read: they may be NaN, or absent."""
    prompt = make_prompt(rng, tokens)
    expected = prompt.dense(face)
    assert [s.stage for s in oracle.stages_of(0, tokens, CHUNK_LEN)] == [oracle.INTRA]
    prompt.queries[1:] = np.nan
    assert (prompt.dense(face) == expected).all()
    out = np.full(expected.shape, np.nan)
    keys, values, table = prompt.caches
    pieces = prompt.pieces([0])
    face.dca_prefill(prompt.queries[:1], out, keys, values, table[None], pieces, [prompt.scale], CHUNK_LEN)
    assert (out == expected).all()


@each_face
@pytest.mark.parametrize("tokens", [1, CHUNK_LEN, CHUNK_LEN + 1, 2 * CHUNK_LEN, 2 * CHUNK_LEN + 1, 3 * CHUNK_LEN + 50])
def test_p10_decode_equals_the_last_row_of_prefill(face: Face, rng: np.random.Generator, tokens: int) -> None:
    """Property 10: decode of token p equals row p of a dense prefill when m = 1."""
    prompt = make_prompt(rng, tokens)
    keys, values, table = prompt.caches
    last = prompt.queries[:, -1:]
    got = face.dca_decode(last, keys, values, table[None], np.array([tokens]), [prompt.scale], CHUNK_LEN)
    assert error(got[0], prompt.dense(face)[-1]) < face.tolerance


@each_face
def test_p10_decode_with_temperature_is_the_explicit_sum(face: Face, rng: np.random.Generator) -> None:
    """Property 10: with m != 1 every key's logit carries m(n)^2, n counting the token itself (DESIGN.md rule 4)."""
    tokens, head_dim = 3 * CHUNK_LEN + 50, 64
    m = oracle.temperature(tokens, CHUNK_SIZE)
    assert m > 1
    prompt = make_prompt(rng, tokens, head_dim=head_dim, temperature=m)
    keys, values, table = prompt.caches
    arguments = prompt.k, prompt.v, exact_frequencies(head_dim), CHUNK_LEN, CHUNK_SIZE, head_dim**-0.5 * m * m
    expected = oracle.pairwise_dca(prompt.q[-1:], *arguments, begin=tokens - 1)
    scale = [head_dim**-0.5 * m * m]
    got = face.dca_decode(prompt.queries[:, -1:], keys, values, table[None], np.array([tokens]), scale, CHUNK_LEN)
    assert error(got[0], expected[0]) < face.tolerance


def test_p10_distance_to_the_references_key_temperatures(capsys: pytest.CaptureFixture[str]) -> None:
    """Property 10: m(n)^2 differs from m_q(n) * m_k(j) by less than 0.1 % over 8192 tokens generated at 1M.

    The references leave m(prompt length) on prompt keys and m(j + 1) on generated ones.
    """
    prompt, generated = 1_000_000, 8_192
    last = oracle.temperature(prompt + generated, 262144)
    key_temperatures = [oracle.temperature(prompt, 262144), oracle.temperature(prompt + 1, 262144), last]
    distances = [abs(last * last / (last * key) - 1) for key in key_temperatures]
    print(f"largest relative distance of a logit to the references: {max(distances):.6f}")
    assert 0 < max(distances) < 1e-3


DECODE_LENGTHS = [
    (253952, 253952, 0, 0),
    (253953, 1, 253952, 0),
    (262144, 8192, 253952, 0),
    (507905, 1, 253952, 253952),
    (1000000, 238144, 253952, 507904),
]


@pytest.mark.parametrize("length, intra, succ, inter", DECODE_LENGTHS)
def test_p11_decode_length_splits(length: int, intra: int, succ: int, inter: int) -> None:
    """Property 11: the stage lengths of section 9."""
    assert oracle.decode_lengths(length, 253952) == (intra, succ, inter)


@each_face
def test_p11_batched_decode_equals_each_sequence_alone(face: Face, rng: np.random.Generator) -> None:
    """Property 11: sequences of different chunk counts share a batch; empty stages add nothing and no NaN."""
    lengths = [1, 60, CHUNK_LEN, CHUNK_LEN + 1, 2 * CHUNK_LEN, 2 * CHUNK_LEN + 1, 4 * CHUNK_LEN + 9]
    prompts = [make_prompt(rng, n) for n in lengths]
    alone = [
        face.dca_decode(p.queries[:, -1:], *p.caches[:2], p.cache.tables, np.array([n]), [p.scale], CHUNK_LEN)[0]
        for p, n in zip(prompts, lengths)
    ]
    rotated = [oracle.read_pages(p.caches[0], p.caches[2], 0, n) for p, n in zip(prompts, lengths)]
    cache = paged_cache(rng, rotated, [p.v for p in prompts], 32)
    last = np.stack([p.queries[:, -1] for p in prompts], axis=1)
    scale = [p.scale for p in prompts]
    got = face.dca_decode(last, cache.keys, cache.values, cache.tables, np.array(lengths), scale, CHUNK_LEN)
    assert error(got, np.stack(alone)) < face.tolerance


def test_p12_merge_ignores_a_common_shift_and_an_empty_stage(rng: np.random.Generator) -> None:
    """Property 12: a constant on all LSEs changes nothing; LSE = -inf contributes nothing, whatever its output."""
    outputs, lses = rng.standard_normal((3, 5, 4, 16)), rng.standard_normal((3, 4, 5))
    merged, lse = oracle.merge(outputs, lses)
    shifted, shifted_lse = oracle.merge(outputs, lses + 700.0)
    np.testing.assert_allclose(shifted, merged, rtol=0, atol=1e-13)
    np.testing.assert_allclose(shifted_lse - 700.0, lse, rtol=0, atol=1e-12)
    lses[1] = -np.inf
    np.testing.assert_array_equal(oracle.merge(outputs, lses)[0], oracle.merge(outputs[::2], lses[::2])[0])
    lses[:] = -np.inf
    assert (oracle.merge(outputs, lses)[0] == 0).all()


def test_p12_merging_two_halves_equals_the_whole(rng: np.random.Generator) -> None:
    """Property 12: attention on two halves of a key set, merged, is attention on the whole set."""
    q, k, v = rng.standard_normal((7, 4, 16)), rng.standard_normal((50, 2, 16)), rng.standard_normal((50, 2, 16))
    everything = np.ones((7, 50), bool)
    whole, whole_lse = oracle.attend(q, k, v, everything, 0.3)
    halves = [oracle.attend(q, k[part], v[part], everything[:, part], 0.3) for part in (slice(0, 13), slice(13, 50))]
    merged, lse = oracle.merge(*zip(*halves))
    np.testing.assert_allclose(merged, whole, rtol=0, atol=1e-14)
    np.testing.assert_allclose(lse, whole_lse, rtol=0, atol=1e-14)


@each_face
@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
def test_p13_order_and_size_of_pages_do_not_matter(face: Face, rng: np.random.Generator, page_size: int) -> None:
    """Property 13: the same keys in other pages give the same prefill, decode and probe, bit for bit."""
    prompt = make_prompt(rng, 3 * CHUNK_LEN + 21)
    tokens = len(prompt.q)
    rotated = oracle.read_pages(prompt.caches[0], prompt.caches[2], 0, tokens)
    scale, results = [prompt.scale], []
    for cache in (prompt.cache, paged_cache(rng, [rotated], [prompt.v], page_size, spare_pages=7)):
        out = np.full(prompt.q.shape, np.nan)
        pages = cache.keys, cache.values, cache.tables
        face.dca_prefill(prompt.queries, out, *pages, prompt.pieces([0]), scale, CHUNK_LEN)
        one = face.dca_decode(prompt.queries[:, -1:], *pages, np.array([tokens]), scale, CHUNK_LEN)
        probe = face.dca_probe(prompt.critical[:, -21:], cache.keys, cache.tables[0], tokens, CHUNK_LEN, prompt.scale)
        results.append((out, one, *probe))
    for first, second in zip(*results):
        np.testing.assert_array_equal(first, second)


def test_p13_pages_must_divide_the_chunk(rng: np.random.Generator) -> None:
    """Property 13: an op refuses a page size that does not divide L, and says so."""
    prompt = make_prompt(rng, 200, page_size=48)
    keys, values, table = prompt.caches
    scale, one = [prompt.scale], np.array([200])
    op = OpFace()
    calls = {
        "dca_prefill": lambda: prompt.dense(op),
        "dca_decode": lambda: op.dca_decode(prompt.queries[:, -1:], keys, values, table[None], one, scale, CHUNK_LEN),
        "dca_probe": lambda: op.dca_probe(prompt.critical[:, -8:], keys, table, 200, CHUNK_LEN, prompt.scale),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name}.*48"):
            call()


@each_face
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 2), (10, 2), (7, 1), (14, 2)])
def test_p14_query_head_reads_its_group_of_kv_heads(
    face: Face, rng: np.random.Generator, heads: int, kv_heads: int
) -> None:
    """Property 14: query head h uses KV head floor(h * G / H), in prefill and decode."""
    prompt = make_prompt(rng, 150, heads=heads, kv_heads=kv_heads)
    keys, values, table = prompt.caches
    values[:] = np.arange(kv_heads)[:, None]
    expected = np.array([h * kv_heads // heads for h in range(heads)], dtype=float)
    got = face.dca_decode(prompt.queries[:, -1:], keys, values, table[None], np.array([150]), [prompt.scale], CHUNK_LEN)
    for out in (prompt.dense(face), got):
        np.testing.assert_allclose(out, np.broadcast_to(expected[:, None], out.shape), atol=1e-5)


@pytest.mark.parametrize("storage", STORAGE)
def test_p15_cached_keys_are_the_rotation_rounded_once(rng: np.random.Generator, storage: str) -> None:
    """Property 15: the cache holds rotate(k, p mod L) rounded once to its type: no temperature, no stage, no length.

    float32 arithmetic is off by at most 2e-6 on these numbers, so a rounding to 16 bits may fall on the other side of
    a tie, but only where the exact number lies that close to one: in fewer than one of a thousand keys.
    """
    tokens, heads, kv_heads, head_dim, page_size = 300, 4, 2, 64, 16
    qkv = rng.standard_normal((tokens, (heads + 2 * kv_heads) * head_dim))
    bias = stored(rng.standard_normal(qkv.shape[1]), storage)
    qkv = stored(qkv, "float32")
    empty = np.zeros((tokens, kv_heads, head_dim))
    cache = paged_cache(rng, [empty], [empty], page_size)
    slots = cache.slots(0, 0, tokens)
    op = OpFace(storage)
    inv_freq = oracle.inverse_frequencies(head_dim, 1e7)
    table = op.rotary_table(oracle.query_positions(np.arange(tokens), CHUNK_LEN, CHUNK_SIZE), inv_freq)

    whole = cache.keys.copy(), cache.values.copy()
    op.rotate_and_cache(qkv, bias, table, slots, *whole)
    keys = (qkv + bias).reshape(tokens, -1, head_dim)[:, heads : heads + kv_heads]
    exact = oracle.rotate(keys, table[0][:, None])
    got = whole[0].reshape(-1, kv_heads, head_dim)[slots]
    assert ((got >= stored(exact - 2e-6, storage)) & (got <= stored(exact + 2e-6, storage))).all()
    if storage != "float32":
        assert np.mean(got == stored(exact, storage)) > 0.999

    pieces = cache.keys.copy(), cache.values.copy()
    for start, end in ((0, 77), (77, 128), (128, 300)):
        op.rotate_and_cache(qkv[start:end], bias, table[:1, start:end], slots[start:end], *pieces)
    np.testing.assert_array_equal(pieces, whole)
