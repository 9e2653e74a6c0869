"""How much of what is hidden the needle checkpoint finds, by length: dense, sparse, and with the forced keys alone.

    python tools/retrieval.py [--tokens 65536 262144] [--answers 208] [--needles 16] [--sparse-budgets FILE]
        [--max-num-batched-tokens 63488]
    python tools/retrieval.py --table [--tokens 16384 ... 1048576]       sparse alone, length after length

On whatever device Paddle uses. Question and answer stand in the prompt (see needle_reading.py). The share of pairs is
an upper bound: whole blocks, masked cells included. Without --sparse-budgets, those beside the checkpoint that were
chosen for the longest documents up to the length at hand.
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
from needle_reading import READS_ONCE, read
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
from paddlenlp.utils.log import logger

import paddle_qwen1m  # noqa: F401  (importing it registers the model)
from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.config import BLOCK, SparseBudgets

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "needle"
CHOICES = ("dense", "sparse", "forced keys alone")
FORCED_ALONE = (31, 100)
BUDGETS = {
    0: "sparse_attention_config.json",
    65536: "sparse_attention_config_65536.json",
    262144: "sparse_attention_config_262144.json",
}
"""Of the checkpoint, by the tokens from which on they serve."""
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
        rows = np.minimum(BLOCK, piece.rows - np.arange(counts.shape[1]) * BLOCK)
        keys = BLOCK * counts[..., :3].sum(-1) + counts[..., 3:].sum(-1)
        self.visited += int((keys * rows).sum())
        self.causal += counts.shape[0] * (piece.rows * piece.begin + piece.rows * (piece.rows + 1) // 2)

    def __str__(self) -> str:
        return f"{self.visited / self.causal:.1%}" if self.causal else "all"


class Reader:
    """The checkpoint with one choice of keys."""

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        self.engine = AutoModelForCausalLM.from_pretrained(
            str(CHECKPOINT), config=config, sparse_threshold=4096, **READS_ONCE, **options
        ).engine

    def score(self, documents: list[Any], encode: Any) -> tuple[float, str]:
        """Share of right answers, and in words what was visited and how long it took."""
        document, question = VisitedAtMost(), VisitedAtMost()
        start = time.monotonic()
        answers = read(self.engine, documents, encode, document, question)
        seconds = time.monotonic() - start
        effort = f"{document} of the document's pairs, {question} of the questions', {seconds:.1f} s"
        return sum(one.right for one in answers) / len(answers), effort


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--answers", type=int, default=208, help="at least so many a cell (default: %(default)s)")
    parser.add_argument("--needles", type=int, default=16, help="hidden facts a document (default: %(default)s)")
    parser.add_argument("--sparse-budgets", type=Path, metavar="FILE")
    parser.add_argument("--first-seed", type=int, default=1000, help="of the documents (default: %(default)s)")
    parser.add_argument("--max-num-batched-tokens", type=int, help="rows of a chunk, each of which chooses its keys")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="*", choices=CHOICES)
    arguments = parser.parse_args()
    logger.set_level("ERROR")
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT))
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    lengths = arguments.tokens or (list(TABLE) if arguments.table else [65536, 262144])
    config["max_position_embeddings"] = max(config["max_position_embeddings"], *lengths)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    shape = config["num_hidden_layers"], config["num_attention_heads"]

    def budgets(name: str, tokens: int) -> SparseBudgets:
        if name == "forced keys alone":
            return SparseBudgets.uniform(*FORCED_ALONE, *shape)
        file = CHECKPOINT / BUDGETS[max(start for start in BUDGETS if start <= tokens)]
        return SparseBudgets.from_file(arguments.sparse_budgets or file, *shape)

    chosen = arguments.only or (["sparse"] if arguments.table else list(CHOICES))
    chunk = arguments.max_num_batched_tokens
    readers = {name: Reader(config, sparse=name != "dense", max_num_batched_tokens=chunk) for name in chosen}
    maker = DocumentMaker(encode)
    documents_a_cell = -(-arguments.answers // arguments.needles)
    holds = 0
    for tokens in lengths:
        documents = [maker.make(tokens, arguments.needles, arguments.first_seed + n) for n in range(documents_a_cell)]
        for name, reader in readers.items():
            reader.engine.configure(reader.engine.options, budgets(name, tokens))
            share, effort = reader.score(documents, encode)
            answers = documents_a_cell * arguments.needles
            print(f"{tokens:9,} tokens, {answers} answers, {name}: {share:.3f} right, {effort}", flush=True)
            if name == "sparse" and share >= LOST:
                holds = tokens
    if arguments.table:
        print(f"At least {LOST:.0%} of the answers are right up to {holds:,} tokens.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
