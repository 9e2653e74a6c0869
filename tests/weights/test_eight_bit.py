"""Weights that are rounded to 8 bits as they are loaded: every one of them, for every rank, from every form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import oracle
import paddle
import pytest
from checkpoint_files import write_file

from paddle_qwen1m import ops
from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.parallel.group import ALONE, Group
from paddle_qwen1m.plan import weight_bytes, widened_weight_bytes
from paddle_qwen1m.planning import PUBLISHED
from paddle_qwen1m.weights import CheckpointError, Slot, load_checkpoint
from paddle_qwen1m.weights.convert import convert
from paddle_qwen1m.weights.eight_bit import choose_blocks, linears

each_kind = pytest.mark.parametrize("kind", ["int8", "fp8"])


class RankOf(Group):
    def __init__(self, rank: int, degree: int) -> None:
        self.rank, self.degree = rank, degree


def config_of(checkpoint: Path) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))


def loaded(checkpoint: Path, kind: str | None, group: Group = ALONE) -> Mapping[str, paddle.Tensor]:
    """The parameters of a rank, by name."""
    model = Qwen2OneM(config_of(checkpoint), "bfloat16", group, quantization=kind)
    load_checkpoint(checkpoint, model.slots())
    return dict(model.named_buffers())


def assert_rounded(kind: str, found: Mapping[str, paddle.Tensor], whole: Mapping[str, paddle.Tensor]) -> None:
    """Linears are what the oracle makes of the same ones in 16 bits, and all else is the same."""
    names = [name for name in found if not name.endswith("_scales")]
    assert names == list(whole)
    for name in names:
        held, given = found[name], whole[name].astype("float32").numpy()
        if f"{name}_scales" not in found:
            np.testing.assert_array_equal(held.astype("float32").numpy(), given)
            continue
        scales = found[f"{name}_scales"].numpy()
        blocks = given.shape[0] // scales.shape[0], given.shape[1] // scales.shape[1]
        numbers, expected = oracle.round_weight(kind, given, *blocks)
        np.testing.assert_array_equal(scales, expected)
        np.testing.assert_array_equal(held.numpy(), numbers)


@each_kind
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_every_rank_holds_its_part_rounded(needle_checkpoint: Path, kind: str, degree: int) -> None:
    for rank in range(degree):
        group = RankOf(rank, degree)
        assert_rounded(kind, loaded(needle_checkpoint, kind, group), loaded(needle_checkpoint, None, group))


@each_kind
def test_units_of_a_gpu_are_whole_blocks(needle_checkpoint: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through buffers, of tensors in parts."""
    monkeypatch.setattr("paddle_qwen1m.weights.loader._is_in_host_memory", lambda _: False)
    monkeypatch.setattr("paddle_qwen1m.weights.loader.UNIT_BYTES", 150 * 512)
    found = loaded(needle_checkpoint, kind)
    monkeypatch.undo()
    assert_rounded(kind, found, loaded(needle_checkpoint, None))


@each_kind
def test_transposed_files_give_the_same(needle_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    convert(needle_checkpoint, tmp_path / "np", "paddlenlp", progress=False)
    assert_rounded(kind, loaded(tmp_path / "np", kind), loaded(needle_checkpoint, None))


@each_kind
def test_written_values_are_rounded_too(rng: np.random.Generator, kind: str) -> None:
    """As random weights are, in float32 or as bfloat16's bits, into rows of a parameter."""
    numbers, scales = paddle.zeros([128, 64], "uint8"), paddle.zeros([128 if kind == "int8" else 2, 1], "float32")
    slot = Slot(numbers, 64, (64, 64), None, ops.Weight8(numbers, scales, kind))
    values = rng.standard_normal((64, 64)).astype(np.float32)
    for given in (values, (values.view(np.uint32) >> 16).astype(np.uint16)):
        slot.write(given)
        held = values if given is values else (given.astype(np.uint32) << 16).view(np.float32)
        expected, _ = oracle.round_weight(kind, held, 1 if kind == "int8" else 64, 64)
        np.testing.assert_array_equal(numbers.numpy()[64:], expected)
        assert (numbers.numpy()[:64] == 0).all()


@each_kind
def test_what_is_not_finite_is_refused_by_file_and_tensor(tmp_path: Path, kind: str) -> None:
    values = np.ones((64, 64), np.float32)
    values[50, 3] = np.nan
    write_file(tmp_path / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": values})
    numbers, scales = paddle.zeros([64, 64], "uint8"), paddle.zeros([64 if kind == "int8" else 1, 1], "float32")
    slot = Slot(numbers, 0, (64, 64), None, ops.Weight8(numbers, scales, kind))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*up_proj.*not finite"):
        load_checkpoint(tmp_path, {"model.layers.0.mlp.up_proj.weight": slot})


def test_a_slot_of_half_a_block_is_refused() -> None:
    numbers, scales = paddle.zeros([128, 64], "uint8"), paddle.zeros([1, 1], "float32")
    with pytest.raises(ValueError, match="rows 64 to 128 are no whole blocks of 128 rows"):
        Slot(numbers, 64, (64, 64), None, ops.Weight8(numbers, scales, "fp8"))


@each_kind
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_plan_counts_the_bytes_that_a_rank_holds(needle_checkpoint: Path, kind: str, degree: int) -> None:
    model = Qwen2OneM(config_of(needle_checkpoint), "bfloat16", RankOf(0, degree), quantization=kind)
    held = sum(tensor.size * tensor.element_size() for tensor in dict(model.named_buffers()).values())
    assert weight_bytes(model.local, "bfloat16", kind) == held


def test_the_plan_of_the_published_models() -> None:
    """Half of the linears and a little for scales; the MLP's weights widened, on a GPU alone."""
    config = PUBLISHED["14B"]
    linear = config.num_layers * sum(sum(heights) * sum(widths) for heights, widths in linears(config).values())
    fp8, int8, whole = (weight_bytes(config, "bfloat16", kind) for kind in ("fp8", "int8", None))
    assert whole - fp8 == linear - 4 * linear // 128**2 and whole - int8 == linear - 4 * linear // 128
    assert widened_weight_bytes(config, "fp8", "bfloat16") == 3 * 2 * 13_824 * 5_120
    assert widened_weight_bytes(config, "fp8", "float32") == widened_weight_bytes(config, None, "bfloat16") == 0


def test_blocks_divide_what_a_weight_is_put_together_of() -> None:
    assert choose_blocks("fp8", (3584, 512, 512), (3584,)) == (128, 128)
    assert choose_blocks("int8", (3584, 512, 512), (3584,)) == (1, 128)
    assert choose_blocks("fp8", (1728, 1728), (1728,)) == (64, 64)
    with pytest.raises(ValueError, match="multiples of 16, got 1000"):
        choose_blocks("fp8", (64,), (1000,))
