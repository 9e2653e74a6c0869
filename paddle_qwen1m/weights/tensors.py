"""One table of the published tensors: name, shape, how ranks cut it, which parameter of the model it goes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from paddle_qwen1m.parallel.split import COLUMNS, ROWS, Part, equal_part

if TYPE_CHECKING:
    from paddle_qwen1m.config import ModelConfig
    from paddle_qwen1m.parallel.placement import Placement

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Shared(Enum):
    """What of a tensor a rank has: an equal part, or that of its query heads or KV heads."""

    EQUALLY = "equally"
    QUERY_HEADS = "by query heads"
    KV_HEADS = "by KV heads"


class Cut(NamedTuple):
    """Along which axis ranks share a tensor, and how."""

    axis: int
    shared: Shared = Shared.EQUALLY


@dataclass(frozen=True)
class Published:
    """`cut` None: every rank holds all of it. `parameter`: its dotted name in the model; None: the model has no use for
    it, files may have it. Those of one parameter lie below one another, in the order of the table. layer, head_dim: of
    what is cut by heads.
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut | None
    parameter: str | None
    layer: int = 0
    head_dim: int = 0

    def part(self, placement: Placement, rank: int) -> Part | None:
        """What `rank` holds where heads are placed so; None: all of it."""
        if placement.degree == 1 or self.cut is None:
            return None
        axis, shared = self.cut
        if shared is Shared.QUERY_HEADS:
            return placement.query_part(self.layer, rank, axis, self.head_dim)
        if shared is Shared.KV_HEADS:
            return placement.kv_part(self.layer, rank, axis, self.head_dim)
        return equal_part(axis, self.shape[axis], placement.degree, rank)


@lru_cache(maxsize=16)
def published_tensors(config: ModelConfig) -> Mapping[str, Published]:
    """By name, every tensor that a published checkpoint holds or, with tied embeddings, may hold."""
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows, columns = Cut(ROWS), Cut(COLUMNS)
    query_heads, kv_heads = Cut(ROWS, Shared.QUERY_HEADS), Cut(ROWS, Shared.KV_HEADS)
    query_columns = Cut(COLUMNS, Shared.QUERY_HEADS)
    layer = (
        ("input_layernorm.weight", (hidden,), None, "input_norm"),
        ("self_attn.q_proj.weight", (query, hidden), query_heads, "qkv_weight"),
        ("self_attn.k_proj.weight", (key, hidden), kv_heads, "qkv_weight"),
        ("self_attn.v_proj.weight", (key, hidden), kv_heads, "qkv_weight"),
        ("self_attn.q_proj.bias", (query,), query_heads, "qkv_bias"),
        ("self_attn.k_proj.bias", (key,), kv_heads, "qkv_bias"),
        ("self_attn.v_proj.bias", (key,), kv_heads, "qkv_bias"),
        ("self_attn.o_proj.weight", (hidden, query), query_columns, "output_weight"),
        ("post_attention_layernorm.weight", (hidden,), None, "post_attention_norm"),
        ("mlp.gate_proj.weight", (inner, hidden), rows, "gate_up_weight"),
        ("mlp.up_proj.weight", (inner, hidden), rows, "gate_up_weight"),
        ("mlp.down_proj.weight", (hidden, inner), columns, "down_weight"),
    )
    table = [
        Published(EMBEDDING, (vocabulary, hidden), rows, "embedding"),
        *(
            Published(
                f"model.layers.{number}.{name}", shape, cut, f"layers.{number}.{parameter}", number, config.head_dim
            )
            for number in range(config.num_layers)
            for name, shape, cut, parameter in layer
        ),
        Published("model.norm.weight", (hidden,), None, "norm"),
        Published(HEAD, (vocabulary, hidden), rows, None if config.tie_word_embeddings else "head"),
    ]
    return {tensor.name: tensor for tensor in table}


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a published checkpoint must hold, with its shape."""
    return {name: tensor.shape for name, tensor in published_tensors(config).items() if tensor.parameter is not None}


def part_of(config: ModelConfig, name: str, placement: Placement, rank: int) -> Part | None:
    """What `rank` holds of a tensor where heads are placed so; None: all of it, as every rank does of one that is not
    in the table.

    The ranks' parts are the whole tensor, each row or column once, but that ranks which share a KV head each hold it.
    """
    tensor = published_tensors(config).get(name)
    return None if tensor is None else tensor.part(placement, rank)
