"""Decode: one token a step for every sequence that runs."""

from __future__ import annotations

from collections.abc import Sequence as ManyOf
from typing import Callable

import numpy as np
import paddle

from paddle_qwen1m.attention.step import Step, StepBuilder, page_tables
from paddle_qwen1m.engine.core import Sequence
from paddle_qwen1m.engine.graph import Outputs, ReplayedStep
from paddle_qwen1m.engine.sampling import SamplingBatch

Forward = Callable[[Step], paddle.Tensor]
"""Logits float32 [B, vocab] of a decode step."""


class DecodeBatch:
    """The decode steps of sequences whose prompts are cached and whose pages hold their longest answers.

    All that a step reads and changes lies in tensors that stay where they are, and the ids that it samples are what the
    next one starts from: a step needs nothing from the host, and on a GPU it can be replayed.
    """

    def __init__(
        self, sequences: ManyOf[Sequence], builder: StepBuilder, page_size: int, vocab_size: int, forward: Forward
    ) -> None:
        self._builder, self._page_size, self._forward = builder, page_size, forward
        self._ids = paddle.to_tensor(np.asarray([sequence.token_ids[-1] for sequence in sequences], np.int64))
        self._lengths = paddle.to_tensor(np.asarray([sequence.length - 1 for sequence in sequences], np.int32))
        self._block_tables = page_tables([sequence.pages for sequence in sequences])
        self._sampling = SamplingBatch(sequences, vocab_size)

    def step(self) -> Outputs:
        """Token ids int64 [B] and their log-probabilities float32 [B]."""
        step = self._builder.decode(self._ids, self._lengths, self._block_tables, self._page_size)
        ids, logprobs = self._sampling.sample(self._forward(step))
        self._ids.copy_(ids, False)
        return ids, logprobs

    def follow(self, sequences: ManyOf[Sequence]) -> None:
        """The sequences have got the tokens of the last step."""
        self._sampling.follow(sequences)


class Decoder:
    """Decodes whichever sequences run: makes a batch of them, and a new one when they are no longer the same."""

    def __init__(
        self, builder: StepBuilder, page_size: int, vocab_size: int, forward: Forward, *, replay: bool
    ) -> None:
        self._arguments = builder, page_size, vocab_size, forward
        self._replay = replay
        self._ids: list[str] = []
        self._batch: DecodeBatch | None = None
        self._step: Callable[[], Outputs] | None = None

    def step(self, sequences: ManyOf[Sequence]) -> Outputs:
        """The sequences' next tokens int64 [B] and their log-probabilities float32 [B]; their last ones are cached."""
        ids = [sequence.id for sequence in sequences]
        if self._step is None or self._ids != ids:
            self.close()
            batch = DecodeBatch(sequences, *self._arguments)
            self._ids, self._batch = ids, batch
            self._step = ReplayedStep(batch.step) if self._replay else batch.step
        assert self._batch is not None
        self._batch.follow(sequences)
        for sequence in sequences:
            sequence.num_cached = sequence.length
        return self._step()

    def close(self) -> None:
        """Gives back the memory of the batch."""
        if isinstance(self._step, ReplayedStep):
            self._step.release()
        self._step = self._batch = None
