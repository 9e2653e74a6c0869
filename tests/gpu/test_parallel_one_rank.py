"""One rank under the launcher, its collectives through a real NCCL group, answers what a plain run answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="Paddle is not installed")

if not paddle.device.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
    pytest.skip("this Paddle has no GPU", allow_module_level=True)

from paddle_qwen1m import ops  # noqa: E402

if ops.gpu_obstacle() is not None:
    pytest.skip(str(ops.gpu_obstacle()), allow_module_level=True)

SCRIPT = """
import json, sys
import numpy as np
import paddle_qwen1m
from paddle_qwen1m.engine import SamplingParams
from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM
from paddle_qwen1m.parallel.group import ProcessGroup

checkpoint, out = sys.argv[1:]
calls = dict.fromkeys(("all_reduce", "gather_columns", "reduce_scatter", "all_gather"), 0)
for name in calls:
    def counted(self, *arguments, _call=getattr(ProcessGroup, name), _name=name):
        calls[_name] += 1
        return _call(self, *arguments)
    setattr(ProcessGroup, name, counted)

found = {}
for graph in (True, False):
    engine = Qwen2OneMForCausalLM.from_pretrained(checkpoint, sparse=False).engine
    options = engine.options
    engine.configure(type(options)(**{**vars(options), "cuda_graph": graph}), engine.budgets)
    if not found:
        calls.update(dict.fromkeys(calls, 0))  # without those that the group began with
    prompts = [np.arange(n, dtype=np.int64) * 37 % 700 for n in (1024, 740, 8192)]
    params = [SamplingParams(max_tokens=40, temperature=0.0), SamplingParams(max_tokens=30, temperature=2.0, seed=5)]
    before = calls["all_reduce"]
    greedy = engine.generate(prompts[:1], params[0])
    summed = calls["all_reduce"] - before
    answers = [greedy, engine.generate(prompts, params[1])]
    found[str(graph)] = [[(one.token_ids, one.logprobs) for one in answer] for answer in answers]
group = engine.model.group
found["group"], found["calls"], found["summed"] = type(group).__name__, calls, summed
found["backend"] = group._group.name() if hasattr(group, "_group") else None
open(out, "w").write(json.dumps(found))
"""


def answers(checkpoint: Path, folder: Path, launched: bool) -> dict[str, Any]:
    script, out = folder / "script.py", folder / f"launched-{launched}.json"
    script.write_text(SCRIPT, encoding="utf-8")
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # as the launcher counts
    launcher = ["-m", "paddle.distributed.launch", "--devices", device, "--log_dir", str(folder / "logs")]
    command = [sys.executable, *(launcher if launched else []), str(script), str(checkpoint), str(out)]
    environment = {**os.environ, **({"PADDLE_QWEN1M_GROUP_OF_ONE": "1"} if launched else {})}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


def test_a_nccl_group_of_one_changes_nothing(needle_checkpoint: Path, tmp_path: Path) -> None:
    """Greedy and sampled, eagerly and replayed from a CUDA graph: the tokens and their log-probabilities."""
    plain = answers(needle_checkpoint, tmp_path, launched=False)
    grouped = answers(needle_checkpoint, tmp_path, launched=True)
    assert (plain["group"], grouped["group"]) == ("Group", "ProcessGroup")
    assert grouped["backend"] == "NCCL"
    layers = json.loads((needle_checkpoint / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    steps = 39  # behind the first of 40 tokens, not replayed: their ids, the embedding, two sums a layer
    assert grouped["summed"] >= steps * (2 * layers + 2) and grouped["calls"]["gather_columns"] > 0
    scattered, gathered = grouped["calls"]["reduce_scatter"], grouped["calls"]["all_gather"]
    in_lanes = 2 * layers - 1  # a lane's sums, before the last layer, for which its residual stream is gathered as well
    assert scattered * (in_lanes + 1) == gathered * in_lanes > 0, "8,192 rows go in lanes"
    for graph in ("True", "False"):
        for expected, got in zip(plain[graph], grouped[graph]):
            assert [ids for ids, _ in got] == [ids for ids, _ in expected]
            for (_, one), (_, other) in zip(got, expected):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
