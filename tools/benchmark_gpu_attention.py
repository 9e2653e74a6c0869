"""Speed of the attention kernels on a GPU, each beside what else would run there, in one run.

    python tools/cuda_library.py && python tools/benchmark_gpu_attention.py [dense] [few] [sparse] [probe] [decode]
    python tools/benchmark_gpu_attention.py --fetch-peer DIR      downloads the sparse kernel that SGLang uses (21 MB)

Needs PyTorch. Prefill stands beside the kernels that other cards run, dense beside PyTorch's FlashAttention-2 and cuDNN
as well, sparse beside SGLang's kernel (--peer DIR), few rows beside 8,192 and a device copy, decode beside the copy,
the probe beside its floor. Medians of CUDA events; caches exceed L2.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sparse_workload
from cuda_library import REFERENCE, CudaLibrary, index_shapes

CHUNK_LEN = 253952
PAGE = 256
HEAD_DIM = 128
MODELS = {"14B": (40, 8), "7B": (28, 4)}
PEER_WHEEL, PEER_OPS = "sglang-kernel==0.4.3", "sgl_kernel/sm90/common_ops.abi3.so"


def milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of a call on the device, after two that do not count; what the host does for it is hidden."""
    import torch

    run(), run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)
        begin.record(), run(), end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return float(np.median(times))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device copy."""
    import torch

    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * 2**31 / milliseconds(lambda: target.copy_(source), 9) * 1e3


def matmul_speed() -> float:
    """TFLOP/s of a bfloat16 matrix product of 8192^3."""
    import torch

    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b, 9) / 1e9


def with_workspace(cuda: CudaLibrary, op: str, fields: dict[str, Any]) -> Callable[[], None]:
    """A call of the op that takes no time to make its workspace."""
    import torch

    workspace = torch.empty(cuda.workspace_bytes(op, **fields), dtype=torch.uint8, device="cuda")
    return lambda: cuda(op, workspace, **fields)


class Sequence:
    """One layer's cache of a sequence, and queries of its last rows in three rotations."""

    in_order = False
    """Whether pages lie as an engine's first prompt has them, one behind the other, and not shuffled."""

    def __init__(self, heads: int, kv_heads: int, keys: int, rows: int) -> None:
        import torch

        self.heads, self.kv_heads, self.keys, self.rows = heads, kv_heads, keys, rows
        pages = -(-keys // PAGE)
        shape = (pages, PAGE, kv_heads, HEAD_DIM)
        self.key, self.value = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        order = torch.arange if self.in_order else torch.randperm
        self.table = order(pages, device="cuda").int()
        variants = min(3, (keys - 1) // CHUNK_LEN + 1)
        self.q = torch.randn(variants, rows, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        self.out = torch.empty(rows, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        self.scale = torch.full((1,), HEAD_DIM**-0.5, device="cuda")
        self.lengths = torch.full((1,), keys, dtype=torch.int32, device="cuda")

    @property
    def cache(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "value": self.value,
            "dtype": "bfloat16",
            "page_size": PAGE,
            "kv_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
        }

    def pieces(self) -> np.ndarray:
        """int32 [P, 4]: sequence, row, rows, position."""
        begin, pieces = self.keys - self.rows, []
        while begin < self.keys:
            end = min((begin // CHUNK_LEN + 1) * CHUNK_LEN, self.keys)
            pieces.append((0, begin - self.keys + self.rows, end - begin, begin))
            begin = end
        return np.asarray(pieces, np.int32)

    def dense(self, cuda: CudaLibrary) -> Callable[[], None]:
        pieces = self.pieces()
        fields = {
            "q": self.q,
            "out": self.out,
            "lse": None,
            "cache": self.cache,
            "block_tables": self.table,
            "pieces": pieces,
            "scale": self.scale,
            "activation": "bfloat16",
            "tokens": self.rows,
            "heads": self.heads,
            "table_width": len(self.table),
            "num_pieces": len(pieces),
            "on_device": 0,
            "chunk_len": CHUNK_LEN,
        }
        return with_workspace(cuda, "dca_prefill", fields)

    def decode(self, cuda: CudaLibrary, workspace: Any) -> None:
        cuda("dca_decode", workspace, **self.decode_fields())

    def decode_fields(self) -> dict[str, Any]:
        return {
            "q": self.q,
            "out": self.out,
            "cache": self.cache,
            "block_tables": self.table,
            "lengths": self.lengths,
            "scale": self.scale,
            "activation": "bfloat16",
            "batch": 1,
            "heads": self.heads,
            "table_width": len(self.table),
            "chunk_len": CHUNK_LEN,
        }


def bench_dense(cuda: CudaLibrary, reference: CudaLibrary) -> None:
    """40/8 heads: 8,192 rows at long contexts, and causal at 16,384, beside other kernels and a matrix product."""
    import torch
    import torch.nn.functional as functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    peak = matmul_speed()
    print(f"\ndense prefill, 40/8 heads, bf16, TFLOP/s; 8192^3 matmul {peak:.0f}")
    print("                                 ours        share  sm_80 kernels  FlashAttention-2      cuDNN")
    heads, kv_heads = MODELS["14B"]
    for rows, keys in ((16384, 16384), (8192, 131072), (8192, 1015808)):
        sequence = Sequence(heads, kv_heads, keys, rows)
        pairs = rows * (keys - (rows - 1) / 2)
        flop = 4 * heads * HEAD_DIM * pairs
        whole_flop = flop if rows == keys else 4 * heads * HEAD_DIM * rows * keys
        q = sequence.q[0].transpose(0, 1)[None]
        k, v = (
            pool.view(-1, kv_heads, HEAD_DIM)[:keys].transpose(0, 1)[None].repeat_interleave(heads // kv_heads, 1)
            for pool in (sequence.key, sequence.value)
        )

        def theirs(q: Any = q, k: Any = k, v: Any = v, causal: bool = rows == keys) -> None:
            functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        ours = milliseconds(sequence.dense(cuda))
        speed = flop / ours / 1e9
        others = [flop / milliseconds(sequence.dense(reference), 3) / 1e9]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(backend):
                others.append(whole_flop / milliseconds(theirs, 3) / 1e9)
        print(
            f"{rows:6,} rows, {keys:9,} keys {ours:8.2f} ms {speed:5.0f} {speed / peak:5.2f}"
            + "".join(f" {other:8.0f} ({speed / other:.2f}x)" for other in others),
            flush=True,
        )
        del sequence, q, k, v, theirs
        torch.cuda.empty_cache()


FEW_ROWS = (1, 8, 64, 512)


def bench_few(cuda: CudaLibrary, seed: int) -> None:
    """A question on a cached document: 1 to 512 rows over many keys, dense, and sparse with the budgets of layer 21.

    Beside cuDNN and FlashAttention-2 on the same rows and keys, a device copy, and what the same heads reach with 8,192
    rows. The sparse kernel visits the lines of tools/sparse_workload.py; its TFLOP/s count those pairs.
    """
    import torch
    import torch.nn.functional as functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    bandwidth = copy_bandwidth()
    print(f"\nfew rows, bf16; copy {bandwidth / 1e12:.2f} TB/s; of it, and of the speed with 8,192 rows")
    for model, (heads, kv_heads) in MODELS.items():
        for keys in (131072, 1015808):
            many = 0.0
            for rows in (8192, *FEW_ROWS):
                sequence = Sequence(heads, kv_heads, keys, rows)
                time = milliseconds(sequence.dense(cuda))
                flop = 4 * heads * HEAD_DIM * rows * (keys - (rows - 1) / 2)
                speed = flop / time / 1e9
                many = many or speed
                read = 4 * keys * kv_heads * HEAD_DIM / time * 1e3
                line = f"{model} {rows:5,} rows, {keys:9,} keys {time:8.3f} ms {read / 1e12:5.2f} TB/s"
                line += f" ({read / bandwidth:.2f}) {speed:5.0f} TFLOP/s ({speed / many:.2f})"
                q = sequence.q[0].transpose(0, 1)[None]
                k, v = (
                    pool.view(-1, kv_heads, HEAD_DIM)[:keys].transpose(0, 1)[None]
                    for pool in (sequence.key, sequence.value)
                )
                for name, backend in (
                    ("cuDNN", SDPBackend.CUDNN_ATTENTION),
                    ("FlashAttention-2", SDPBackend.FLASH_ATTENTION),
                ):
                    with sdpa_kernel(backend):
                        theirs = milliseconds(
                            lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), 3
                        )
                    line += f"  {name} {theirs:8.3f} ms ({theirs / time:.2f}x)"
                if rows in FEW_ROWS[2:]:
                    line += sparse_beside(cuda, sequence, seed)
                print(line, flush=True)
                del sequence, q, k, v
                torch.cuda.empty_cache()


def sparse_beside(cuda: CudaLibrary, sequence: Sequence, seed: int) -> str:
    """How long the sparse kernel takes for the same rows, the index included, and how many keys a row visits."""
    workload = sparse_workload.Workload(sequence.rows, sequence.keys, "published:21", 64)
    lines = sparse_workload.make(workload, sparse_workload.budgets_of(workload.budgets, sequence.heads), seed)
    pieces = [Piece(sequence, lines, row, rows, begin) for _, row, rows, begin in sequence.pieces().tolist()]
    converting = milliseconds(in_turn([piece.convert(cuda) for piece in pieces]))
    attending = milliseconds(in_turn([piece.attend(cuda) for piece in pieces]))
    keys = sum(piece.keys_a_row() * piece.rows for piece in pieces) / sequence.rows
    speed = 4 * sequence.heads * HEAD_DIM * sequence.rows * keys / attending / 1e9
    return f"  sparse {converting:.3f} + {attending:.3f} ms, {keys:,.0f} keys a row, {speed:.0f} TFLOP/s"


class Piece:
    """One piece of a sparse prefill: its lines, its index tables, and the kernels that work on them."""

    def __init__(self, sequence: Sequence, lines: sparse_workload.Lines, row: int, rows: int, begin: int) -> None:
        import torch

        self.sequence, self.row, self.rows, self.begin = sequence, row, rows, begin
        end = begin + rows
        self.columns = torch.from_numpy(lines.columns).cuda()
        self.slashes = torch.from_numpy(lines.slashes(end)).cuda()
        work = 2 * lines.offset_counts + lines.column_counts
        self.order = torch.from_numpy(np.argsort(-work, kind="stable").astype(np.int32)).cuda()
        shapes = index_shapes(sequence.heads, -(-rows // 64), self.columns.shape[1], self.slashes.shape[1], end)
        tables = {name: torch.empty(shape, dtype=torch.int32, device="cuda") for name, shape in shapes.items()}
        self.tables = {**tables, "block_width": shapes["blocks"][2], "column_width": shapes["columns"][1]}

    def convert(self, cuda: CudaLibrary) -> Callable[[], None]:
        fields = {
            "columns": self.columns,
            "slashes": self.slashes,
            "chains": None,
            "tables": self.tables,
            "heads": self.sequence.heads,
            "selected_columns": self.columns.shape[1],
            "selected_slashes": self.slashes.shape[1],
            "begin": self.begin,
            "rows": self.rows,
            "chunk_len": CHUNK_LEN,
            "block": 64,
            "first_block": 0,
            "num_blocks": -(-self.rows // 64),
        }
        return with_workspace(cuda, "sparse_index", fields)

    def attend(self, cuda: CudaLibrary) -> Callable[[], None]:
        sequence = self.sequence
        fields = {
            "q": sequence.q,
            "out": sequence.out,
            "lse": None,
            "cache": sequence.cache,
            "block_table": sequence.table,
            "tables": self.tables,
            "order": self.order,
            "activation": "bfloat16",
            "scale": HEAD_DIM**-0.5,
            "tokens": sequence.rows,
            "heads": sequence.heads,
            "all_columns": self.tables["columns"].numel(),
            "row": self.row,
            "begin": self.begin,
            "rows": self.rows,
            "chunk_len": CHUNK_LEN,
            "first_block": 0,
            "num_blocks": -(-self.rows // 64),
        }
        return with_workspace(cuda, "dca_sparse_prefill", fields)

    def keys_a_row(self) -> float:
        counts = self.tables["counts"].float().mean((0, 1))
        return float(64 * counts[:3].sum() + counts[3:].sum())


def in_turn(calls: list[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


class Peer:
    """SGLang's index conversion and sparse attention, one causal stage over keys without pages."""

    def __init__(self, folder: Path) -> None:
        import torch

        spec = importlib.util.spec_from_file_location("common_ops", folder / "common_ops.abi3.so")
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        self._ops = torch.ops.sgl_kernel

    def times(self, sequence: Sequence, lines: sparse_workload.Lines) -> tuple[float, float, float]:
        """Milliseconds of conversion and of attention, and the keys that a row visits."""
        import torch

        columns, offsets, column_counts, offset_counts = (torch.from_numpy(part).cuda() for part in lines)
        rows, keys, heads = sequence.rows, sequence.keys, sequence.heads
        q = sequence.q[0]
        k, v = (pool.view(-1, sequence.kv_heads, HEAD_DIM) for pool in (sequence.key, sequence.value))
        lengths = [torch.tensor([n], device="cuda", dtype=torch.int32) for n in (rows, keys)]
        bounds = [torch.tensor([0, n], device="cuda", dtype=torch.int32) for n in (rows, keys)]
        shapes = ((), (offsets.shape[1],), (), (columns.shape[1],))
        index = [torch.zeros(1, heads, rows // 64, *shape, device="cuda", dtype=torch.int32) for shape in shapes]

        def convert() -> None:
            self._ops.convert_vertical_slash_indexes_mergehead.default(
                *index, *lengths, columns[None], offsets[None], column_counts, offset_counts, rows, 64, 64, True
            )

        def attend() -> None:
            self._ops.varlen_fwd_sparse.default(
                q,
                k,
                v,
                *index,
                None,
                *bounds,
                None,
                None,
                rows,
                keys,
                0.0,
                HEAD_DIM**-0.5,
                False,
                True,
                0.0,
                False,
                None,
            )

        converting = milliseconds(convert)
        return converting, milliseconds(attend), float(64 * index[0].float().mean() + index[2].float().mean())


def bench_sparse(cuda: CudaLibrary, reference: CudaLibrary, peer: Peer | None, models: list[str], seed: int) -> None:
    """The workloads with L = 253,952 and all their stages; the peer runs the same lines as one causal stage."""
    import torch

    print(
        "\nsparse prefill, 32,768 rows, bf16                ours: convert  attend  keys a row"
        "   sm_80 kernel: attend    peer: convert  attend  keys a row   speed"
    )
    for model in models:
        heads, kv_heads = MODELS[model]
        for workload in sparse_workload.WORKLOADS:
            lines = sparse_workload.make(workload, sparse_workload.budgets_of(workload.budgets, heads), seed)
            sequence = Sequence(heads, kv_heads, workload.keys, workload.rows)
            pieces = [Piece(sequence, lines, row, rows, begin) for _, row, rows, begin in sequence.pieces().tolist()]
            converting = milliseconds(in_turn([piece.convert(cuda) for piece in pieces]))
            attending = milliseconds(in_turn([piece.attend(cuda) for piece in pieces]))
            keys = sum(piece.keys_a_row() * piece.rows for piece in pieces) / workload.rows
            speed = 4 * heads * HEAD_DIM * workload.rows * keys / attending / 1e9
            line = f"{model} {workload!s:42} {converting:8.2f} {attending:8.2f} {keys:8,.0f} {speed:4.0f} TFLOP/s"
            other = milliseconds(in_turn([piece.attend(reference) for piece in pieces]), 3)
            line += f" {other:8.2f} ({other / attending:.2f}x)"
            if peer is not None:
                their_convert, their_attend, their_keys = peer.times(sequence, lines)
                ratio = (their_convert + their_attend) / (converting + attending)
                line += f" {their_convert:8.2f} {their_attend:8.2f} {their_keys:8,.0f} {ratio:8.2f}x"
            print(line, flush=True)
            del sequence, pieces
            torch.cuda.empty_cache()


def bench_probe(cuda: CudaLibrary) -> None:
    """Probe and top-k with budgets (1000, 6096), beside the time to read K and the two products."""
    import torch

    bandwidth = copy_bandwidth()
    print(f"\nprobe and selection, budgets (1000, 6096); copy {bandwidth / 1e12:.2f} TB/s")
    for model, (heads, kv_heads) in MODELS.items():
        for keys in (131072, 1015808):
            sequence = Sequence(heads, kv_heads, keys, 64)
            sums = [torch.empty(heads, keys, device="cuda") for _ in range(2)]
            sizes = [torch.full((heads,), size, dtype=torch.int32, device="cuda") for size in (1000, 6096)]
            chosen = [torch.empty(heads, size, dtype=torch.int32, device="cuda") for size in (1000, 6096)]
            fields: dict[str, Any] = {
                "q": sequence.q,
                "cache": sequence.cache,
                "block_table": sequence.table,
                "vertical": sums[0],
                "slash": sums[1],
                "activation": "bfloat16",
                "scale": HEAD_DIM**-0.5,
                "rows": 64,
                "heads": heads,
                "end": keys,
                "chunk_len": CHUNK_LEN,
            }
            size = cuda.workspace_bytes("dca_probe", **fields)
            workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
            probing = milliseconds(lambda f=fields, w=workspace: cuda("dca_probe", w, **f))  # type: ignore[misc]

            def select(
                sums: Any = sums, sizes: Any = sizes, chosen: Any = chosen, keys: int = keys, heads: int = heads
            ) -> None:
                cuda(
                    "select_critical",
                    vertical=sums[0],
                    slash=sums[1],
                    vertical_sizes=sizes[0],
                    slash_sizes=sizes[1],
                    columns=chosen[0],
                    slashes=chosen[1],
                    heads=heads,
                    keys=keys,
                    column_width=1000,
                    slash_width=6096,
                    forced_columns=30,
                    forced_diagonals=100,
                )

            selecting = milliseconds(select)
            reading = 2 * keys * kv_heads * HEAD_DIM * 2 / bandwidth * 1e3
            products = 2 * 2 * heads * 64 * keys * HEAD_DIM / 790e12 * 1e3
            print(
                f"{model} {keys:9,} keys: probe {probing:6.2f} ms, top-k {selecting:5.2f} ms, together "
                f"{probing + selecting:6.2f} ms; floor {max(reading, products):.2f} ms (reading K twice {reading:.2f}, "
                f"two products at 790 TFLOP/s {products:.2f})",
                flush=True,
            )
            del sequence, sums
            torch.cuda.empty_cache()


def bench_decode(cuda: CudaLibrary) -> None:
    """Batch 1, keys and values read once, beside a device copy: calls follow each other in a graph, caches in turn."""
    import torch

    bandwidth = copy_bandwidth()
    print(f"\ndecode attention, batch 1, bf16; copy {bandwidth / 1e12:.2f} TB/s")
    for model, (heads, kv_heads) in MODELS.items():
        for keys in (4096, 131072, 1010000):
            copies, rounds = (2, 8) if keys > 100000 else (16, 1)
            sequences = [Sequence(heads, kv_heads, keys, 1) for _ in range(copies)]
            for sequence in sequences:
                sequence.q = torch.randn(3, 1, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
            fields = sequences[0].decode_fields()
            size = cuda.workspace_bytes("dca_decode", **fields)
            workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
            stream = torch.cuda.Stream()
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                for sequence in sequences:
                    sequence.decode(cuda, workspace)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for sequence in sequences * rounds:
                    sequence.decode(cuda, workspace)
            time = milliseconds(graph.replay, 15) / (copies * rounds)
            read = 2 * keys * kv_heads * HEAD_DIM * 2
            print(
                f"{model} {keys:9,} keys: {time * 1e3:8.1f} us, {read / time / 1e9:6.2f} TB/s, "
                f"{read / time * 1e3 / bandwidth:.2f} of the copy",
                flush=True,
            )
            del sequences, graph
            torch.cuda.empty_cache()


def fetch_peer(folder: Path) -> None:
    """Takes the sm_90 ops out of SGLang's kernel wheel on PyPI."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", PEER_WHEEL]
        command += ["--python-version", "3.12", "--platform", "manylinux2014_x86_64", "-d", temporary]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        (folder / "common_ops.abi3.so").write_bytes(zipfile.ZipFile(wheel).read(PEER_OPS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="dense, few, sparse, probe, decode; default: all")
    parser.add_argument("--peer", type=Path, help="the folder that --fetch-peer filled")
    parser.add_argument("--fetch-peer", type=Path, metavar="DIR")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-order", action="store_true", help="pages one behind the other; default: shuffled")
    arguments = parser.parse_args()
    if arguments.fetch_peer is not None:
        fetch_peer(arguments.fetch_peer)
        return 0
    import torch

    Sequence.in_order = arguments.in_order
    parts = arguments.parts or ["dense", "few", "sparse", "probe", "decode"]
    cuda = CudaLibrary()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if "dense" in parts:
        bench_dense(cuda, CudaLibrary(REFERENCE))
    if "few" in parts:
        bench_few(cuda, arguments.seed)
    if "sparse" in parts:
        peer = Peer(arguments.peer) if arguments.peer else None
        bench_sparse(cuda, CudaLibrary(REFERENCE), peer, arguments.models, arguments.seed)
    if "probe" in parts:
        bench_probe(cuda)
    if "decode" in parts:
        bench_decode(cuda)
    return 0


if __name__ == "__main__":
    sys.exit(main())
