"""The digest of a checkpoint: the same for a copy and on every rank, another for other weights, from few bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import write_file, write_raw
from synthetic_checkpoint import write_checkpoint

from paddle_qwen1m.weights import Checkpoint, CheckpointError, checkpoint_digest
from paddle_qwen1m.weights.convert import convert

NEEDLE = Path(__file__).parents[2] / "checkpoints" / "needle"
PLACES, PLACE_BYTES = 16, 4096


def change(directory: Path, tensor: str, byte: int) -> None:
    """Flips a bit of a byte of a tensor; negative bytes count from its end."""
    info = Checkpoint(directory).tensors[tensor]
    at = info.offset + byte % info.nbytes
    with info.file.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1]))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(NEEDLE, tmp_path / "copy")


def test_a_copy_has_the_same_and_companions_do_not_count(copy: Path) -> None:
    (copy / "README.md").write_text("my copy")
    (copy / "tokenizer.json").unlink()
    assert checkpoint_digest(copy) == checkpoint_digest(str(NEEDLE)) == checkpoint_digest(f"{NEEDLE}/../needle")


def test_another_process_has_the_same() -> None:
    code = "import sys; from paddle_qwen1m.weights import checkpoint_digest; print(checkpoint_digest(sys.argv[1]))"
    printed = subprocess.run([sys.executable, "-c", code, str(NEEDLE)], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == checkpoint_digest(NEEDLE)


def test_links_into_a_hubs_cache_have_the_same(tmp_path: Path) -> None:
    for path in NEEDLE.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert checkpoint_digest(tmp_path) == checkpoint_digest(NEEDLE)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_the_same_shapes_with_one_layer_retrained_have_another(copy: Path, layer: int) -> None:
    rng = np.random.default_rng(layer)
    for name, info in Checkpoint(copy).tensors.items():
        if name.startswith(f"model.layers.{layer}.mlp."):
            with info.file.open("r+b") as file:
                file.seek(info.offset)
                bits = np.frombuffer(file.read(info.nbytes), np.uint16).copy()
                bits ^= rng.integers(0, 2, bits.shape, dtype=np.uint16)
                file.seek(info.offset)
                file.write(bits.tobytes())
    assert checkpoint_digest(copy) != checkpoint_digest(NEEDLE)


@pytest.mark.parametrize("byte", [0, 4095, -1, -4096, "middle"])
def test_one_value_at_a_place_that_is_read_changes_it(copy: Path, byte: int | str) -> None:
    name = "model.embed_tokens.weight"
    nbytes = Checkpoint(copy).tensors[name].nbytes
    assert nbytes > PLACES * PLACE_BYTES
    change(copy, name, (nbytes - PLACE_BYTES) * 7 // 15 + 11 if byte == "middle" else int(byte))
    assert checkpoint_digest(copy) != checkpoint_digest(NEEDLE)


def test_any_value_of_a_small_tensor_changes_it(copy: Path) -> None:
    known = {checkpoint_digest(copy)}
    for name in ("model.norm.weight", "model.layers.2.self_attn.k_proj.bias"):
        for byte in range(0, Checkpoint(copy).tensors[name].nbytes, 37):
            change(copy, name, byte)
            digest = checkpoint_digest(copy)
            assert digest not in known
            known.add(digest)


def test_the_config_counts(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 1e5}))
    assert checkpoint_digest(copy) != checkpoint_digest(NEEDLE)


def test_two_files_with_each_others_names_have_another(tmp_path: Path) -> None:
    """The index follows, so that the model is the same but for the names of its files."""
    shapes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    write_checkpoint(tmp_path / "model", 3, num_hidden_layers=2, vocab_size=512, **shapes)
    before = checkpoint_digest(tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    one, two = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    (tmp_path / "model" / one).rename(tmp_path / "aside")
    (tmp_path / "model" / two).rename(tmp_path / "model" / one)
    (tmp_path / "aside").rename(tmp_path / "model" / two)
    index.write_text(index.read_text().replace(one, "?").replace(two, one).replace("?", two))
    assert checkpoint_digest(tmp_path / "model") != before


@pytest.mark.parametrize("form", [{"form": "paddlenlp"}, {"form": "tensor-parallel", "degree": 2}], ids=["np", "tp"])
def test_other_forms_have_their_own(tmp_path: Path, form: dict) -> None:
    """That of what is there: the files of all ranks, whichever asks."""
    options = dict(form)
    convert(NEEDLE, tmp_path / "one", options.pop("form"), progress=False, **options)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    digest = checkpoint_digest(tmp_path / "one")
    assert digest == checkpoint_digest(tmp_path / "two") != checkpoint_digest(NEEDLE)
    last = max((tmp_path / "two").rglob("*.safetensors"))
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    assert checkpoint_digest(tmp_path / "two") != digest


def asked_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def test_a_gigabyte_takes_a_few_hundred_kilobytes(tmp_path: Path) -> None:
    shutil.copy(NEEDLE / "config.json", tmp_path)
    shape, count = [16384, 8192], 4
    nbytes = 2 * shape[0] * shape[1]
    header = {
        f"t{n}": {"dtype": "BF16", "shape": shape, "data_offsets": [n * nbytes, (n + 1) * nbytes]} for n in range(count)
    }
    write_raw(tmp_path / "model.safetensors", header, b"")
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + count * nbytes)
    before = asked_bytes()
    checkpoint_digest(tmp_path)
    assert 0 < asked_bytes() - before <= count * PLACES * PLACE_BYTES + 32_000


@pytest.mark.parametrize("nbytes", [1, 2, PLACE_BYTES, PLACES * PLACE_BYTES - 1, PLACES * PLACE_BYTES, 70_001, 10**6])
def test_first_and_last_byte_of_every_tensor_count(tmp_path: Path, nbytes: int) -> None:
    shutil.copy(NEEDLE / "config.json", tmp_path)
    header = {"t": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    digests = set()
    for at in sorted({0, nbytes - 1}):
        data = bytearray(nbytes)
        write_raw(tmp_path / "model.safetensors", header, bytes(data))
        digests.add(checkpoint_digest(tmp_path))
        data[at] = 1
        write_raw(tmp_path / "model.safetensors", header, bytes(data))
        digests.add(checkpoint_digest(tmp_path))
    assert len(digests) == 1 + len({0, nbytes - 1})


def test_an_empty_tensor_and_none_at_all(tmp_path: Path) -> None:
    shutil.copy(NEEDLE / "config.json", tmp_path)
    write_file(tmp_path / "model.safetensors", {"w": np.zeros((0, 4), np.float32)})
    first = checkpoint_digest(tmp_path)
    write_file(tmp_path / "model.safetensors", {"w": np.zeros((0, 5), np.float32)})
    assert checkpoint_digest(tmp_path) != first


def test_what_is_missing_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        checkpoint_digest(tmp_path)
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        checkpoint_digest(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        checkpoint_digest(copy)
