"""Asks the needle checkpoint for hidden facts through its logits, and counts what sparse prefill visited meanwhile.

Decode is dense, so a generated answer hides what sparse prefill lost. Here question and answer stand in the prompt, the
document is prefilled once but for its last tokens, every question runs with them and its answer as the last chunk, and
an answer counts when each of its tokens is the arg-max of the logits before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from needle_documents import Document, DocumentMaker, Encode, prompt_head, prompt_tail

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.attention.selector import Observer
from paddle_qwen1m.config import BLOCK

HELD_BACK = ops.PROBE_ROWS
"""Tokens of a document that each question reads anew: by itself it has no more rows than the probe, which attend to all
keys."""


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
    """Unmasked (row, key) pairs of the blocks and columns of one piece, all heads."""
    blocks, columns, counts = (np.asarray(table.numpy(), np.int64) for table in index)
    chunk_start = begin // chunk_len * chunk_len
    visited = 0
    for row_block in range(counts.shape[1]):
        first = begin + row_block * BLOCK
        positions = np.arange(first, min(first + BLOCK, begin + rows))
        # keys of a stage end here, for each row: intra, succ, inter
        ends = [positions + 1, np.full_like(positions, chunk_start), np.full_like(positions, chunk_start - chunk_len)]
        for head in range(counts.shape[0]):
            for table, width, stage_counts in (
                (blocks, BLOCK, counts[head, row_block, :3]),
                (columns, 1, counts[head, row_block, 3:]),
            ):
                taken = 0
                for stage in (ops.Stage.INTER, ops.Stage.SUCC, ops.Stage.INTRA):
                    keys = table[head, row_block, taken : taken + stage_counts[stage]]
                    taken += stage_counts[stage]
                    visited += int((ends[stage][:, None] - keys[None, :]).clip(0, width).sum())
    return visited


def read(
    engine: Any, documents: list[Document], encode: Encode, in_document: Observer, in_question: Observer
) -> list[bool]:
    """Asks for every needle of every document: which answers are right. The observers see each part's sparse pieces."""
    maker, right = DocumentMaker(encode), []
    for document in documents:
        head = encode(prompt_head()) + maker.ids(document)
        document_ids, end = np.asarray(head[:-HELD_BACK], np.int64), head[-HELD_BACK:]
        turns = [(encode(prompt_tail(needle)), encode(needle.sentence)) for needle in document.needles]
        longest = max(len(question) + len(answer) for question, answer in turns)
        engine.observe(in_document)
        with engine.prefilled(document_ids, prompt_length=len(head) + longest) as context:
            engine.observe(in_question)
            for question, answer in turns:
                asked = end + question
                before = range(len(asked) - 1, len(asked) + len(answer) - 1)
                logits = context.extend_logits(np.asarray(asked + answer, np.int64), list(before))
                right.append(logits.argmax(-1).tolist() == answer)
        engine.observe(None)
    return right
