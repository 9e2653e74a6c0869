"""What a checkpoint says of itself: shapes, dual chunk attention, sparse budgets."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paddle_qwen1m.config_keys import DUAL_CHUNK, DUAL_CHUNK_KEYS, INT32_MAX, KEYS, read, read_rope_theta
from paddle_qwen1m.config_keys import SPARSE_THRESHOLD as SPARSE_THRESHOLD
from paddle_qwen1m.dtypes import DTYPES

CONFIGS = Path(__file__).with_name("configs")
if not CONFIGS.is_dir():  # a source checkout
    CONFIGS = Path(__file__).parents[1] / "configs"

SPARSE_CONFIG = "sparse_attention_config.json"
PUBLISHED_SOURCE = "those published for this shape, which the package carries"
SINK_COLUMNS = 30  # the first columns and the last diagonals are always kept
LOCAL_DIAGONALS = 100
BLOCK = 64  # rows of a row block, keys of a block of keys
COLUMN_GROUP = 64  # a stage's columns in an index begin at a multiple of it
ROWS_AT_ONCE = 17_088
"""Rows of a chunk whose rotated queries and index tables are in memory at once, of all heads: 267 row blocks, a
multiple of the three that a kernel takes together.
"""
LANE_ROWS, LANE_ROWS_IN_FP8 = 12_672, 16_896
"""Rows of a chunk that one rank's products behind attention take at once, the last of them up to LEAST_LANE_ROWS more,
in 16 bits and in FP8: 66 tiles of 192 and 132 of 128 rows, which by any even number of tiles of features fill whole
rounds of the 132 processors of a Hopper.
"""
QUESTION_ROWS = 8, 64
"""Rows that a GPU keeps captured steps for: engine/questions.py."""
ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2OneMForCausalLM")


def load_json(path: Path) -> Any:
    """What a JSON file holds; ValueError names the file when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from None
    if text.startswith("\ufeff"):
        raise ValueError(f"{path} begins with a byte order mark: save it as UTF-8 without one")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError names the file when it holds anything else."""
    value = load_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def is_ours(values: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a Qwen2 causal language model with dual chunk attention.

    One without architectures, as a config that was saved without its model, is one by its model_type.
    """
    named = values.get("architectures")
    if isinstance(named, list):
        named = named[-1] if named else None
    causal = values.get("model_type") == "qwen2" if named is None else named in ARCHITECTURES
    return values.get(DUAL_CHUNK) is not None and causal


@dataclass(frozen=True)
class DualChunkConfig:
    """`dual_chunk_attention_config` of config.json; all numbers are tokens.

    sparse_budgets: its `sparse_attention_config`, for where no file of that name lies beside the weights.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int = 0
    sparse_attention_enabled: bool = True
    sparse_attention_threshold: int = SPARSE_THRESHOLD
    sparse_budgets: SparseBudgets | None = field(default=None, compare=False, repr=False)

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
        """From the object of that name in config.json. ValueError names a key that is missing or cannot be meant."""
        try:
            found = read(values, DUAL_CHUNK_KEYS)
        except ValueError as error:
            raise ValueError(f"{DUAL_CHUNK}: {error}") from None
        layers = found.pop("sparse_attention_config")
        try:
            budgets = None if layers is None else SparseBudgets.from_json(layers)
        except ValueError as error:
            raise ValueError(f"{DUAL_CHUNK}: sparse_attention_config: {error}") from None
        return cls(**found, sparse_budgets=budgets)

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
    """Shapes of a Qwen2 model with dual chunk attention, or of a rank's share of one (parallel/split.py).

    head_parts: in how many parts ranks hold the heads, of which these are one.
    """

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
    head_parts: int = 1

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim not in (64, 128):
            raise ValueError(f"head_dim must be 64 or 128, got {self.head_dim}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")

    @property
    def rows_at_once(self) -> int:
        """Rows of a chunk that attention works on at once: the fewer heads, the more rows take as much memory."""
        return self.head_parts * ROWS_AT_ONCE

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """From the fields of config.json, whose path is `source`, in the spelling of transformers 4 or 5.

        Raises ValueError naming source, key and value for a key that is missing, for a value that cannot be meant and
        for one that asks for other mathematics than are computed here; see config_keys.
        """
        try:
            return cls._from_dict(values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        found = read(values, KEYS)
        heads, hidden, head_dim = found["num_attention_heads"], found["hidden_size"], found["head_dim"]
        if head_dim is None and hidden % heads:
            raise ValueError(
                f"without head_dim, hidden_size {hidden} must be a multiple of num_attention_heads {heads}"
            )
        dtypes = {str(found[key]).rsplit(".", 1)[-1] for key in ("torch_dtype", "dtype") if found[key] is not None}
        if len(dtypes) > 1:
            raise ValueError(f"torch_dtype {found['torch_dtype']} and dtype {found['dtype']} are two answers: keep one")
        config = cls(
            num_layers=found["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=found["num_key_value_heads"] or heads,
            head_dim=head_dim or hidden // heads,
            hidden_size=hidden,
            intermediate_size=found["intermediate_size"],
            vocab_size=found["vocab_size"],
            rms_norm_eps=float(found["rms_norm_eps"]),
            rope_theta=read_rope_theta(values),
            max_position_embeddings=found["max_position_embeddings"],
            tie_word_embeddings=found["tie_word_embeddings"],
            dtype=dtypes.pop() if dtypes else "float32",
            dual_chunk=DualChunkConfig.from_dict(found[DUAL_CHUNK]),
            initializer_range=float(found["initializer_range"]),
        )
        if config.dual_chunk.sparse_budgets is not None:
            config.dual_chunk.sparse_budgets.check_fit(config.num_layers, config.num_heads, f"{DUAL_CHUNK} ")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields of config.json that were read, with defaults, as transformers 4 and PaddleNLP spell them."""
        return {
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "initializer_range": self.initializer_range,
        }

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def column_widths(selected: np.ndarray) -> np.ndarray:
    """How wide the columns of an index are at most, of which so many are selected: QWEN1M_COLUMN_WIDTH in
    custom_ops/include/qwen1m/keys.h, five more for each stage, and each filled up to whole groups.
    """
    return (selected + 3 * (5 + COLUMN_GROUP - 1)) // COLUMN_GROUP * COLUMN_GROUP


@dataclass(frozen=True)
class SparseBudgets:
    """How many columns and diagonals each head keeps: int32 [layers, heads]."""

    vertical: np.ndarray
    slash: np.ndarray

    @classmethod
    def from_json(cls, layers: Sequence[Mapping[str, Sequence[Any]]]) -> SparseBudgets:
        """From the published format: a list over layers of {"head": [type, vertical, slash, score]}.

        A vertical size of exactly 30 becomes 130: the 30 columns that are always kept would use all of it. ValueError,
        naming layer, head and value, for another format and for fewer diagonals than are always kept.
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
            for head, entry in heads.items():
                if not _is_budget(entry):
                    raise ValueError(
                        f"sparse budgets: layer {number} head {head} must be a list of vertical_and_slash, at least 1 "
                        f"column, at least the {LOCAL_DIAGONALS} diagonals that are always kept, both whole numbers, "
                        f"and a score, got {_show_budget(entry)}"
                    )
                _, vertical, slash, *_ = entry
                sizes[:, number, int(head)] = (130 if vertical == 30 else vertical), slash
        return cls(vertical=sizes[0], slash=sizes[1])

    @classmethod
    def from_file(cls, path: Path, num_layers: int, num_heads: int) -> SparseBudgets:
        """Reads a file of that format; ValueError naming it when it cannot be read or is for another shape."""
        layers = load_json(Path(path))
        try:
            budgets = cls.from_json(layers)
            budgets.check_fit(num_layers, num_heads)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return budgets

    def check_fit(self, num_layers: int, num_heads: int, source: str = "") -> None:
        """ValueError, which `source` begins, when these are budgets for a model of another shape."""
        shape, wanted = self.vertical.shape, (num_layers, num_heads)
        if shape != wanted or self.slash.shape != wanted:
            raise ValueError(f"{source}has budgets for {shape} (layers, heads), the model has {wanted}")

    @classmethod
    def uniform(cls, vertical: int, slash: int, num_layers: int, num_heads: int) -> SparseBudgets:
        shape = (num_layers, num_heads)
        return cls(vertical=np.full(shape, vertical, np.int32), slash=np.full(shape, slash, np.int32))


def _is_budget(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) not in (3, 4) or entry[0] != "vertical_and_slash":
        return False
    least = (1, LOCAL_DIAGONALS)
    return all(type(size) is int and lowest <= size <= INT32_MAX for size, lowest in zip(entry[1:3], least))


def _show_budget(entry: Any) -> str:
    whole = isinstance(entry, list) and len(entry) in (3, 4)
    return f"{entry[0]} {entry[1]!r} {entry[2]!r}" if whole else reprlib.repr(entry)


def default_budgets(config: ModelConfig, beside: Path | None) -> tuple[SparseBudgets | None, str]:
    """The budgets of a checkpoint where nobody gives others, and their source: the file `beside` the weights
    (SPARSE_CONFIG; None: there is none), else those in config.json, else those published for the shape, else None.
    Raises ValueError for budgets that do not fit the model.
    """
    if beside is not None:
        return SparseBudgets.from_file(beside, config.num_layers, config.num_heads), str(beside)
    inline = config.dual_chunk.sparse_budgets
    if inline is not None:
        return inline, f"the {DUAL_CHUNK} of config.json"
    return published_budgets(config), PUBLISHED_SOURCE


def published_budgets(config: ModelConfig) -> SparseBudgets | None:
    """The published budgets of Qwen2.5-7B- and 14B-Instruct-1M, when the shapes are theirs."""
    files = {(28, 28, 3584): "sparse_attention_config_7B.json", (48, 40, 5120): "sparse_attention_config_14B.json"}
    name = files.get((config.num_layers, config.num_heads, config.hidden_size))
    return SparseBudgets.from_file(CONFIGS / name, config.num_layers, config.num_heads) if name else None
