"""Memory: a long prompt needs its KV cache and little more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paddle_qwen1m import memory

TOOLS = Path(__file__).parents[1] / "tools"
CACHE_FACTOR = 1.05
SLACK = 150e6

MEASURE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import resident_memory
from needle_documents import DocumentMaker, prompt
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
import paddle_qwen1m
from paddle_qwen1m.engine import SamplingParams

checkpoint, tokens, sparse = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "sparse"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
document = DocumentMaker(lambda text: list(tokenizer(text)["input_ids"])).make(tokens, 4, seed=0)
ids = np.asarray(tokenizer(prompt(document, document.needles[0]))["input_ids"], np.int64)
engine = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32", sparse=sparse).engine
before = resident_memory.resident_bytes()
resident_memory.reset_peak()
engine.generate([ids], SamplingParams(max_tokens=4, temperature=0.0))
print(json.dumps({"rise": resident_memory.peak_bytes() - before, "tokens": len(ids) + 4}))
"""


def rise_and_cache(checkpoint: Path, tokens: int, mode: str) -> tuple[int, int]:
    """Peak above the loaded model of one generate, in a process of its own, and the bytes of its KV cache (float32)."""
    command = [sys.executable, "-c", MEASURE, str(TOOLS), str(checkpoint), str(tokens), mode]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    measured = json.loads(finished.stdout.splitlines()[-1])
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    token_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 4
    return measured["rise"], measured["tokens"] * token_bytes


@pytest.mark.parametrize("statistics", ["", "cache 9\ninactive_file 250000000\n"])
def test_a_host_leaves_what_its_cgroup_does_divided_by_the_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, statistics: str
) -> None:
    names = ("memory.max", "memory.current", "memory.stat")
    limit, used, stat = (tmp_path / name for name in names)
    used.write_text("700000000\n", encoding="ascii")
    stat.write_text(statistics, encoding="ascii")
    monkeypatch.setattr(memory, "CGROUP_FILES", ((str(limit), str(used), "inactive_file"),))
    monkeypatch.delenv("PADDLE_LOCAL_SIZE", raising=False)
    limit.write_text("max\n", encoding="ascii")
    whole = memory.available_host_memory()
    assert whole is not None and whole > 10**9, "of a machine that runs these tests"
    limit.write_text("1000000000\n", encoding="ascii")
    left = 550_000_000 if statistics else 300_000_000  # files' copies are dropped when memory is wanted
    assert memory.available_host_memory() == left
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "4")
    assert memory.available_host_memory() == left // 4


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("tokens", "mode"),
    [
        pytest.param(65536, "sparse", marks=pytest.mark.slow),
        pytest.param(65536, "dense", marks=pytest.mark.slow),
        pytest.param(262144, "sparse", marks=pytest.mark.soak),
    ],
)
def test_a_long_prompt_needs_its_cache_and_little_more(
    needle_checkpoint: Path, tokens: int, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rise, cache = rise_and_cache(needle_checkpoint, tokens, mode)
    with capsys.disabled():
        print(f"\n{tokens:,} tokens, {mode}: peak {rise / 1e6:.0f} MB above the model, KV cache {cache / 1e6:.0f} MB")
    assert rise <= CACHE_FACTOR * cache + SLACK
