"""Orders on several ranks: rank 0 makes them, the others are told each and do it too.

orders_rank.py MODEL OUT    rank k writes to OUT/rank-k.json what `run` gives
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np


def run(model: str) -> dict[str, list[Any]]:
    """The tokens of two answers, which rank 0 alone knows, and the ids that this rank's decode slots end with."""
    from runner_setup import make_runner, rows, whole

    from paddle_qwen1m.engine import SamplingParams
    from paddle_qwen1m.engine.orders import (
        Advance,
        CopyPage,
        Decode,
        Drop,
        Head,
        Join,
        Prefill,
        Rest,
        from_message,
        to_message,
    )
    from paddle_qwen1m.engine.sampling import SamplingSlots
    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM
    from paddle_qwen1m.parallel.job import launched_ranks

    engine = Qwen2OneMForCausalLM.from_pretrained(
        model, tensor_parallel_degree=launched_ranks(), dtype="float32", sparse_threshold=256
    ).engine
    group = engine.model.group
    sampling = SamplingSlots(4, engine.model.config.vocab_size) if group.rank == 0 else None
    runner, _ = make_runner(
        engine.model, engine.budgets, sampling, sparse_threshold=256, num_pages=80, page_size=64, max_num_seqs=4
    )

    def lead(order: Any, read: Callable[[Any], Any] | None = None) -> Any:
        group.share(json.dumps(to_message(order)))
        return runner.run(order, read)

    answers: list[list[int]] = []
    if sampling is not None:
        prompts = [np.arange(7, 7 + length, dtype=np.int64) % 700 for length in (901, 60)]
        pages = [tuple(range(20)), tuple(range(30, 34))]
        chunks = [
            rows(prompt, own, sparse=len(prompt) > 256, wanted=(len(prompt) - 1,))
            for prompt, own in zip(prompts, pages)
        ]
        short, params = len(prompts[1]), SamplingParams(temperature=1.5, repetition_penalty=1.1)
        lead(Prefill((chunks[1],), points=0))
        first = lead(Head(0, 1), whole).result()[0].argmax()
        answers = [[], [int(first)]]
        sampling.put(2, params, prompt=prompts[1], answer_tokens=answers[1], seed=7)
        joins: tuple[Join, ...] = (Join(2, answers[1][0], short, pages[1]),)
        assert lead(Prefill((chunks[0],), 2)).done is False
        lead(Drop())
        post = lead(Prefill((chunks[0],), 2))
        while not post.done:  # a token of the short one at every third point of the long one
            answers[1].append(int(lead(Decode(3, joins)).result()[0][2]))
            joins = ()
            post = lead(Advance(3))
        answers[0].append(int(lead(Head(0, 1), whole).result()[0].argmax()))
        lead(CopyPage(14, 70, 901 % 64))
        sampling.put(0, params, prompt=prompts[0], answer_tokens=answers[0], seed=8)
        joins = (Join(0, answers[0][0], 901, (*pages[0][:14], 70, *pages[0][15:])),)
        for _ in range(12):
            ids, *_ = lead(Decode(4, joins, top_logprobs=True)).result()
            joins = ()
            answers[0].append(int(ids[0]))
            answers[1].append(int(ids[2]))
        group.share(json.dumps(None))
    else:
        while (message := json.loads(group.share(None))) is not None:
            assert runner.run(from_message(message)) is None
    assert runner._slots is not None
    ids = runner._slots._ids.tolist()
    runner.run(Rest())
    return {"answers": answers, "ids": ids}


def main() -> None:
    model, out = sys.argv[1:]
    import paddle_qwen1m  # noqa: F401
    from paddle_qwen1m.parallel.job import launched_rank

    found = json.dumps(run(model))
    Path(out, f"rank-{launched_rank()}.json").write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
