"""Which part of a tensor a rank holds: the degrees that work, and parts that make up the whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.parallel.split import Part, check_degree, degrees
from paddle_qwen1m.planning import PUBLISHED
from paddle_qwen1m.weights.tensors import part_of

NEEDLE = ModelConfig.from_dict(
    json.loads((Path(__file__).parents[2] / "checkpoints" / "needle" / "config.json").read_text(encoding="utf-8"))
)
CONFIGS = {"needle": NEEDLE, **PUBLISHED}
LAYER = "model.layers.3."


@pytest.mark.parametrize(
    ("model", "expected"), [("needle", [1, 2, 4]), ("7B", [1, 2, 4]), ("14B", [1, 2, 4, 8])], ids=list(CONFIGS)
)
def test_degrees_are_divisors_of_the_kv_heads_and_multiples_that_the_rest_divides_by(
    model: str, expected: list[int]
) -> None:
    assert degrees(CONFIGS[model]) == expected
    for degree in expected:
        check_degree(CONFIGS[model], degree)


@pytest.mark.parametrize(
    ("model", "degree", "message"),
    [
        ("7B", 8, r"one of 1, 2, 4 .*got 8: for 8 devices use 4 and two replicas"),
        ("7B", 3, r"one of 1, 2, 4 .*got 3: use 2$"),
        ("14B", 16, r"one of 1, 2, 4, 8 .*got 16: for 16 devices use 8 and two replicas"),
        ("needle", 0, r"one of 1, 2, 4 .*got 0: use 1$"),
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
        share = size(config) // degree
        assert parts == [Part(axis, rank * share, (rank + 1) * share) for rank in range(degree)]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_vocabulary_that_does_not_divide_leaves_less_to_the_last_rank(name: str) -> None:
    config = dataclasses.replace(PUBLISHED["14B"], vocab_size=1003)
    assert [part_of(config, name, 4, rank) for rank in range(4)] == [
        Part(0, 0, 251), Part(0, 251, 502), Part(0, 502, 753), Part(0, 753, 1003)
    ]  # fmt: skip
    tiny = dataclasses.replace(config, vocab_size=5)
    assert [part_of(tiny, name, 4, rank) for rank in range(4)] == [
        Part(0, 0, 2), Part(0, 2, 4), Part(0, 4, 5), Part(0, 5, 5)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"])
def test_ranks_beyond_the_kv_heads_share_them(name: str) -> None:
    parts = [part_of(NEEDLE, f"{LAYER}self_attn.{name}", 4, rank) for rank in range(4)]
    assert parts == [Part(0, 0, 128), Part(0, 0, 128), Part(0, 128, 256), Part(0, 128, 256)]
    assert part_of(NEEDLE, f"{LAYER}self_attn.{name}", 2, 1) == Part(0, 128, 256)


@pytest.mark.parametrize("name", ["model.norm.weight", LAYER + "input_layernorm.weight"])
def test_norms_are_whole_on_every_rank(name: str) -> None:
    assert part_of(PUBLISHED["14B"], name, 8, 3) is None


def test_one_rank_holds_everything() -> None:
    assert part_of(NEEDLE, "lm_head.weight", 1, 0) is None
