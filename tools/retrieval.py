"""How much of what is hidden the needle checkpoint finds, by length: dense, sparse, and with the forced keys alone.

    python tools/retrieval.py [--tokens 65536 262144] [--answers 208] [--needles 16] [--columns N]
    python tools/retrieval.py --table [--tokens 16384 ... 1048576]       sparse alone, length after length

On whatever device Paddle uses. Question and answer stand in the prompt (see needle_reading.py). The share of pairs is
an upper bound: whole blocks, masked cells included. --columns gives every head so many columns and the forced diagonals
in place of the checkpoint's budgets, which were chosen for 16,384 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from needle_documents import DocumentMaker
from needle_reading import read
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
from paddlenlp.utils.log import logger

import paddle_qwen1m  # noqa: F401  (importing it registers the model)
from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.config import LOCAL_DIAGONALS, SparseBudgets

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "needle"
FIRST_SEED = 1000
FORCED_ALONE = (31, 100)
TABLE = (16384, 65536, 131072, 262144, 524288, 1048576)
LOST = 0.5
"""A share of answers below which retrieval has stopped."""


@dataclass
class VisitedAtMost:
    """Pairs of rows and keys of all sparse pieces: visited at most, and causal."""

    visited: int = 0
    causal: int = 0

    def __call__(self, layer: int, piece: Piece, index: ops.SparseIndex) -> None:
        counts = np.asarray(index.counts.numpy(), np.int64)
        rows = np.minimum(ops.BLOCK, piece.rows - np.arange(counts.shape[1]) * ops.BLOCK)
        keys = ops.BLOCK * counts[..., :3].sum(-1) + counts[..., 3:].sum(-1)
        self.visited += int((keys * rows).sum())
        self.causal += counts.shape[0] * (piece.rows * piece.begin + piece.rows * (piece.rows + 1) // 2)

    def __str__(self) -> str:
        return f"{self.visited / self.causal:.1%}" if self.causal else "all"


class Reader:
    """The checkpoint with one choice of keys."""

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        self.engine = AutoModelForCausalLM.from_pretrained(
            str(CHECKPOINT), config=config, sparse_threshold=4096, **options
        ).engine

    def score(self, documents: list[Any], encode: Any) -> tuple[float, VisitedAtMost, float]:
        """Share of right answers, what was visited of the documents, and seconds."""
        visited = VisitedAtMost()
        start = time.monotonic()
        right = read(self.engine, documents, encode, visited, VisitedAtMost())
        return sum(right) / len(right), visited, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--answers", type=int, default=208, help="at least so many a cell (default: %(default)s)")
    parser.add_argument("--needles", type=int, default=16, help="hidden facts a document (default: %(default)s)")
    parser.add_argument("--columns", type=int)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="*", choices=("dense", "sparse", "forced keys alone"))
    arguments = parser.parse_args()
    logger.set_level("ERROR")
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT))
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    lengths = arguments.tokens or (list(TABLE) if arguments.table else [65536, 262144])
    config["max_position_embeddings"] = max(config["max_position_embeddings"], *lengths)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    def uniform(columns: int, diagonals: int) -> SparseBudgets:
        return SparseBudgets.uniform(columns, diagonals, config["num_hidden_layers"], config["num_attention_heads"])

    options: dict[str, dict[str, Any]] = {
        "dense": {"sparse": False},
        "sparse": {"sparse_budgets": uniform(arguments.columns, LOCAL_DIAGONALS)} if arguments.columns else {},
        "forced keys alone": {"sparse_budgets": uniform(*FORCED_ALONE)},
    }
    chosen = arguments.only or (["sparse"] if arguments.table else list(options))
    readers = {name: Reader(config, **options[name]) for name in chosen}
    maker = DocumentMaker(encode)
    documents_a_cell = -(-arguments.answers // arguments.needles)
    holds = 0
    for tokens in lengths:
        documents = [maker.make(tokens, arguments.needles, FIRST_SEED + n) for n in range(documents_a_cell)]
        for name, reader in readers.items():
            share, visited, seconds = reader.score(documents, encode)
            print(
                f"{tokens:9,} tokens, {documents_a_cell * arguments.needles} answers, {name}: {share:.3f} right, "
                f"{visited} of the document's pairs, {seconds:.1f} s",
                flush=True,
            )
            if name == "sparse" and share >= LOST:
                holds = tokens
    if arguments.table:
        print(f"At least {LOST:.0%} of the answers are right up to {holds:,} tokens.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
