"""A user's script in which one rank fails: failing_rank.py MODEL PIDS RANK WHEN HOW

WHEN: prefill (after the first chunk) or decode (after the third token). HOW: kill (SIGKILL), stop (SIGSTOP), raise,
exit, or memory (it asks for more than its device has). Every rank writes its process id into the folder PIDS; the one
that fails writes the time at which it does into the file `failed` there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import paddle

from paddle_qwen1m import Qwen2OneMForCausalLM
from paddle_qwen1m.engine import PrefillProgress, SamplingParams
from paddle_qwen1m.parallel.job import launched_rank, launched_ranks


def main() -> None:
    model, pids, rank, when, how = sys.argv[1:]
    (Path(pids) / str(launched_rank())).write_text(str(os.getpid()), encoding="utf-8")
    ours = launched_rank() == int(rank)

    def fail() -> None:
        (Path(pids) / "failed").write_text(str(time.time()), encoding="utf-8")
        if how in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        if how == "memory":
            paddle.empty([1 << 40], "uint8")
        if how == "exit":
            sys.exit("the dog ate it")
        raise LookupError("the dog ate it")

    def on_prefill(progress: PrefillProgress) -> None:
        if ours and when == "prefill":
            fail()

    seen: list[int] = []

    def on_token(_index: int, token: int) -> None:
        seen.append(token)
        if ours and when == "decode" and len(seen) == 3:
            fail()

    engine = Qwen2OneMForCausalLM.from_pretrained(
        model, tensor_parallel_degree=launched_ranks(), max_num_batched_tokens=256, sparse=False
    ).engine
    prompt = np.arange(1000, dtype=np.int64) % 700
    engine.generate(
        [prompt], SamplingParams(max_tokens=20000, temperature=0.0), on_token=on_token, on_prefill=on_prefill
    )


if __name__ == "__main__":
    main()
