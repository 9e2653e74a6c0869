"""Checkpoint directories: what the index says is what the files hold, or one error says where they differ."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoint_files import write_file, write_sharded

from paddle_qwen1m.weights import Checkpoint, CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def index(tmp_path):
    first = {"a.weight": np.ones((4, 2), np.float32), "b.weight": np.ones((2, 3), np.float16)}
    return write_sharded(tmp_path, [first, {"c.weight": np.ones(5, np.uint16)}])


def edit(index, change):
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def failure(directory):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    return str(caught.value)


def test_a_sharded_directory(index):
    checkpoint = Checkpoint(str(index.parent))
    assert {name: (info.file.name, info.dtype, info.shape) for name, info in checkpoint.tensors.items()} == {
        "a.weight": (FIRST, "F32", (4, 2)),
        "b.weight": (FIRST, "F16", (2, 3)),
        "c.weight": (SECOND, "BF16", (5,)),
    }
    assert checkpoint.total_bytes == 32 + 12 + 10
    assert checkpoint.largest_tensor_bytes == 32


def test_a_single_file_and_an_index_over_a_single_file(tmp_path):
    write_file(tmp_path / "model.safetensors", {"w": np.ones((3, 2), np.float16)})
    assert Checkpoint(tmp_path).total_bytes == 12
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    assert Checkpoint(tmp_path).tensors["w"].shape == (3, 2)


def test_no_checkpoint_at_all(tmp_path):
    assert "is not a directory" in failure(tmp_path / "absent")
    message = failure(tmp_path)
    assert "holds neither model.safetensors.index.json nor model.safetensors" in message and str(tmp_path) in message


def test_two_checkpoints_in_one_directory(index):
    shutil.copy(index.parent / SECOND, index.parent / "model.safetensors")
    message = failure(index.parent)
    assert "holds both model.safetensors.index.json and a model.safetensors" in message and "remove the one" in message


def test_a_missing_shard(index):
    (index.parent / FIRST).unlink()
    message = failure(index.parent)
    assert f"{index.parent / FIRST} is missing; it should hold 2 tensors, 'a.weight' the first" in message
    assert "download the directory again" in message


def test_a_truncated_shard(index):
    shard = index.parent / SECOND
    shard.write_bytes(shard.read_bytes()[:-1])
    message = failure(index.parent)
    assert f"{shard} is truncated" in message and "'c.weight'" in message


def test_a_tensor_in_the_index_that_its_file_lacks(index):
    edit(index, lambda content: content["weight_map"].update({"d.weight": SECOND}))
    assert f"{index.parent / SECOND}: tensor 'd.weight' is in the index, not in the file" in failure(index.parent)


def test_rotary_tables_that_only_the_index_has_are_not_missed(index):
    edit(index, lambda content: content["weight_map"].update({"model.layers.0.self_attn.rotary_emb.inv_freq": SECOND}))
    assert len(Checkpoint(index.parent).tensors) == 3


def test_a_tensor_in_a_file_that_the_index_lacks(index):
    edit(index, lambda content: content["weight_map"].pop("b.weight"))
    assert f"{index.parent / FIRST}: tensor 'b.weight' is in the file, not in the index" in failure(index.parent)


def test_a_tensor_in_another_file_than_the_index_says(index):
    edit(index, lambda content: content["weight_map"].update({"b.weight": SECOND}))
    message = failure(index.parent)
    assert f"{index.parent / FIRST}: tensor 'b.weight' is in the file, but the index places it in {SECOND}" in message
    assert f"{index.parent / SECOND}: tensor 'b.weight' is in the index, not in the file" in message


@pytest.mark.parametrize("stated", [55, 0, -1, 27.5, "54", "54 B", True, [54], {}])
def test_a_wrong_total_size_is_spoken_of_and_harmless(index, caplog, stated):
    edit(index, lambda content: content["metadata"].update({"total_size": stated}))
    assert len(Checkpoint(index.parent).tensors) == 3
    (message,) = caplog.messages
    assert f"{index} states a total_size of {stated!r} bytes" in message and "hold 54" in message


@pytest.mark.parametrize("metadata", [{"total_size": None}, {"total_size": 54.0}, {}, None, [], "pt", 54])
def test_metadata_may_say_nothing(index, caplog, metadata):
    edit(index, lambda content: content.update({"metadata": metadata}))
    assert len(Checkpoint(index.parent).tensors) == 3
    assert not caplog.messages


def test_an_index_needs_no_metadata(index, caplog):
    edit(index, lambda content: content.pop("metadata"))
    assert len(Checkpoint(index.parent).tensors) == 3
    assert not caplog.messages


def test_many_disagreements_are_one_short_error(index):
    edit(index, lambda content: content["weight_map"].update({f"x{i}": SECOND for i in range(30)}))
    message = failure(index.parent)
    assert message.count("\n") < 12 and "... and 22 more" in message


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is corrupt: not valid JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"w": 3}}', "tensor 'w' is mapped to 3, not to a file of the same directory"),
        ('{"weight_map": {"w": "../model.safetensors"}}', "tensor 'w' is mapped to '../model.safetensors'"),
    ],
)
def test_a_corrupt_index(index, text, message):
    index.write_text(text)
    assert message in failure(index.parent) and str(index) in failure(index.parent)
