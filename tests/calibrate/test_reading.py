"""What pairs keep of a layer's attention, against float64; texts go through the layers as through the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
from small_model import CONFIG, random_model

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.calibrate import reading
from paddle_qwen1m.calibrate.reading import Layer, Text
from paddle_qwen1m.calibrate.strategies import Kept, Pairs
from paddle_qwen1m.engine import Engine
from paddle_qwen1m.model import DecoderLayer, Qwen2OneM
from paddle_qwen1m.options import EngineOptions

CHUNK, PAGE = 96, 32
PAIRS = Pairs(np.array([31, 50, 90, 31]), np.array([100, 130, 100, 101]))
OTHERS = Pairs(np.full(4, 200), np.full(4, 150))


def make_text(rng: np.random.Generator, tokens: int) -> Text:
    residual = rng.standard_normal([tokens, CONFIG.hidden_size]).astype(np.float32)
    return Text(rng.integers(0, CONFIG.vocab_size, tokens), residual)


def layer_of(layer: DecoderLayer, texts: list[Text]) -> Layer:
    pages = max(-(-len(text.ids) // PAGE) for text in texts)
    return Layer(layer, CONFIG, texts, PagedCache(replace(CONFIG, num_layers=1), pages, PAGE, "float32"), CHUNK)


def kept_in_float64(layer: DecoderLayer, text: Text, pairs: Pairs, *, last_blocks: bool = False) -> Kept:
    """Piece by piece of the second half: all rows, or those of each one's last block."""
    dual_chunk, tokens = CONFIG.dual_chunk, len(text.ids)
    length, size = dual_chunk.chunk_len, dual_chunk.chunk_size
    scale = CONFIG.head_dim**-0.5 * oracle.temperature(tokens, dual_chunk.original_max_position_embeddings) ** 2
    inv_freq = oracle.inverse_frequencies(CONFIG.head_dim, CONFIG.rope_theta)
    qkv = oracle.linear(
        oracle.rms_norm(text.residual, layer.input_norm.numpy(), CONFIG.rms_norm_eps), layer.qkv_weight.numpy()
    )
    bias, where = layer.qkv_bias.numpy(), np.arange(tokens)
    keys, values = np.zeros([2, tokens, 1, CONFIG.num_kv_heads, CONFIG.head_dim])
    table = oracle.rotary_table(oracle.query_positions(where, length, size), inv_freq)
    q = oracle.rotate_and_cache(qkv, bias, table, where, keys, values)
    critical = oracle.rotary_table(oracle.critical_positions(where, length, size), inv_freq)
    output = layer.output_weight.numpy().astype(np.float64).reshape(CONFIG.hidden_size, CONFIG.num_heads, -1)
    shares, moves, sizes, rows_kept = [], [], [], []
    visited, causal = np.zeros(CONFIG.num_heads), 0
    cuts = sorted({*range(0, tokens, CHUNK), *range(0, tokens, length), tokens})
    for begin, end in zip(cuts, cuts[1:]):
        if end - begin <= 64 or end <= tokens / 2:
            continue
        probe = oracle.rotate_queries(qkv, bias, critical[:, end - 64 : end], end - 64, CONFIG.num_heads)
        sums = oracle.dca_probe(probe, keys, where, end, length, scale)
        chosen = oracle.select_critical(*sums, *pairs, int(pairs.columns.max()), int(pairs.diagonals.max()))
        index = oracle.sparse_index(*chosen, begin, end - begin, length)
        own = q[:, begin:end]
        chosen_out, sparse = oracle.sparse_piece(own, keys, values, where, index, begin, length, scale)
        full_out, dense = oracle.dense_piece(own, keys, values, where, begin, length, scale)
        last = 0 if end > tokens - 64 else (end - begin - 1) // 64 * 64
        measured = range(last if last_blocks else 0, end - begin)
        shares.append(np.exp(sparse - dense)[:, measured])
        moved = np.einsum("nhd,chd->hnc", chosen_out - full_out, output)
        moves.append(np.square(moved).sum(-1)[:, measured])
        behind = text.residual[begin:end] + np.einsum("nhd,chd->nc", full_out, output)
        sizes += np.square(behind).sum(-1)[measured].tolist()
        rows_kept += [begin + row for row in measured]
        for first in range(measured.start, measured.stop, 64):
            counts, ends = index.counts[:, first // 64], range(begin + first, min(begin + first + 64, end))
            pairs_seen = sum(end + 1 for end in ends)
            visited += np.minimum(len(ends) * (64 * counts[:, :3].sum(-1) + counts[:, 3:].sum(-1)), pairs_seen)
            causal += pairs_seen
    share = np.concatenate(shares, axis=1)
    last = np.array(rows_kept) >= tokens - 64
    last_share, mean = share[:, last], share.mean(1)
    move, size = np.concatenate(moves, axis=1), np.array(sizes)
    change = move.mean(1) / size.mean() / 2
    if last.any():
        change += move[:, last].mean(1) / size[last].mean() / 2
    return Kept(mean, last_share.mean(1) if last_share.size else np.ones_like(mean), visited / causal, change)


@pytest.fixture
def model(rng: np.random.Generator) -> Qwen2OneM:
    return random_model(rng)


@pytest.mark.parametrize("tokens", [530, 480])
def test_kept_is_what_float64_says(model: Qwen2OneM, rng: np.random.Generator, tokens: int) -> None:
    """530: the last piece has few rows and keeps all."""
    text, other = make_text(rng, tokens), make_text(rng, 400)
    layer = layer_of(model.layers[1], [text, other])
    expected = [kept_in_float64(model.layers[1], one, PAIRS) for one in (text, other)]
    assert expected[0].mean.min() < 0.9 and expected[0].cost.min() < 0.9
    assert expected[0].change.max() > 1e-2
    for kept, wanted in (
        (layer.measure(OTHERS, PAIRS, first_alone=True, change=True)[1], expected[0]),
        (layer.measure(PAIRS, change=True)[0], Kept(*(np.mean(two, axis=0) for two in zip(*expected)))),
        (layer.measure(PAIRS, first_alone=True, change=True)[0], expected[0]),
        (layer.measure(PAIRS, first_alone=True)[0], expected[0]._replace(change=np.full(4, np.nan))),
    ):
        np.testing.assert_allclose(kept, wanted, rtol=1e-4, atol=1e-10)


def test_all_keys_change_nothing(model: Qwen2OneM, rng: np.random.Generator) -> None:
    (kept,) = layer_of(model.layers[1], [make_text(rng, 480)]).measure(Pairs(*np.full((2, 4), 600)), change=True)
    np.testing.assert_allclose(kept.mean, 1, rtol=1e-5)
    np.testing.assert_allclose(kept.change, 0, atol=1e-12)


def test_with_fewer_blocks_the_last_of_each_piece_is_measured_and_all_at_the_end(
    model: Qwen2OneM, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCKS_A_TEXT", 1)
    text = make_text(rng, 530)
    expected = kept_in_float64(model.layers[0], text, PAIRS, last_blocks=True)
    (kept,) = layer_of(model.layers[0], [text]).measure(PAIRS, change=True)
    np.testing.assert_allclose(kept, expected, rtol=1e-4, atol=1e-10)


def test_all_row_blocks_of_a_piece_at_once_keep_what_those_measured_keep_one_by_one(
    model: Qwen2OneM, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCKS_A_TEXT", 1)
    text, launches = make_text(rng, 530), list[int]()
    attend = ops.dca_sparse_prefill

    def counted(*arguments: Any, **options: Any) -> None:
        launches.append(options["num_blocks"])
        attend(*arguments, **options)

    monkeypatch.setattr(ops, "dca_sparse_prefill", counted)
    (expected,) = layer_of(model.layers[0], [text]).measure(PAIRS, change=True)
    assert set(launches) == {1}
    layer = layer_of(model.layers[0], [text])
    layer.measure(PAIRS)  # reads the text; from here on nothing else asks which device it is
    launches.clear()
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    (kept,) = layer.measure(PAIRS, change=True)
    assert set(launches) == {2}
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize(("rows", "blocks", "heads", "at_once"), [(32768, 43, 4, True), (32768, 8, 28, False)])
def test_a_gpu_computes_all_row_blocks_where_these_are_done_sooner(
    rows: int, blocks: int, heads: int, at_once: bool
) -> None:
    """The last pieces of a small model's text of 131,072 tokens, and of the 7B's of 1,000,000."""
    piece = Piece(0, 65536, rows)
    assert reading._sooner_at_once(piece, np.arange(blocks), heads) == at_once


def test_texts_that_went_through_all_layers_are_where_the_model_takes_them(
    model: Qwen2OneM, rng: np.random.Generator
) -> None:
    texts = [make_text(rng, tokens) for tokens in (300, 530)]
    for text in texts:
        text.residual = model.embedding.numpy()[text.ids]
    for layer in model.layers:
        done = list(layer_of(layer, texts).advance())
        assert sum(done) == 830
    engine = Engine(model, EngineOptions(max_num_batched_tokens=CHUNK, sparse=False))
    for text in texts:
        normed = oracle.rms_norm(text.residual, model.norm.numpy(), CONFIG.rms_norm_eps)
        logits = oracle.linear(normed, model.head.numpy())
        expected = engine.logits(text.ids, range(len(text.ids)))
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
