"""Data that the scheduler, the runner and the engine share, with its invariants."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Protocol, Union

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

    def up_to(self, length: int, stop_reason: str) -> Completion:
        """Its first tokens, which this text has ended."""
        likelihoods = None if self.token_logprobs is None else self.token_logprobs[:length]
        return Completion(self.token_ids[:length], self.logprobs[:length], "stop", self.index, stop_reason, likelihoods)


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
    before it began, at `started` of the clock time.perf_counter, and `restored_tokens` of these from the prefix store.
    """

    id: str
    done_tokens: int
    total_tokens: int
    reused_tokens: int
    started: float
    restored_tokens: int = 0


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


@dataclass
class Metrics:
    """Requests that wait and run; pages that requests hold, of all; and sums since the engine was made: tokens of
    prompts that were read, and of these looked for in the prefix cache, found there, and computed though they were
    there, cut otherwise or as of a dense prompt; tokens of answers; requests that finished and that were dropped; and
    of the prefix store what keeping.StoreCounters says.
    """

    waiting: int = 0
    running: int = 0
    pages_held: int = 0
    pages: int = 0
    prompt_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_reused_tokens: int = 0
    prefix_recut_tokens: int = 0
    prefix_dense_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    store_hits: int = 0
    store_tokens: int = 0
    store_read_bytes: int = 0
    store_read_seconds: float = 0.0
    store_written_bytes: int = 0
    store_write_seconds: float = 0.0


@dataclass(frozen=True)
class PrefillProgress:
    """How far the prefill of a request is, `seconds` after it began; see Prefilled."""

    id: str
    done_tokens: int
    total_tokens: int
    seconds: float
    reused_tokens: int = 0
    restored_tokens: int = 0


class Rules(Protocol):
    """What says which tokens an answer may go on with."""

    def words(self) -> np.ndarray | None:
        """Mask uint32 [ceil(vocab / 32)] of the tokens that may come next; None: all of them."""

    def accept(self, token: int) -> bool:
        """The answer goes on with this token: whether the mask may be another than before."""


@dataclass(eq=False)
class Answer:
    """The `index`-th answer to a request and what has become of it: all but its last token have their keys in `pages`.

    seed: of its draws. rules: which tokens it may have; None: all. chosen_at: when its last token came, by the
    scheduler's clock.
    """

    request: Request
    index: int
    seed: int
    rules: Rules | None = None
    pages: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    chosen_at: float = 0.0

    @property
    def params(self) -> SamplingParams:
        assert self.request.params is not None
        return self.request.params

    @property
    def num_cached(self) -> int:
        """Tokens of prompt and answer that have keys."""
        return len(self.request.prompt) + max(0, len(self.token_ids) - 1)

    @property
    def tokens_left(self) -> int:
        """How many more it may have."""
        assert self.params.max_tokens is not None
        return self.params.max_tokens - len(self.token_ids)

    def append(self, token: int, logprob: float, logprobs: TokenLogprobs | None = None) -> TokenChosen:
        """The next token has been chosen. Whether it ends the answer is in the event."""
        assert self.finish_reason is None
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if logprobs is not None:
            self.token_logprobs.append(logprobs)
        params, ends = self.params, self.request.eos_token_ids
        if token in ends and not params.ignore_eos:
            self.finish_reason = "stop"
        elif token in params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token
        elif self.tokens_left == 0:
            self.finish_reason = "length"
        return TokenChosen(self.request.id, token, logprob, self.index, logprobs, self.finish_reason)

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        asked = self.params.logprobs is not None
        return Completion(
            self.token_ids,
            self.logprobs,
            self.finish_reason,
            self.index,
            self.stop_reason,
            self.token_logprobs if asked else None,
        )


@dataclass(eq=False)
class Sequence:
    """A request whose prompt waits, is read, or has been: its first `num_cached` tokens have their keys in `pages`.

    made_under, m2, sparse: what else than tokens decides about the prompt's keys. num_reused: tokens that were in the
    cache when it `started`, num_restored of them from the store. chain: the names of the prompt's prefixes. ends: where
    its chunks end. spare: pages for answers behind the first. passed: how often one that came later has gone before it.
    results: those of it that are on their way.
    """

    request: Request
    seed: int
    made_under: str = ""
    m2: float = 1.0
    sparse: bool = False
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_reused: int = 0
    num_restored: int = 0
    started: float | None = None
    chain: PrefixChain | None = None
    ends: list[int] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    passed: int = 0
    results: int = 0
    is_gone: bool = False

    def __post_init__(self) -> None:
        if self.request.params is not None:
            self.answers = [Answer(self.request, n, (self.seed + n) % 2**63) for n in range(self.request.params.n)]

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt(self) -> np.ndarray:
        return self.request.prompt

    @property
    def max_length(self) -> int:
        return self.request.max_length

    @property
    def remaining(self) -> int:
        """Tokens of the prompt that are still to be computed."""
        return len(self.prompt) - self.num_cached

    @property
    def own_tokens(self) -> int:
        """Tokens of the prompt that were not in the cache when it started."""
        return len(self.prompt) - self.num_reused

    @property
    def is_prefilled(self) -> bool:
        return self.num_cached >= len(self.prompt)

    @property
    def is_finished(self) -> bool:
        return (
            self.is_prefilled and not self.results and all(answer.finish_reason is not None for answer in self.answers)
        )

    @property
    def reuse_limit(self) -> int | None:
        """How many tokens may be reused: those before the first one whose logits are asked for; None is any number."""
        params, positions = self.request.params, self.request.logit_positions
        if self.asks_likelihoods or (params is not None and params.skip_reading_prefix_cache):
            return 0
        return positions[0] if positions else None

    @property
    def asks_likelihoods(self) -> bool:
        """Whether the log-probabilities of the prompt's own tokens are asked for."""
        return self.request.params is not None and self.request.params.prompt_logprobs is not None

    def wanted(self, begin: int, end: int) -> list[int]:
        """Positions of the prompt in [begin, end) after which logits are wanted, ascending."""
        if self.asks_likelihoods:
            return list(range(begin, end))
        places = [place for place in self.request.logit_positions if begin <= place < end]
        last = len(self.prompt) - 1
        if self.answers and begin <= last < end and places[-1:] != [last]:
            places.append(last)
        return places

    def completions(self) -> tuple[Completion, ...]:
        return tuple(answer.completion() for answer in self.answers)


def draw_seed(params: SamplingParams | None) -> int:
    """The seed of `params`, or a random one, in [0, 2^63)."""
    chosen = None if params is None else params.seed
    return secrets.randbits(63) if chosen is None else chosen & (2**63 - 1)
