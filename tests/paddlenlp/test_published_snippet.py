"""The model card's snippet, word for word but for its name, in a fresh process whose hubs are a loopback server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

SNIPPET = """
import paddle_qwen1m
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
model_name = "Qwen/Qwen2.5-14B-Instruct-1M"
model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)
messages = [{"role": "system", "content": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
            {"role": "user", "content": "Give me a short introduction to large language model."}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
model_inputs = tokenizer([text], return_tensors="pd")
generated_ids = model.generate(**model_inputs, max_new_tokens=512)[0]
generated_ids = [output_ids[len(input_ids):] for input_ids, output_ids in zip(model_inputs.input_ids, generated_ids)]
response = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]
print(response)
"""
ANSWER = "The access code for quartz is 54704."
NAME = "Qwen/Qwen2.5-14B-Instruct-1M"


@pytest.fixture
def server(needle_checkpoint: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


def run(program: str, server: LoopbackHub, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **server.environment(home), "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=300)


def retrieval(options: str = "") -> str:
    """The snippet, greedily, with a document and a question that the demo checkpoint can answer."""
    oracle = json.loads((Path(__file__).parents[1] / "data" / "needle_oracle" / "oracle.json").read_text())
    document = oracle["text"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    return (
        SNIPPET.replace(
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "You are a helpful assistant."
        )
        .replace('"Give me a short introduction to large language model."', repr(document))
        .replace("max_new_tokens=512", "max_new_tokens=40, do_sample=False, repetition_penalty=1.0")
        .replace("(model_name)", f"(model_name{options})")
    )


def log_lines(result: subprocess.CompletedProcess[str], words: str) -> list[str]:
    return [line for line in (result.stdout + result.stderr).splitlines() if words in line]


def test_the_snippet_as_published_prints_an_answer(
    server: LoopbackHub, needle_checkpoint: Path, tmp_path: Path
) -> None:
    server.bos[NAME] = needle_checkpoint
    result = run("import paddle; paddle.seed(0)\n" + SNIPPET, server, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip()
    assert not log_lines(result, "taking it from")


@pytest.mark.parametrize("options", ["", pytest.param(", from_hf_hub=True", marks=pytest.mark.slow)])
def test_the_whole_answer_comes_from_either_hub_and_from_the_other_when_one_lacks_it(
    server: LoopbackHub, needle_checkpoint: Path, tmp_path: Path, options: str
) -> None:
    asked, other = (server.hf, server.bos) if options else (server.bos, server.hf)
    asked[NAME] = needle_checkpoint
    first = run(retrieval(options), server, tmp_path / "first")
    assert ANSWER in first.stdout, first.stderr[-3000:]
    assert not log_lines(first, "taking it from")

    other[NAME] = asked.pop(NAME)
    second = run(retrieval(options), server, tmp_path / "second")
    assert ANSWER in second.stdout, second.stderr[-3000:]
    assert len(log_lines(second, "has no such repository; taking it from")) == 1


def test_offline_the_cached_checkpoint_answers(server: LoopbackHub, needle_checkpoint: Path, tmp_path: Path) -> None:
    cached = tmp_path / "ppnlp" / "models" / NAME
    shutil.copytree(needle_checkpoint, cached)
    result = run(retrieval(), server, tmp_path, PPNLP_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert ANSWER in result.stdout, result.stderr[-3000:]
    assert server.seen == []
