"""Runs every CUDA kernel on small odd shapes under compute-sanitizer: memory errors, races in shared memory, barriers.

    python tools/cuda_library.py && python tools/sanitize_gpu.py [memcheck] [racecheck] [synccheck]

Without PyTorch, whose own libraries would take the sanitizer minutes; what the kernels compute is the tests' affair.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from cuda_library import CudaLibrary, constant, index_shapes

TOOLS = ("memcheck", "racecheck", "synccheck")
CHUNK_LEN, PAGE = 256, 64
MAILBOX_ROWS = 64
EXIT_CODE = 9


class Runtime:
    """The few calls of the CUDA runtime that hold arrays on the device."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        self._library = ctypes.CDLL(f"{home}/lib64/libcudart.so")

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: CUDA error {status}")

    def compute_capability(self) -> int:
        """The major number of the first device's."""
        major, attribute = ctypes.c_int(), 75
        self.call("cudaDeviceGetAttribute", ctypes.byref(major), attribute, 0)
        return major.value


class DeviceArray:
    """A copy of a numpy array on the device, of exactly its size."""

    def __init__(self, runtime: Runtime, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values)
        self._pointer = ctypes.c_void_p()
        runtime.call("cudaMalloc", ctypes.byref(self._pointer), ctypes.c_size_t(values.nbytes))
        runtime.call(
            "cudaMemcpy", self._pointer, ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.nbytes), 1
        )

    def data_ptr(self) -> int:
        assert self._pointer.value is not None
        return self._pointer.value

    def is_contiguous(self) -> bool:
        return True


class PlainLibrary(CudaLibrary):
    """The kernels on the default stream, without PyTorch."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def make_workspace(self, size: int) -> DeviceArray:
        return DeviceArray(self._runtime, np.full(max(size, 1), 0xFF, np.uint8))

    def stream(self) -> int:
        return 0


def split_pieces(begin: int, rows: int) -> list[tuple[int, int, int, int]]:
    """Sequence 0's rows at positions from `begin` on, a piece a chunk: sequence, row, rows, position."""
    pieces, position, end = [], begin, begin + rows
    while position < end:
        stop = min((position // CHUNK_LEN + 1) * CHUNK_LEN, end)
        pieces.append((0, position - begin, stop - position, position))
        position = stop
    return pieces


def cut_piece(piece: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    """A piece in two, at a row block where it has several."""
    sequence, row, rows, begin = piece
    first = rows // 2 // 64 * 64 or rows
    parts = [(sequence, row, first, begin), (sequence, row + first, rows - first, begin + first)]
    return [part for part in parts if part[2] > 0]


class Kernels:
    """Calls every op for one head size and one KV head."""

    def __init__(self, head_dim: int, heads: int) -> None:
        self.runtime = Runtime()
        self.cuda = PlainLibrary(self.runtime)
        self.rng = np.random.default_rng(head_dim)
        self.head_dim, self.heads, self.kv_heads = head_dim, heads, 1

    def array(self, values: np.ndarray) -> DeviceArray:
        return DeviceArray(self.runtime, values)

    def normal(self, *shape: int) -> DeviceArray:
        """bfloat16."""
        values = self.rng.standard_normal(shape).astype(np.float32)
        return self.array((values.view(np.uint32) >> 16).astype(np.uint16))

    def floats(self, *shape: int) -> DeviceArray:
        return self.array(self.rng.random(shape).astype(np.float32))

    def integers(self, kind: Any, below: int, *shape: int) -> DeviceArray:
        return self.array(self.rng.integers(0, below, shape).astype(kind))

    def cache(self, pages: int) -> dict[str, Any]:
        shape = (pages, PAGE, self.kv_heads, self.head_dim)
        return {
            "key": self.normal(*shape),
            "value": self.normal(*shape),
            "dtype": "bfloat16",
            "page_size": PAGE,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
        }

    def caches(self, pages: int) -> Iterator[dict[str, Any]]:
        """In 16 bits, and in 8 of either kind."""
        yield self.cache(pages)
        yield from (self.cache_in_8_bits(pages, dtype) for dtype in ("int8", "e4m3"))

    def cache_in_8_bits(self, pages: int, dtype: str) -> dict[str, Any]:
        shape = (pages, PAGE, self.kv_heads, self.head_dim)
        scales = [self.array(self.rng.random(shape[:3]).astype(np.float16)) for _ in range(2)]
        frame = self.array(np.ones(shape[2:], np.float32)), self.floats(*shape[2:])
        numbers = [self.integers(np.int8, 127, *shape) for _ in range(2)]
        names = ("key_scale", "value_scale", "power", "centre")
        cache = {"key": numbers[0], "value": numbers[1], "dtype": dtype, "frame": dict(zip(names, (*scales, *frame)))}
        return {**self.cache(1), **cache}

    def pages(self, pages: int) -> None:
        """Copies of pages, and what 8-bit ones stand for."""
        shape = (pages, PAGE, self.kv_heads, self.head_dim)
        for cache in self.caches(pages):
            self.cuda("copy_page", cache=cache, source=0, target=pages - 1, rows=PAGE - 3)
            if cache["dtype"] == "bfloat16":
                continue
            self.cuda(
                "dequantize_pages",
                cache=cache,
                pages=self.array(self.rng.permutation(pages).astype(np.int32)),
                key=self.normal(*shape),
                value=self.normal(*shape),
                dtype="bfloat16",
                count=pages,
            )

    def prefill(self, length: int, rows: int) -> None:
        """Dense and sparse attention of the last rows of one sequence, which may cross borders of chunks."""
        pages = -(-length // PAGE)
        cache, table = self.cache(pages), self.array(self.rng.permutation(pages).astype(np.int32))
        begin, variants = length - rows, min(3, (length - 1) // CHUNK_LEN + 1)
        q, out = self.normal(variants, rows, self.heads, self.head_dim), self.normal(rows, self.heads, self.head_dim)
        lse = self.floats(rows, self.heads)
        scale = self.head_dim**-0.5
        common = {"q": q, "out": out, "lse": lse, "cache": cache, "activation": "bfloat16", "tokens": rows}
        common |= {"heads": self.heads, "chunk_len": CHUNK_LEN}
        pieces = split_pieces(begin, rows)
        cut = [part for piece in pieces for part in cut_piece(piece)]
        for ranges in (pieces, cut):
            self.cuda(
                "dca_prefill",
                **common,
                block_tables=table,
                pieces=np.asarray(ranges, np.int32),
                scale=self.array(np.asarray([scale], np.float32)),
                table_width=pages,
                num_pieces=len(ranges),
                on_device=0,
            )
        for _, row, piece_rows, piece_begin in pieces:
            self.sparse_prefill(common, cache, table, scale, row, piece_begin, piece_rows)

    def sparse_prefill(
        self,
        common: dict[str, Any],
        cache: dict[str, Any],
        table: DeviceArray,
        scale: float,
        row: int,
        begin: int,
        rows: int,
    ) -> None:
        """Probe, selection, conversion and sparse attention of one piece, whole and in two ranges of row blocks."""
        length, variants = begin + rows, min(3, begin // CHUNK_LEN + 1)
        probe_rows = min(64, rows)
        sums = [self.floats(self.heads, length) for _ in range(2)]
        self.cuda(
            "dca_probe",
            q=self.normal(variants, probe_rows, self.heads, self.head_dim),
            cache=cache,
            block_table=table,
            vertical=sums[0],
            slash=sums[1],
            activation="bfloat16",
            scale=scale,
            rows=probe_rows,
            heads=self.heads,
            end=length,
            chunk_len=CHUNK_LEN,
        )
        widths = [min(size, length) for size in (60, 150)]
        chosen = [self.integers(np.int32, 1, self.heads, width) for width in widths]
        sizes = [self.array(np.full(self.heads, size, np.int32)) for size in (60, 150)]
        self.cuda(
            "select_critical",
            vertical=sums[0],
            slash=sums[1],
            vertical_sizes=sizes[0],
            slash_sizes=sizes[1],
            columns=chosen[0],
            slashes=chosen[1],
            heads=self.heads,
            keys=length,
            column_width=widths[0],
            slash_width=widths[1],
            forced_columns=30,
            forced_diagonals=100,
        )
        row_blocks = -(-rows // 64)
        shapes = index_shapes(self.heads, row_blocks, *widths, length)
        tables: dict[str, Any] = {name: self.integers(np.int32, 1, *shape) for name, shape in shapes.items()}
        tables |= {"block_width": shapes["blocks"][2], "column_width": shapes["columns"][1]}
        ranges = (0, row_blocks // 2), (row_blocks // 2, row_blocks), (0, row_blocks)
        index = {"columns": chosen[0], "slashes": chosen[1], "tables": tables, "heads": self.heads, "block": 64}
        index |= {"selected_columns": widths[0], "selected_slashes": widths[1], "chunk_len": CHUNK_LEN}
        index |= {"begin": begin, "rows": rows, "chains": self.integers(np.int32, 1, self.heads, 3, widths[1] + 6)}
        self.cuda("index_chains", **index, first_block=0, num_blocks=0)
        for first, end in ranges:
            self.cuda("sparse_index", **index, first_block=first, num_blocks=end - first)
        self.cuda("sparse_index", **index | {"chains": None}, first_block=0, num_blocks=row_blocks)
        order = self.array(np.arange(self.heads, dtype=np.int32)[::-1].copy())
        for first, end in ranges:
            piece = {"row": row, "begin": begin, "rows": rows, "first_block": first, "num_blocks": end - first}
            piece |= {"tables": tables, "order": order, "all_columns": self.heads * tables["column_width"]}
            self.cuda("dca_sparse_prefill", **common, block_table=table, scale=scale, **piece)

    def decode(self, lengths: list[int]) -> None:
        batch, width = len(lengths), -(-max(lengths) // PAGE)
        tables = self.integers(np.int32, width, batch, width)
        state = self.array(np.asarray(lengths, np.int32) - 1)
        scale = self.floats(batch)
        self.cuda(
            "decode_inputs",
            lengths=state,
            block_tables=tables,
            inv_freq=self.floats(self.head_dim // 2),
            slots=self.integers(np.int64, 1, batch),
            table=self.floats(3, batch, self.head_dim),
            scale=scale,
            batch=batch,
            table_width=width,
            page_size=PAGE,
            head_dim=self.head_dim,
            chunk_len=CHUNK_LEN,
            chunk_size=CHUNK_LEN + 64,
            original_max_position_embeddings=256,
        )
        for cache in self.caches(width):
            if cache["dtype"] != "bfloat16" and self.head_dim != 128:
                continue
            self.cuda(
                "dca_decode",
                q=self.normal(3, batch, self.heads, self.head_dim),
                out=self.normal(batch, self.heads, self.head_dim),
                cache=cache,
                block_tables=tables,
                lengths=state,
                scale=scale,
                activation="bfloat16",
                batch=batch,
                heads=self.heads,
                table_width=width,
                chunk_len=CHUNK_LEN,
            )

    def norm(self, tokens: int, width: int, residual: DeviceArray) -> dict[str, Any]:
        half = "bfloat16"
        return {
            "delta": self.normal(tokens, width),
            "residual": residual,
            "weight": self.normal(width),
            "out": self.normal(tokens, width),
            "tokens": tokens,
            "width": width,
            "eps": 1e-6,
            "activation": half,
            "dtype": half,
        }

    def sum_of_two_ranks(self, tokens: int, width: int, residual: DeviceArray) -> None:
        """Rank 0's part of the first sum: all of the other rank's lines are there, for it cannot run beside."""
        lines = np.full(self.cuda.mailbox_bytes(2) // 8, 1 << 32, np.uint64)
        lines[: MAILBOX_ROWS // 2] = 0  # nobody has added anything yet
        boxes = [self.array(lines), self.array(np.zeros_like(lines))]
        addresses = np.array([box.data_ptr() for box in boxes])
        ranks = {"boxes": addresses, "rank": 0, "degree": 2}
        norm = self.norm(tokens, width, residual)
        sent = tokens <= 16
        if sent:
            linear = {**self.linear(tokens, 64, width), "y": norm["delta"]}
            self.cuda("sending_linear", linear=linear, **ranks)
        self.cuda("sum_rms_norm", norm=norm, **ranks, sent=int(sent))

    def rows_of_two_ranks(self, tokens: int, width: int, residual: DeviceArray) -> None:
        """What rank 0 sends is what it waits for; its norm adds up both ranks' parts."""
        copier, flag = self.cuda.make_copier(), self.array(np.zeros(1, np.int32))
        parts, norm = self.normal(tokens, width), self.norm(tokens, width, residual)
        places = {"from": norm["delta"], "to": parts, "flags": flag}
        addresses = {name: np.array([place.data_ptr()]) for name, place in places.items()}
        self.cuda("send_rows", **addresses, copier=copier, bytes=2 * tokens * width, count=1, number=1, mark=0)
        self.cuda("await_rows", copier=copier, flags=addresses["flags"], count=1, number=1, mark=0)
        self.cuda("parts_rms_norm", norm=norm, parts=parts, stride=tokens * width, rank=0, degree=2)

    def layers(self, tokens: int, width: int) -> None:
        half = "bfloat16"
        heads, kv_heads, d = self.heads, self.kv_heads, self.head_dim
        features = (heads + 2 * kv_heads) * d
        residual = self.floats(tokens, width)
        self.cuda(
            "embedding",
            ids=self.integers(np.int64, 50, tokens),
            table=self.normal(50, width),
            out=residual,
            tokens=tokens,
            width=width,
            rows=50,
            first=0,
            dtype=half,
            out_dtype="float32",
        )
        self.cuda("rms_norm", **self.norm(tokens, width, residual))
        if tokens <= MAILBOX_ROWS:
            self.sum_of_two_ranks(tokens, width, residual)
        self.rows_of_two_ranks(tokens, width, residual)
        self.cuda(
            "silu_mul",
            gate_up=self.normal(tokens, 2 * width),
            out=self.normal(tokens, width),
            tokens=tokens,
            width=width,
            activation=half,
        )
        self.cuda(
            "cast",
            values=residual,
            out=self.normal(tokens, width),
            count=tokens * width,
            dtype="float32",
            out_dtype=half,
        )
        self.cuda(
            "join_columns",
            parts=self.floats(2, tokens, 499),
            out=self.floats(tokens, 997),
            rows=tokens,
            share=499,
            columns=997,
        )
        table = self.floats(3, tokens, d)
        self.cuda(
            "rotary_table",
            positions=self.integers(np.int32, 5000, 3 * tokens),
            inv_freq=self.floats(d // 2),
            table=table,
            rows=3 * tokens,
            head_dim=d,
        )
        qkv, bias, pages = self.normal(tokens, features), self.normal(features), -(-tokens // PAGE)
        for cache in self.caches(pages):
            self.cuda(
                "rotate_and_cache",
                qkv=qkv,
                bias=bias,
                table=table,
                slots=self.array(self.rng.permutation(pages * PAGE)[:tokens].astype(np.int64)),
                q=self.normal(3, tokens, heads, d),
                cache=cache,
                activation=half,
                bias_dtype=half,
                variants=3,
                tokens=tokens,
                heads=heads,
            )
        rows = min(tokens, 3)
        self.cuda(
            "rotate_queries",
            qkv=qkv,
            bias=bias,
            table=self.floats(2, rows + 2, d),
            q=self.normal(2, rows, heads, d),
            activation=half,
            bias_dtype=half,
            variants=2,
            row=tokens - rows,
            rows=rows,
            table_row=2,
            table_rows=rows + 2,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=d,
        )
        for few in (1, min(tokens, 16)):
            given = {"bias": self.normal(77), "y": self.floats(few, 77), "out_dtype": "float32"}
            self.cuda("linear", **{**self.linear(few, width, 77), **given})
            self.linears_and_more(few, width, pages)
        many = constant("MANY_ROWS", "step.h") + tokens
        for features in (272, 2064):  # whole eights, of gate and up as well; of the second some blocks have two tiles
            self.cuda("linear", **{**self.linear(many, width, features), "y": self.normal(many, features)})
            fields = self.linear(many, width, features)
            self.cuda("gated_linear", **{**fields, "y": self.normal(many, features // 2)})

    def linears_and_more(self, tokens: int, width: int, pages: int) -> None:
        """A product and SiLU; projections, rotated and cached."""
        half, heads, d = "bfloat16", self.heads, self.head_dim
        features = (heads + 2 * self.kv_heads) * d
        self.cuda("gated_linear", **{**self.linear(tokens, width, 2 * 39), "y": self.normal(tokens, 39)})
        rotation = {
            "qkv": None,
            "bias": self.normal(features),
            "table": self.floats(3, tokens, d),
            "slots": self.array(self.rng.permutation(pages * PAGE)[:tokens].astype(np.int64)),
            "q": self.normal(3, tokens, heads, d),
            "cache": self.cache(pages),
            "activation": half,
            "bias_dtype": half,
            "variants": 3,
            "tokens": tokens,
            "heads": heads,
        }
        self.cuda("rotating_linear", linear=self.linear(tokens, width, features), rotation=rotation)

    def linear(self, tokens: int, width: int, features: int) -> dict[str, Any]:
        """A product's fields, all but where it goes."""
        return {
            "x": self.normal(tokens, width),
            "weight": self.normal(features, width),
            "bias": None,
            "y": None,
            "tokens": tokens,
            "in_features": width,
            "out_features": features,
            "activation": "bfloat16",
            "out_dtype": "bfloat16",
            "dtype": "bfloat16",
        }

    def weights_of_8_bits(self, tokens: int, width: int, features: int) -> None:
        """Products with them and, on Hopper, rows in FP8; width: a multiple of 128."""
        half = "bfloat16"
        for kind, rows, columns in (("int8", 1, 128), ("e4m3", 1, 64)):
            weight = {
                "numbers": self.integers(np.uint8, 120, features, width),
                "scales": self.floats(features // rows, width // columns),
                "kind": kind,
                "rows": rows,
                "columns": columns,
            }
            shape = {"in_features": width, "out_features": features}
            self.cuda(
                "linear8",
                x=self.normal(tokens, width),
                weight=weight,
                y=self.normal(tokens, features),
                tokens=tokens,
                activation=half,
                out_dtype=half,
                **shape,
            )
            self.cuda("widen_weight", weight=weight, out=self.normal(features, width), out_dtype=half, **shape)
        if self.runtime.compute_capability() != 9:
            return
        padded = -(-tokens // 4) * 4
        rows8 = {
            "numbers": self.integers(np.uint8, 120, padded, width),
            "scales": self.floats(width // 128, padded),
            "rows": padded,
        }
        common = {"tokens": tokens, "width": width, "activation": half}
        self.cuda("round_rows", values=self.normal(tokens, width), out=rows8, **common)
        norm = {
            "delta": self.normal(tokens, width),
            "residual": self.floats(tokens, width),
            "weight": self.normal(width),
            "out": None,
            "eps": 1e-6,
            "dtype": half,
            **common,
        }
        self.cuda("rms_norm8", norm=norm, out=rows8)
        for rows, depth, features in ((padded, width, 256), (4100, 128, 384), (4100, 128, 512)):
            product = {
                "x": {
                    "numbers": self.integers(np.uint8, 120, rows, depth),
                    "scales": self.floats(depth // 128, rows),
                    "rows": rows,
                },
                "weight": {
                    "numbers": self.integers(np.uint8, 120, features, depth),
                    "scales": self.floats(features // 128, depth // 128),
                    "kind": "e4m3",
                    "rows": 128,
                    "columns": 128,
                },
                "y": self.normal(rows, features),
                "in_features": depth,
                "out_features": features,
                "out_dtype": half,
            }
            if features % 256 == 0:
                gated = {
                    "numbers": self.integers(np.uint8, 120, rows, features // 2),
                    "scales": self.floats(features // 256, rows),
                    "rows": rows,
                }
                self.cuda("gated_product8", product={**product, "y": None}, out=gated)
            self.cuda("product8", **product)

    def sample(self, vocab: int) -> None:
        temperatures = np.asarray([0.0, 0.7, 1.0, 1.3], np.float32)
        batch = len(temperatures)
        self.cuda(
            "sample",
            logits=self.floats(batch, vocab),
            counts=self.integers(np.int16, 3, batch, vocab),
            mask=self.integers(np.int32, 2**31 - 1, batch, -(-vocab // 32)),
            masked=self.integers(np.uint8, 2, batch),
            bias=self.floats(batch, vocab),
            biased=self.integers(np.uint8, 2, batch),
            temperature=self.array(temperatures),
            top_k=self.array(np.asarray([0, 20, 0, 600], np.int32)),
            top_p=self.array(np.asarray([1.0, 0.8, 0.9, 1.0], np.float32)),
            repetition_penalty=self.array(np.asarray([1.0, 1.05, 1.0, 1.2], np.float32)),
            frequency_penalty=self.array(np.asarray([0.0, 0.0, 0.5, 0.1], np.float32)),
            presence_penalty=self.array(np.asarray([0.0, 0.0, 0.0, 0.3], np.float32)),
            min_p=self.array(np.asarray([0.0, 0.0, 0.01, 0.0], np.float32)),
            seeds=self.integers(np.int64, 1000, batch),
            steps=self.integers(np.int64, 3, batch),
            ids=self.integers(np.int64, 1, batch),
            logprobs=self.floats(batch),
            batch=batch,
            vocab=vocab,
        )
        for k in (1, 20):
            self.cuda(
                "top_logprobs",
                logits=self.floats(batch, vocab),
                ids=self.integers(np.int64, vocab, batch),
                top_ids=self.integers(np.int32, 1, batch, k),
                top_logprobs=self.floats(batch, k),
                logprobs=self.floats(batch),
                ranks=self.integers(np.int32, 1, batch),
                batch=batch,
                vocab=vocab,
                k=k,
            )


def run() -> None:
    for head_dim, heads in ((128, 5), (128, 7), (64, 5)):
        kernels = Kernels(head_dim, heads)
        for length, rows in ((1, 1), (65, 65), (300, 40), (700, 130), (769, 1), (1000, 520)):
            kernels.prefill(length, rows)
        kernels.decode([1, 65, 257, 700])
        kernels.layers(1, 64)
        kernels.layers(19, 264)
        kernels.weights_of_8_bits(1, 128, 77)
        kernels.weights_of_8_bits(5, 640, 33)
        kernels.weights_of_8_bits(19, 640, 33)
        kernels.pages(5)
        kernels.sample(4100)
        kernels.runtime.call("cudaDeviceSynchronize")
    many_heads = Kernels(128, 12)
    many_heads.decode([1, 65, 257, 700])
    many_heads.runtime.call("cudaDeviceSynchronize")
    few_rows = Kernels(128, 5)
    few_rows.prefill(9000, 70)  # over so many keys that they are shared out
    few_rows.decode([9000])  # in so many shares that several blocks merge them
    few_rows.runtime.call("cudaDeviceSynchronize")


def main() -> int:
    if sys.argv[1:] == ["run"]:
        run()
        return 0
    failed = 0
    for tool in sys.argv[1:] or TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(EXIT_CODE)]
        command += [sys.executable, __file__, "run"]
        status = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"{tool}: {status.stdout.strip().splitlines()[-1]}", flush=True)
        if status.returncode != 0:
            print("\n".join(dict.fromkeys(status.stdout.splitlines()))[:8000])  # each line once
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
