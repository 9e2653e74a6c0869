"""How PaddleNLP's own Qwen2 names and orients the published tensors."""

from __future__ import annotations

from collections.abc import Iterable

from .tensors import HEAD

PADDLENLP_PREFIX = "qwen2."
PREFIX = "model."
DERIVED_SUFFIX = "rotary_emb.inv_freq"


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
