"""What loading a model and answering costs a rank: measured_rank.py MODEL OUT TOKENS writes OUT/rank-k.json

asked: bytes asked of files while loading. rise: peak resident bytes above those before loading.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import resident_memory
from parallel_cases import asked_bytes

from paddle_qwen1m import Qwen2OneMForCausalLM
from paddle_qwen1m.engine import SamplingParams
from paddle_qwen1m.parallel.group import start
from paddle_qwen1m.parallel.job import launched_rank, launched_ranks


def main() -> None:
    model, out, tokens = sys.argv[1:]
    start(launched_ranks())
    before, asked = resident_memory.resident_bytes(), asked_bytes()
    resident_memory.reset_peak()
    loaded = Qwen2OneMForCausalLM.from_pretrained(
        model, tensor_parallel_degree=launched_ranks(), max_num_batched_tokens=256, sparse=False
    )
    asked = asked_bytes() - asked
    loaded.engine.generate([np.zeros(int(tokens), np.int64)], SamplingParams(max_tokens=2, temperature=0.0))
    found = {"asked": asked, "rise": resident_memory.peak_bytes() - before}
    (Path(out) / f"rank-{launched_rank()}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
