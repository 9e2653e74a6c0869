"""How the next tokens of a batch are chosen, as tensors that a sampling step reads and updates in place."""

from __future__ import annotations

from collections.abc import Sequence as ManyOf

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.engine.params import SamplingParams
from paddle_qwen1m.engine.rules import num_words

EMPTY = -1
"""Step of a slot without a sequence."""


class SamplingSlots:
    """What `capacity` sequences, a slot each, are sampled by. Slots are filled and emptied in place.

    The tensors are made once and stay where they are: a step that samples the first b slots reads and updates them, and
    a CUDA graph may replay it, whatever the slots have come to hold. A slot's counts and step advance on the device.
    """

    def __init__(self, capacity: int, vocab_size: int) -> None:
        self.capacity, self.vocab_size = capacity, vocab_size
        # Read where a setting or a flag says so, and written before.
        self._counts = paddle.empty([capacity, vocab_size], "int16")
        self._mask = paddle.empty([capacity, num_words(vocab_size)], "int32")
        self._bias = paddle.empty([capacity, vocab_size], "float32")
        self._steps = paddle.to_tensor(np.full(capacity, EMPTY, np.int64))
        self._settings = _Settings(capacity)
        self._inputs: dict[int, tuple[paddle.Tensor, ...]] = {}

    def put(
        self,
        slot: int,
        params: SamplingParams,
        *,
        prompt: np.ndarray,
        answer_tokens: ManyOf[int] = (),
        seed: int,
        mask: np.ndarray | None = None,
    ) -> None:
        """A sequence of these params takes the slot: `prompt` int64 [n], followed by answer_tokens so far.

        mask: words of the tokens that may come next (see set_mask); None: all.
        """
        if params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            _write_row(self._counts, slot, _counts(prompt, answer_tokens, self.vocab_size))
        if params.logit_bias:
            bias = np.zeros(self.vocab_size, np.float32)
            bias[list(params.logit_bias)] = list(params.logit_bias.values())
            _write_row(self._bias, slot, bias)
        if mask is not None:
            self._write_mask(slot, mask)
        self._settings.put(slot, params, seed, masked=mask is not None)
        self._write_step(slot, len(answer_tokens))

    def clear(self, slot: int) -> None:
        """The slot holds no sequence: steps pass over it, and give token 0 and log-probability 0."""
        self._write_step(slot, EMPTY)

    def set_mask(self, slot: int, words: np.ndarray | None) -> None:
        """From the next step on the slot's tokens are those that words uint32 [ceil(vocab / 32)] allow; None: all."""
        if words is not None:
            self._write_mask(slot, words)
        self._settings.set_masked(slot, words is not None)

    def sample(self, logits: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The next tokens int64 [b] of the first b slots and their log-probabilities float32 [b].

        logits: float32 [b, vocab]. The log-probability is that of the logits before the temperature.
        """
        return ops.sample(logits, *self._first(logits.shape[0]))

    def _first(self, batch: int) -> tuple[paddle.Tensor, ...]:
        """The op's inputs for the first slots: views, made once."""
        if batch not in self._inputs:
            flags, numbers, top_k, seeds = self._settings.views(batch)
            masked, biased = flags
            *untempered, top_p = numbers
            self._inputs[batch] = (
                *(self._counts[:batch], self._mask[:batch], masked, self._bias[:batch], biased),
                *(*untempered, top_k, top_p, seeds, self._steps[:batch]),
            )
        return self._inputs[batch]

    def _write_step(self, slot: int, step: int) -> None:
        _write(self._steps[slot : slot + 1], np.asarray([step], np.int64))

    def _write_mask(self, slot: int, words: np.ndarray) -> None:
        _write_row(self._mask, slot, words.view(np.int32))


class _Settings:
    """The numbers of every slot that no step changes: held on the host, and copied whole when one slot's change."""

    NUMBERS = ("repetition_penalty", "frequency_penalty", "presence_penalty", "temperature", "min_p", "top_p")
    FLAGS = ("masked", "biased")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._numbers = np.zeros((len(self.NUMBERS), capacity), np.float32)
        self._flags = np.zeros((len(self.FLAGS), capacity), np.uint8)
        self._top_k = np.zeros(capacity, np.int32)
        self._seeds = np.zeros(capacity, np.int64)
        # One dimension: parts of it are views on every device.
        self._tensors = [paddle.to_tensor(values.ravel()) for values in self._values]

    @property
    def _values(self) -> tuple[np.ndarray, ...]:
        return self._flags, self._numbers, self._top_k, self._seeds

    def put(self, slot: int, params: SamplingParams, seed: int, *, masked: bool) -> None:
        self._numbers[:, slot] = [getattr(params, name) for name in self.NUMBERS]
        self._flags[:, slot] = masked, bool(params.logit_bias)
        self._top_k[slot], self._seeds[slot] = params.top_k, seed
        for tensor, values in zip(self._tensors, self._values):
            _write(tensor, values.ravel())

    def set_masked(self, slot: int, masked: bool) -> None:
        if self._flags[0, slot] != masked:
            self._flags[0, slot] = masked
            _write(self._tensors[0], self._flags.ravel())

    def views(self, batch: int) -> tuple[list[paddle.Tensor], list[paddle.Tensor], paddle.Tensor, paddle.Tensor]:
        """Flags, numbers, top_k and seeds of the first slots."""
        flags, numbers, top_k, seeds = self._tensors

        def parts(tensor: paddle.Tensor, names: tuple[str, ...]) -> list[paddle.Tensor]:
            begins = [place * self._capacity for place in range(len(names))]
            return [tensor[begin : begin + batch] for begin in begins]

        return parts(flags, self.FLAGS), parts(numbers, self.NUMBERS), top_k[:batch], seeds[:batch]


def _counts(prompt: np.ndarray, answer_tokens: ManyOf[int], vocab_size: int) -> np.ndarray:
    """A row of counts, int16 [vocab], as ops.sample reads them."""
    times = np.bincount(np.asarray(answer_tokens, np.int64), minlength=vocab_size)
    in_prompt = np.zeros(vocab_size, np.uint16)
    in_prompt[prompt] = ops.IN_PROMPT
    return (np.minimum(times, ops.LARGEST_COUNT).astype(np.uint16) | in_prompt).view(np.int16)


def _write_row(tensor: paddle.Tensor, row: int, values: np.ndarray) -> None:
    _write(tensor[row : row + 1], values[None])


def _write(tensor: paddle.Tensor, values: np.ndarray) -> None:
    """A copy in the order of the device's work, which nothing waits for. `values` may change at once."""
    ops.upload(tensor, values)
