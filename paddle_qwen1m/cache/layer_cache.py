"""Keys and values of every layer, in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.cache.kv_scales import KVScales
from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.dtypes import FP8, QUANTIZATIONS


class CopiedPages(NamedTuple):
    """Pages int32 [n] that are copied for their readers, in that order, and block tables that count in the copies."""

    pages: paddle.Tensor
    tables: paddle.Tensor


class LayerCache(NamedTuple):
    """One layer's rotated keys and values, [pages, page_size, G, D] each; chunk_len is L, tokens of a DCA chunk.

    quantised: what the numbers of 8-bit pages stand for. widened: where these are copied for kernels that read 16 bits;
    None where they read the pages themselves.
    """

    keys: paddle.Tensor
    values: paddle.Tensor
    chunk_len: int
    quantised: ops.Quantised | None = None
    widened: WidenedPages | None = None

    def readable(self, tables: paddle.Tensor, copied: CopiedPages | None) -> tuple[LayerCache, paddle.Tensor]:
        """What prefill reads, with its block tables: this by `tables`, or a copy of pages of it, until those of another
        layer or step are asked for.
        """
        if self.widened is None:
            return self, tables
        assert copied is not None, "a step for this cache names the pages that it reads"
        return self.widened.copy(self, copied.pages), copied.tables


class WidenedPages:
    """Room for copies of a layer's 8-bit pages in a floating type: shape [pages, page_size, G, D], keys and values."""

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

    dtype: of numbers, or int8 or fp8. scales: for these two, for the KV heads that `config` has; layers that they keep
    in 16 bits are of the type `unrounded`. widened: how many 8-bit pages are copied at a time, in which type, for
    readers that take no bytes.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: str,
        scales: KVScales | None = None,
        widened: tuple[int, str] | None = None,
        unrounded: str = "bfloat16",
    ) -> None:
        page = [page_size, config.num_kv_heads, config.head_dim]
        self.page_size, self.dtype = page_size, dtype
        self.widened = None if widened is None else WidenedPages([widened[0], *page], widened[1])
        self.layers = []
        for layer in range(config.num_layers):
            quantised, copied, kept = None, None, dtype
            if dtype in QUANTIZATIONS:
                assert scales is not None, "bytes mean nothing without scales"
                if layer in scales.in_16_bits:
                    kept = unrounded
                else:
                    kept = "uint8" if dtype == FP8 else dtype
                    frame = ops.tensor(scales.frame(layer))
                    quantised = ops.Quantised(paddle.empty([2, num_pages, *page[:2]], "float16"), frame)
                    copied = self.widened
            keys, values = paddle.empty([num_pages, *page], kept), paddle.empty([num_pages, *page], kept)
            self.layers.append(LayerCache(keys, values, config.dual_chunk.chunk_len, quantised, copied))

    def slots(self, pages: Sequence[int], begin: int, end: int) -> np.ndarray:
        """Where tokens [begin, end) of a sequence lie: int64 page * page_size + offset."""
        size, positions = self.page_size, np.arange(begin, end, dtype=np.int64)
        return np.asarray(pages, np.int64)[positions // size] * size + positions % size

    @property
    def piece_bytes(self) -> int:
        """Of a page's keys in one layer, or its values, where they take most; a multiple of all pieces."""
        return max(nbytes for _, nbytes in self._pieces())

    @property
    def page_bytes(self) -> int:
        """Of a page in all layers."""
        return sum(len(bases) * nbytes for bases, nbytes in self._pieces())

    def addresses(self, pages: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """Where pages lie, piece by piece: int64 [pieces, pages], a layer's keys before its values, and the bytes of
        each piece. Of an 8-bit cache layers in 16 bits come first, and the scales of the others last.
        """
        numbers = np.asarray(pages, np.int64)
        return [(np.asarray(bases, np.int64)[:, None] + numbers * nbytes, nbytes) for bases, nbytes in self._pieces()]

    def _pieces(self) -> list[tuple[list[int], int]]:
        """Where the first page's pieces of one size lie, and the size, the largest first."""
        bases: dict[int, list[int]] = {}
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                nbytes = int(np.prod(tensor.shape[1:])) * tensor.element_size()
                bases.setdefault(nbytes, []).append(tensor.data_ptr())
            if layer.quantised is not None:
                scales = layer.quantised.scales
                nbytes = int(np.prod(scales.shape[2:])) * scales.element_size()
                halves = (side * nbytes * scales.shape[1] for side in (0, 1))
                bases.setdefault(nbytes, []).extend(scales.data_ptr() + half for half in halves)
        return [(bases[nbytes], nbytes) for nbytes in sorted(bases, reverse=True)]

    def release(self) -> None:
        """Gives the memory back; the cache holds nothing afterwards."""
        self.layers, self.widened = [], None

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` tokens of page `source` become those of page `target`, in every layer."""
        for layer in self.layers:
            ops.copy_page(layer.keys, layer.values, source, target, tokens, layer.quantised)
