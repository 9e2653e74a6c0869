"""LLM with a long prompt beside short ones, and what happens when a rank is killed.

    python tools/benchmark_llm.py DIR [--tokens 131072] [--short 8] [--tensor-parallel-size 2]

DIR: a checkpoint, tools/random_checkpoint.py writes such of the published shapes. With several ranks, one of them is
killed in the middle of a call: what the caller gets is printed, and a new LLM answers the same short prompts.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from paddle_qwen1m import LLM, SamplingParams
from paddle_qwen1m.outputs import RequestOutput

SHORT_TOKENS = 1024
NEW_TOKENS = 64
LONG_NEW_TOKENS = 16
KILL_AFTER = 1.5
"""Seconds into the call."""


def start(arguments: argparse.Namespace) -> LLM:
    begin = time.perf_counter()
    llm = LLM(
        arguments.checkpoint,
        tensor_parallel_size=arguments.tensor_parallel_size,
        max_model_len=arguments.tokens + 1024,
        seed=0,
    )
    print(f"LLM is there after {time.perf_counter() - begin:.1f} s", flush=True)
    return llm


def prompts(llm: LLM, lengths: list[int], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, len(llm.get_tokenizer()), length).tolist() for length in lengths]


def ask(llm: LLM, lengths: list[int], seed: int = 0) -> list[RequestOutput]:
    """Prompts of these lengths at once; the time that it takes is printed."""
    params = [
        SamplingParams(
            max_tokens=NEW_TOKENS if length == SHORT_TOKENS else LONG_NEW_TOKENS, temperature=0.0, ignore_eos=True
        )
        for length in lengths
    ]
    given = prompts(llm, lengths, seed)
    begin = time.perf_counter()
    outputs = llm.generate(given, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    answered = sum(len(one.outputs[0].token_ids) for one in outputs)
    print(f"{len(lengths)} prompts of {sum(lengths):,} tokens, {answered} tokens answered: {seconds:.2f} s", flush=True)
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> list[Any]:
    return [list(one.outputs[0].token_ids) for one in outputs]


def worker_of_rank(rank: int) -> int:
    """The process of a rank that this one has started."""
    for line in subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines():
        pid, _, command = line.strip().partition(" ")
        if "paddle_qwen1m.parallel.worker" in command and f"PADDLE_TRAINER_ID={rank}\0" in _environment(int(pid)):
            return int(pid)
    raise SystemExit(f"no process of rank {rank} was found")


def _environment(pid: int) -> str:
    with open(f"/proc/{pid}/environ", encoding="utf-8", errors="replace") as file:
        return file.read()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="DIR")
    parser.add_argument("--tokens", type=int, default=131072, help="of the long prompt (default: %(default)s)")
    parser.add_argument("--short", type=int, default=8, help=f"prompts of {SHORT_TOKENS} tokens (default: %(default)s)")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    arguments = parser.parse_args()
    short = [SHORT_TOKENS] * arguments.short
    llm = start(arguments)
    ask(llm, short, seed=1)  # what is made once
    alone = ask(llm, short)
    llm.reset_prefix_cache()
    ask(llm, [arguments.tokens])
    llm.reset_prefix_cache()
    together = ask(llm, [*short, arguments.tokens])
    print(f"the short ones' answers are those without the long one: {tokens_of(together)[:-1] == tokens_of(alone)}")
    if arguments.tensor_parallel_size > 1:
        victim = arguments.tensor_parallel_size - 1
        llm.reset_prefix_cache()
        threading.Timer(KILL_AFTER, os.kill, (worker_of_rank(victim), signal.SIGKILL)).start()
        begin = time.perf_counter()
        try:
            ask(llm, [*short, arguments.tokens])
            print("the call came to its end all the same")
        except Exception as error:
            seconds = time.perf_counter() - begin - KILL_AFTER
            print(f"rank {victim} killed: after {seconds:.1f} s {type(error).__name__}: {error}")
        again = start(arguments)
        print(f"a new LLM answers as the first one did: {tokens_of(ask(again, short)) == tokens_of(alone)}")
        again.shutdown()
    llm.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
