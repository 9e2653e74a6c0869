"""Prefill in ranges of a piece's row blocks: each row gets the bits that it gets when the whole piece is computed."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from cases import Prompt, make_prompt
from faces import OpFace, tensor, visits

from paddle_qwen1m import ops

BEGIN, END, CHUNK_LEN = 1100, 1517, 512  # inside the third DCA chunk; the last row block is not whole
CUTS = [[0, 7], [0, 1, 7], [0, 3, 4, 7], [0, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.fixture
def prompt(rng: np.random.Generator) -> Prompt:
    return make_prompt(rng, END, CHUNK_LEN, 64, heads=4, kv_heads=2, page_size=32)


def inputs(prompt: Prompt) -> tuple[paddle.Tensor, ...]:
    """q of the piece's rows, both caches, the block table."""
    keys, values, table = prompt.caches
    return tensor(prompt.queries[:, BEGIN:]), tensor(keys), tensor(values), tensor(table)


def poisoned(prompt: Prompt) -> tuple[paddle.Tensor, paddle.Tensor]:
    rows, heads, head_dim = END - BEGIN, *prompt.q.shape[1:]
    return tensor(np.full((rows, heads, head_dim), np.nan)), tensor(np.full((rows, heads), np.nan))


@pytest.mark.parametrize("cuts", CUTS[1:])
def test_dense_rows_do_not_depend_on_how_a_piece_is_cut(prompt: Prompt, cuts: list[int]) -> None:
    q, keys, values, table = inputs(prompt)
    scale = tensor(np.array([prompt.scale], np.float32))

    def attend(borders: list[int]) -> tuple[np.ndarray, np.ndarray]:
        out, lse = poisoned(prompt)
        for first, last in zip(borders, borders[1:]):
            begin, end = 64 * first, min(64 * last, END - BEGIN)
            piece = tensor(np.array([[0, begin, end - begin, BEGIN + begin]], np.int32))
            ops.dca_prefill(q, out, keys, values, table.unsqueeze(0), piece, scale, CHUNK_LEN, lse)
        return out.numpy(), lse.numpy()

    for whole, cut in zip(attend(CUTS[0]), attend(cuts)):
        assert np.isfinite(whole).all()
        np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize("cuts", CUTS[1:])
def test_sparse_rows_do_not_depend_on_how_a_piece_is_cut(prompt: Prompt, cuts: list[int]) -> None:
    q, keys, values, table = inputs(prompt)
    index = visits(prompt.index(OpFace(), BEGIN, END, 40, 150))

    def attend(borders: list[int]) -> tuple[np.ndarray, np.ndarray]:
        out, lse = poisoned(prompt)
        for first, last in zip(borders, borders[1:]):
            ops.dca_sparse_prefill(
                q, out, keys, values, table, index, 0, BEGIN, END - BEGIN, CHUNK_LEN, prompt.scale, lse,
                first_block=first, num_blocks=last - first,
            )  # fmt: skip
        return out.numpy(), lse.numpy()

    for whole, cut in zip(attend(CUTS[0]), attend(cuts)):
        assert np.isfinite(whole).all()
        np.testing.assert_array_equal(cut, whole)


def test_a_range_computes_its_own_rows_alone(prompt: Prompt) -> None:
    q, keys, values, table = inputs(prompt)
    index = visits(prompt.index(OpFace(), BEGIN, END, 40, 150))
    out, _ = poisoned(prompt)
    arguments = q, out, keys, values, table, index, 0, BEGIN, END - BEGIN, CHUNK_LEN, prompt.scale
    ops.dca_sparse_prefill(*arguments, first_block=2, num_blocks=3)
    written = np.isfinite(out.numpy()).all(axis=(1, 2))
    assert written[128:320].all() and not written[:128].any() and not written[320:].any()
    for first, count in ((-1, 2), (6, 2), (0, 8)):
        with pytest.raises(ValueError, match=r"row blocks .* are not among the piece's 7"):
            ops.dca_sparse_prefill(*arguments, first_block=first, num_blocks=count)
    room = index.columns.size
    for all_columns in (0, room + 1):
        with pytest.raises(ValueError, match=rf"all_columns must be 1 to the {room} .*, got {all_columns}"):
            ops.dca_sparse_prefill(*arguments, all_columns=all_columns)
