"""Data that the scheduler, the runner and the engine share, with its invariants."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is greedy; top_k 0 keeps all; a sequence ends at any of eos_token_ids.

    min_new_tokens: no eos before so many tokens. seed: the draw of a token depends on (seed, its number) alone.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be 0 to max_new_tokens ({self.max_new_tokens}), got {self.min_new_tokens}"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt: its tokens, their log-probabilities, and why it ended ("stop" or "length")."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class PrefillProgress:
    """How far the prefill of prompt `index` is, `seconds` after it began."""

    index: int
    done_tokens: int
    total_tokens: int
    seconds: float


@dataclass
class Sequence:
    """A request and what has become of it. Its first `num_cached` tokens have their keys in `pages`.

    `seed` is that of its params, or a random one.
    """

    index: int
    prompt: np.ndarray
    params: SamplingParams
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.prompt.ndim == 1 and self.prompt.dtype == np.int64 and len(self.prompt) > 0
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed & (2**63 - 1)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.token_ids)

    @property
    def max_length(self) -> int:
        return len(self.prompt) + self.params.max_new_tokens

    @property
    def is_prefilled(self) -> bool:
        return self.num_cached >= len(self.prompt)

    def append(self, token: int, logprob: float) -> None:
        assert self.is_prefilled and self.finish_reason is None
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in self.params.eos_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.params.max_new_tokens:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(self.token_ids, self.logprobs, self.finish_reason)
