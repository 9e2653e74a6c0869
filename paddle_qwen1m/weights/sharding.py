"""How a checkpoint is laid out that holds a set of weights for each rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.parallel.placement import Placement

RANK_SETS = "tensor_parallel_size"
"""Field of config.json: the checkpoint holds a set of weights for each of so many ranks."""
RANK_HEADS = "tensor_parallel_heads"
"""Field of config.json: which heads each of these ranks has, Placement.text; without it the published order."""
RANK_PREFIX = "rank-"


def rank_sets(config: Mapping[str, Any]) -> int | None:
    """For how many ranks the checkpoint of this config.json is cut; None for a whole one."""
    return config.get(RANK_SETS)


def recorded_placement(config: Mapping[str, Any], model: ModelConfig) -> Placement | None:
    """Which of the ranks that the checkpoint of this config.json is cut for has which heads; None for a whole one.

    ValueError for what is no placement of this model.
    """
    degree, heads = rank_sets(config), config.get(RANK_HEADS)
    if degree is None:
        return None
    if heads is None:
        return Placement.published(model, degree)
    try:
        return Placement.from_text(model, degree, heads)
    except ValueError as error:
        raise ValueError(f"{RANK_HEADS}: {error}") from None


def rank_directory(rank: int, degree: int) -> str:
    """Folder of a checkpoint that is cut for ranks, with the shards and the index of one of them."""
    return f"{RANK_PREFIX}{rank:05d}-of-{degree:05d}"
