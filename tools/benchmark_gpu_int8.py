"""Decode over 8-bit caches, int8 and FP8, beside a 16-bit one; the copy that widens them, beside a device copy.

    python tools/benchmark_gpu_int8.py [--keys 4096 131072 1010000] [--library FILE ...] [--layers 28] [--in-order]

Batch 1. Medians of CUDA events over graphs in which the caches of some layers take turns, larger than L2 together; a
model's own number of them reaches over as much memory as it does. Pages are shuffled, or in the order of the tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

from benchmark_gpu_attention import CHUNK_LEN, HEAD_DIM, MODELS, PAGE, copy_bandwidth, milliseconds
from cuda_library import LIBRARY, CudaLibrary


class Layer:
    """A layer's cache of `keys` tokens, in pages that are shuffled or in order, and a query in three rotations."""

    def __init__(self, heads: int, kv_heads: int, keys: int, dtype: str, *, shuffled: bool) -> None:
        import torch

        self.keys, self.dtype = keys, dtype
        self.pages = -(-keys // PAGE)
        shape = (self.pages, PAGE, kv_heads, HEAD_DIM)
        if dtype != "bfloat16":  # any byte is a number of either kind
            pools = [torch.randint(-127, 127, shape, dtype=torch.int8, device="cuda") for _ in range(2)]
        else:
            pools = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        self.cache: dict[str, Any] = {
            "key": pools[0],
            "value": pools[1],
            "dtype": dtype,
            "page_size": PAGE,
            "kv_heads": kv_heads,
            "head_dim": HEAD_DIM,
        }
        if dtype != "bfloat16":
            frame = {
                "key_scale": torch.full(shape[:3], 0.02, dtype=torch.float16, device="cuda"),
                "value_scale": torch.full(shape[:3], 0.02, dtype=torch.float16, device="cuda"),
                "power": torch.ones(kv_heads, HEAD_DIM, device="cuda"),
                "centre": torch.randn(kv_heads, HEAD_DIM, device="cuda"),
            }
            self.cache["frame"] = frame
        self.table = (torch.randperm if shuffled else torch.arange)(self.pages, device="cuda").int()
        self.q = torch.randn(3, 1, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        self.fields = {
            "q": self.q,
            "out": torch.empty(1, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda"),
            "cache": self.cache,
            "block_tables": self.table,
            "lengths": torch.full((1,), keys, dtype=torch.int32, device="cuda"),
            "scale": torch.full((1,), HEAD_DIM**-0.5, device="cuda"),
            "activation": "bfloat16",
            "batch": 1,
            "heads": heads,
            "table_width": self.pages,
            "chunk_len": CHUNK_LEN,
        }

    @property
    def read(self) -> int:
        """Bytes of keys and values, and of scales."""
        size = 2 * HEAD_DIM if self.dtype == "bfloat16" else HEAD_DIM + 2
        return 2 * self.keys * int(self.cache["kv_heads"]) * size


def graphed(calls: Sequence[Callable[[], None]], rounds: int) -> float:
    """Milliseconds of one call, of those that follow each other in a graph."""
    import torch

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return milliseconds(graph.replay, 11) / (rounds * len(calls))


def decode(cuda: CudaLibrary, layers: Sequence[Layer], rounds: int) -> float:
    import torch

    workspace = torch.empty(cuda.workspace_bytes("dca_decode", **layers[0].fields), dtype=torch.uint8, device="cuda")
    return graphed([lambda one=one: cuda("dca_decode", workspace, **one.fields) for one in layers], rounds)


def widen(cuda: CudaLibrary, layer: Layer) -> float:
    import torch

    keys, values = (torch.empty(layer.cache["key"].shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    fields = {"cache": layer.cache, "pages": layer.table, "key": keys, "value": values}
    return graphed([lambda: cuda("dequantize_pages", **fields, dtype="bfloat16", count=layer.pages)], 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="*", default=[4096, 131072, 1010000])
    parser.add_argument("--library", type=Path, nargs="*", default=[LIBRARY])
    parser.add_argument("--layers", type=int, help="default: 2, or 16 of few keys")
    parser.add_argument("--in-order", action="store_true", help="pages in the order of the tokens")
    arguments = parser.parse_args()
    import torch

    libraries = {path.stem: CudaLibrary(path) for path in arguments.library}
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}; a copy moves {bandwidth / 1e12:.2f} TB/s")
    for model, (heads, kv_heads) in MODELS.items():
        for keys in arguments.keys:
            many, rounds = (2, 4) if keys > 100000 else (16, 1)
            for name, cuda in libraries.items():
                times = {}
                for dtype in ("bfloat16", "int8", "e4m3"):
                    layers = [
                        Layer(heads, kv_heads, keys, dtype, shuffled=not arguments.in_order)
                        for _ in range(arguments.layers or many)
                    ]
                    time = times[dtype] = decode(cuda, layers, rounds)
                    share = layers[0].read / time * 1e3 / bandwidth
                    what = f"{model} {keys:9,} keys, {name}, {dtype:8}"
                    print(f"{what}: {time * 1e3:8.1f} us, {share:.2f} of a copy", flush=True)
                    if dtype != "bfloat16":
                        widened = widen(cuda, layers[0])
                        share = (layers[0].read + 4 * keys * kv_heads * HEAD_DIM) / widened * 1e3 / bandwidth
                        faster = times["bfloat16"] / time
                        print(
                            f"    {faster:.2f} times as fast; widened in {widened * 1e3:.1f} us, {share:.2f} of a copy"
                        )
                    del layers
                    torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
