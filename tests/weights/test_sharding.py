"""Which part of a tensor a rank holds: the degrees that work, and parts that make up the whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.parallel.split import Part, check_degree, degrees, head_degree
from paddle_qwen1m.planning import PUBLISHED
from paddle_qwen1m.weights import tensors

NEEDLE = ModelConfig.from_dict(
    json.loads((Path(__file__).parents[2] / "checkpoints" / "needle" / "config.json").read_text(encoding="utf-8"))
)
CONFIGS = {"needle": NEEDLE, **PUBLISHED}
LAYER = "model.layers.3."


def part_of(config: ModelConfig, name: str, degree: int, rank: int) -> Part | None:
    """In published order."""
    return tensors.part_of(config, name, Placement.published(config, degree), rank)


def rows(begin: int, end: int, axis: int = 0) -> Part:
    return Part(axis, ((begin, end),))


@pytest.mark.parametrize(
    ("model", "expected"),
    [("needle", [1, 2, 4, 8]), ("7B", [1, 2, 4, 8]), ("14B", [1, 2, 4, 8, 16])],
    ids=list(CONFIGS),
)
def test_degrees_are_divisors_of_the_kv_heads_multiples_that_the_rest_divides_by_and_twice_the_last(
    model: str, expected: list[int]
) -> None:
    """Ranks of the last one share rows, two and two."""
    assert degrees(CONFIGS[model]) == expected
    for degree in expected:
        check_degree(CONFIGS[model], degree)


@pytest.mark.parametrize(
    ("model", "degree", "message"),
    [
        ("7B", 16, r"one of 1, 2, 4, 8 .*got 16: for 16 devices use 8 and two replicas"),
        ("7B", 3, r"one of 1, 2, 4, 8 .*got 3: use 2$"),
        ("14B", 32, r"one of 1, 2, 4, 8, 16 .*got 32: for 32 devices use 16 and two replicas"),
        ("needle", 0, r"one of 1, 2, 4, 8 .*got 0: use 1$"),
    ],
)
def test_another_degree_is_refused_with_those_that_work(model: str, degree: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_degree(CONFIGS[model], degree)


SPLIT = {
    "self_attn.q_proj.weight": (0, lambda c: c.num_heads * c.head_dim),
    "self_attn.q_proj.bias": (0, lambda c: c.num_heads * c.head_dim),
    "self_attn.o_proj.weight": (1, lambda c: c.num_heads * c.head_dim),
    "mlp.gate_proj.weight": (0, lambda c: c.intermediate_size),
    "mlp.up_proj.weight": (0, lambda c: c.intermediate_size),
    "mlp.down_proj.weight": (1, lambda c: c.intermediate_size),
}


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("name", SPLIT)
def test_the_ranks_parts_in_order_are_the_whole(model: str, name: str) -> None:
    config = CONFIGS[model]
    axis, size = SPLIT[name]
    for degree in degrees(config)[1:]:
        parts = [part_of(config, LAYER + name, degree, rank) for rank in range(degree)]
        ranks = degree // head_degree(config, degree) if name.startswith("self_attn.") else 1  # that have the same
        share = size(config) // degree * ranks
        assert parts == [rows(rank // ranks * share, (rank // ranks + 1) * share, axis) for rank in range(degree)]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_vocabulary_that_does_not_divide_leaves_less_to_the_last_rank(name: str) -> None:
    config = dataclasses.replace(PUBLISHED["14B"], vocab_size=1003)
    assert [part_of(config, name, 4, rank) for rank in range(4)] == [
        rows(0, 251), rows(251, 502), rows(502, 753), rows(753, 1003)
    ]  # fmt: skip
    tiny = dataclasses.replace(config, vocab_size=5)
    assert [part_of(tiny, name, 4, rank) for rank in range(4)] == [
        rows(0, 2), rows(2, 4), rows(4, 5), rows(5, 5)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"])
def test_ranks_beyond_the_kv_heads_share_them(name: str) -> None:
    parts = [part_of(NEEDLE, f"{LAYER}self_attn.{name}", 4, rank) for rank in range(4)]
    assert parts == [rows(0, 128), rows(0, 128), rows(128, 256), rows(128, 256)]
    assert part_of(NEEDLE, f"{LAYER}self_attn.{name}", 2, 1) == rows(128, 256)


def test_parts_go_by_where_a_layers_heads_are() -> None:
    """Heads of 128; 14B: 8 KV heads of 5 query heads each."""
    config = PUBLISHED["14B"]
    published = tuple(range(40))
    odd = tuple(head for rank in (1, 0) for kv in range(rank, 8, 2) for head in range(5 * kv, 5 * kv + 5))
    placement = Placement(2, 8, (published, published, published, odd, *(published,) * 44))
    own = {
        name: tensors.part_of(config, f"{LAYER}self_attn.{name}", placement, 0)
        for name in ("q_proj.bias", "o_proj.weight", "k_proj.weight")
    }
    groups = tuple((640 * kv, 640 * kv + 640) for kv in (1, 3, 5, 7))
    assert own["q_proj.bias"] == Part(0, groups) and own["o_proj.weight"] == Part(1, groups)
    assert own["k_proj.weight"] == Part(0, tuple((128 * kv, 128 * kv + 128) for kv in (1, 3, 5, 7)))
    for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
        assert tensors.part_of(config, f"model.layers.2.{name}", placement, 1) == part_of(
            config, f"model.layers.2.{name}", 2, 1
        )
    assert tensors.part_of(config, f"{LAYER}mlp.up_proj.weight", placement, 0) == rows(0, 6912)


@pytest.mark.parametrize("name", ["model.norm.weight", LAYER + "input_layernorm.weight"])
def test_norms_are_whole_on_every_rank(name: str) -> None:
    assert part_of(PUBLISHED["14B"], name, 8, 3) is None


def test_one_rank_holds_everything() -> None:
    assert part_of(NEEDLE, "lm_head.weight", 1, 0) is None
