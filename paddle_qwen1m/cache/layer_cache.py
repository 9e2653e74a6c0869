"""Keys and values of every layer, in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.cache.kv_scales import KVScales
from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.dtypes import INT8


class LayerCache(NamedTuple):
    """One layer's rotated keys and values, [pages, page_size, G, D] each; chunk_len is L, tokens of a DCA chunk.

    quantised: what the numbers of an int8 cache stand for. widened: where its pages are copied for kernels that read 16
    bits; None where they read int8.
    """

    keys: paddle.Tensor
    values: paddle.Tensor
    chunk_len: int
    quantised: ops.Quantised | None = None
    widened: WidenedPages | None = None

    def readable(self, pages: paddle.Tensor | None) -> LayerCache:
        """What prefill reads: this, or a copy of its pages int32 [n] in that order, until those of another layer or
        step are asked for.
        """
        if self.widened is None:
            return self
        assert pages is not None, "a step for this cache names the pages that it reads"
        return self.widened.copy(self, pages)


class WidenedPages:
    """Room for copies of one layer's int8 pages in a floating type: shape [pages, page_size, G, D], keys and values."""

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        self._keys, self._values = paddle.empty(shape, dtype), paddle.empty(shape, dtype)
        self._held: tuple[paddle.Tensor, paddle.Tensor] | None = None
        """Keys of the layer and pages whose copies are here. A step's own tensor of pages stands for what is in them:
        while it is in a layer nobody else writes these pages of it.
        """

    @property
    def num_pages(self) -> int:
        """Most that are copied at once."""
        return int(self._keys.shape[0])

    def copy(self, layer: LayerCache, pages: paddle.Tensor) -> LayerCache:
        """The copies, made unless they are there."""
        if self._held is None or self._held[0] is not layer.keys or self._held[1] is not pages:
            assert layer.quantised is not None
            ops.dequantize_pages(layer.keys, layer.values, layer.quantised, pages, self._keys, self._values)
            self._held = layer.keys, pages
        return LayerCache(self._keys, self._values, layer.chunk_len)


class PagedCache:
    """The memory of a pool of pages in all layers. It is reserved at once; on a CPU it is resident as it is written.

    scales: of an int8 cache, for the KV heads that `config` has. widened: how many pages of it are copied at a time, in
    which type, for readers that take no int8.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: str,
        scales: KVScales | None = None,
        widened: tuple[int, str] | None = None,
    ) -> None:
        page = [page_size, config.num_kv_heads, config.head_dim]
        self.page_size = page_size
        self.widened = None if widened is None else WidenedPages([widened[0], *page], widened[1])
        self.layers = []
        for layer in range(config.num_layers):
            quantised = None
            if dtype == INT8:
                assert scales is not None, "int8 numbers mean nothing without scales"
                frame = ops.tensor(scales.frame(layer))
                quantised = ops.Quantised(paddle.empty([2, num_pages, *page[:2]], "float16"), frame)
            keys, values = paddle.empty([num_pages, *page], dtype), paddle.empty([num_pages, *page], dtype)
            self.layers.append(LayerCache(keys, values, config.dual_chunk.chunk_len, quantised, self.widened))

    def slots(self, pages: Sequence[int], begin: int, end: int) -> np.ndarray:
        """Where tokens [begin, end) of a sequence lie: int64 page * page_size + offset."""
        size, positions = self.page_size, np.arange(begin, end, dtype=np.int64)
        return np.asarray(pages, np.int64)[positions // size] * size + positions % size

    @property
    def piece_bytes(self) -> int:
        """Of a page's keys in one layer, or its values."""
        keys = self.layers[0].keys
        return int(np.prod(keys.shape[1:])) * keys.element_size()

    @property
    def scale_piece_bytes(self) -> int:
        """Of the scales of a page's keys in one layer, or its values; 0 without any. A divisor of piece_bytes."""
        quantised = self.layers[0].quantised
        return 0 if quantised is None else int(np.prod(quantised.scales.shape[2:])) * quantised.scales.element_size()

    @property
    def page_bytes(self) -> int:
        """Of a page in all layers."""
        return 2 * len(self.layers) * (self.piece_bytes + self.scale_piece_bytes)

    def addresses(self, pages: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """Where pages lie, piece by piece: int64 [2 * layers, pages], a layer's keys before its values, and the bytes
        of each piece; behind them the same of an int8 cache's scales.
        """
        bases = [tensor.data_ptr() for layer in self.layers for tensor in (layer.keys, layer.values)]
        parts = [(bases, self.piece_bytes)]
        scales = [layer.quantised.scales for layer in self.layers if layer.quantised is not None]
        if scales:
            half = self.scale_piece_bytes * self.layers[0].keys.shape[0]
            parts.append(
                ([scale.data_ptr() + side * half for scale in scales for side in (0, 1)], self.scale_piece_bytes)
            )
        numbers = np.asarray(pages, np.int64)
        return [(np.asarray(starts, np.int64)[:, None] + numbers * nbytes, nbytes) for starts, nbytes in parts]

    def release(self) -> None:
        """Gives the memory back; the cache holds nothing afterwards."""
        self.layers, self.widened = [], None

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` tokens of page `source` become those of page `target`, in every layer."""
        for layer in self.layers:
            ops.copy_page(layer.keys, layer.values, source, target, tokens, layer.quantised)
