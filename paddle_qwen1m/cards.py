"""Which card holds which context: the published models' memory arithmetic as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paddle_qwen1m.config import ModelConfig, published_budgets
from paddle_qwen1m.parallel.split import degrees, local_config
from paddle_qwen1m.plan import MemoryPlan, longest_context, parameters, plan_memory

CARDS = (24, 40, 48, 80, 141)
"""Memory of common cards in GB, counted as 10^9 bytes."""
RESERVE = 2 * 10**9
"""Bytes of a card that the plan does not count: CUDA's context, NCCL, cuBLAS, what the allocator rounds up."""
CHUNK = 32_768

_BOTH: dict[str, Any] = {
    "vocab_size": 152_064,
    "max_position_embeddings": 1_010_000,
    "torch_dtype": "bfloat16",
    "dual_chunk_attention_config": {
        "chunk_size": 262_144,
        "local_size": 8_192,
        "original_max_position_embeddings": 262_144,
    },
}
_SHAPES = {
    "7B": {
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "14B": {
        "hidden_size": 5_120,
        "intermediate_size": 13_824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}
PUBLISHED = {name: ModelConfig.from_dict({**_BOTH, **shapes}) for name, shapes in _SHAPES.items()}


def longest_on(config: ModelConfig, ranks: int, card_bytes: int, chunk: int = CHUNK) -> int | None:
    """Most tokens of prompt and answer in bfloat16 where each of `ranks` cards has so many bytes; None for none."""
    held = local_config(config, ranks)

    def plan(length: int) -> MemoryPlan:
        return plan_memory(
            held,
            length,
            max_num_batched_tokens=chunk,
            cache_dtype="bfloat16",
            weight_bytes=2 * parameters(held),
            budgets=published_budgets(config),
            dtype="bfloat16",
        )

    room = card_bytes - RESERVE
    return longest_context(config.max_position_embeddings, lambda length: plan(length).total <= room)


def table(chunk: int = CHUNK) -> Iterator[str]:
    """Lines of a Markdown table: a row a model and number of cards, a column a card, thousands of tokens in a cell."""
    yield f"| | cards | {' | '.join(f'{card} GB' for card in CARDS)} |"
    yield "|---" * (2 + len(CARDS)) + "|"
    for name, config in PUBLISHED.items():
        for ranks in degrees(config):
            if ranks & (ranks - 1) == 0 and ranks <= 8:
                cells = (_cell(longest_on(config, ranks, card * 10**9, chunk)) for card in CARDS)
                yield f"| {name} | {ranks} | {' | '.join(cells)} |"


def _cell(tokens: int | None) -> str:
    return "-" if tokens is None or tokens < 1000 else f"{tokens // 1000:,}K"
