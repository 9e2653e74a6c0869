"""How a checkpoint is laid out that holds a set of weights for each rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RANK_SETS = "tensor_parallel_size"
"""Field of config.json: the checkpoint holds a set of weights for each of so many ranks."""
RANK_PREFIX = "rank-"


def rank_sets(config: Mapping[str, Any]) -> int | None:
    """For how many ranks the checkpoint of this config.json is cut; None for a whole one."""
    return config.get(RANK_SETS)


def rank_directory(rank: int, degree: int) -> str:
    """Folder of a checkpoint that is cut for ranks, with the shards and the index of one of them."""
    return f"{RANK_PREFIX}{rank:05d}-of-{degree:05d}"
