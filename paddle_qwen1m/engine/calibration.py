"""The frame of an int8 cache from the keys that a model makes of a text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import inv_freq
from paddle_qwen1m.attention.step import SequenceRows, StepBuilder
from paddle_qwen1m.cache import LayerCache, PagedCache, choose_page_size
from paddle_qwen1m.cache.kv_scales import KVScales, centre_of, exponents_of
from paddle_qwen1m.model import Qwen2OneM

CHUNK_TOKENS = 512
"""Of a text in which a chunk after the other is read; no memory that a prefill does not take anyway."""


def calibrate(model: Qwen2OneM, token_ids: np.ndarray) -> KVScales:
    """Scales of the whole model from a text int64 [n]; every rank calls it and gets the same. Raises as `keys_of`."""
    frequencies, chunk_len = inv_freq(model.config), model.config.dual_chunk.chunk_len
    exponents, centres = [], []
    for keys in keys_of(model, token_ids):
        centres.append(centre_of(keys, frequencies, chunk_len))
        exponents.append(exponents_of(keys, centres[-1], frequencies, chunk_len))
    if model.on_gpu:
        paddle.device.cuda.empty_cache()  # what comes next is large, and wants its memory in one piece
    return _of_all_ranks(model, KVScales.of_layers(exponents, centres))


def keys_of(model: Qwen2OneM, token_ids: np.ndarray) -> Iterator[np.ndarray]:
    """Layer by layer this rank's unrotated keys, float32 [n, G, D], of a text int64 [n] that is read densely.

    ValueError for a text of less than two tokens, or more than one DCA chunk.
    """
    config, length = model.config, len(token_ids)
    chunk_len = config.dual_chunk.chunk_len
    if not 2 <= length <= chunk_len:
        raise ValueError(f"a text to calibrate with has 2 to {chunk_len} tokens, got {length}")
    page_size = choose_page_size(chunk_len)
    pages = list(range(-(-length // page_size)))
    cache = PagedCache(model.local, len(pages), page_size, model.compute_dtype)
    builder = StepBuilder(config)
    with paddle.no_grad():
        for begin in range(0, length, CHUNK_TOKENS):
            rows = SequenceRows(token_ids[begin : begin + CHUNK_TOKENS], begin, pages, length)
            for _ in model.layer_by_layer(builder.prefill([rows], cache, []), cache.layers):
                pass
        for layer in cache.layers:
            yield _unrotated(layer, length, inv_freq(config))


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
