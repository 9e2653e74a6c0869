"""Decode of the 7B's shape on a CPU with weights in bfloat16, int8 and FP8: tokens a second, and memory.

    python tools/benchmark_cpu_weights.py [--layers 4] [--tokens 8] [--threads N]

Random weights of a few layers, with a vocabulary of VOCABULARY; each kind in a process of its own. A decode step of one
layer and of all of them gives the time of a layer, and so that of the 28 layers, which is an extrapolation. The real
head, which stays in 16 bits with each kind, reads 1.1 GB more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

KINDS = ("bfloat16", "int8", "fp8")
PROMPT_TOKENS = 16
REPEATS = 3
NOISE = 1 << 24
VOCABULARY = 8192


def measure(kind: str, layers: int, tokens: int, threads: int | None) -> dict[str, Any]:
    """Seconds a token of one layer and of `layers`, and bytes of the weights of those."""
    import numpy as np

    from paddle_qwen1m import ops
    from paddle_qwen1m.engine import Engine, SamplingParams
    from paddle_qwen1m.model import Qwen2OneM
    from paddle_qwen1m.options import EngineOptions
    from paddle_qwen1m.plan import weight_bytes
    from paddle_qwen1m.planning import PUBLISHED

    if threads is not None:
        ops.set_num_threads(threads)
    quantization = None if kind == "bfloat16" else kind
    noise = np.random.default_rng(0).standard_normal(NOISE, np.float32) * np.float32(0.02)
    bits = (noise.view(np.uint32) >> 16).astype(np.uint16)
    seconds = []
    for count in (1, layers):
        config = replace(PUBLISHED["7B"], num_layers=count, vocab_size=VOCABULARY)
        model = Qwen2OneM(config, "bfloat16", quantization=quantization)
        for slot in model.slots().values():
            slot.write(np.resize(bits, slot.held_shape))
        engine = Engine(model, EngineOptions(sparse=False, cache_tokens=1024, quantization=quantization))
        prompt = np.arange(PROMPT_TOKENS)
        times = []
        for _ in range(REPEATS + 1):
            seen: list[float] = []
            engine.generate(
                [prompt],
                SamplingParams(temperature=0.0, max_tokens=tokens + 1, ignore_eos=True),
                on_token=lambda *_, seen=seen: seen.append(time.perf_counter()),
            )
            times.append((seen[-1] - seen[0]) / tokens)
        seconds.append(sorted(times[1:])[REPEATS // 2])
        held = weight_bytes(config, "bfloat16", quantization)
    return {"one": seconds[0], "all": seconds[1], "bytes": held}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer (default: %(default)s)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    layers, tokens, threads = arguments.layers, arguments.tokens, arguments.threads
    if arguments.kind is not None:
        print(json.dumps(measure(arguments.kind, layers, tokens, threads)))
        return 0

    from paddle_qwen1m.plan import weight_bytes
    from paddle_qwen1m.planning import PUBLISHED

    first = None
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind, "--layers", str(layers), "--tokens", str(tokens)]
        command += [] if threads is None else ["--threads", str(threads)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        layer = (found["all"] - found["one"]) / (layers - 1)
        whole = found["one"] + 27 * layer
        first = first or (layer, whole)
        size = weight_bytes(PUBLISHED["7B"], "bfloat16", None if kind == "bfloat16" else kind)
        print(
            f"{kind:9} {layers} layers: {1 / found['all']:.2f} tokens/s, {found['bytes'] / 1e9:.2f} GB of weights; a "
            f"layer {1e3 * layer:.1f} ms ({first[0] / layer:.2f}x); 28 layers, extrapolated: {1 / whole:.2f} tokens/s "
            f"({first[1] / whole:.2f}x), {size / 1e9:.2f} GB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
