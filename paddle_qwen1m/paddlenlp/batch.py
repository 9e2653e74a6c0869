"""Token ids as callers give them turned into prompts: types, shapes, padding, range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import paddle
from paddlenlp.utils.log import logger

TokenIds = Union[paddle.Tensor, np.ndarray, Sequence[int], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts. ids: int64 [B, N] as given; starts: the column of each row's first real token."""

    ids: np.ndarray
    starts: tuple[int, ...]

    @property
    def prompts(self) -> list[np.ndarray]:
        """Each row without its padding: int64 [n]."""
        return [row[start:] for row, start in zip(self.ids, self.starts)]


def read_batch(
    input_ids: TokenIds,
    attention_mask: Any | None,
    vocab_size: int,
    pad_token_id: int | None = None,
    pad_is_end: bool = False,
) -> Batch:
    """Check a batch of token ids before any work is done.

    input_ids: integers [N] or [B, N], a tensor, an array or nested lists. attention_mask: the same shape, 1 for tokens
    and 0 for padding, which may stand on the left only. pad_token_id: what counts as padding at the start of a row when
    there is no mask; None: nothing does. pad_is_end: it ends an answer, too, and counts as a token, as in PaddleNLP.
    Raises ValueError for an empty prompt, padding on the right, ids outside [0, vocab_size) and wrong types or shapes.
    """
    ids = _integers("input_ids", input_ids)
    if attention_mask is not None:
        mask = _mask(attention_mask, ids.shape)
    elif pad_token_id is None or pad_is_end:
        mask = np.ones(ids.shape, dtype=bool)
        if pad_is_end and len(ids) > 1 and (ids[:, [0, -1]] == pad_token_id).any():
            logger.warning(
                f"input_ids has rows that start or end with {pad_token_id}, pad_token_id and eos_token_id in one, and "
                "no attention_mask: all of them are taken as tokens"
            )
    else:
        mask = _guessed_mask(ids, pad_token_id)
    starts: list[int] = []
    for row in range(ids.shape[0]):
        tokens = np.flatnonzero(mask[row])
        if tokens.size == 0:
            raise ValueError(f"row {row} of input_ids is an empty prompt: give at least one token")
        if tokens[-1] != ids.shape[1] - 1 or tokens.size != ids.shape[1] - tokens[0]:
            raise ValueError(
                f"row {row} of attention_mask has a 0 right of a 1: padding may stand on the left only; "
                'set tokenizer.padding_side = "left"'
            )
        starts.append(int(tokens[0]))
    wrong = np.argwhere(mask & ((ids < 0) | (ids >= vocab_size)))
    if wrong.size:
        row, column = wrong[0]
        raise ValueError(
            f"input_ids[{row}, {column}] is {ids[row, column]}, outside the vocabulary [0, {vocab_size}): "
            "was another model's tokenizer used?"
        )
    return Batch(ids, tuple(starts))


def read_positions(positions: Sequence[int] | None, batch: Batch) -> list[int]:
    """Columns of the batch whose logits are wanted; the last one when `positions` is None. ValueError for others."""
    length = batch.ids.shape[1]
    if positions is None:
        return [length - 1]
    columns = [int(column) for column in np.asarray(positions).reshape(-1)]
    low = max(batch.starts)
    if not columns or min(columns) < low or max(columns) >= length:
        raise ValueError(
            f"positions must be columns of input_ids in [{low}, {length}), padding left out; got {columns}"
        )
    return columns


def _guessed_mask(ids: np.ndarray, pad_token_id: int) -> np.ndarray:
    """The padding of a batch that came without a mask, bool [B, N]: pad_token_id at the start of a row.

    PaddleNLP hides it wherever it stands; inside a prompt it may be a token, so there it is said and kept.
    """
    is_pad = ids == pad_token_id
    mask = np.logical_or.accumulate(~is_pad, axis=1)
    for row in range(len(ids)):
        if not mask[row].any():
            raise ValueError(
                f"row {row} of input_ids is an empty prompt: all of it is pad_token_id {pad_token_id}; give an "
                "attention_mask if that is a token"
            )
        if len(ids) > 1 and is_pad[row, -1]:
            raise ValueError(
                f"row {row} of input_ids ends with pad_token_id {pad_token_id}: padding may stand on the left only; "
                'set tokenizer.padding_side = "left", or give an attention_mask of 1 if that is a token'
            )
    inside = np.argwhere(mask & is_pad)
    if inside.size:
        row, column = inside[0]
        logger.warning(
            f"input_ids[{row}, {column}] is pad_token_id {pad_token_id} behind the row's first token and is taken as a "
            "token; an attention_mask says which it is"
        )
    return mask


def _integers(name: str, values: Any) -> np.ndarray:
    """int64 [B, N]; ValueError for other types and shapes."""
    raw = values.numpy() if isinstance(values, paddle.Tensor) else values
    try:
        array = np.asarray(raw)
    except ValueError:
        array = np.asarray(raw, dtype=object)
    if array.dtype == object:
        raise ValueError(f"{name} must be rows of equal length: pad them on the left and give an attention_mask")
    if array.size == 0:
        raise ValueError(f"{name} has shape {list(array.shape)}: an empty prompt; give at least one token")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers (int64), got {array.dtype}")
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must be [length] or [batch, length], got shape {list(array.shape)}")
    return np.array(array, dtype=np.int64, ndmin=2)


def _mask(attention_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(attention_mask.numpy() if isinstance(attention_mask, paddle.Tensor) else attention_mask)
    if array.ndim == 1:
        array = array[None]
    if array.shape != shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {list(shape)}, got {list(array.shape)}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError("attention_mask must be 1 for tokens and 0 for padding, got other values")
    return array.astype(bool)
