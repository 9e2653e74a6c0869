"""A checkpoint, layer after layer: one layer's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.model import DecoderLayer, device_dtypes, vocabulary_table
from paddle_qwen1m.parallel.group import ALONE
from paddle_qwen1m.weights import Slot, load_checkpoint
from paddle_qwen1m.weights.tensors import EMBEDDING, HEAD, published_tensors

EMBEDDED_ROWS = 16384
"""Tokens that are looked up at once."""


class WeightStream:
    """The weights in a directory of a checkpoint of this shape, kept as `dtype` where they are."""

    def __init__(self, directory: Path, config: ModelConfig, dtype: str) -> None:
        self._directory, self._config = directory, config
        self._kept, self.compute_dtype = device_dtypes(dtype)

    def embed(self, texts: Collection[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        """The residual stream before the first layer, float32 [T, hidden] of each text's ids [T]."""
        table = vocabulary_table(self._config, ALONE, self._kept)
        parameters = {"embedding": table}
        if not self._config.tie_word_embeddings:  # the loader takes an embedding without a head for a tied one
            parameters["head"] = vocabulary_table(self._config, ALONE, self._kept)
        self._load(parameters)
        return [
            np.concatenate(
                [
                    ops.embedding(ops.tensor(ids[first : first + EMBEDDED_ROWS]), table).numpy()
                    for first in range(0, len(ids), EMBEDDED_ROWS)
                ]
            )
            for ids in texts
        ]

    def layer(self, number: int) -> DecoderLayer:
        """A layer with its weights."""
        layer = DecoderLayer(self._config, number, self._kept, ALONE)
        self._load({f"layers.{number}.{name}": tensor for name, tensor in layer.named_buffers()})
        return layer

    def _load(self, parameters: Mapping[str, paddle.Tensor]) -> None:
        """Fills these parameters of the model, by their names there."""
        published, slots = published_tensors(self._config), dict[str, Slot]()
        taken = dict.fromkeys(parameters, 0)
        for tensor in published.values():
            if tensor.parameter in taken:
                slots[tensor.name] = Slot(parameters[tensor.parameter], taken[tensor.parameter], tensor.shape)
                taken[tensor.parameter] += tensor.shape[0]
        assert EMBEDDING not in slots or HEAD in slots or self._config.tie_word_embeddings
        load_checkpoint(self._directory, slots, ignore=published.keys() - slots.keys())
