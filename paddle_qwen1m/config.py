"""What a checkpoint says of itself: shapes, dual chunk attention, sparse budgets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dtypes import DTYPES

CONFIGS = Path(__file__).with_name("configs")
if not CONFIGS.is_dir():  # a source checkout
    CONFIGS = Path(__file__).parents[1] / "configs"

SINK_COLUMNS = 30  # the first columns and the last diagonals are always kept
LOCAL_DIAGONALS = 100
BLOCK = 64  # rows of a row block, keys of a block of keys
SPARSE_THRESHOLD = 32768


@dataclass(frozen=True)
class DualChunkConfig:
    """`dual_chunk_attention_config` of config.json; all numbers are tokens."""

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int = 0
    sparse_attention_enabled: bool = True
    sparse_attention_threshold: int = SPARSE_THRESHOLD

    def __post_init__(self) -> None:
        if not 0 <= self.local_size < self.chunk_size:
            raise ValueError(
                "dual_chunk_attention_config: local_size must be at least 0 and below chunk_size, got "
                f"local_size {self.local_size}, chunk_size {self.chunk_size}"
            )
        if self.local_size > self.chunk_len - 1:
            raise ValueError(
                "dual_chunk_attention_config: local_size must be below chunk_size - local_size, got "
                f"local_size {self.local_size}, chunk_size {self.chunk_size}"
            )
        if self.original_max_position_embeddings < 0:
            raise ValueError(
                "dual_chunk_attention_config: original_max_position_embeddings must not be negative, got "
                f"{self.original_max_position_embeddings}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DualChunkConfig:
        missing = [key for key in ("chunk_size", "local_size") if key not in values]
        if missing:
            raise ValueError(f"dual_chunk_attention_config lacks {' and '.join(missing)}")
        known = {key: values[key] for key in cls.__dataclass_fields__ if values.get(key) is not None}
        return cls(**known)

    @property
    def chunk_len(self) -> int:
        """L: tokens of one DCA chunk."""
        return self.chunk_size - self.local_size

    def temperature(self, length: int) -> float:
        """m(n) = max(1, 0.1 ln(n / original_max_position_embeddings) + 1); logits are multiplied by m^2."""
        if self.original_max_position_embeddings == 0:
            return 1.0
        return max(1.0, 0.1 * math.log(length / self.original_max_position_embeddings) + 1.0)


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of a Qwen2 model with dual chunk attention."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    dual_chunk: DualChunkConfig
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim not in (64, 128):
            raise ValueError(f"head_dim must be 64 or 128, got {self.head_dim}")
        if self.dtype not in DTYPES:
            raise ValueError(f"torch_dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From the fields of config.json. Raises ValueError naming a field that is missing or not supported."""
        required = {
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "dual_chunk_attention_config",
        }
        missing = sorted(key for key in required if values.get(key) is None)
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        if values.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act must be silu, got {values['hidden_act']}")
        heads = values["num_attention_heads"]
        dtype = values.get("torch_dtype") or values.get("dtype") or "bfloat16"
        return cls(
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=values.get("rope_theta", 1e4),
            max_position_embeddings=values.get("max_position_embeddings", 32768),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            dtype=str(dtype).replace("torch.", ""),
            dual_chunk=DualChunkConfig.from_dict(values["dual_chunk_attention_config"]),
            initializer_range=values.get("initializer_range", 0.02),
        )

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class SparseBudgets:
    """How many columns and diagonals each head keeps: int32 [layers, heads]."""

    vertical: np.ndarray
    slash: np.ndarray

    @classmethod
    def from_json(cls, layers: Sequence[Mapping[str, Sequence[Any]]]) -> SparseBudgets:
        """From the published format: a list over layers of {"head": [type, vertical, slash, score]}.

        A vertical size of exactly 30 becomes 130: the 30 columns that are always kept would use all of it. ValueError
        for another format, and for fewer diagonals than are always kept.
        """
        if not isinstance(layers, list) or not layers or not all(isinstance(heads, dict) for heads in layers):
            raise ValueError("sparse budgets must be a list of one object a layer")
        num_heads = len(layers[0])
        sizes = np.zeros((2, len(layers), num_heads), np.int32)
        for number, heads in enumerate(layers):
            if set(heads) != {str(head) for head in range(num_heads)}:
                raise ValueError(
                    f'sparse budgets: layer {number} must have the heads "0" to "{num_heads - 1}", got '
                    f"{len(heads)}: {', '.join(sorted(heads)[:4])}..."
                )
            for head, (kind, vertical, slash, *_) in heads.items():
                if kind != "vertical_and_slash" or vertical < 1 or slash < LOCAL_DIAGONALS:
                    raise ValueError(
                        f"sparse budgets: layer {number} head {head} must be vertical_and_slash with at least 1 column "
                        f"and the {LOCAL_DIAGONALS} diagonals that are always kept, got {kind} {vertical} {slash}"
                    )
                sizes[:, number, int(head)] = (130 if vertical == 30 else vertical), slash
        return cls(vertical=sizes[0], slash=sizes[1])

    @classmethod
    def from_file(cls, path: Path, num_layers: int, num_heads: int) -> SparseBudgets:
        """Reads a file of that format; ValueError naming it when it cannot be read or is for another shape."""
        try:
            budgets = cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if budgets.vertical.shape != (num_layers, num_heads):
            raise ValueError(
                f"{path} has budgets for {budgets.vertical.shape} (layers, heads), the model has "
                f"{(num_layers, num_heads)}"
            )
        return budgets

    @classmethod
    def uniform(cls, vertical: int, slash: int, num_layers: int, num_heads: int) -> SparseBudgets:
        shape = (num_layers, num_heads)
        return cls(vertical=np.full(shape, vertical, np.int32), slash=np.full(shape, slash, np.int32))


def published_budgets(config: ModelConfig) -> SparseBudgets | None:
    """The published budgets of Qwen2.5-7B- and 14B-Instruct-1M, when the shapes are theirs."""
    files = {(28, 28, 3584): "sparse_attention_config_7B.json", (48, 40, 5120): "sparse_attention_config_14B.json"}
    name = files.get((config.num_layers, config.num_heads, config.hidden_size))
    return SparseBudgets.from_file(CONFIGS / name, config.num_layers, config.num_heads) if name else None
