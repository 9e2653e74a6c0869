"""Whatever the order of imports, reloads and failures, the Auto classes know the model and stock Qwen2 refuses it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHECK = """
import importlib, importlib.util, sys, threading, time

def check(transformers):
    config = transformers.Qwen2Config(
        architectures=["Qwen2ForCausalLM"], dual_chunk_attention_config={"chunk_size": 192, "local_size": 64}
    )
    auto, tokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    assert auto._get_model_class_from_config(None, None, config).__name__ == "Qwen2OneMForCausalLM"
    for method in (auto._from_pretrained, tokenizer.from_pretrained):
        assert "paddle_qwen1m" in method.__func__.__code__.co_filename, method
    for stock in (transformers.Qwen2ForCausalLM, transformers.Qwen2Model):
        try:
            stock(config)
        except ValueError as error:
            assert "would ignore the dual_chunk_attention_config" in str(error), error
        else:
            raise AssertionError(f"{stock} took the config")
    assert sum(type(finder).__module__.startswith("paddle_qwen1m") for finder in sys.meta_path) == 1

def forget(prefix):
    for name in [name for name in sys.modules if name.startswith(prefix)]:
        del sys.modules[name]
"""

ORDERS = {
    "PaddleNLP first": """
import paddlenlp.transformers
import paddle_qwen1m
check(paddlenlp.transformers)
""",
    "a module of PaddleNLP first": """
import paddle_qwen1m
from paddlenlp.transformers.auto.modeling import AutoModelForCausalLM
import paddlenlp.transformers
check(paddlenlp.transformers)
""",
    "while another thread imports PaddleNLP": """
thread = threading.Thread(target=importlib.import_module, args=["paddlenlp.transformers"])
thread.start()
while "paddlenlp.transformers.auto.modeling" not in sys.modules:
    time.sleep(0.001)
import paddle_qwen1m
thread.join()
import paddlenlp.transformers
check(paddlenlp.transformers)
""",
    "looked for, failed, reloaded and forgotten": """
import paddle_qwen1m
for missing in ("paddlenlp.transformers.bert.modeling", "paddlenlp.transformers.xlnet.modeling"):
    sys.modules[missing] = None
    try:
        import paddlenlp.transformers
    except ImportError:
        del sys.modules[missing]
    else:
        raise AssertionError("the import was to fail")
for finder in list(sys.meta_path):
    finder.find_spec("paddlenlp.transformers", None)
assert importlib.util.find_spec("paddlenlp.transformers.auto.modeling").loader.get_source is not None
import paddlenlp.transformers
check(paddlenlp.transformers)

for module in ("", ".auto.modeling", ".auto.tokenizer", ".auto", ""):
    importlib.reload(importlib.import_module("paddlenlp.transformers" + module))
check(paddlenlp.transformers)
importlib.reload(paddle_qwen1m)
check(paddlenlp.transformers)

forget("paddlenlp.transformers.auto")
modeling = importlib.import_module("paddlenlp.transformers.auto.modeling")
paddlenlp.transformers.AutoModelForCausalLM = modeling.AutoModelForCausalLM
tokenizer = importlib.import_module("paddlenlp.transformers.auto.tokenizer")
paddlenlp.transformers.AutoTokenizer = tokenizer.AutoTokenizer
check(paddlenlp.transformers)
forget("paddle_qwen1m")
import paddle_qwen1m
check(paddlenlp.transformers)
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_model_is_registered(order: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK + ORDERS[order]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
