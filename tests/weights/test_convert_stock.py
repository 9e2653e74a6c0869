"""PaddleNLP's own Qwen2ForCausalLM, in a process without this package, loads what the converter writes for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paddle_qwen1m.weights.convert import convert

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
TOLERANCE = 2e-4

# max_position_embeddings: stock builds tables of that length for every layer
STOCK = """
import sys
import numpy as np
import paddle
from paddlenlp.transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

directory, ids, out, low_memory = sys.argv[1:]
config = Qwen2Config.from_pretrained(directory)
config.max_position_embeddings = 2048
model = Qwen2ForCausalLM.from_pretrained(
    directory, config=config, dtype="float32", low_cpu_mem_usage=low_memory == "True"
)
assert type(model).__module__ == "paddlenlp.transformers.qwen2.modeling"
model.eval()
ids = np.load(ids)
with paddle.no_grad():
    logits = model(paddle.to_tensor(ids[None]), attention_mask=paddle.ones([1, len(ids)], "int64"))
np.save(out, (logits[0] if isinstance(logits, (tuple, list)) else logits)[0].numpy())
assert not any(name.startswith("paddle_qwen1m") for name in sys.modules)
"""


def stock_logits(directory, ids, tmp_path, low_memory=False):
    np.save(tmp_path / "ids.npy", np.asarray(ids, np.int64))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    arguments = [str(directory), str(tmp_path / "ids.npy"), str(tmp_path / "logits.npy"), str(low_memory)]
    command = [sys.executable, "-W", "ignore", "-c", STOCK, *arguments]
    before = sorted(path.name for path in directory.iterdir())
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    log = run.stdout + run.stderr
    assert "newly initialized" not in log or "newly initialized: ['lm_head.weight']" in log  # which is the embedding
    assert sorted(path.name for path in directory.iterdir()) == before
    return np.load(tmp_path / "logits.npy")


@pytest.mark.parametrize("low_memory", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_needle_checkpoint_gives_transformers_logits(tmp_path, needle_checkpoint, low_memory):
    """928 of the 1,024 trained tokens. Row 2 feels how float32 rotary angles are rounded; see test_reference_logits."""
    convert(needle_checkpoint, tmp_path / "np", "paddlenlp")
    oracle = np.load(DATA / "needle_oracle" / "oracle.npz")
    got, expected = (
        stock_logits(tmp_path / "np", oracle["input_ids"], tmp_path, low_memory)[-8:],
        oracle["logits_last8"],
    )
    exact_rows = [0, 1, 3, 4, 5, 6, 7]
    np.testing.assert_allclose(got[exact_rows], expected[exact_rows], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got[2], expected[2], rtol=0, atol=5 * TOLERANCE)


def test_a_tied_checkpoint_gives_transformers_logits(tmp_path):
    convert(DATA / "reference" / "group1_tied_f32", tmp_path / "np", "paddlenlp")
    expected = np.load(DATA / "reference" / "group1_tied_f32" / "reference.npz")
    got = stock_logits(tmp_path / "np", expected["input_ids"], tmp_path)
    np.testing.assert_allclose(got[expected["positions"]], expected["logits"], rtol=0, atol=TOLERANCE)
