"""What keys of 8 bits lose where a model has outlying keys, as Qwen2.5 has them and the needle checkpoint has not.

    python tools/outlying_keys.py [--tokens 8192 ... 262144] [--answers 1008] [--pairs 6] [--bias 600] [--only int8 ...]
    python tools/outlying_keys.py --write DIR [--pairs 6] [--bias 600]

A copy of the checkpoint is rewritten: rotation pairs of K are made larger by factors up to 256 and those of Q smaller,
which is exactly the same model; and a bias stands on the slow pairs, which nearly is. Every cell is paired, over the
same documents, with the same copy's bfloat16 cache. On a CPU; the columns:

    int8              what the package does
    per token         int8 of keys as they are, a scale a token and head
    no centre         with pair scales made for keys as they are
    no pair scales    with the centre alone
    fp8               E4M3 of keys as they are, a scale a token and head, rounded here
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from needle_documents import Document, DocumentMaker, Encode
from needle_reading import READS_ONCE, read
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
from paddlenlp.utils.log import logger
from retrieval import BUDGETS, CHECKPOINT

import paddle_qwen1m  # noqa: F401  (importing it registers the model)
from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import inv_freq
from paddle_qwen1m.cache.kv_scales import KVScales, centre_of, exponents_of
from paddle_qwen1m.config import ModelConfig, SparseBudgets
from paddle_qwen1m.engine import Engine
from paddle_qwen1m.engine.calibration import keys_of
from paddle_qwen1m.evaluate.statistics import paired_difference
from paddle_qwen1m.paddlenlp.scales import MOST_TOKENS, TEXT
from paddle_qwen1m.weights.checkpoint import Checkpoint

KINDS = ("int8", "per token", "no centre", "no pair scales", "fp8")
REFERENCE = "bfloat16"
LARGEST_FACTOR = 8
"""Power of two of the largest factor of a pair."""
SLOW_PAIRS = 2
LARGEST_E4M3 = 448.0


def rewrite(source: Path, target: Path, pairs: int, bias: float, seed: int = 0) -> None:
    """A copy of a bfloat16 checkpoint in which `pairs` rotation pairs of each KV head's keys are 16 to 256 times as
    large, those of its query heads as much smaller, and SLOW_PAIRS slow pairs have a bias of `bias`, of either sign.
    """
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, group = config["hidden_size"] // heads, heads // kv_heads
    half, rng = head_dim // 2, np.random.default_rng(seed)
    tensors = Checkpoint(target).tensors
    for layer in range(config["num_hidden_layers"]):
        factors = np.ones((kv_heads, head_dim), np.float32)
        offsets = np.zeros((kv_heads, head_dim), np.float32)
        for head in range(kv_heads):
            for pair in rng.choice(half - SLOW_PAIRS, size=pairs, replace=False):
                factors[head, [pair, pair + half]] = 2.0 ** rng.integers(4, LARGEST_FACTOR + 1)
            offsets[head, half - SLOW_PAIRS : half] = bias * rng.choice([-1.0, 1.0], size=SLOW_PAIRS)
        of_queries = np.repeat(1 / factors, group, axis=0).reshape(-1)
        for name, factor, offset in (("q", of_queries, None), ("k", factors.reshape(-1), offsets.reshape(-1))):
            for kind in ("weight", "bias"):
                info = tensors[f"model.layers.{layer}.self_attn.{name}_proj.{kind}"]
                assert info.dtype == "BF16", "the checkpoint is rewritten in bfloat16, where powers of two are exact"
                bits = np.memmap(info.file, np.uint16, "r+", info.offset, info.shape)
                values = (bits.astype(np.uint32) << 16).view(np.float32) * factor.reshape(-1, *[1] * (bits.ndim - 1))
                if kind == "bias" and offset is not None:
                    values = values + offset
                bits[:] = _bfloat16(values)
                bits.flush()


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def load(checkpoint: Path, **options: Any) -> Engine:
    options = {"sparse_threshold": 4096, **READS_ONCE, **options}
    engine: Engine = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype="float32", **options).engine
    return engine


def scales_for(kind: str, engine: Engine, ids: np.ndarray) -> KVScales:
    """What an int8 cache of that kind is kept in, from the model's keys of a text."""
    config = engine.model.config
    frequencies, chunk_len = inv_freq(config), config.dual_chunk.chunk_len
    exponents, centres = [], []
    for keys in keys_of(engine.model, ids):
        centre = centre_of(keys, frequencies, chunk_len)
        if kind in ("per token", "no centre"):
            centre = np.zeros_like(centre)
        powers = exponents_of(keys, centre, frequencies, chunk_len)
        exponents.append(np.zeros_like(powers) if kind in ("per token", "no pair scales") else powers)
        centres.append(centre)
    return KVScales.of_layers(exponents, centres)


def kinds_of_engine(checkpoint: Path, encode: Encode, kinds: list[str], **options: Any) -> Iterator[tuple[str, Engine]]:
    """An engine a kind, one after the other, each to be used before the next is asked for."""
    yield REFERENCE, load(checkpoint, kv_cache_dtype="bfloat16", **options)
    for kind in kinds:
        if kind == "fp8":
            with rounding_to_fp8():
                yield kind, load(checkpoint, kv_cache_dtype="float32", **options)
            continue
        engine = load(checkpoint, kv_cache_dtype="int8", kv_scales=_none(checkpoint), **options)
        ids = np.asarray(encode(TEXT.read_text(encoding="utf-8")), np.int64)
        most = min(MOST_TOKENS, engine.model.config.dual_chunk.chunk_len)
        engine.use_scales(scales_for(kind, engine, ids[:most]))
        yield kind, engine


def _none(checkpoint: Path) -> KVScales:
    return KVScales.none(ModelConfig.from_dict(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))))


@contextmanager
def rounding_to_fp8() -> Iterator[None]:
    """A float32 cache keeps what E4M3 would, with a scale for each token and KV head."""
    original = ops.rotate_and_cache

    def rounded(*arguments: Any) -> paddle.Tensor:
        queries = original(*arguments)
        slots = arguments[3].numpy()
        for pages in arguments[4:6]:
            held = _memory(pages).reshape(-1, *pages.shape[2:])
            held[slots] = _e4m3(held[slots])
        return queries

    ops.rotate_and_cache = rounded
    try:
        yield
    finally:
        ops.rotate_and_cache = original


def _e4m3(values: np.ndarray) -> np.ndarray:
    scale = np.maximum(np.abs(values).max(axis=-1, keepdims=True), 1e-30) / LARGEST_E4M3
    scaled = values / scale
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**-9))), -6) - 3)
    return (np.round(scaled / step) * step * scale).astype(np.float32)


def _memory(tensor: paddle.Tensor) -> np.ndarray:
    """A float32 tensor in host memory, to be written."""
    buffer = (ctypes.c_char * (4 * int(np.prod(tensor.shape)))).from_address(tensor.data_ptr())
    return np.frombuffer(buffer, np.float32).reshape(tensor.shape)


def scores(engine: Engine, documents: list[Document], encode: Encode) -> list[float]:
    """1 for each right answer."""
    answers = read(engine, documents, encode, lambda *_piece: None, lambda *_piece: None)
    return [float(answer.right) for answer in answers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192])
    parser.add_argument("--answers", type=int, default=1008, help="at least so many a cell (default: %(default)s)")
    parser.add_argument("--needles", type=int, default=16, help="hidden facts a document (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=6, help="larger rotation pairs a KV head (default: %(default)s)")
    parser.add_argument("--bias", type=float, default=600.0, help="on the slow pairs (default: %(default)g)")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=["int8"])
    parser.add_argument("--keys", nargs="*", choices=["dense", "sparse"], default=["dense", "sparse"])
    parser.add_argument("--first-seed", type=int, default=7000, help="of the documents (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="leave the copy there and do no more")
    arguments = parser.parse_args()
    logger.set_level("ERROR")
    if arguments.write is not None:
        rewrite(CHECKPOINT, arguments.write, arguments.pairs, arguments.bias)
        return 0
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT))

    def encode(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    maker = DocumentMaker(encode)
    number = -(-arguments.answers // arguments.needles)
    asked = [document for document in range(number) for _ in range(arguments.needles)]
    print(f"{arguments.pairs} pairs a KV head 16 to 256 times as large, a bias of {arguments.bias:g} on {SLOW_PAIRS}")
    losses: dict[str, list[tuple[list[float], list[float]]]] = {kind: [] for kind in arguments.only}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        rewrite(CHECKPOINT, checkpoint, arguments.pairs, arguments.bias)
        for tokens in arguments.tokens:
            documents = [maker.make(tokens, arguments.needles, arguments.first_seed + n) for n in range(number)]
            file = checkpoint / BUDGETS[max(start for start in BUDGETS if start <= tokens)]
            for keys in arguments.keys:
                reference: list[float] = []
                for kind, engine in kinds_of_engine(checkpoint, encode, arguments.only, sparse=keys == "sparse"):
                    config = engine.model.config
                    budgets = SparseBudgets.from_file(file, config.num_layers, config.num_heads)
                    engine.configure(engine.options, budgets)
                    got = scores(engine, documents, encode)
                    line = f"{tokens:9,} tokens, {len(got)} answers, {keys:6}, {kind:14}: {np.mean(got):.3f} right"
                    if kind == REFERENCE:
                        reference = got
                    else:
                        loss = paired_difference(reference, got, asked)
                        losses[kind].append((reference, got))
                        line += f", {100 * loss.mean:.1f} points lost ({100 * loss.low:.1f} to {100 * loss.high:.1f})"
                    print(line, flush=True)
    for kind, cells in losses.items():
        before, after = ([one for cell in cells for one in cell[side]] for side in (0, 1))
        loss = paired_difference(before, after, asked * len(cells))
        print(
            f"{kind}: {100 * loss.mean:.2f} points lost in all cells ({100 * loss.low:.2f} to {100 * loss.high:.2f}), "
            f"{len(after)} answers"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
