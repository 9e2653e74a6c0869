"""More ranks than heads divide into: two have the same ones, share the rows of a prefill, and give what one gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import parallel_cases
import pytest
from parallel_ranks import NEEDLE, write_checkpoint
from test_parallel import DUAL_CHUNK, MODES, SHORT, check, loads, on_ranks

from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.attention.step import RowShare, SparsePiece, dense_pieces

SHAPES: dict[str, dict[str, Any]] = {
    "three heads": {
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64,
        "hidden_size": 192, "intermediate_size": 256, "vocab_size": 997, "dual_chunk_attention_config": DUAL_CHUNK,
    },
    "six heads": {
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
        "hidden_size": 192, "intermediate_size": 320, "vocab_size": 1001, "dual_chunk_attention_config": DUAL_CHUNK,
    },
}  # fmt: skip
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "degree"),
    [("three heads", 2), pytest.param("six heads", 4, marks=slow), pytest.param("needle", 8, marks=slow)],
)
def test_ranks_that_share_rows_give_what_one_gives(tmp_path: Path, name: str, degree: int) -> None:
    """Dense and sparse, 300 tokens in pieces of several DCA chunks, prompts of any few rows, and several at once."""
    directory = NEEDLE if name == "needle" else write_checkpoint(tmp_path / "shape", **SHAPES[name])
    jobs = loads({name: directory}, SHORT, [name])
    few = [{"name": f"{rows} rows", "tokens": rows, "new_tokens": 3} for rows in (1, 2, 63, 65, 129, 193)]
    few.append({"name": "three at once", "tokens": 150, "new_tokens": 9, "beside": [40, 270]})
    for job in jobs:
        job["runs"] += [{**one, "params": {"temperature": 0.0}} for one in few]
    alone = parallel_cases.run(jobs, 1)
    ranks = on_ranks(degree, jobs, tmp_path, alone, seconds=400)
    for mode in MODES:
        check(ranks, alone, f"{name}-{mode}")
        for results in ranks:
            for one in few:
                key = f"{name}-{mode}/{one['name']}"
                np.testing.assert_array_equal(results[f"{key}/tokens"], alone[f"{key}/tokens"])
    for first, second in zip(ranks[::2], ranks[1::2]):
        np.testing.assert_array_equal(first[f"{name}-sparse/heads"], second[f"{name}-sparse/heads"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_row_is_of_one_share(rng: np.random.Generator, count: int) -> None:
    """Of groups of row blocks, and of pieces, whose shares are as far from their ends on average."""
    shares = [RowShare(number, count) for number in range(count)]
    for first, blocks in [(0, 1), (3, 2), (7, 64), (5, 0)]:
        own = [share.of_blocks(first, blocks) for share in shares]
        assert [one for begin, size in own for one in range(begin, begin + size)] == list(range(first, first + blocks))
    pieces = [Piece(0, 1000, 1), Piece(1, 0, 64), Piece(65, 64, 65), Piece(130, 4096, 8000)]
    group = np.array([(number, one.row, one.rows, one.begin) for number, one in enumerate(pieces)], np.int32)
    rows: list[tuple[int, int, int]] = []
    for share in shares:
        own = share.of_pieces(group)
        assert own.dtype == np.int32 and own.shape[1] == 4
        rows += [(number, row + i, begin + i) for number, row, size, begin in own.tolist() for i in range(size)]
        long = [begin + i for number, _, size, begin in own.tolist() if number == 3 for i in range(size)]
        assert abs(np.mean(long) - (4096 + 3999.5)) <= 128
    assert sorted(rows) == [
        (number, one.row + i, one.begin + i) for number, one in enumerate(pieces) for i in range(one.rows)
    ]


def test_a_share_may_have_no_row() -> None:
    assert RowShare(1, 2).of_pieces(np.array([[0, 5, 64, 128]], np.int32)).shape == (0, 4)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("row_blocks", [1, 5, 8, 38])
def test_parts_of_a_sparse_piece_hold_every_row_block_of_one_share(count: int, row_blocks: int) -> None:
    """Whatever the pauses, of which each share has as many. A part is no more than is there at once."""
    piece, nothing = Piece(70, 1000, 37 * 64 + 5), paddle.empty([0])
    groups = [(first, min(row_blocks, 38 - first)) for first in range(0, 38, row_blocks)]
    blocks = []
    for number in range(count):
        share = RowShare(number, count)
        pauses = 0
        for span, first, runs in SparsePiece(piece, nothing, 1.0, nothing, groups, share=share).spans(8 * 64):
            assert span == piece.blocks(first, 8)
            for run in runs:
                assert 0 <= run.first <= run.first + run.size <= max(span.row_blocks, run.first)
                blocks += [first + run.first + one for one in range(run.size)]
                pauses += run.pauses
        assert pauses == len(groups)
    assert sorted(blocks) == list(range(38))


def test_parts_of_dense_pieces_hold_every_row_once() -> None:
    given = [(0, 3, 40, 5), (1, 43, 1200, 64), (2, 1243, 293, 0), (3, 1536, 7, 900)]
    parts = list(dense_pieces(np.asarray(given, np.int32), 512, None))
    assert [(part.first, part.pauses) for part in parts] == [(0, False), (512, False), (1024, False), (1536, True)]
    rows = []
    for part in parts:
        for number, row, count, begin in part.pieces.numpy().tolist():
            assert 0 <= row < row + count <= 512
            rows += [(number, part.first + row + one, begin + one) for one in range(count)]
    assert rows == [(number, row + one, begin + one) for number, row, count, begin in given for one in range(count)]
    (none,) = dense_pieces(np.empty((0, 4), np.int32), 512, None)
    assert none.pauses and none.pieces.shape == [0, 4]
