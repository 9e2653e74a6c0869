"""One table of the published tensors: name, shape, how ranks cut it, which parameter of the model it goes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from paddle_qwen1m.parallel.split import COLUMNS, ROWS, Cut, Part

if TYPE_CHECKING:
    from paddle_qwen1m.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Published:
    """`cut` None: every rank holds all of it. `parameter`: its dotted name in the model; None: the model has no use for
    it, files may have it. Those of one parameter lie below one another, in the order of the table.
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut | None
    parameter: str | None

    def part(self, degree: int, rank: int) -> Part | None:
        """What `rank` of `degree` holds; None: all of it."""
        if degree == 1 or self.cut is None:
            return None
        return self.cut.part(self.shape[self.cut.axis], degree, rank)


@lru_cache(maxsize=16)
def published_tensors(config: ModelConfig) -> Mapping[str, Published]:
    """By name, every tensor that a published checkpoint holds or, with tied embeddings, may hold."""
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows, columns, kv_heads = Cut(ROWS), Cut(COLUMNS), Cut(ROWS, config.num_kv_heads)
    layer = (
        ("input_layernorm.weight", (hidden,), None, "input_norm"),
        ("self_attn.q_proj.weight", (query, hidden), rows, "qkv_weight"),
        ("self_attn.k_proj.weight", (key, hidden), kv_heads, "qkv_weight"),
        ("self_attn.v_proj.weight", (key, hidden), kv_heads, "qkv_weight"),
        ("self_attn.q_proj.bias", (query,), rows, "qkv_bias"),
        ("self_attn.k_proj.bias", (key,), kv_heads, "qkv_bias"),
        ("self_attn.v_proj.bias", (key,), kv_heads, "qkv_bias"),
        ("self_attn.o_proj.weight", (hidden, query), columns, "output_weight"),
        ("post_attention_layernorm.weight", (hidden,), None, "post_attention_norm"),
        ("mlp.gate_proj.weight", (inner, hidden), rows, "gate_up_weight"),
        ("mlp.up_proj.weight", (inner, hidden), rows, "gate_up_weight"),
        ("mlp.down_proj.weight", (hidden, inner), columns, "down_weight"),
    )
    table = [
        Published(EMBEDDING, (vocabulary, hidden), rows, "embedding"),
        *(
            Published(f"model.layers.{number}.{name}", shape, cut, f"layers.{number}.{parameter}")
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


def part_of(config: ModelConfig, name: str, degree: int, rank: int) -> Part | None:
    """What `rank` of `degree` holds of a tensor; None: all of it, as every rank does of one that is not in the table.

    The parts of the ranks in order are the whole tensor, except that ranks which share a KV head each hold its rows.
    """
    tensor = published_tensors(config).get(name)
    return None if tensor is None else tensor.part(degree, rank)
