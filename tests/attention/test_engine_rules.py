"""The rules of attention as the engine applies them, on a small random model: properties 4, 7, 10, 13, 23 and 31."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import oracle
import pytest
from faces import array, error
from small_model import BUDGETS, CONFIG, random_model

from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.engine import Engine, SamplingParams
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions


class SeenStep(NamedTuple):
    """What the engine asked of one forward pass."""

    scales: set[float]
    dense: int
    sparse: int
    decode: bool


class Watched(NamedTuple):
    """An engine, and the steps it has run since."""

    engine: Engine
    steps: list[SeenStep]


def watched_engine(monkeypatch: pytest.MonkeyPatch, model: Qwen2OneM, options: EngineOptions) -> Watched:
    """An engine whose forward passes are noted."""
    engine = Engine(model, options, BUDGETS)
    watched = Watched(engine, [])
    forward = engine.model.layer_by_layer

    def note(step, *arguments):  # type: ignore[no-untyped-def]
        scales = set(step.scale.numpy().tolist()) | {float(np.float32(piece.scale)) for piece in step.sparse_pieces}
        dense = len(step.dense_pieces)
        watched.steps.append(SeenStep(scales, dense, len(step.sparse_pieces), step.lengths is not None))
        return forward(step, *arguments)

    monkeypatch.setattr(engine.model, "layer_by_layer", note)
    return watched


@pytest.fixture
def model(rng: np.random.Generator) -> Qwen2OneM:
    return random_model(rng)


@pytest.fixture
def prompt(rng: np.random.Generator) -> np.ndarray:
    """Token ids of a prompt of four DCA chunks and a bit."""
    return rng.integers(0, CONFIG.vocab_size, 530)


def scale_at(length: int) -> float:
    """The softmax scale D^-0.5 m(n)^2 in float32."""
    return float(np.float32(CONFIG.head_dim**-0.5 * oracle.temperature(length, 160) ** 2))


def assert_chunks_of_530(steps: list[SeenStep], sparse: bool) -> None:
    """Chunks of 128 rows are sparse or dense; the last one's 18 rows, fewer than the probe's 64, are always dense."""
    assert [(step.sparse > 0, step.dense > 0) for step in steps] == [(sparse, not sparse)] * 4 + [(False, True)]


@pytest.mark.parametrize("rows, sparse", [(1, 0), (64, 0), (65, 1), (128, 1)])
def test_as_few_rows_as_the_probe_has_attend_to_all_keys(
    monkeypatch: pytest.MonkeyPatch, model: Qwen2OneM, prompt: np.ndarray, rows: int, sparse: int
) -> None:
    """In a sparse prefill, whatever the rest of the prompt does: choosing their keys would cost more."""
    engine, steps = watched_engine(monkeypatch, model, EngineOptions(max_num_batched_tokens=128, sparse_threshold=0))
    engine.logits(prompt[: 128 + rows])
    assert [(step.sparse, step.dense) for step in steps] == [(1, 0), (sparse, 1 - sparse)]


@pytest.mark.parametrize("sparse", [False, True])
def test_p04_every_prefill_chunk_has_the_temperature_of_the_whole_prompt(
    monkeypatch: pytest.MonkeyPatch, model: Qwen2OneM, prompt: np.ndarray, sparse: bool
) -> None:
    """Property 4: m(prompt length) in every chunk, dense, sparse and probing; it is not 1 here."""
    options = EngineOptions(max_num_batched_tokens=128, sparse_threshold=0 if sparse else 10_000)
    engine, steps = watched_engine(monkeypatch, model, options)
    engine.logits(prompt)
    assert len(steps) == 5 and scale_at(530) > scale_at(160)
    assert all(step.scales == {scale_at(530)} for step in steps)
    assert_chunks_of_530(steps, sparse)


def test_p10_decode_has_the_temperature_of_its_own_length(
    monkeypatch: pytest.MonkeyPatch, model: Qwen2OneM, prompt: np.ndarray
) -> None:
    """Property 10: the token that is processed as number n attends with m(n)^2."""
    engine, steps = watched_engine(monkeypatch, model, EngineOptions())
    engine.generate([prompt], SamplingParams(max_tokens=4, temperature=0.0))
    decoded = [step for step in steps if step.decode]
    assert [step.scales for step in decoded] == [{scale_at(n)} for n in (531, 532, 533)]


@pytest.mark.parametrize("chunk", [7, 64, 100, 128, 129, 300])
def test_p07_the_model_does_not_see_prefill_chunks(
    model: Qwen2OneM, rng: np.random.Generator, prompt: np.ndarray, chunk: int
) -> None:
    """Property 7: dense logits at several positions are the same for every size of prefill chunk, to float32."""
    tokens, wanted = prompt[:270], [0, 127, 128, 200, 256, 269]
    whole = Engine(model, EngineOptions()).logits(tokens, wanted)
    parts = Engine(model, EngineOptions(max_num_batched_tokens=chunk)).logits(tokens, wanted)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=2e-5 * np.abs(whole).max())


def test_defaults_are_those_of_the_device(model: Qwen2OneM) -> None:
    """On a CPU: chunks of 2,048 tokens and a cache of what is computed in; what was chosen stays."""
    options = Engine(model, EngineOptions()).options
    assert (options.max_num_batched_tokens, options.kv_cache_dtype) == (2048, "float32")
    options = Engine(model, EngineOptions(max_num_batched_tokens=77, kv_cache_dtype="bfloat16")).options
    assert (options.max_num_batched_tokens, options.kv_cache_dtype) == (77, "bfloat16")


@pytest.mark.parametrize("page_size", [48, 256, 3])
def test_p13_an_engine_refuses_pages_that_do_not_divide_the_chunk(model: Qwen2OneM, page_size: int) -> None:
    """Property 13: the error names both numbers."""
    with pytest.raises(ValueError, match=rf"128.*{page_size}"):
        Engine(model, EngineOptions(page_size=page_size))


def test_p23_the_threshold_is_strict_and_32768_by_default(model: Qwen2OneM) -> None:
    """Property 23: 32768 tokens are prefilled densely, 32769 sparsely; never without budgets or when switched off."""
    engine = Engine(model, EngineOptions(), BUDGETS)
    assert not engine.is_sparse(32768) and engine.is_sparse(32769)
    assert not Engine(model, EngineOptions()).is_sparse(32769)
    assert not Engine(model, EngineOptions(sparse=False), BUDGETS).is_sparse(32769)


@pytest.mark.parametrize("threshold, sparse", [(530, False), (529, True)])
def test_p23_the_decision_holds_for_every_chunk_and_never_for_decode(
    monkeypatch: pytest.MonkeyPatch, model: Qwen2OneM, prompt: np.ndarray, threshold: int, sparse: bool
) -> None:
    """Property 23: the prompt's length decides, also for chunks that end long before the threshold."""
    options = EngineOptions(max_num_batched_tokens=128, sparse_threshold=threshold)
    engine, steps = watched_engine(monkeypatch, model, options)
    engine.generate([prompt], SamplingParams(max_tokens=3, temperature=0.0))
    prefill = [step for step in steps if not step.decode]
    assert len(prefill) == 5 and len(steps) - len(prefill) == 2
    assert_chunks_of_530(prefill, sparse)
    assert all(step.sparse == 0 for step in steps if step.decode)


@pytest.mark.parametrize("vertical, slash", [(10_000, 100), (31, 10_000)])
def test_p31_full_budgets_give_the_dense_model(model: Qwen2OneM, prompt: np.ndarray, vertical: int, slash: int) -> None:
    """Property 31: with all columns, or all diagonals, sparse prefill gives the dense logits, whatever the chunks."""
    wanted = [0, 130, 300, 529]
    dense = Engine(model, EngineOptions()).logits(prompt, wanted)
    budgets = SparseBudgets.uniform(vertical, slash, CONFIG.num_layers, CONFIG.num_heads)
    options = EngineOptions(max_num_batched_tokens=150, sparse_threshold=0)
    full = Engine(model, options, budgets).logits(prompt, wanted)
    np.testing.assert_allclose(full, dense, rtol=0, atol=2e-5 * np.abs(dense).max())
    few = Engine(model, options, BUDGETS).logits(prompt, wanted)
    assert np.abs(few - dense).max() > 1e-3 * np.abs(dense).max()


def oracle_logits(model: Qwen2OneM, ids: np.ndarray, prefill_chunk: int) -> np.ndarray:
    """Logits [n, vocab] of a sparse chunked prefill, composed of nothing but the oracle's ops."""
    config, dual = model.config, model.config.dual_chunk
    length, chunk_len, chunk_size = len(ids), dual.chunk_len, dual.chunk_size
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    scale = head_dim**-0.5 * oracle.temperature(length, dual.original_max_position_embeddings) ** 2
    inv_freq = oracle.inverse_frequencies(head_dim, config.rope_theta)
    tokens, eps = np.arange(length), config.rms_norm_eps
    table = oracle.rotary_table(oracle.query_positions(tokens, chunk_len, chunk_size), inv_freq)
    critical = oracle.rotary_table(oracle.critical_positions(tokens, chunk_len, chunk_size), inv_freq)
    block_table = np.arange(-(-length // 64))
    hidden = oracle.embedding(ids, array(model.embedding))
    for number, layer in enumerate(model.layers):
        weights = {name: array(buffer) for name, buffer in layer.named_buffers()}
        qkv = oracle.linear(oracle.rms_norm(hidden, weights["input_norm"], eps), weights["qkv_weight"])
        keys, values = np.zeros((2, len(block_table), 64, kv_heads, head_dim))
        bias = weights["qkv_bias"]
        q = oracle.rotate_and_cache(qkv, bias, table, tokens, keys, values)
        out = np.empty((length, heads, head_dim))
        for start in range(0, length, prefill_chunk):
            for begin, end in oracle.pieces_of(start, min(start + prefill_chunk, length), chunk_len):
                if end - begin <= 64:  # as few rows as the probe has
                    piece = np.array([[0, begin, end - begin, begin]])
                    oracle.dca_prefill(q, out, keys, values, block_table[None], piece, [scale], chunk_len)
                    continue
                probe = end - 64
                probes = oracle.rotate_queries(qkv, bias, critical[:, probe:end], probe, heads)
                scores = oracle.dca_probe(probes, keys, block_table, end, chunk_len, scale)
                sizes = BUDGETS.vertical[number], BUDGETS.slash[number]
                selected = oracle.select_critical(*scores, *sizes, int(sizes[0].max()), int(sizes[1].max()))
                index = oracle.sparse_index(*selected, begin, end - begin, chunk_len)
                where = begin, begin, end - begin, chunk_len, scale
                oracle.dca_sparse_prefill(q, out, keys, values, block_table, index, *where)
        hidden = hidden + oracle.linear(out.reshape(length, -1), weights["output_weight"])
        normed = oracle.rms_norm(hidden, weights["post_attention_norm"], eps)
        inner = oracle.silu_mul(oracle.linear(normed, weights["gate_up_weight"]))
        hidden = hidden + oracle.linear(inner, weights["down_weight"])
    return oracle.linear(oracle.rms_norm(hidden, array(model.norm), eps), array(model.head))


@pytest.mark.parametrize("chunk", [128, 64])
def test_sparse_prefill_of_the_model_equals_the_composed_oracle(
    model: Qwen2OneM, prompt: np.ndarray, chunk: int
) -> None:
    """Sections 5 to 8 end to end: logits of every position after a sparse prefill in chunks, with m > 1.

    Chunks that divide L, so that the engine, which ends chunks at DCA borders, cuts where the plain rule does. In
    chunks of 64 rows, as few as the probe has, no key is chosen.
    """
    options = EngineOptions(max_num_batched_tokens=chunk, sparse_threshold=0)
    got = Engine(model, options, BUDGETS).logits(prompt, range(len(prompt)))
    expected = oracle_logits(model, prompt, chunk)
    assert error(got, expected) < 1e-4
