"""To how many ranks a model can be split, and in which parts; placement.py says whose the heads are. No Paddle here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from paddle_qwen1m.config import ModelConfig

ROWS, COLUMNS = 0, 1


class Part(NamedTuple):
    """Rows (axis 0) or columns (axis 1) of a published tensor: `ranges` [begin, end), ascending, one after another."""

    axis: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(end - begin for begin, end in self.ranges)


def equal_part(axis: int, size: int, degree: int, rank: int) -> Part:
    """What `rank` of `degree` holds of `size` rows or columns in equal parts, the first the first rank's.

    Where it does not divide, the last ranks hold fewer, or none.
    """
    share = -(-size // degree)
    return Part(axis, ((min(rank * share, size), min((rank + 1) * share, size)),))


def degrees(config: ModelConfig) -> list[int]:
    """The degrees that a model can be split to, ascending: those that its heads can, and twice the largest of them that
    has no more than one KV head a rank, where each part of the heads is two ranks', which share the rows of a prefill.
    Each must divide the MLP's intermediate size too.
    """
    of_heads = _degrees_of_heads(config)
    shared = [2 * degree for degree in of_heads[-1:] if degree % config.num_kv_heads == 0]
    return [degree for degree in sorted({*of_heads, *shared}) if config.intermediate_size % degree == 0]


def head_degree(config: ModelConfig, degree: int) -> int:
    """In how many parts the heads are split for a degree that works: as many, or half of it, two ranks for each."""
    return degree if degree in _degrees_of_heads(config) else degree // 2


def _degrees_of_heads(config: ModelConfig) -> list[int]:
    """Every divisor of the KV heads, and above them the multiples of the KV heads that divide the query heads, where
    several ranks hold the same KV head.
    """
    heads, kv_heads = config.num_heads, config.num_kv_heads
    return [
        degree
        for degree in range(1, heads + 1)
        if heads % degree == 0
        and config.intermediate_size % degree == 0
        and (kv_heads % degree == 0 or degree % kv_heads == 0)
    ]


def check_degree(config: ModelConfig, degree: int, option: str = "tensor_parallel_degree") -> None:
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
        f"{option} must be one of {', '.join(map(str, works))} for a model of {config.num_heads} query "
        f"heads, {config.num_kv_heads} KV heads and intermediate_size {config.intermediate_size}, got {degree}: "
        f"{advice}"
    )


def local_config(config: ModelConfig, degree: int) -> ModelConfig:
    """The shapes of what one rank holds: its heads, its part of the MLP and as much vocabulary as rank 0."""
    check_degree(config, degree)
    parts = head_degree(config, degree)
    return replace(
        config,
        num_heads=config.num_heads // parts,
        num_kv_heads=max(1, config.num_kv_heads // parts),
        head_parts=parts,
        intermediate_size=config.intermediate_size // degree,
        vocab_size=equal_part(ROWS, config.vocab_size, degree, 0).size,
    )
