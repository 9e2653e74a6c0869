"""Asks a small checkpoint for hidden facts through its logits, and counts what sparse prefill visited meanwhile.

Decode is dense, so a generated answer hides what sparse prefill lost. Here question and answer stand in the prompt, an
ordinary one whose beginning comes from the prefix cache where an earlier question has left it, and an answer counts
when each of its tokens is the arg-max of the logits before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from asked_documents import Document as Asked
from asked_documents import with_needles
from needle_documents import Document, DocumentMaker, Encode

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.attention.selector import Observer
from paddle_qwen1m.config import BLOCK, COLUMN_GROUP

READS_ONCE = {"enable_prefix_caching": True, "prefix_temperature_tolerance": 1e-3}
"""Options of an engine that reads a document once for all its questions, whose lengths differ by a few tokens."""


@dataclass(frozen=True)
class Answer:
    """sparse: whether all rows of question and answer chose their keys, in every layer."""

    right: bool
    sparse: bool


@dataclass
class Visits:
    """(row, key) pairs of all layers and heads of the sparse pieces observed: visited, causal, and read by probes."""

    config: dict[str, Any]
    visited: int = 0
    causal: int = 0
    probed: int = 0
    rows: dict[int, int] = field(default_factory=dict)

    def __call__(self, layer: int, piece: Piece, index: ops.SparseIndex) -> None:
        begin, rows = piece.begin, piece.rows
        heads = self.config["num_attention_heads"]
        dual_chunk = self.config["dual_chunk_attention_config"]
        chunk_len = dual_chunk["chunk_size"] - dual_chunk["local_size"]
        self.visited += visited_pairs(index, begin, rows, chunk_len)
        self.causal += heads * sum(range(begin + 1, begin + rows + 1))
        self.probed += heads * piece.probe_rows * piece.end
        self.rows[layer] = self.rows.get(layer, 0) + rows

    def __str__(self) -> str:
        return f"{self.visited / self.causal:.2%} of the pairs visited, probes {self.probed / self.causal:.2%}"


def visited_pairs(index: ops.SparseIndex, begin: int, rows: int, chunk_len: int) -> int:
    """Unmasked (row, key) pairs of the blocks and listed columns of one piece, all heads."""
    blocks, counts, columns, column_counts = (
        np.asarray(table.numpy(), np.int64)
        for table in (index.blocks, index.counts, index.columns, index.column_counts)
    )
    listed = np.unpackbits(index.listed.numpy().view(np.uint8), axis=-1, bitorder="little").astype(bool)
    chunk_start = begin // chunk_len * chunk_len
    visited = 0
    for row_block in range(counts.shape[1]):
        first = begin + row_block * BLOCK
        positions = np.arange(first, min(first + BLOCK, begin + rows))
        # keys of a stage end here, for each row: intra, succ, inter
        ends = [positions + 1, np.full_like(positions, chunk_start), np.full_like(positions, chunk_start - chunk_len)]
        for head in range(counts.shape[0]):
            block = column = 0
            for stage in (ops.Stage.INTER, ops.Stage.SUCC, ops.Stage.INTRA):
                end, last = block + counts[head, row_block, stage], column + column_counts[head, stage]
                singles = columns[head, column:last][listed[head, row_block, column:last]]
                for keys, width in ((blocks[head, row_block, block:end], BLOCK), (singles, 1)):
                    visited += int((ends[stage][:, None] - keys[None, :]).clip(0, width).sum())
                block, column = end, -(-last // COLUMN_GROUP) * COLUMN_GROUP
    return visited


def read(
    engine: Any, documents: list[Document], encode: Encode, in_document: Observer, in_question: Observer
) -> list[Answer]:
    """Asks for every needle of every document; see `read_asked`."""
    maker = DocumentMaker(encode)
    asked = (with_needles(document, maker, encode) for document in documents)
    return [answer for one in asked for answer in read_asked(engine, one, in_document, in_question)]


def read_asked(engine: Any, document: Asked, in_document: Observer, in_question: Observer) -> list[Answer]:
    """Asks all questions about a document, each with its right answer behind it. The observers see the sparse pieces of
    the document's first reading, and those that questions and answers are in, with what of the document is in the same
    pieces.
    """
    answers, head = [], len(document.head)
    for number, (question, answer) in enumerate(document.asked):
        ids = np.concatenate([document.head, question, answer])
        watch = _Watch(head, in_document if number == 0 else None, in_question)
        engine.observe(watch)
        begin = len(ids) - len(answer)
        likeliest = engine.logits(ids, range(begin - 1, len(ids) - 1)).argmax(-1)
        answers.append(Answer(np.array_equal(likeliest, answer), watch.chose == len(ids) - head))
    engine.observe(None)
    return answers


@dataclass
class _Watch:
    """Tells pieces of a document, of `document_end` tokens, from those of a question. chose: rows of the latter whose
    keys are chosen.
    """

    document_end: int
    in_document: Observer | None
    in_question: Observer
    chose: int = 0

    def __call__(self, layer: int, piece: Piece, index: ops.SparseIndex) -> None:
        if piece.end > self.document_end:
            self.chose += piece.end - max(piece.begin, self.document_end) if layer == 0 else 0
            self.in_question(layer, piece, index)
        elif self.in_document is not None:
            self.in_document(layer, piece, index)
