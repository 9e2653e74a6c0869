"""Checkpoints converted to 8 bits: half the bytes, the same weights as rounded at load, and back to 16 bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest

from paddle_qwen1m.cli import main
from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.parallel.group import ALONE, Group
from paddle_qwen1m.weights import Checkpoint, CheckpointError, load_checkpoint
from paddle_qwen1m.weights.convert import ConversionError, convert, plan
from paddle_qwen1m.weights.eight_bit import Blocks, numbers_of, scales_between

each_kind = pytest.mark.parametrize("kind", ["int8", "fp8"])
INDEX = "model.safetensors.index.json"


class RankOf(Group):
    def __init__(self, rank: int, degree: int) -> None:
        self.rank, self.degree = rank, degree


def parameters(checkpoint: Path, kind: str | None, group: Group = ALONE) -> dict[str, np.ndarray]:
    """What a rank holds, float64: numbers and scales as what they stand for."""
    config = ModelConfig.from_dict(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    model = Qwen2OneM(config, "bfloat16", group, kind)
    load_checkpoint(checkpoint, model.slots())
    held = dict(model.named_buffers())
    return {
        name: oracle.widen_weight(str(kind), tensor.numpy(), held[f"{name}_scales"].numpy())
        if f"{name}_scales" in held
        else tensor.astype("float32").numpy().astype(np.float64)
        for name, tensor in held.items()
        if not name.endswith("_scales")
    }


@pytest.fixture(scope="module")
def converted(needle_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            convert(needle_checkpoint, made[kind], "huggingface", quantization=kind, progress=False)
        return made[kind]

    return of


@each_kind
def test_the_same_weights_as_rounded_at_load_in_half_the_bytes(
    needle_checkpoint: Path, converted: Callable[[str], Path], kind: str
) -> None:
    found, expected = parameters(converted(kind), kind), parameters(needle_checkpoint, kind)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    linears = [name for name in Checkpoint(needle_checkpoint).tensors if name.endswith("_proj.weight")]
    sizes = [
        sum(info.nbytes for name, info in Checkpoint(directory).tensors.items() if name.startswith(tuple(linears)))
        for directory in (needle_checkpoint, converted(kind))
    ]
    assert 0.5 < sizes[1] / sizes[0] < 0.52


@each_kind
@pytest.mark.parametrize("degree", [2, 4])
def test_each_rank_reads_its_part_of_numbers_and_scales(
    converted: Callable[[str], Path], kind: str, degree: int
) -> None:
    """Also where its blocks are smaller than those of the files: of the 768 inner columns 192 each for four ranks."""
    whole = parameters(converted(kind), kind)
    ranks = [parameters(converted(kind), kind, RankOf(rank, degree)) for rank in range(degree)]
    for number in range(4):
        down, output = (f"layers.{number}.{name}_weight" for name in ("down", "output"))
        for name in (down, output):
            np.testing.assert_array_equal(np.concatenate([rank[name] for rank in ranks], axis=1), whole[name])
        for half, joined in enumerate(np.split(whole[f"layers.{number}.gate_up_weight"], 2)):
            parts = [np.split(rank[f"layers.{number}.gate_up_weight"], 2)[half] for rank in ranks]
            np.testing.assert_array_equal(np.concatenate(parts), joined)
        queries = [rank[f"layers.{number}.qkv_weight"][: 512 // degree] for rank in ranks]
        np.testing.assert_array_equal(np.concatenate(queries), whole[f"layers.{number}.qkv_weight"][:512])


@each_kind
def test_the_way_back_to_16_bits_and_what_it_costs(
    needle_checkpoint: Path, converted: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Each weight moved by at most what the command says and bfloat16's own rounding; all else byte by byte."""
    convert(converted(kind), tmp_path / "back", "huggingface", quantization="none", progress=False)
    back, published = parameters(tmp_path / "back", None), parameters(needle_checkpoint, None)
    for name, values in published.items():
        if "_weight" not in name:
            np.testing.assert_array_equal(back[name], values)
            continue
        rows, columns = (128, 128) if kind == "fp8" else (1, 128)
        shape = (values.shape[0] // rows, rows, values.shape[1] // columns, columns)
        largest = np.abs(values).reshape(shape).max((1, 3), keepdims=True)
        most = np.broadcast_to(largest, shape).reshape(values.shape)
        bound = most / 254 if kind == "int8" else np.maximum(np.abs(values) / 16, most / 450_000)
        assert (np.abs(back[name] - values) <= bound + np.abs(back[name]) * 2.0**-8).all()
        assert (back[name] != values).any()
    config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config


def test_an_interrupted_conversion_goes_on_and_ends_the_same(
    needle_checkpoint: Path, converted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paddle_qwen1m.weights import stream

    published: list[Path] = []

    def publish(path: Path) -> None:
        if len(published) == 2:
            raise OSError(28, "No space left on device")
        published.append(path)
        original(path)

    original = stream.publish
    monkeypatch.setattr(stream, "publish", publish)
    arguments: dict[str, Any] = {"quantization": "fp8", "progress": False}
    with pytest.raises(OSError, match="2 of 3 files of weights are finished and stay"):
        convert(needle_checkpoint, tmp_path / "model", "huggingface", **arguments)
    with pytest.raises(CheckpointError, match="conversion"):
        Checkpoint(tmp_path / "model")
    monkeypatch.undo()
    assert convert(needle_checkpoint, tmp_path / "model", "huggingface", verify=True, **arguments).kept == 2
    for file in sorted(converted("fp8").glob("*")):
        assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_is_damaged_is_found_and_written_anew(
    needle_checkpoint: Path, converted: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(converted("int8"), tmp_path / "model")
    shard = tmp_path / "model" / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    command = ["convert", str(needle_checkpoint), str(tmp_path / "model"), "--format", "huggingface"]
    command += ["--quantization", "int8", "--verify"]
    assert main(command) != 0 and shard.name in capsys.readouterr().err
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "verified" in said and "each weight within 1/254 of the largest of its 128" in said
    assert shard.read_bytes() == (converted("int8") / shard.name).read_bytes()


def test_what_is_not_written_is_refused_before_anything_is(
    needle_checkpoint: Path, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    for form, degree in (("paddlenlp", 1), ("tensor-parallel", 2)):
        with pytest.raises(ConversionError, match="format huggingface alone"):
            convert(needle_checkpoint, tmp_path / "no", form, degree=degree, quantization="fp8")
    for quantization in (None, "fp8", "int8"):
        with pytest.raises(ConversionError, match="holds weights in fp8, which are converted back alone"):
            convert(converted("fp8"), tmp_path / "no", "huggingface", quantization=quantization)
    odd = Path(__file__).parents[1] / "data" / "reference" / "group5_f16"
    with pytest.raises(ConversionError, match=r"blocks of 128, tensor .*down_proj.* \[64, 96\]"):
        convert(odd, tmp_path / "no", "huggingface", quantization="int8")
    assert not (tmp_path / "no").exists()


def test_shards_of_a_size_count_numbers_and_scales(needle_checkpoint: Path) -> None:
    limit = 4 << 20
    wanted = plan(needle_checkpoint, "huggingface", quantization="int8", max_shard_bytes=limit)
    assert len(wanted.targets) > 2
    assert all(target.nbytes - len(target.header) <= limit for target in wanted.targets)


@each_kind
def test_files_and_config_that_disagree_are_refused(
    converted: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    shutil.copytree(converted(kind), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config.pop("quantization_config") == {"quant_method": "paddle-qwen1m", "format": kind}
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"is {kind}, and is to be kept in 16 or 32 bits: load it with"):
        parameters(tmp_path / "model", None)
    with pytest.raises(CheckpointError, match="put together of two checkpoints"):
        convert(tmp_path / "model", tmp_path / "no", "huggingface", quantization="none")
    index = json.loads((tmp_path / "model" / INDEX).read_text(encoding="utf-8"))
    assert any(name.endswith(".weight_scales") for name in index["weight_map"])


@each_kind
def test_numpys_numbers_are_the_kernels(kind: str) -> None:
    """And so are the scales of blocks within blocks."""
    found, expected = numbers_of(kind), oracle.numbers_of(kind)
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(found[finite], expected[finite])
    target = np.empty((3, 4), np.float32)
    scales_between(np.arange(6.0).reshape(2, 3), Blocks(128, 128), target, Blocks(64, 64), 64, 128)
    np.testing.assert_array_equal(target, [[1, 1, 2, 2], [4, 4, 5, 5], [4, 4, 5, 5]])
