"""An engine on several ranks: calls that all ranks make, calls that rank 0 makes alone, calls that fail on it.

serving_rank.py MODEL OUT    rank k writes to OUT/rank-k.json what `run` gives
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def prompts() -> list[np.ndarray]:
    return [np.arange(7, 7 + length, dtype=np.int64) % 700 for length in (900, 60, 300)]


def run(model: str, *, paused: bool = True) -> dict[str, Any]:
    """What each call gives on this rank. paused: decode steps run at every point, requests come and are dropped."""
    from paddle_qwen1m.engine import Finished, Request, SamplingParams
    from paddle_qwen1m.options import EngineOptions
    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM
    from paddle_qwen1m.parallel.job import launched_ranks

    engine = Qwen2OneMForCausalLM.from_pretrained(
        model, tensor_parallel_degree=launched_ranks(), dtype="float32", sparse_threshold=256,
        max_num_batched_tokens=512,
    ).engine  # fmt: skip
    options = {**vars(engine.options), "enable_prefix_caching": True, "max_pause_tokens": 64, "cache_tokens": 4096}
    if paused:
        options["max_inter_token_ms"] = 1
    engine.configure(EngineOptions(**options), engine.budgets)
    leads = engine.model.group.rank == 0
    choices = [SamplingParams(max_tokens=12, temperature=0.0 if n else 1.2, seed=3, logprobs=n) for n in range(3)]
    found: dict[str, Any] = {"errors": []}

    seen: list[tuple[int, int]] = []
    progress: list[tuple[int, int]] = []
    completions = engine.generate(
        prompts(),
        choices,
        on_token=lambda index, token: seen.append((index, token)),
        on_prefill=lambda at: progress.append((at.done_tokens, at.total_tokens)),
    )
    found["generate"] = [one.token_ids for one in completions]
    found["likelihoods"] = [len(one.token_logprobs or ()) for one in completions]
    found["heard"] = [[token for index, token in seen if index == number] for number in range(3)]
    found["progress"] = sorted(progress)
    found["logits"] = engine.logits(prompts()[0], [5, 600, 899])[:, :50].tolist()

    for error in (KeyboardInterrupt("enough"), ValueError("no more"), LookupError("the dog ate it")):

        def interrupt(_index: int, _token: int, error: BaseException = error) -> None:
            if leads:
                raise error

        try:
            engine.generate(prompts(), choices, on_token=interrupt)
        except BaseException as raised:
            found["errors"].append(f"{type(raised).__name__}: {raised}")
    found["afterwards"] = [one.token_ids for one in engine.generate(prompts(), choices)]

    if leads:
        found["alone"] = {}
        rng = np.random.default_rng(1)
        waiting = [Request(str(n), prompts()[n % 3], choices[n % 3]) for n in range(9)]
        while waiting or not engine.is_idle:
            if waiting and (not paused or rng.random() < 0.2):
                engine.add(waiting.pop(0))
            for event in engine.step():
                if isinstance(event, Finished):
                    found["alone"][event.id] = event.completions[0].token_ids
            if paused and rng.random() < 0.02:
                engine.abort(str(rng.integers(0, 9)))
        engine.dismiss()
    else:
        engine.follow()
    found["last"] = [one.token_ids for one in engine.generate(prompts(), choices)]
    return found


def main() -> None:
    model, out = sys.argv[1:]
    import paddle_qwen1m  # noqa: F401
    from paddle_qwen1m.parallel.job import launched_rank

    found = json.dumps(run(model))
    Path(out, f"rank-{launched_rank()}.json").write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
