"""Data that the scheduler, the runner and the engine share, with its invariants."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Union

import numpy as np

from paddle_qwen1m.cache import PrefixChain
from paddle_qwen1m.engine.params import SamplingParams


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was before anything but the model spoke: the log-softmax of its raw logits.

    rank: 1 for the likeliest. top_ids, top_logprobs: those of the likeliest tokens, as many as were asked for.
    """

    token: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The `index`-th answer to a prompt.

    logprobs: of its tokens, as they were drawn from: penalties included, before the temperature. token_logprobs: of
    each token, where params.logprobs asked for them. finish_reason: "stop" (a token that ends an answer, or whoever
    asked stopped it), "length" or "abort"; stop_reason: which of stop_token_ids, or the text; None at the model's own.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    index: int = 0
    stop_reason: int | str | None = None
    token_logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Request:
    """What a caller asks for under an id of its own choosing: `prompt` int64 [n], and how to go on from it.

    params None asks for no answer. eos_token_ids: the model's own ends of an answer. bad_words: the token sequences of
    params.bad_words. logit_positions, ascending: positions of the prompt after which logits are wanted. cache_salt:
    only requests with the same one share prefixes.
    """

    id: str
    prompt: np.ndarray
    params: SamplingParams | None = None
    logit_positions: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    cache_salt: str = ""

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
class PromptLogprobs:
    """Event: the log-probabilities of the prompt's tokens from position `begin` on, each after those before it."""

    id: str
    begin: int
    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class TokenChosen:
    """Event: the next token of a request's `index`-th answer. finish_reason: where it is the last one."""

    id: str
    token: int
    logprob: float
    index: int = 0
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Finished:
    """Event: a request is done and holds nothing any more; `completions` are its answers, if it asked for any."""

    id: str
    completions: tuple[Completion, ...]


Event = Union[Prefilled, Logits, PromptLogprobs, TokenChosen, Finished]


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
    draws. made_under, m2, sparse: what else than tokens decides about the prompt's keys. num_reused: tokens that were
    in the cache when it `started`. chain: the names of the prompt's prefixes, once it has looked for one.
    """

    request: Request
    seed: int
    temperature_length: int
    made_under: str = ""
    m2: float = 1.0
    sparse: bool = False
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_reused: int = 0
    started: float | None = None
    chain: PrefixChain | None = None
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

    def completions(self) -> tuple[Completion, ...]:
        if self.request.params is None:
            return ()
        assert self.finish_reason is not None
        return (Completion(self.token_ids, self.logprobs, self.finish_reason),)


def draw_seed(params: SamplingParams | None) -> int:
    """The seed of `params`, or a random one, in [0, 2^63)."""
    chosen = None if params is None else params.seed
    return secrets.randbits(63) if chosen is None else chosen & (2**63 - 1)
