"""How the next tokens of a batch are chosen, as tensors that a sampling step reads and updates in place."""

from __future__ import annotations

from collections.abc import Sequence as ManyOf

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.engine.core import Sequence


class SamplingBatch:
    """Samples the tokens that follow those which its sequences have so far, one of each at every call."""

    def __init__(self, sequences: ManyOf[Sequence], vocab_size: int) -> None:
        params = [sequence.params for sequence in sequences]
        seen = np.zeros((len(sequences), vocab_size), np.uint8)
        for row, sequence in zip(seen, sequences):
            row[sequence.prompt] = 1
            row[sequence.token_ids] = 1
        banned = np.full((len(sequences), max(1, *(len(one.stop_token_ids) for one in params))), -1, np.int32)
        for row, one in zip(banned, params):
            row[: len(one.stop_token_ids)] = one.stop_token_ids
        self._inputs = [
            paddle.to_tensor(values)
            for values in (
                seen,
                np.asarray([one.temperature for one in params], np.float32),
                np.asarray([one.top_k for one in params], np.int32),
                np.asarray([one.top_p for one in params], np.float32),
                np.asarray([one.repetition_penalty for one in params], np.float32),
                banned,
                np.asarray([one.min_tokens for one in params], np.int64),
                np.asarray([sequence.seed for sequence in sequences], np.int64),
                np.asarray([len(sequence.token_ids) for sequence in sequences], np.int64),
            )
        ]

    def sample(self, logits: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Token ids int64 [B] and their log-probabilities float32 [B], from logits float32 [B, vocab]."""
        return ops.sample(logits, *self._inputs)
