"""A decode step as the model launches it, over the kernels' C interface and random weights, without Paddle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda_library import CudaLibrary

VOCABULARY = 152064
HEAD_DIM = 128
CHUNK_LEN = 253952


@dataclass(frozen=True)
class Model:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int = VOCABULARY

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * HEAD_DIM

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of each."""
        return {
            "qkv": (self.hidden, self.qkv),
            "o": (self.heads * HEAD_DIM, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
            "head": (self.hidden, self.vocabulary),
        }


MODELS = {"7B": Model(3584, 18944, 28, 4, 28), "14B": Model(5120, 13824, 40, 8, 48)}


class DecodeStep:
    """`batch` sequences of `keys` tokens, in pages that no two share; each call makes them a token longer."""

    def __init__(self, cuda: CudaLibrary, model: Model, batch: int, keys: int, page_size: int = 256) -> None:
        import torch

        self._cuda, self._model, self._batch = cuda, model, batch

        def half(*shape: int) -> Any:
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

        def scaled(*shape: int) -> Any:
            return half(*shape).mul_(shape[-1] ** -0.5)

        def single(*shape: int) -> Any:
            return torch.zeros(shape, dtype=torch.float32, device="cuda")

        self._width = -(-(keys + 64) // page_size)
        pages = (batch * self._width, page_size, model.kv_heads, HEAD_DIM)
        self._layers = [
            {name: scaled(features, depth) for name, (depth, features) in model.linears.items() if name != "head"}
            | {"norm": half(model.hidden), "post_norm": half(model.hidden), "bias": half(model.qkv)}
            | {"key": half(*pages), "value": half(*pages)}
            for _ in range(model.layers)
        ]
        self._embedding, self._norm = half(model.vocabulary, model.hidden), half(model.hidden)
        self._head = scaled(model.vocabulary, model.hidden)
        self._ids = torch.randint(model.vocabulary, (batch,), device="cuda")
        self.lengths = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
        self._tables = torch.randperm(batch * self._width, device="cuda").int().view(batch, self._width)
        exponents = -np.arange(0, HEAD_DIM, 2) / HEAD_DIM
        self._inv_freq = torch.tensor(1e7**exponents, dtype=torch.float32, device="cuda")
        self._slots = torch.zeros(batch, dtype=torch.int64, device="cuda")
        self._rotary, self._scale = single(3, batch, HEAD_DIM), single(batch)
        self._residual, self.logits = single(batch, model.hidden), single(batch, model.vocabulary)
        self._normed, self._delta = half(batch, model.hidden), half(batch, model.hidden)
        self._q = half(3, batch, model.heads, HEAD_DIM)
        self._attended = half(batch, model.heads, HEAD_DIM)
        self._inner = half(batch, model.intermediate)
        size = cuda.workspace_bytes("dca_decode", **self._attention(self._layers[0]))
        self._workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

    @property
    def weight_bytes(self) -> int:
        """Of the weights that a step reads whole."""
        depths = self._model.linears
        layer = sum(depth * features for name, (depth, features) in depths.items() if name != "head")
        return 2 * (self._model.layers * layer + self._model.hidden * self._model.vocabulary)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, at the length that the sequences have now."""
        tokens = int(self.lengths.sum())
        return self._model.layers * tokens * 2 * 2 * self._model.kv_heads * HEAD_DIM

    def __call__(self, after: Callable[[], None] = lambda: None) -> None:
        """Launches all of it, and calls `after` after each launch."""
        model = self._model
        self._after = after
        self._launch(
            "decode_inputs",
            lengths=self.lengths,
            block_tables=self._tables,
            inv_freq=self._inv_freq,
            slots=self._slots,
            table=self._rotary,
            scale=self._scale,
            batch=self._batch,
            table_width=self._width,
            page_size=self._layers[0]["key"].shape[1],
            head_dim=HEAD_DIM,
            chunk_len=CHUNK_LEN,
            chunk_size=262144,
            original_max_position_embeddings=262144,
        )
        self._launch(
            "embedding",
            ids=self._ids,
            table=self._embedding,
            out=self._residual,
            tokens=self._batch,
            width=model.hidden,
            rows=model.vocabulary,
            first=0,
            dtype="bfloat16",
            out_dtype="float32",
        )
        self._rms_norm(None, self._layers[0]["norm"])
        for layer, following in zip(self._layers, [*(layer["norm"] for layer in self._layers[1:]), self._norm]):
            self._launch(
                "rotating_linear",
                linear=self._linear_fields(self._normed, layer["qkv"], None),
                rotation={
                    "qkv": None,
                    "bias": layer["bias"],
                    "table": self._rotary,
                    "slots": self._slots,
                    "q": self._q,
                    "cache": self._cache(layer),
                    "activation": "bfloat16",
                    "bias_dtype": "bfloat16",
                    "variants": 3,
                    "tokens": self._batch,
                    "heads": model.heads,
                },
            )
            self._launch("dca_decode", self._workspace, **self._attention(layer))
            self._linear(self._attended, layer["o"], self._delta)
            self._rms_norm(self._delta, layer["post_norm"])
            self._launch("gated_linear", **self._linear_fields(self._normed, layer["gate_up"], self._inner))
            self._linear(self._inner, layer["down"], self._delta)
            self._rms_norm(self._delta, following)
        self._linear(self._normed, self._head, self.logits)

    def _launch(self, op: str, workspace: Any = None, **fields: Any) -> None:
        self._cuda(op, workspace, **fields)
        self._after()

    def _cache(self, layer: dict[str, Any]) -> dict[str, Any]:
        key = layer["key"]
        return {
            "key": key,
            "value": layer["value"],
            "dtype": "bfloat16",
            "page_size": key.shape[1],
            "kv_heads": self._model.kv_heads,
            "head_dim": HEAD_DIM,
        }

    def _attention(self, layer: dict[str, Any]) -> dict[str, Any]:
        return {
            "q": self._q,
            "out": self._attended,
            "cache": self._cache(layer),
            "block_tables": self._tables,
            "lengths": self.lengths,
            "scale": self._scale,
            "activation": "bfloat16",
            "batch": self._batch,
            "heads": self._model.heads,
            "table_width": self._width,
            "chunk_len": CHUNK_LEN,
        }

    def _linear(self, x: Any, weight: Any, y: Any) -> None:
        self._launch("linear", **self._linear_fields(x, weight, y))

    def _linear_fields(self, x: Any, weight: Any, y: Any | None) -> dict[str, Any]:
        features, depth = weight.shape
        return {
            "x": x,
            "weight": weight,
            "bias": None,
            "y": y,
            "tokens": self._batch,
            "in_features": depth,
            "out_features": features,
            "activation": "bfloat16",
            "out_dtype": "bfloat16" if y is None else str(y.dtype),
            "dtype": "bfloat16",
        }

    def _rms_norm(self, delta: Any, weight: Any) -> None:
        self._launch(
            "rms_norm",
            delta=delta,
            residual=self._residual,
            weight=weight,
            out=self._normed,
            tokens=self._batch,
            width=self._model.hidden,
            eps=1e-6,
            activation="bfloat16",
            dtype="bfloat16",
        )
