"""Data that the scheduler, the runner and the engine share, with its invariants."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Union

import numpy as np

from paddle_qwen1m.engine.params import SamplingParams


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt: its tokens, their log-probabilities, and why it ended ("stop" or "length")."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Request:
    """What a caller asks for under an id of its own choosing: `prompt` int64 [n], and how to go on from it.

    params None asks for no answer. logit_positions, ascending: positions of the prompt after which logits are wanted.
    """

    id: str
    prompt: np.ndarray
    params: SamplingParams | None = None
    logit_positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        prompt = self.prompt
        if prompt.ndim != 1 or prompt.dtype != np.int64:
            raise ValueError(f"a prompt must be int64 [n], got {prompt.dtype} {list(prompt.shape)}")
        if len(prompt) == 0:
            raise ValueError("a prompt must have at least one token")
        positions = list(self.logit_positions)
        if positions != sorted(set(positions)) or any(not 0 <= place < len(prompt) for place in positions):
            raise ValueError(f"positions must ascend within 0 to {len(prompt) - 1}, got {positions}")

    @property
    def max_length(self) -> int:
        """Tokens of the prompt and its longest answer."""
        return len(self.prompt) + (self.params.max_tokens or 0 if self.params is not None else 0)


@dataclass(frozen=True)
class Prefilled:
    """Event: `done_tokens` of a request's `total_tokens` of prompt are in the cache, `reused_tokens` of them since
    before it began, at `started` of the clock time.perf_counter.
    """

    id: str
    done_tokens: int
    total_tokens: int
    reused_tokens: int
    started: float


@dataclass(frozen=True)
class Logits:
    """Event: logits float32 [n, vocab] after the request's next n logit positions."""

    id: str
    values: np.ndarray


@dataclass(frozen=True)
class TokenChosen:
    """Event: a request's next token."""

    id: str
    token: int
    logprob: float


@dataclass(frozen=True)
class Finished:
    """Event: a request is done and holds nothing any more; `completion` is None where no answer was asked for."""

    id: str
    completion: Completion | None


Event = Union[Prefilled, Logits, TokenChosen, Finished]


@dataclass(frozen=True)
class PrefillProgress:
    """How far the prefill of a request is, `seconds` after it began."""

    id: str
    done_tokens: int
    total_tokens: int
    seconds: float


@dataclass(eq=False)
class Sequence:
    """A request and what has become of it. Its first `num_cached` tokens have their keys in `pages`.

    temperature_length: the n of the temperature and of the sparse threshold while the prompt is read. seed: of the
    draws. made_under: what else than tokens decides about the prompt's keys; prefixes are shared under the same alone.
    num_reused: tokens that were in the cache when it `started`. borders: where its prefixes end, and their digests.
    """

    request: Request
    seed: int
    temperature_length: int
    made_under: str = ""
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_reused: int = 0
    started: float | None = None
    borders: dict[int, bytes] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt(self) -> np.ndarray:
        return self.request.prompt

    @property
    def params(self) -> SamplingParams:
        assert self.request.params is not None
        return self.request.params

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.token_ids)

    @property
    def max_length(self) -> int:
        return self.request.max_length

    @property
    def is_prefilled(self) -> bool:
        return self.num_cached >= len(self.prompt)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None or (self.request.params is None and self.is_prefilled)

    def append(self, token: int, logprob: float) -> None:
        assert self.is_prefilled and self.finish_reason is None
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.params.max_tokens:
            self.finish_reason = "length"

    def completion(self) -> Completion | None:
        if self.request.params is None:
            return None
        assert self.finish_reason is not None
        return Completion(self.token_ids, self.logprobs, self.finish_reason)


def draw_seed(params: SamplingParams | None) -> int:
    """The seed of `params`, or a random one, in [0, 2^63)."""
    chosen = None if params is None else params.seed
    return secrets.randbits(63) if chosen is None else chosen & (2**63 - 1)
