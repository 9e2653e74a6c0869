"""Starts ranks, with a time limit, and makes small random checkpoints, whole and cut for ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from paddle_qwen1m.config import ModelConfig, SparseBudgets
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.weights import Checkpoint
from paddle_qwen1m.weights.safetensors import read_rows
from paddle_qwen1m.weights.sharding import rank_directory
from paddle_qwen1m.weights.tensors import part_of

ROOT = Path(__file__).parents[2]
NEEDLE = ROOT / "checkpoints" / "needle"
COMMAND = Path(sys.executable).with_name("paddle-qwen1m")
"""The program that pip installs; the launcher runs what does not end in .py as a program."""


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PADDLE_", "FLAGS_"))}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools"), str(ROOT / "tests"), kept.get("PYTHONPATH", "")])
    return {**kept, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", **changes}


class Process:
    """A process in a session of its own, which `finish` kills whole when its time is over."""

    def __init__(self, command: Sequence[str | Path], **changes: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment(**changes),
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
        )

    def finish(self, seconds: float) -> tuple[int, str]:
        """Exit status and output."""
        try:
            output, _ = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._kill_all()
            output, _ = self._process.communicate()
            pytest.fail(f"it did not end within {seconds:g} s and printed:\n{output[-4000:]}")
        except BaseException:
            self._kill_all()
            raise
        return self._process.returncode, output

    def _kill_all(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kills the process alone, not what it started."""
        self._process.kill()

    def signal(self, number: int) -> None:
        """Sends a signal to the process alone."""
        self._process.send_signal(number)


def launcher(degree: int, logs: Path, script: Sequence[str | Path], *options: str) -> list[str | Path]:
    return [
        "-m", "paddle.distributed.launch", "--nproc_per_node", str(degree), "--log_dir", logs, *options, *script
    ]  # fmt: skip


def launch(degree: int, logs: Path, script: Sequence[str | Path], seconds: float) -> tuple[int, str]:
    """Exit status and output of a script on `degree` ranks, the ranks' logs included."""
    status, output = Process(launcher(degree, logs, script)).finish(seconds)
    return status, output + "".join(f"\n--- {log.name}\n{log.read_text()}" for log in sorted(logs.glob("workerlog.*")))


def rank_environment(rank: int, degree: int, port: int) -> dict[str, str]:
    """What the launcher tells a rank."""
    return {
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(degree),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(f"127.0.0.1:{port + number}" for number in range(degree)),
        "PADDLE_LOCAL_SIZE": str(degree),
        "PADDLE_DISTRI_BACKEND": "gloo",
    }


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every published tensor of a model."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    for name, rows in (("q", query), ("k", key), ("v", key)):
        layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        layer[f"self_attn.{name}_proj.bias"] = (rows,)
    names = {f"model.layers.{n}.{name}": shape for n in range(config.num_layers) for name, shape in layer.items()}
    names["model.embed_tokens.weight"] = (config.vocab_size, hidden)
    names["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = (config.vocab_size, hidden)
    return names


def write_checkpoint(directory: Path, shards: int = 2, **changes: Any) -> Path:
    """A random float32 checkpoint in the published layout; `changes` are fields of config.json."""
    config = {**json.loads((NEEDLE / "config.json").read_text(encoding="utf-8")), "torch_dtype": "float32", **changes}
    model = ModelConfig.from_dict(config)
    rng = np.random.default_rng(model.num_heads * model.hidden_size)
    tensors = {}
    for name, shape in shapes(model).items():
        values = rng.standard_normal(shape, np.float32)
        tensors[name] = 1 + 0.1 * values if "norm" in name else values * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_shards(directory, tensors, shards)
    return directory


def write_shards(directory: Path, tensors: Mapping[str, np.ndarray], shards: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    files = {name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors" for n, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: np.ascontiguousarray(tensors[n]) for n in names if files[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")


def cut(source: Path, directory: Path, degree: int, budgets: SparseBudgets | None = None) -> Path:
    """The checkpoint as one set of float32 shards a rank, whose heads are placed by `budgets`."""
    described = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = ModelConfig.from_dict(described)
    tensors: dict[str, np.ndarray] = {}
    for name, info in Checkpoint(source).tensors.items():
        values = np.empty(math.prod(info.shape), np.float32)
        with open(info.file, "rb", buffering=0) as file:
            read_rows(file, name, info, values, "F32")
        tensors[name] = values.reshape(info.shape)
    placement = Placement.balanced(config, degree, budgets)
    for rank in range(degree):
        held = {}
        for name, values in tensors.items():
            part = part_of(config, name, placement, rank)
            held[name] = values
            if part is not None:
                held[name] = values.take([index for one in part.ranges for index in range(*one)], part.axis)
        write_shards(directory / rank_directory(rank, degree), held, 2)
    record = {"tensor_parallel_size": degree, "tensor_parallel_heads": placement.text}
    (directory / "config.json").write_text(json.dumps({**described, **record}), encoding="utf-8")
    budgets = source / "sparse_attention_config.json"
    if budgets.exists():
        shutil.copy(budgets, directory)
    return directory
