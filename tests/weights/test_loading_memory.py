"""Memory: loading 2 GB peaks at the parameters' bytes, the largest tensor and 100 MB above the interpreter's own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest

ROWS, WIDTH, SHARDS, PER_SHARD = 16384, 4096, 4, 4

LOAD = """
import sys
import paddle
from paddle_qwen1m.weights import Checkpoint, Slot, load_checkpoint


def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


directory, dtype = sys.argv[1:]
paddle.set_device("cpu")
paddle.zeros([1]).astype(dtype)
checkpoint = Checkpoint(directory)
start = status("VmRSS")
parameters = {name: paddle.empty(list(info.shape), dtype) for name, info in checkpoint.tensors.items()}
load_checkpoint(directory, {name: Slot(t, 0, tuple(t.shape)) for name, t in parameters.items()})
peak = status("VmHWM") - start
nbytes = sum(t.element_size() * t.size for t in parameters.values())
last = list(parameters)[-1]
last_value = float(parameters[last][-1, -1].astype("float32"))
print(peak, nbytes, checkpoint.largest_tensor_bytes, last_value)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """2 GB of bfloat16 in 16 tensors of 128 MB; holes on disk except for a 1.0 at the end of each tensor."""
    directory = tmp_path_factory.mktemp("two_gigabytes")
    nbytes = 2 * ROWS * WIDTH
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        names = [f"model.layers.{PER_SHARD * shard + i}.weight" for i in range(PER_SHARD)]
        entries = {
            name: {"dtype": "BF16", "shape": [ROWS, WIDTH], "data_offsets": [i * nbytes, (i + 1) * nbytes]}
            for i, name in enumerate(names)
        }
        header = json.dumps(entries).encode()
        with (directory / file).open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            for i in range(PER_SHARD):
                out.seek(8 + len(header) + (i + 1) * nbytes - 2)
                out.write(b"\x80\x3f")
        weight_map.update(dict.fromkeys(names, file))
    total = nbytes * SHARDS * PER_SHARD
    assert total == 2 * 1024**3
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_loading_two_gigabytes_needs_little_more_than_the_parameters(directory, dtype):
    command = [sys.executable, "-c", LOAD, str(directory), dtype]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    peak, parameters, largest, last = run.stdout.split()[-4:]
    assert float(last) == 1.0
    print(f"{dtype}: peak {int(peak) / 2**20:.1f} MiB for {int(parameters) / 2**20:.0f} MiB of parameters")
    assert int(peak) <= int(parameters) + int(largest) + 100_000_000
