"""Values and speed of linear layers with 8-bit weights on a GPU, over the four linears of a layer of each model.

    python tools/cuda_library.py && python tools/benchmark_gpu_fp8.py [--models 7B 14B] [--rows 32768]

Needs PyTorch, for its cuBLAS. Prefill: whole paths from the residual or the attention's output to each product's
output, norms and SiLU included, in bfloat16, on Hopper by products of our own where the engine has them, of which that
of gate and up has SiLU (`bf16`), and by cuBLAS (`cublas`); in FP8 with rows rounded as they are made, on Hopper; and
with weights widened to bfloat16 first. Then each product alone, and the linears of decode, which read the weights
alone. Products are compared with float64 on the same numbers and scales for a sample of rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from benchmark_gpu_step import copy_bandwidth, empty, normal, time_launches
from cuda_library import CudaLibrary
from decode_step import MODELS, Model

ROWS = 32768
DECODE_ROWS = (1, 2, 4, 8, 16)
COMPARED_ROWS = 64
COPIES = 8
"""Of weights that decode reads in turn, so that none is in L2."""
BLOCK = 128
LARGEST = {"fp8": 448.0, "int8": 127.0}
DTYPES = {"fp8": "e4m3", "int8": "int8"}


def rounded(weight: Any, kind: str) -> dict[str, Any]:
    """A weight [N, K] in 8 bits as the kernels take it; by PyTorch."""
    import torch

    features, depth = weight.shape
    rows = BLOCK if kind == "fp8" else 1
    blocks = weight.float().view(features // rows, rows, depth // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / LARGEST[kind]
    scaled = blocks / scales[:, None, :, None]
    numbers = scaled.to(torch.float8_e4m3fn) if kind == "fp8" else scaled.round().to(torch.int8)
    numbers = numbers.view(torch.uint8).view(features, depth)
    return {"numbers": numbers, "scales": scales, "kind": DTYPES[kind], "rows": rows, "columns": BLOCK}


def widened(weight: dict[str, Any]) -> Any:
    """What it stands for, float64."""
    import torch

    kind = torch.float8_e4m3fn if weight["kind"] == "e4m3" else torch.int8
    features, depth = weight["numbers"].shape
    blocks = weight["numbers"].view(kind).double().view(features // weight["rows"], weight["rows"], -1, BLOCK)
    return (blocks * weight["scales"].double()[:, None, :, None]).view(features, depth)


class Rows:
    """Memory for rows in FP8."""

    def __init__(self, tokens: int, width: int) -> None:
        self.fields = {
            "numbers": empty(tokens, width, dtype="uint8"),
            "scales": empty(width // BLOCK, tokens, dtype="float32"),
            "rows": tokens,
        }

    def widened(self, count: int) -> Any:
        """The first ones, float64."""
        import torch

        numbers = self.fields["numbers"][:count].view(torch.float8_e4m3fn).double()
        return numbers * self.fields["scales"].double()[:, :count].T.repeat_interleave(BLOCK, 1)


class Prefill:
    """A layer's linears and what stands before them, over `rows` rows."""

    def __init__(self, cuda: CudaLibrary, model: Model, rows: int) -> None:
        self._cuda, self._rows, self._model = cuda, rows, model
        self.shapes = {name: shape for name, shape in model.linears.items() if name != "head"}
        self._weights = {name: normal(features, depth).mul_(0.02) for name, (depth, features) in self.shapes.items()}
        self._fp8 = {name: rounded(weight, "fp8") for name, weight in self._weights.items()}
        self._out = {name: empty(rows, features) for name, (_, features) in self.shapes.items()}
        self._residual, self._gain = normal(rows, model.hidden, dtype="float32"), normal(model.hidden)
        self._delta = normal(rows, model.hidden).mul_(1e-3)
        self._inputs = {name: normal(rows, depth) for name, (depth, _) in self.shapes.items()}
        self._rows8 = {name: Rows(rows, depth) for name, (depth, _) in self.shapes.items()}
        self._wide = {name: empty(features, depth) for name, (depth, features) in self.shapes.items()}
        self._workspace = empty(max(1, 33 << 20), dtype="uint8")

    def whole(self, path: str) -> None:
        """All of a layer but its attention: `path` is bf16, cublas, fp8 or widened."""
        in_fp8 = path == "fp8"
        self._norm("qkv", in_fp8)
        self.product("qkv", path)
        if in_fp8:
            self._round("o")
        self.product("o", path)
        self._norm("gate_up", in_fp8)
        self.product("gate_up", path)
        if not in_fp8 and not self._is_own("gate_up", path):
            self._silu()
        self.product("down", path)

    def product(self, name: str, path: str) -> None:
        """That of gate and up may have SiLU with it."""
        import torch

        depth, features = self.shapes[name]
        if path == "fp8":
            product = {
                "x": self._rows8[name].fields,
                "weight": self._fp8[name],
                "y": self._out[name],
                "in_features": depth,
                "out_features": features,
                "out_dtype": "bfloat16",
            }
            if name == "gate_up":
                self._cuda("gated_product8", product={**product, "y": None}, out=self._rows8["down"].fields)
            else:
                self._cuda("product8", self._workspace, **product)
            return
        weight = self._weights[name]
        if path == "widened":
            weight = self._wide[name]
            self._cuda(
                "widen_weight",
                weight=self._fp8[name],
                out=weight,
                in_features=depth,
                out_features=features,
                out_dtype="bfloat16",
            )
        if self._is_own(name, path):
            gates = name == "gate_up"
            self._cuda(
                "gated_linear" if gates else "linear",
                x=self._inputs[name],
                weight=weight,
                bias=None,
                y=self._inputs["down"] if gates else self._out[name],
                tokens=self._rows,
                in_features=depth,
                out_features=features,
                activation="bfloat16",
                out_dtype="bfloat16",
                dtype="bfloat16",
            )
            return
        torch.matmul(self._inputs[name], weight.T, out=self._out[name])

    def errors(self) -> Iterator[str]:
        """Of each FP8 product, the largest beside the largest value of its row."""
        import torch

        self.whole("fp8")
        gate, up = (self._rows8["gate_up"].widened(COMPARED_ROWS) @ widened(self._fp8["gate_up"]).T).chunk(2, 1)
        exact, got = torch.nn.functional.silu(gate) * up, self._rows8["down"].widened(COMPARED_ROWS)
        yield f"gate, up and SiLU {float(((got - exact).norm(dim=1) / exact.norm(dim=1)).max()):.1e} of a row, rounded"
        for name in self.shapes:
            if name == "gate_up":
                continue
            exact = self._rows8[name].widened(COMPARED_ROWS) @ widened(self._fp8[name]).T
            off = (self._out[name][:COMPARED_ROWS].double() - exact).abs().amax(1) / exact.abs().amax(1)
            yield f"{name} {float(off.max()):.1e}"

    def _norm(self, into: str, in_fp8: bool) -> None:
        fields = {
            "delta": self._delta,
            "residual": self._residual,
            "weight": self._gain,
            "out": None if in_fp8 else self._inputs[into],
            "tokens": self._rows,
            "width": self._model.hidden,
            "eps": 1e-6,
            "activation": "bfloat16",
            "dtype": "bfloat16",
        }
        if in_fp8:
            self._cuda("rms_norm8", norm=fields, out=self._rows8[into].fields)
        else:
            self._cuda("rms_norm", **fields)

    def _round(self, into: str) -> None:
        self._cuda(
            "round_rows",
            values=self._inputs[into],
            out=self._rows8[into].fields,
            tokens=self._rows,
            width=self.shapes[into][0],
            activation="bfloat16",
        )

    def _is_own(self, name: str, path: str) -> bool:
        """Whether a product in bfloat16 is ours."""
        return path != "cublas" and self._cuda.multiplies_many_rows(self._rows, self.shapes[name][1])

    def _silu(self) -> None:
        self._cuda(
            "silu_mul",
            gate_up=self._out["gate_up"],
            out=self._inputs["down"],
            tokens=self._rows,
            width=self._model.intermediate,
            activation="bfloat16",
        )


def prefill_lines(cuda: CudaLibrary, name: str, rows: int) -> Iterator[str]:
    layer = Prefill(cuda, MODELS[name], rows)
    paths = ["bf16", "cublas", "fp8", "widened"] if cuda.multiplies_rows8() else ["bf16", "widened"]
    if "fp8" in paths:
        yield f"{name}: errors of FP8 products: {', '.join(layer.errors())}"
    whole = {path: time_launches([lambda path=path: layer.whole(path)], rounds=4).graph for path in paths}
    yield f"{name}, {rows:,} rows, a layer but its attention, whole: " + beside(whole)
    for linear, (depth, features) in layer.shapes.items():
        alone = {
            path: time_launches([lambda path=path, linear=linear: layer.product(linear, path)], rounds=4).graph
            for path in paths
        }
        flops = 2e-6 * rows * depth * features
        rates = ", ".join(f"{path} {flops / time:.0f} TFLOP/s" for path, time in alone.items())
        yield f"  {linear} alone: {beside(alone)}; {rates}"


def beside(times: dict[str, float]) -> str:
    first = times["bf16"]
    return ", ".join(f"{path} {time / 1e3:.2f} ms ({first / time:.2f}x)" for path, time in times.items())


def decode_lines(cuda: CudaLibrary, name: str) -> Iterator[str]:
    """Microseconds of each linear, in turn on copies of its weights, and their sum over a layer."""
    import torch

    shapes = {linear: shape for linear, shape in MODELS[name].linears.items() if linear != "head"}
    for rows in DECODE_ROWS:
        sums = dict.fromkeys(("bf16", *DTYPES), 0.0)
        parts = []
        for linear, (depth, features) in shapes.items():
            x, y = normal(rows, depth), empty(rows, features)
            times = {}
            for kind in sums:
                weights = [normal(features, depth).mul_(0.02) for _ in range(COPIES)]
                common = {"x": x, "y": y, "tokens": rows, "in_features": depth, "out_features": features}
                common |= {"activation": "bfloat16", "out_dtype": "bfloat16"}
                held = weights if kind == "bf16" else [rounded(weight, kind) for weight in weights]
                del weights
                extra = {"bias": None, "dtype": "bfloat16"} if kind == "bf16" else {}
                op = "linear" if kind == "bf16" else "linear8"
                launches = [
                    lambda op=op, fields={**common, **extra, "weight": weight}: cuda(op, **fields) for weight in held
                ]
                times[kind] = time_launches(launches).graph
                sums[kind] += times[kind]
                if kind != "bf16":
                    exact = x.double() @ widened(held[-1]).T
                    launches[-1]()
                    off = float(((y.double() - exact).abs().amax(1) / exact.abs().amax(1)).max())
                    assert off < 1e-2, f"{linear} {kind}: off by {off}"
                del held, launches
                torch.cuda.empty_cache()
            parts.append(f"{linear} " + " / ".join(f"{time:.1f}" for time in times.values()))
        ratios = ", ".join(f"{kind} {sums['bf16'] / time:.2f}x" for kind, time in sums.items() if kind != "bf16")
        yield f"{name}, {rows} rows, us of {' / '.join(sums)}: {'; '.join(parts)}; a layer: {ratios}"


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--rows", type=int, default=ROWS, help="of a prefill, a multiple of 4 (default: %(default)s)")
    arguments = parser.parse_args()
    torch.matmul(normal(8, 8), normal(8, 8))  # cuBLASLt is in the process before it is looked for
    cuda = CudaLibrary()
    print(f"{torch.cuda.get_device_name()}: a copy moves {copy_bandwidth() / 1e12:.2f} TB/s", flush=True)
    for name in arguments.models:
        for lines in (prefill_lines(cuda, name, arguments.rows), decode_lines(cuda, name)):
            for line in lines:
                print(line, flush=True)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
