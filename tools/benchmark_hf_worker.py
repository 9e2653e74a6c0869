"""Hugging Face's side of tools/benchmark_cpu.py: runs in an environment of its own, answers one JSON line a request.

Requests on stdin: {"op": "prefill", "ids": [...]} and {"op": "decode", "ids": [...], "tokens": n}. Answers on stdout:
{"seconds": s}, for decode the time of the n steps alone. The first line, {"versions": ...}, says that it is ready.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM


class Worker:
    """The checkpoint in float32 with sdpa attention; the configuration's dual chunk entry means nothing to it."""

    def __init__(self, checkpoint: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        ).eval()

    def prefill(self, ids: list[int]) -> float:
        """Seconds for the logits of the last position."""
        start = time.monotonic()
        self._model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        return time.monotonic() - start

    def decode(self, ids: list[int], tokens: int) -> float:
        """Seconds for `tokens` greedy steps after the prompt."""
        output = self._model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        start = time.monotonic()
        for _ in range(tokens):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = self._model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return time.monotonic() - start


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    worker = Worker(arguments.checkpoint)
    say({"versions": f"torch {torch.__version__}, transformers {transformers.__version__}"})
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "prefill":
            say({"seconds": worker.prefill(request["ids"])})
        elif request["op"] == "decode":
            say({"seconds": worker.decode(request["ids"], request["tokens"])})
        else:
            raise ValueError(f"unknown op {request['op']!r}: expected prefill or decode")
    return 0


if __name__ == "__main__":
    sys.exit(main())
