"""What a caller gets of a request, with the names that users of vLLM know, built from the engine's events."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from paddle_qwen1m.engine import (
    Event,
    Finished,
    Prefilled,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenChosen,
    TokenLogprobs,
)
from paddle_qwen1m.text import Decode, Detokenizer


@dataclass
class Logprob:
    """The log-softmax of a token's raw logit; rank 1 is the likeliest token's. decoded_token: the token as text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """The `index`-th answer to a prompt.

    token_ids: with the token that ended it, which is not part of the text. logprobs: for each token, it and the
    likeliest ones by token id, where they were asked for; cumulative_logprob: their sum. finish_reason: "stop",
    "length" or "abort", None while it goes on. stop_reason: the stop text, or the one of stop_token_ids, that ended it.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """When what happened to a request, in seconds of the clock time.perf_counter."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


@dataclass
class RequestOutput:
    """A prompt and its answers. num_cached_tokens: how many tokens of the prompt an earlier one had left in the cache.

    prompt: its text, None where ids were given. prompt_logprobs: for each of its tokens but the first, whose entry is
    None, where they were asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int | None = None


@dataclass(frozen=True)
class Tokens:
    """How tokens become text: `answer` that of an answer, `single` that of one token, special ones too."""

    answer: Decode
    single: Decode


@dataclass
class Answer:
    """An answer that is being written; fields as in CompletionOutput."""

    index: int
    text: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Collector:
    """Builds the output of `request` from its events. `prompt`: its text. `tokens`: None where none becomes text."""

    def __init__(self, request: Request, prompt: str | None, tokens: Tokens | None) -> None:
        self.request = request
        self.metrics = RequestMetrics(arrival_time=time.perf_counter())
        self.finished = False
        self.num_prefilled = 0
        self.num_reused: int | None = None
        self.num_restored = 0
        self._prompt, self._tokens = prompt, tokens
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self.answers = [Answer(index, self._detokenizer()) for index in range(self.params.n)]

    @property
    def params(self) -> SamplingParams:
        assert self.request.params is not None
        return self.request.params

    @property
    def num_generated(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(answer.token_ids) for answer in self.answers)

    def take(self, event: Event) -> tuple[int, str] | None:
        """Adds what the event tells. An answer that a text has ended now: its index and the text, for Engine.stop."""
        if isinstance(event, Prefilled):
            self.num_prefilled, self.num_reused = event.done_tokens, event.reused_tokens
            self.num_restored = event.restored_tokens
            self.metrics.first_scheduled_time = event.started
        elif isinstance(event, PromptLogprobs):
            self.prompt_logprobs += [self._entry(one) for one in event.tokens]
        elif isinstance(event, TokenChosen):
            return self._token(event)
        elif isinstance(event, Finished):
            for completion in event.completions:
                answer = self.answers[completion.index]
                if answer.finish_reason is None:
                    self._end(answer, completion.finish_reason, completion.stop_reason)
            self.finished, self.metrics.finished_time = True, time.perf_counter()
        return None

    def output(self) -> RequestOutput:
        """What is there by now."""
        return RequestOutput(
            request_id=self.request.id,
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt.tolist(),
            prompt_logprobs=None if self.params.prompt_logprobs is None else self.prompt_logprobs,
            outputs=[self._completion(answer) for answer in self.answers],
            finished=self.finished,
            metrics=self.metrics,
            num_cached_tokens=self.num_reused,
        )

    def _token(self, event: TokenChosen) -> tuple[int, str] | None:
        answer = self.answers[event.index]
        if answer.finish_reason is not None:  # it was under way when a text ended the answer
            return None
        now = time.perf_counter()
        self.metrics.last_token_time = now
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
        answer.token_ids.append(event.token)
        if event.logprobs is not None:
            answer.logprobs.append(self._entry(event.logprobs))
            answer.cumulative_logprob += event.logprobs.logprob
        is_end = event.finish_reason == "stop"
        if answer.text is not None and (not is_end or self.params.include_stop_str_in_output):
            answer.text.put(event.token)
            if answer.text.stopped_by is not None:
                self._end(answer, "stop", answer.text.stopped_by)
                return (event.index, answer.text.stopped_by) if event.finish_reason is None else None
        if event.finish_reason is not None:
            own_end = event.token in self.request.eos_token_ids
            self._end(answer, event.finish_reason, event.token if is_end and not own_end else None)
        return None

    def _end(self, answer: Answer, reason: str, stop_reason: int | str | None) -> None:
        answer.finish_reason, answer.stop_reason = reason, stop_reason
        if answer.text is not None:
            answer.text.end()

    def _completion(self, answer: Answer) -> CompletionOutput:
        asked = self.params.logprobs is not None
        return CompletionOutput(
            index=answer.index,
            text="" if answer.text is None else answer.text.text,
            token_ids=list(answer.token_ids),
            cumulative_logprob=answer.cumulative_logprob if asked else None,
            logprobs=list(answer.logprobs) if asked else None,
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )

    def _detokenizer(self) -> Detokenizer | None:
        if self._tokens is None:
            return None
        params = self.params
        return Detokenizer(
            self._tokens.answer,
            stop=tuple(params.stop),
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _entry(self, told: TokenLogprobs) -> dict[int, Logprob]:
        """The token itself, then the likeliest ones."""
        likeliest = zip(told.top_ids, told.top_logprobs)
        entry = {told.token: Logprob(told.logprob, told.rank)}
        for rank, (token, logprob) in enumerate(likeliest, 1):
            entry.setdefault(token, Logprob(logprob, rank))
        if self._tokens is not None:
            for token, one in entry.items():
                one.decoded_token = self._tokens.single([token])
        return entry
