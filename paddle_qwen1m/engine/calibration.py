"""What an 8-bit cache is kept by, measured on a text: the frame of a model's keys, and layers that stay in 16 bits."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import inv_freq
from paddle_qwen1m.attention.step import SequenceRows, Step, StepBuilder
from paddle_qwen1m.cache import LayerCache, PagedCache, choose_page_size
from paddle_qwen1m.cache.kv_scales import LARGEST_ERROR, KVScales, centre_of, exponents_of
from paddle_qwen1m.dtypes import INT8, QUANTIZATIONS, itemsize
from paddle_qwen1m.model import AttentionObserver, DecoderLayer, Qwen2OneM, unrounded_dtype

CHUNK_TOKENS = 512
"""Of a text in which a chunk after the other is read; no memory that a prefill does not take anyway."""


def calibrate(model: Qwen2OneM, token_ids: np.ndarray) -> KVScales:
    """Scales of the whole model from a text int64 [n]; every rank calls it and gets the same. Raises as `keys_of`."""
    frequencies, chunk_len = inv_freq(model.config), model.config.dual_chunk.chunk_len
    exponents, centres = [], []
    for keys in keys_of(model, token_ids):
        centres.append(centre_of(keys, frequencies, chunk_len))
        exponents.append(exponents_of(keys, centres[-1], frequencies, chunk_len))
    scales = measure(model, _of_all_ranks(model, KVScales.of_layers(exponents, centres)), token_ids)
    if model.on_gpu:
        paddle.device.cuda.empty_cache()  # what comes next is large, and wants its memory in one piece
    return scales


def measure(model: Qwen2OneM, scales: KVScales, token_ids: np.ndarray) -> KVScales:
    """Scales of the whole model with what rounding does to each layer, and so with the layers that stay in 16 bits, by
    a text int64 [n]. Every rank calls it and gets the same. ValueError as `keys_of`.
    """
    own = scales.of_heads(model.placement.layers_kv_heads(model.group.rank))
    errors = model.group.share(output_errors(model, INT8, replace(own, in_16_bits=()), token_ids))
    in_16_bits = [0.0] * len(errors)
    if itemsize(model.compute_dtype) != 2 and max(errors) > LARGEST_ERROR:
        in_16_bits = model.group.share(output_errors(model, unrounded_dtype(model), None, token_ids))
    return scales.measured(errors, in_16_bits)


def output_errors(model: Qwen2OneM, dtype: str, scales: KVScales | None, token_ids: np.ndarray) -> list[float]:
    """How far the output of each layer's attention, behind its projection, is with keys and values of `dtype` from what
    it is with those of the type of the computation: the norm of the difference over that of the output, of a text int64
    [n] that is read densely. What a layer gets is made without rounding before it. scales: those of the rank's heads.
    """
    exact = _cache_of(model, token_ids, model.compute_dtype)
    rounded = _cache_of(model, token_ids, dtype, scales)
    moved, size = np.zeros((2, model.config.num_layers))

    def compare(step: Step) -> AttentionObserver:
        def of_layer(layer: DecoderLayer, normed: paddle.Tensor, heads: paddle.Tensor) -> None:
            others = _end_of(layer.attention(normed, step, rounded.layers[layer.number], None))
            outputs = (model.group.all_reduce(layer.linear(one, "output_weight")) for one in (heads, others))
            expected, got = (ops.cast(one, "float32").numpy().astype(np.float64) for one in outputs)
            moved[layer.number] += np.square(got - expected).sum()
            size[layer.number] += np.square(expected).sum()

        return of_layer

    with paddle.no_grad():
        for step in _steps(model, rounded, token_ids):
            _end_of(model.layer_by_layer(step, exact.layers, observe=compare(step)))
    return [float(error) for error in np.sqrt(moved / np.maximum(size, np.finfo(np.float64).tiny))]


def keys_of(model: Qwen2OneM, token_ids: np.ndarray) -> Iterator[np.ndarray]:
    """Layer by layer this rank's unrotated keys, float32 [n, G, D], of a text int64 [n] that is read densely.

    ValueError for a text of less than two tokens, or more than one DCA chunk.
    """
    length, chunk_len = len(token_ids), model.config.dual_chunk.chunk_len
    if not 2 <= length <= chunk_len:
        raise ValueError(f"a text to calibrate with has 2 to {chunk_len} tokens, got {length}")
    cache = _cache_of(model, token_ids, model.compute_dtype)
    with paddle.no_grad():
        for step in _steps(model, cache, token_ids):
            _end_of(model.layer_by_layer(step, cache.layers))
        for layer in cache.layers:
            yield _unrotated(layer, length, inv_freq(model.config))


def _cache_of(model: Qwen2OneM, token_ids: np.ndarray, dtype: str, scales: KVScales | None = None) -> PagedCache:
    """Room for the keys and values of a text on this rank."""
    page_size = choose_page_size(model.config.dual_chunk.chunk_len)
    pages = -(-len(token_ids) // page_size)
    widened = (pages, model.compute_dtype) if model.on_gpu and dtype in QUANTIZATIONS else None
    return PagedCache(model.local, pages, page_size, dtype, scales, widened)


def _steps(model: Qwen2OneM, cache: PagedCache, token_ids: np.ndarray) -> Iterator[Step]:
    """A text, chunk by chunk, into a cache that is its own."""
    builder, length = StepBuilder(model.config), len(token_ids)
    pages = list(range(-(-length // cache.page_size)))
    for begin in range(0, length, CHUNK_TOKENS):
        rows = SequenceRows(token_ids[begin : begin + CHUNK_TOKENS], begin, pages, length)
        yield builder.prefill([rows], cache, [])


def _end_of(running: Generator[None, None, Any]) -> Any:
    """What it returns."""
    while True:
        try:
            next(running)
        except StopIteration as end:
            return end.value


def _unrotated(layer: LayerCache, length: int, frequencies: np.ndarray) -> np.ndarray:
    """The first `length` keys of a layer as they were before they were rotated: float32 [length, G, D]."""
    keys = ops.cast(layer.keys, "float32").numpy().reshape(-1, *layer.keys.shape[2:])[:length]
    half = keys.shape[-1] // 2
    angles = np.arange(length, dtype=np.float64)[:, None, None] * frequencies
    pairs = (keys[..., :half] + 1j * keys[..., half:]) * np.exp(-1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=-1).astype(np.float32)


def _of_all_ranks(model: Qwen2OneM, own: KVScales) -> KVScales:
    """Every rank's KV heads in one; where several have the same head, the first of them counts."""
    config, group, placement = model.config, model.group, model.placement
    whole = []
    for part in (own.exponents, own.centres):
        everywhere = np.zeros((config.num_layers, config.num_kv_heads, part.shape[-1]), np.float32)
        for layer in range(config.num_layers):
            before = {head for rank in range(group.rank) for head in placement.kv_heads(layer, rank)}
            for number, head in enumerate(placement.kv_heads(layer, group.rank)):
                if head not in before:
                    everywhere[layer, head] = part[layer, number]
        whole.append(group.all_reduce(ops.tensor(everywhere)).numpy())
    return KVScales(whole[0].astype(np.int8), whole[1])
