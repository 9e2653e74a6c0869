"""A PaddleNLP user's script on every rank: paddlenlp_rank.py MODEL OUT writes each rank's answers to OUT/rank-k.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import paddle.distributed as dist
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

import paddle_qwen1m  # noqa: F401


def main() -> None:
    name, out = sys.argv[1:]
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(
        name,
        tensor_parallel_degree=dist.get_world_size(),
        tensor_parallel_rank=rank,
        tensor_parallel_output=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    inputs = tokenizer(["The code of the green door is 4711.", "Once"], return_tensors="pd", padding=True)
    found = {
        "greedy": model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist(),
        "drawn": model.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=3.0, top_p=1.0)[0].tolist(),
        "logits": model(inputs["input_ids"][:1]).tolist(),
    }
    (Path(out) / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
