"""Slots that are filled and emptied in place, beside the oracle on arrays that are made anew for every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import paddle
import pytest

from paddle_qwen1m import ops
from paddle_qwen1m.engine.params import SamplingParams
from paddle_qwen1m.engine.rules import token_words
from paddle_qwen1m.engine.sampling import SamplingSlots
from paddle_qwen1m.plan import sampling_bytes

VOCABULARY = 70


@dataclass
class Filled:
    """What a slot was given, and has answered since."""

    params: SamplingParams
    prompt: np.ndarray
    seed: int
    allowed: np.ndarray | None = None
    answer: list[int] = field(default_factory=list)

    def expected(self, logits: np.ndarray) -> tuple[int, float]:
        """The oracle's next token and its log-probability."""
        counts = np.zeros(VOCABULARY, np.int64)
        np.add.at(counts, self.answer, 1)
        counts[self.prompt] |= oracle.IN_PROMPT
        bias = np.zeros(VOCABULARY)
        for token, value in (self.params.logit_bias or {}).items():
            bias[token] = value
        one = self.params
        allowed = np.ones(VOCABULARY, bool) if self.allowed is None else self.allowed
        ids, logprobs = oracle.sample(
            logits[None],
            counts[None],
            oracle.mask_words(allowed[None]),
            np.ones(1),
            bias[None],
            np.ones(1),
            *(
                np.asarray([value])
                for value in (
                    *(one.repetition_penalty, one.frequency_penalty, one.presence_penalty),
                    *(one.temperature, one.min_p, one.top_k, one.top_p, self.seed, len(self.answer)),
                )
            ),
        )
        return int(ids[0]), float(logprobs[0])


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Float32 holds all of them exactly."""
    return SamplingParams(
        temperature=rng.choice([0.0, 0.5, 1.0]),
        top_k=int(rng.choice([0, 5])),
        top_p=rng.choice([1.0, 0.75]),
        min_p=rng.choice([0.0, 0.125]),
        repetition_penalty=rng.choice([1.0, 1.5]),
        frequency_penalty=rng.choice([0.0, 0.25]),
        presence_penalty=rng.choice([0.0, 0.5]),
        logit_bias={int(rng.integers(VOCABULARY)): 4.0} if rng.random() < 0.3 else None,
    )


def random_allowed(rng: np.random.Generator) -> np.ndarray | None:
    return rng.random(VOCABULARY) < 0.5 if rng.random() < 0.5 else None


def words(allowed: np.ndarray | None) -> np.ndarray | None:
    return None if allowed is None else token_words(np.flatnonzero(allowed), VOCABULARY)


def test_slots_hold_what_they_were_given_last(rng: np.random.Generator) -> None:
    """Sequences come, go on, change their masks and leave, in any order; a step takes the first few slots."""
    slots = SamplingSlots(6, VOCABULARY)
    filled: dict[int, Filled] = {}
    for _ in range(150):
        slot = int(rng.integers(6))
        if slot in filled and rng.random() < 0.3:
            slots.clear(slot)
            del filled[slot]
        elif slot in filled and rng.random() < 0.5:
            filled[slot].allowed = random_allowed(rng)
            slots.set_mask(slot, words(filled[slot].allowed))
        elif slot not in filled:
            answer = rng.integers(0, VOCABULARY, rng.integers(0, 4)).tolist()
            prompt, seed = rng.integers(0, VOCABULARY, 20), int(rng.integers(-(2**62), 2**62))
            one = filled[slot] = Filled(random_params(rng), prompt, seed, random_allowed(rng), answer)
            tokens = prompt.copy()
            slots.put(slot, one.params, prompt=tokens, answer_tokens=answer, seed=seed, mask=words(one.allowed))
            tokens[:] = 0  # nothing of the caller's is kept
        batch = int(rng.integers(1, 7))
        logits = (3.0 * rng.standard_normal((batch, VOCABULARY))).astype(np.float32)
        ids, logprobs = (values.numpy() for values in slots.sample(paddle.to_tensor(logits)))
        for row in range(batch):
            expected = filled[row].expected(logits[row]) if row in filled else (0, 0.0)
            assert ids[row] == expected[0]
            np.testing.assert_allclose(logprobs[row], expected[1], atol=1e-5)
            if row in filled:
                filled[row].answer.append(int(ids[row]))


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 2.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1}, {"top_k": 2**31 - 1}, {"top_k": 2**31}, {"top_k": 2**63}, {"top_k": 2**70},
        {"top_p": 5e-324}, {"top_p": 1e-40}, {"min_p": 5e-324}, {"min_p": 1.0},
        {"repetition_penalty": 5e-324}, {"repetition_penalty": 1e-40}, {"repetition_penalty": 1e308},
        {"presence_penalty": -2.0, "frequency_penalty": 5e-324}, {"logit_bias": {0: -1e308, VOCABULARY - 1: 1e308}},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_params_accept_can_be_drawn_by(
    temperature: float, fields: dict[str, Any], rng: np.random.Generator
) -> None:
    params = SamplingParams(temperature=temperature, **fields)
    slots = SamplingSlots(2, VOCABULARY)
    for slot, seed in enumerate((-(2**63), 2**63 - 1)):
        slots.put(slot, params, prompt=np.arange(VOCABULARY // 2), answer_tokens=[3, 3], seed=seed)
    logits = np.stack([100.0 * rng.standard_normal(VOCABULARY), np.zeros(VOCABULARY)]).astype(np.float32)
    ids, logprobs = (values.numpy() for values in slots.sample(paddle.to_tensor(logits)))
    assert ((ids >= 0) & (ids < VOCABULARY)).all()
    assert np.isfinite(logprobs).all() and (logprobs <= 0).all()


def test_a_steps_tensors_stay_where_they_are(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """A CUDA graph keeps addresses: those of a batch are the same whatever the slots come to hold."""
    slots, addresses = SamplingSlots(4, VOCABULARY), []
    original = ops.sample

    def noting(logits: paddle.Tensor, *inputs: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        addresses.append([tensor.data_ptr() for tensor in inputs])
        return original(logits, *inputs)

    monkeypatch.setattr(ops, "sample", noting)
    logits = paddle.to_tensor(rng.standard_normal((3, VOCABULARY)).astype(np.float32))
    for slot in range(3):
        slots.sample(logits)
        slots.put(slot, random_params(rng), prompt=np.arange(5), seed=1, mask=words(random_allowed(rng)))
        slots.sample(logits)
        slots.set_mask(slot, None)
        slots.clear(slot)
    assert len(addresses) == 6 and all(same == addresses[0] for same in addresses)
    assert len(set(addresses[0])) == len(addresses[0])


def test_memory_is_told_before_it_is_taken() -> None:
    for capacity, vocabulary in ((1, 31), (5, 64), (3, 1000)):
        slots = SamplingSlots(capacity, vocabulary)
        tensors = slots._first(capacity)
        assert sampling_bytes(capacity, vocabulary) == sum(tensor.size * tensor.element_size() for tensor in tensors)
