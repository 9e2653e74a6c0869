"""To how many ranks a model can be split, and the shapes of what one of them holds. No Paddle in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .tensors import EMBEDDING, part_of

if TYPE_CHECKING:
    from paddle_qwen1m.config import ModelConfig

RANK_SETS = "tensor_parallel_size"
"""Field of config.json: the checkpoint holds a set of weights for each of so many ranks."""
RANK_PREFIX = "rank-"


def rank_sets(config: Mapping[str, Any]) -> int | None:
    """For how many ranks the checkpoint of this config.json is cut; None for a whole one."""
    return config.get(RANK_SETS)


def rank_directory(rank: int, degree: int) -> str:
    """Folder of a checkpoint that is cut for ranks, with the shards and the index of one of them."""
    return f"{RANK_PREFIX}{rank:05d}-of-{degree:05d}"


def degrees(config: ModelConfig) -> list[int]:
    """The degrees that a model can be split to, ascending.

    Every divisor of its KV heads, and above them the multiples of the KV heads that divide the query heads, where
    several ranks hold the same KV head. Each must divide the MLP's intermediate size too.
    """
    heads, kv_heads = config.num_heads, config.num_kv_heads
    return [
        degree
        for degree in range(1, heads + 1)
        if heads % degree == 0
        and config.intermediate_size % degree == 0
        and (kv_heads % degree == 0 or degree % kv_heads == 0)
    ]


def check_degree(config: ModelConfig, degree: int) -> None:
    """ValueError for a degree that the model cannot be split to, naming those that work and what to do instead."""
    works = degrees(config)
    if degree in works:
        return
    smaller = max((one for one in works if one < degree), default=None)
    advice = f"use {works[0]}"
    if smaller is not None:
        advice = f"use {smaller}"
        replicas = degree // smaller
        if replicas > 1:
            count = {2: "two", 3: "three", 4: "four"}.get(replicas, f"{replicas:,}")
            advice = f"for {degree} devices use {smaller} and {count} replicas"
    raise ValueError(
        f"tensor_parallel_degree must be one of {', '.join(map(str, works))} for a model of {config.num_heads} query "
        f"heads, {config.num_kv_heads} KV heads and intermediate_size {config.intermediate_size}, got {degree}: "
        f"{advice}"
    )


def local_config(config: ModelConfig, degree: int) -> ModelConfig:
    """The shapes of what one rank holds: its heads, its part of the MLP and as much vocabulary as rank 0."""
    check_degree(config, degree)
    words = part_of(config, EMBEDDING, degree, 0)
    return replace(
        config,
        num_heads=config.num_heads // degree,
        num_kv_heads=max(1, config.num_kv_heads // degree),
        intermediate_size=config.intermediate_size // degree,
        vocab_size=config.vocab_size if words is None else words.size,
    )
