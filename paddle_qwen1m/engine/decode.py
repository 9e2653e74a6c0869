"""Decode: one token a step for every sequence that runs."""

from __future__ import annotations

from typing import Callable, Protocol

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.step import Step, StepBuilder
from paddle_qwen1m.engine.graph import Outputs, ReplayedStep
from paddle_qwen1m.engine.orders import Join
from paddle_qwen1m.engine.params import MAX_LOGPROBS
from paddle_qwen1m.parallel.group import Group

NO_PAGE = -1
"""What a block table holds behind a sequence's pages: a step that reads it is wrong, and found out."""

Forward = Callable[[Step], paddle.Tensor]
"""Logits float32 [B, vocab] of a decode step."""


class Sampler(Protocol):
    """Chooses the next tokens of the first slots. It is filled and emptied as the slots are, by whoever orders that."""

    def sample(self, logits: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Ids int64 [b], any of the vocabulary in an empty slot, and log-probabilities float32 [b]; reads nothing back.

        logits: float32 [b, vocab] of the first b slots.
        """


class DecodeSlots:
    """The sequences that get a token a step, in slots which are filled and emptied between steps.

    All that a step reads and changes lies in tensors that are made once, and the ids that it chooses are what the next
    one starts from. A step is run for the first 1, 2, 4, ... slots: on a GPU each of these is captured once, and then
    replayed whatever the slots have come to hold. A slot without a sequence has length 0, and writes nothing.

    sampler: on the rank that chooses; the others get its ids from it.
    """

    def __init__(
        self,
        num_slots: int,
        max_pages: int,
        page_size: int,
        builder: StepBuilder,
        forward: Forward,
        sampler: Sampler | None,
        group: Group,
        *,
        replay: bool,
    ) -> None:
        self.num_slots = num_slots
        self._page_size, self._builder, self._forward = page_size, builder, forward
        self._sampler, self._group, self._replay = sampler, group, replay
        self._ids = ops.tensor(np.zeros(num_slots, np.int64))
        self._none = ops.tensor(np.zeros(num_slots, np.int64))
        self._lengths = ops.tensor(np.zeros(num_slots, np.int32))
        self._block_tables = ops.tensor(np.full((num_slots, max_pages), NO_PAGE, np.int32))
        self._steps: dict[tuple[int, bool], Callable[[], Outputs]] = {}

    def join(self, join: Join) -> None:
        """Fills a slot."""
        row = slice(join.slot, join.slot + 1)
        table = np.full((1, self._block_tables.shape[1]), NO_PAGE, np.int32)
        table[0, : len(join.pages)] = join.pages
        ops.upload(self._block_tables[row], table)
        ops.upload(self._ids[row], np.asarray([join.token], np.int64))
        ops.upload(self._lengths[row], np.asarray([join.length], np.int32))

    def leave(self, slot: int) -> None:
        """Empties a slot."""
        ops.upload(self._lengths[slot : slot + 1], np.zeros(1, np.int32))

    def clear(self) -> None:
        """Empties every slot."""
        ops.upload(self._lengths, np.zeros(self.num_slots, np.int32))

    def step(self, slots: int, *, top_logprobs: bool) -> Outputs:
        """The next token of each of the first `slots` slots, and of some more: what the sampler says of b >= slots.

        With top_logprobs also what `ops.top_logprobs` says of them. Empty on a rank without a sampler.
        """
        count = min(1 << (slots - 1).bit_length(), self.num_slots)
        key = count, top_logprobs
        if key not in self._steps:
            step = self._step_of(count, top_logprobs)
            self._steps[key] = ReplayedStep(step) if self._replay else step
        outputs = self._steps[key]()
        self._group.mark(self._ids, replayed=self._replay)  # no layer of a replay marks itself
        return outputs

    def release(self) -> None:
        """Gives back the memory of the graphs; no step may be run again."""
        for step in self._steps.values():
            if isinstance(step, ReplayedStep):
                step.release()
        self._steps = {}

    def _step_of(self, count: int, top_logprobs: bool) -> Callable[[], Outputs]:
        ids, none, lengths, tables = (
            tensor[:count] for tensor in (self._ids, self._none, self._lengths, self._block_tables)
        )

        def step() -> Outputs:
            logits = self._forward(self._builder.decode(ids, lengths, tables, self._page_size))
            outputs: Outputs = ()
            if self._sampler is not None:
                outputs = self._sampler.sample(logits)
                if top_logprobs:
                    outputs += ops.top_logprobs(logits, outputs[0], MAX_LOGPROBS)
            ids.copy_(outputs[0] if outputs else none, False)
            self._group.all_reduce(ids)
            return outputs

        return step
