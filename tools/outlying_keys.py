"""What 8-bit keys lose where a model has outlying keys, as Qwen2.5 has them and a checkpoint trained here has not.

    python tools/outlying_keys.py --out DIR [--device cpu|gpu] [--tokens 8192 32768 131072 262144]
        [--biases 150 600 2000] [--documents 16] [--caches int8 ...] [--keys dense sparse]
        [--checkpoint DIR] [--task needle|niah_multikey_3|...]
    python tools/outlying_keys.py --write DIR [--pairs 6] [--bias 600]

Copies of the checkpoint are rewritten: rotation pairs of K are made larger by factors up to 256 and those of Q smaller,
which is exactly the same model; and a bias stands on the slow pairs, which nearly is. Every cache is asked the same
questions of the same documents as the same copy's 16-bit cache, by the likeliest tokens in the place of the right
answer. The caches:

    bfloat16          the reference
    float32           another one, on a CPU: 8 bits of a key of 600 are coarse as well
    int8              what the package does, layers that it keeps in 16 bits included
    fp8               E4M3 in the same frame
    int8 per token    of keys as they are, a scale a token and head
    fp8 per token     the same of E4M3
    no centre         int8 with pair scales made for keys as they are
    no pair scales    int8 with the centre alone

--out gets the copies, their scales, a journal a cell, from which a run that was ended goes on, table.md and table.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Optional, cast

import numpy as np
import paddle
from asked_documents import TASKS, Document, make
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
from paddlenlp.utils.log import logger
from retrieval import BUDGETS, CHECKPOINT

import paddle_qwen1m  # noqa: F401  (importing it registers the model)
from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import inv_freq
from paddle_qwen1m.cache import budgets_digest
from paddle_qwen1m.cache.kv_scales import KVScales, centre_of, exponents_of
from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.engine import Engine
from paddle_qwen1m.engine.calibration import keys_of, measure
from paddle_qwen1m.evaluate import needle
from paddle_qwen1m.evaluate.asking import Job, ask
from paddle_qwen1m.evaluate.results import Journal, Record
from paddle_qwen1m.evaluate.samples import Prompter
from paddle_qwen1m.evaluate.statistics import Interval, paired_difference
from paddle_qwen1m.evaluate.subject import Subject
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.paddlenlp.scales import MOST_TOKENS, TEXT
from paddle_qwen1m.weights.checkpoint import Checkpoint
from paddle_qwen1m.weights.digest import checkpoint_digest

CACHES: dict[str, tuple[str, str]] = {
    "bfloat16": ("bfloat16", ""),
    "float32": ("float32", ""),
    "int8": ("int8", "kept"),
    "fp8": ("fp8", "kept"),
    "int8 per token": ("int8", "none"),
    "fp8 per token": ("fp8", "none"),
    "no centre": ("int8", "no centre"),
    "no pair scales": ("int8", "no pair scales"),
}
"""kv_cache_dtype, and what is left of the scales."""
REFERENCES = ("bfloat16", "float32", "int8")
"""What others are compared with, where it is there."""
LARGEST_FACTOR = 8
"""Power of two of the largest factor of a pair."""
SLOW_PAIRS = 2
Where = tuple[Optional[float], Optional[int], Optional[str]]
"""Bias, tokens, dense or sparse; None is all of them."""
Key = tuple[float, int, str, str]
"""Bias, tokens, dense or sparse, cache."""


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


def scales_of(model: Qwen2OneM, ids: np.ndarray) -> dict[str, KVScales]:
    """By what CACHES leave of them, from the model's keys of a text int64 [n]."""
    where = inv_freq(model.config), model.config.dual_chunk.chunk_len
    keys = list(keys_of(model, ids))
    centres = [centre_of(layer, *where) for layer in keys]
    none = [np.zeros_like(centre) for centre in centres]
    around_centre, around_none = (
        [exponents_of(layer, centre, *where) for layer, centre in zip(keys, chosen)] for chosen in (centres, none)
    )
    no_powers = [np.zeros_like(powers) for powers in around_none]
    return {
        "kept": measure(model, KVScales.of_layers(around_centre, centres), ids),
        "none": KVScales.of_layers(no_powers, none),
        "no centre": KVScales.of_layers(around_none, none),
        "no pair scales": KVScales.of_layers(no_powers, centres),
    }


@dataclass(frozen=True)
class Copy:
    """A rewritten checkpoint, its engine, and the scales of every cache by what is left of them."""

    bias: float
    folder: Path
    engine: Engine
    scales: dict[str, KVScales]

    @classmethod
    def make(cls, out: Path, source: Path, pairs: int, bias: float) -> Copy:
        """In a folder of `out`, where it may be from an earlier run: files of scales are the mark that it is whole."""
        folder = out / f"bias {bias:g}, {pairs} pairs"
        files = {what: folder / f"scales, {what}.json" for _, what in CACHES.values() if what}
        whole = all(path.exists() for path in files.values())
        if not whole:
            rewrite(source, folder / "checkpoint", pairs, bias)
        engine = AutoModelForCausalLM.from_pretrained(str(folder / "checkpoint")).engine
        if not whole:
            tokenizer = AutoTokenizer.from_pretrained(str(source))
            ids = np.asarray(tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False)["input_ids"], np.int64)
            ids = ids[: min(MOST_TOKENS, engine.model.config.dual_chunk.chunk_len)]
            for what, scales in scales_of(engine.model, ids).items():
                scales.write(files[what])
        return cls(bias, folder, engine, {what: KVScales.from_file(path) for what, path in files.items()})

    def set_up(self, tokens: int, keys: str, cache: str, threshold: int) -> dict[str, Any]:
        """Makes the engine one with that cache, dense or sparse; what answers depend on."""
        dtype, what = CACHES[cache]
        options: dict[str, Any] = {
            "kv_cache_dtype": dtype,
            "sparse": keys == "sparse",
            "sparse_threshold": threshold,
            "enable_prefix_caching": True,
            "prefix_temperature_tolerance": 1e-3,
        }
        file = self.folder / "checkpoint" / BUDGETS[max(start for start in BUDGETS if start <= tokens)]
        config, budgets = self.engine.model.config, self.engine.budgets
        if file.exists():
            budgets = SparseBudgets.from_file(file, config.num_layers, config.num_heads)
        self.engine.configure(EngineOptions(**options), budgets)
        scales = self.scales[what] if what else KVScales.none(config)
        self.engine.use_scales(scales)
        rule = "" if budgets is None else budgets_digest(budgets.vertical, budgets.slash)
        return {**options, "scales": scales.digest, "budgets": rule, "on_gpu": self.engine.model.on_gpu}


@dataclass(frozen=True)
class Questions:
    """Documents of a task, the same for every cache. each: questions a document, of the needle task."""

    task: str
    documents: int
    each: int
    prompter: Prompter

    def jobs(self, engine: Engine, tokens: int) -> list[Job]:
        """About documents whose prompts, right answers included, take up to so many tokens."""
        each = self.each if self.task == needle.TASK else 1
        numbers = range(self.documents)
        return [Job(self.task, tokens, one, each, partial(self._ask, engine, tokens, one)) for one in numbers]

    def _ask(self, engine: Engine, tokens: int, number: int, _: Subject, asked: Sequence[int]) -> Iterator[Record]:
        document, decode = self._document(tokens, number), self.prompter.decode
        for one in asked:
            question, answer = document.asked[one]
            ids = np.concatenate([document.head, question, answer])
            begin = len(ids) - len(answer)
            found = engine.logits(ids, range(begin - 1, len(ids) - 1)).argmax(-1)
            right, said = decode(answer.tolist()), decode(found.tolist())
            yield Record(
                self.task, tokens, number, one, len(ids), float(np.array_equal(found, answer)), [right], said, None,
                None, len(answer), "", "",
            )  # fmt: skip

    @lru_cache(128)  # noqa: B019  (there is one for the whole run)
    def _document(self, tokens: int, number: int) -> Document:
        return make(self.task, tokens, number, self.each, self.prompter)


@dataclass
class Nobody:
    """Stands for an engine that the jobs know: there is nothing to open or close."""

    name: str

    def close(self) -> None:
        """Nothing."""


def nobody(name: str) -> Subject:
    return cast(Subject, Nobody(name))


@dataclass(frozen=True)
class Cell:
    """The right answers of a cache, 1 or 0 each, and the document of each."""

    right: list[float]
    documents: list[tuple[Any, ...]]


def run(
    out: Path, copies: Iterable[Copy], questions: Questions, keys: Sequence[tuple[int, str, str]], threshold: int
) -> None:
    """Asks what has not been asked. keys: tokens, dense or sparse, cache."""
    cells: dict[Key, Cell] = {}
    for copy in copies:
        weights = checkpoint_digest(copy.folder / "checkpoint")
        print(f"bias {copy.bias:g}: {copy.scales['kept'].summary()}", flush=True)
        for tokens, name, cache in keys:
            given = {**copy.set_up(tokens, name, cache, threshold), "weights": weights, "task": questions.task}
            given["questions"] = questions.each
            jobs = questions.jobs(copy.engine, tokens)
            title = f"bias {copy.bias:g}, {tokens:,} tokens, {name}, {cache}"
            with Journal(copy.folder / f"{tokens} {name}" / cache, given) as journal:
                ask(jobs, journal, partial(nobody, title))
                asked = [(job.task, job.length, job.number, one) for job in jobs for one in range(job.questions)]
                records = [journal.records[key] for key in asked]
            cell = Cell([record.score for record in records], [record.document for record in records])
            cells[copy.bias, tokens, name, cache] = cell
            print(f"{title}: {np.mean(cell.right):.3f} right", flush=True)
            write_tables(out, cells)


@dataclass(frozen=True)
class Row:
    """What a cache loses in points beside a reference, of answers to the same questions; tokens and keys are None for
    all cells of a copy, bias too for those of all copies.
    """

    cache: str
    reference: str
    bias: float | None
    tokens: int | None
    keys: str | None
    answers: int
    right: float
    reference_right: float
    loss: Interval

    def as_json(self) -> dict[str, Any]:
        """The row with null where there is no interval, for want of documents."""
        loss = {name: None if math.isnan(value) else value for name, value in asdict(self.loss).items()}
        return {**asdict(self), "loss": loss}

    def line(self) -> str:
        where = ["all" if part is None else f"{part:,}" if isinstance(part, int) else str(part) for part in self._where]
        loss = self.loss
        interval = "" if math.isnan(loss.low) else f" ({loss.low:.1f} to {loss.high:.1f})"
        numbers = [
            f"{self.answers:,}",
            f"{self.right:.3f}",
            f"{self.reference_right:.3f}",
            f"{loss.mean:.2f}{interval}",
        ]
        return f"| {' | '.join([self.cache, self.reference, *where, *numbers])} |"

    @property
    def _where(self) -> tuple[Any, ...]:
        return None if self.bias is None else f"{self.bias:g}", self.tokens, self.keys


HEAD = "| cache | beside | bias | tokens | keys | answers | right | right there | points lost (95 %) |"


def rows(cells: dict[Key, Cell]) -> Iterator[Row]:
    """Each cache beside each reference: in all copies together, in each, and in every cell."""
    caches = [cache for cache in CACHES if any(key[3] == cache for key in cells)]
    for cache, reference in product(caches, REFERENCES):
        if cache in (reference, "bfloat16", "float32"):
            continue
        both = [key[:3] for key in cells if key[3] == cache and (*key[:3], reference) in cells]
        biases = list(dict.fromkeys(key[0] for key in both))
        groups: list[tuple[Where, list[tuple[float, int, str]]]] = []
        if len(biases) > 1:
            groups.append(((None, None, None), both))
        groups += [((bias, None, None), [key for key in both if key[0] == bias]) for bias in biases]
        groups += [(key, [key]) for key in both]
        for where, keys in groups:
            there = [cells[(*key, reference)] for key in keys]
            got = [cells[(*key, cache)] for key in keys]
            before, after = ([one for cell in side for one in cell.right] for side in (there, got))
            documents = [document for cell in got for document in cell.documents]
            loss = paired_difference(before, after, documents)
            points = Interval(100 * loss.mean, 100 * loss.low, 100 * loss.high)
            means = float(np.mean(after)), float(np.mean(before))
            yield Row(cache, reference, where[0], where[1], where[2], len(after), means[0], means[1], points)


def write_tables(out: Path, cells: dict[Key, Cell]) -> None:
    """table.md and table.json of what is there so far."""
    table = list(rows(cells))
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|", *(row.line() for row in table)]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    right = [
        {"bias": bias, "tokens": tokens, "keys": keys, "cache": cache, "right": float(np.mean(cell.right))}
        for (bias, tokens, keys, cache), cell in cells.items()
    ]
    content = {"losses": [row.as_json() for row in table], "right": right}
    (out / "table.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="DIR", help="where everything goes")
    target.add_argument("--write", type=Path, metavar="DIR", help="leave one copy there and do no more")
    parser.add_argument("--bias", type=float, default=600.0, help="of --write (default: %(default)g)")
    parser.add_argument("--biases", type=float, nargs="+", default=[150.0, 600.0, 2000.0])
    parser.add_argument("--pairs", type=int, default=6, help="larger rotation pairs a KV head (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072, 262144])
    parser.add_argument("--keys", nargs="+", choices=["dense", "sparse"], default=["dense", "sparse"])
    parser.add_argument("--caches", nargs="+", choices=CACHES, help="beside bfloat16 (default: all)")
    parser.add_argument("--documents", type=int, default=16, help="of each length (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=16, help="a document, needle (default: %(default)s)")
    parser.add_argument("--task", choices=TASKS, default=needle.TASK)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="default: a GPU where Paddle has one")
    parser.add_argument("--sparse-threshold", type=int, default=4096, help="default: %(default)s")
    arguments = parser.parse_args(given)
    logger.set_level("ERROR")
    if arguments.write is not None:
        rewrite(arguments.checkpoint, arguments.write, arguments.pairs, arguments.bias)
        return 0
    if arguments.device is not None:
        paddle.set_device(arguments.device)
    caches = arguments.caches or [cache for cache in CACHES if not (cache == "float32" and ops.on_gpu())]
    caches = list(dict.fromkeys(["bfloat16", *caches]))
    prompter = Prompter(AutoTokenizer.from_pretrained(str(arguments.checkpoint)))
    questions = Questions(arguments.task, arguments.documents, arguments.questions, prompter)
    arguments.out.mkdir(parents=True, exist_ok=True)
    copies = (Copy.make(arguments.out, arguments.checkpoint, arguments.pairs, bias) for bias in arguments.biases)
    keys = list(product(arguments.tokens, arguments.keys, caches))
    run(arguments.out, copies, questions, keys, arguments.sparse_threshold)
    print((arguments.out / "table.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
