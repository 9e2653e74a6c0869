"""Scripts of users on several ranks, and what a rank's part costs it in memory and reads."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import paddlenlp_rank
import pytest
from parallel_ranks import NEEDLE, Process, launch, shapes

from paddle_qwen1m import cli
from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.parallel.split import local_config
from paddle_qwen1m.plan import cache_bytes_per_token
from paddle_qwen1m.weights.tensors import part_of

HERE = Path(__file__).parent
SLACK = 150_000_000


def found(folder: Path, degree: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(degree)]


def test_a_paddlenlp_script_answers_alike_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tensor_parallel_degree, _rank and _output as PaddleNLP has them; a draw without a seed is the same draw."""
    script = paddlenlp_rank.__file__
    status, output = launch(2, tmp_path / "logs", [script, NEEDLE, tmp_path], 150)
    assert status == 0, output[-4000:]
    first, second = found(tmp_path, 2)
    assert first["greedy"] == second["greedy"] and first["drawn"] == second["drawn"]
    alone = tmp_path / "alone"
    alone.mkdir()
    monkeypatch.setattr("sys.argv", [script, str(NEEDLE), str(alone)])
    paddlenlp_rank.main()
    assert found(alone, 1)[0]["greedy"] == first["greedy"]
    expected = np.array(found(alone, 1)[0]["logits"])
    for one in (first, second):
        assert np.abs(np.array(one["logits"]) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_group_of_one_rank_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its collectives go through a real process group, and the answer is the same."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The code of the green door is 4711. What is the code?", encoding="utf-8")
    options = ["--model", str(NEEDLE), "--prompt-file", str(prompt), "--greedy", "--json", "--max-new-tokens", "12"]
    status, output = Process(["-m", "paddle_qwen1m", "generate", *options], PADDLE_QWEN1M_GROUP_OF_ONE="1").finish(150)
    assert status == 0, output
    assert cli.main(["generate", *options]) == 0
    alone = json.loads(capsys.readouterr().out)["text"]
    assert json.loads(output.splitlines()[-1])["text"] == alone and alone


def write_holes(directory: Path, config: dict[str, Any], shards: int) -> dict[str, int]:
    """A bfloat16 checkpoint of zeros that takes no disk; bytes of its tensors by name."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes(ModelConfig.from_dict(config)).items()}
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        entries, end = {}, 0
        for name, shape in list(shapes(ModelConfig.from_dict(config)).items())[shard::shards]:
            begin, end = end, end + sizes[name]
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        header = json.dumps(entries).encode()
        with (directory / file).open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.truncate(8 + len(header) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("degree", [2, 4])
def test_a_rank_of_a_2_gb_model_reads_and_keeps_its_share(
    tmp_path: Path, degree: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked of the files: its share and 5 %. Resident: its share, one tensor, its cache and 150 MB."""
    described = json.loads((NEEDLE / "config.json").read_text(encoding="utf-8"))
    described.update(
        num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=8, hidden_size=2048, intermediate_size=8192,
        vocab_size=32000,
    )  # fmt: skip
    tokens = 2000
    sizes = write_holes(tmp_path / "model", described, 6)
    assert sum(sizes.values()) > 2_000_000_000
    config = ModelConfig.from_dict(described)
    cache = (tokens + 2 + 256) * cache_bytes_per_token(local_config(config, degree), "float32")
    script = [HERE / "measured_rank.py", tmp_path / "model", tmp_path, str(tokens)]
    status, output = launch(degree, tmp_path / "logs", script, 600)
    assert status == 0, output[-4000:]
    for rank, measured in enumerate(found(tmp_path, degree)):
        share = 0
        for name, shape in shapes(config).items():
            part = part_of(config, name, Placement.published(config, degree), rank)
            share += sizes[name] if part is None else sizes[name] // shape[part.axis] * part.size
        with capsys.disabled():
            print(
                f"\nrank {rank} of {degree}: share {share / 1e6:.1f} MB, asked {measured['asked'] / 1e6:.1f} MB, "
                f"peak {measured['rise'] / 1e6:.1f} MB above before, cache {cache / 1e6:.1f} MB"
            )
        assert share <= measured["asked"] <= 1.05 * share
        assert measured["rise"] <= share + max(sizes.values()) + cache + SLACK
