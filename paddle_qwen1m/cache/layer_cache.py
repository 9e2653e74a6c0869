"""Keys and values of every layer, in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.config import ModelConfig


class LayerCache(NamedTuple):
    """One layer's rotated keys and values, [pages, page_size, G, D] each; chunk_len is L, tokens of a DCA chunk."""

    keys: paddle.Tensor
    values: paddle.Tensor
    chunk_len: int


class PagedCache:
    """The memory of a pool of pages in all layers. It is reserved at once; on a CPU it is resident as it is written."""

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int, dtype: str) -> None:
        shape = [num_pages, page_size, config.num_kv_heads, config.head_dim]
        chunk_len = config.dual_chunk.chunk_len
        self.page_size = page_size
        self.layers = [
            LayerCache(paddle.empty(shape, dtype), paddle.empty(shape, dtype), chunk_len)
            for _ in range(config.num_layers)
        ]

    def slots(self, pages: Sequence[int], begin: int, end: int) -> np.ndarray:
        """Where tokens [begin, end) of a sequence lie: int64 page * page_size + offset."""
        size, positions = self.page_size, np.arange(begin, end, dtype=np.int64)
        return np.asarray(pages, np.int64)[positions // size] * size + positions % size

    @property
    def piece_bytes(self) -> int:
        """Of a page's keys in one layer, or its values."""
        keys = self.layers[0].keys
        return int(np.prod(keys.shape[1:])) * keys.element_size()

    def addresses(self, pages: Sequence[int]) -> np.ndarray:
        """Where pages lie: int64 [2 * layers, pages], a layer's keys before its values; each has piece_bytes."""
        bases = [tensor.data_ptr() for layer in self.layers for tensor in (layer.keys, layer.values)]
        return np.asarray(bases, np.int64)[:, None] + np.asarray(pages, np.int64) * self.piece_bytes

    def release(self) -> None:
        """Gives the memory back; the cache holds nothing afterwards."""
        self.layers = []

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` tokens of page `source` become those of page `target`, in every layer."""
        for layer in self.layers:
            ops.copy_page(layer.keys, layer.values, source, target, tokens)
