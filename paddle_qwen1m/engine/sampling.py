"""Turns logits into tokens: keeps, for each sequence, which tokens it has seen."""

from __future__ import annotations

import secrets

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.engine.core import Sequence


class Sampler:
    """Samples one token at a time for the sequences of one engine call."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._seen: dict[int, paddle.Tensor] = {}
        self._seeds: dict[int, int] = {}

    def sample(self, logits: paddle.Tensor, sequence: Sequence) -> tuple[int, float]:
        """The next token of `sequence` and its log-probability, from its logits float32 [1, vocab]."""
        params = sequence.params
        if sequence.index not in self._seen:
            seen = np.zeros((1, self._vocab_size), np.uint8)
            seen[0, sequence.prompt] = 1
            self._seen[sequence.index] = paddle.to_tensor(seen)
            self._seeds[sequence.index] = secrets.randbits(63) if params.seed is None else params.seed & (2**63 - 1)
        too_early = len(sequence.token_ids) < params.min_new_tokens
        banned = params.eos_token_ids if too_early and params.eos_token_ids else (-1,)
        token, logprob = ops.sample(
            logits,
            self._seen[sequence.index],
            paddle.to_tensor(np.asarray([params.temperature], np.float32)),
            paddle.to_tensor(np.asarray([params.top_k], np.int32)),
            paddle.to_tensor(np.asarray([params.top_p], np.float32)),
            paddle.to_tensor(np.asarray([params.repetition_penalty], np.float32)),
            paddle.to_tensor(np.asarray([banned], np.int32)),
            paddle.to_tensor(np.asarray([self._seeds[sequence.index]], np.int64)),
            paddle.to_tensor(np.asarray([len(sequence.token_ids)], np.int64)),
        )
        return int(token.numpy()[0]), float(logprob.numpy()[0])

    def forget(self, sequence: Sequence) -> None:
        self._seen.pop(sequence.index, None)
        self._seeds.pop(sequence.index, None)
