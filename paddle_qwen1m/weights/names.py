"""Published tensors: their names and shapes, and how PaddleNLP's own Qwen2 names and orients them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paddle_qwen1m.config import ModelConfig

PADDLENLP_PREFIX = "qwen2."
PREFIX = "model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DERIVED_SUFFIX = "rotary_emb.inv_freq"


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a published checkpoint must hold, with its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    for name, rows in (("q", query), ("k", key), ("v", key)):
        layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        layer[f"self_attn.{name}_proj.bias"] = (rows,)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for number in range(config.num_layers):
        shapes.update({f"model.layers.{number}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def are_paddlenlp(names: Iterable[str]) -> bool:
    """Whether these are PaddleNLP's names of a Qwen2 model's tensors."""
    return any(name.startswith(PADDLENLP_PREFIX) for name in names)


def to_paddlenlp(name: str) -> str:
    return PADDLENLP_PREFIX + name[len(PREFIX) :] if name.startswith(PREFIX) else name


def from_paddlenlp(name: str) -> str:
    return PREFIX + name[len(PADDLENLP_PREFIX) :] if name.startswith(PADDLENLP_PREFIX) else name


def is_transposed(name: str, tied: bool) -> bool:
    """Whether PaddleNLP keeps the published tensor transposed: all linears, and a head that is not the embedding."""
    return name.endswith("_proj.weight") or (name == HEAD and not tied)
