"""An engine without a model: tokens follow from the prompt, at a pace that a test chooses, with failures on demand."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from paddle_qwen1m.engine import (
    Completion,
    Event,
    Finished,
    Metrics,
    Prefilled,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenChosen,
    TokenLogprobs,
)
from paddle_qwen1m.engine.admission import Limits


@dataclass
class _Running:
    request: Request
    read: int = 0
    begun: float = field(default_factory=time.perf_counter)
    answers: list[list[int]] = field(default_factory=list)
    ended: dict[int, tuple[str, int | str | None]] = field(default_factory=dict)


class FakeEngine:
    """Answers with the tokens of `script`, then eos; without one with the prompt's last token, over and over.

    step_seconds: what a step takes. chunk: tokens of a prompt that one reads. hold: steps read and write nothing while
    it is set. failure: raised by the next step. compile_seconds: what a grammar takes.
    """

    def __init__(self, *, max_model_len: int = 4096, vocab_size: int = 1024, cache_tokens: int | None = None) -> None:
        self.limits = Limits(max_model_len, max_model_len, vocab_size, cache_tokens or 4 * max_model_len)
        self.script: list[int] = []
        self.step_seconds, self.chunk = 0.0, 1 << 30
        self.hold = threading.Event()
        self.failure: Exception | None = None
        self.running: dict[str, _Running] = {}
        self.added: list[Request] = []
        self.aborted: list[str] = []
        self.is_closed = False
        self.resets = 0
        self.compile_seconds = 0.0

    @property
    def is_idle(self) -> bool:
        return not self.running

    @property
    def metrics(self) -> Metrics:
        return Metrics(pages_held=len(self.running), pages=100)

    def prepare(self, params: SamplingParams) -> None:
        time.sleep(self.compile_seconds)

    def add(self, request: Request) -> None:
        self.limits.check(request)
        if request.id in self.running:
            raise ValueError("in use")
        assert request.params is not None
        self.added.append(request)
        self.running[request.id] = _Running(request, answers=[[] for _ in range(request.params.n)])

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return self.running.pop(request_id, None) is not None

    def stop(self, request_id: str, index: int, reason: int | str) -> bool:
        one = self.running.get(request_id)
        if one is not None:
            one.ended[index] = ("stop", reason)
        return one is not None

    def step(self) -> list[Event]:
        time.sleep(self.step_seconds)
        if self.failure is not None:
            raise self.failure
        if self.hold.is_set():
            time.sleep(0.01)
            return []
        events: list[Event] = []
        for one in list(self.running.values()):
            events += self._read(one) if one.read < len(one.request.prompt) else self._write(one)
            if len(one.ended) == len(one.answers):
                completions = tuple(
                    Completion(tokens, [], one.ended[index][0], index, one.ended[index][1])
                    for index, tokens in enumerate(one.answers)
                )
                events.append(Finished(one.request.id, completions))
                del self.running[one.request.id]
        return events

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def close(self) -> None:
        self.is_closed = True

    def _read(self, one: _Running) -> list[Event]:
        prompt, params = one.request.prompt, one.request.params
        assert params is not None
        begin, one.read = one.read, min(len(prompt), one.read + self.chunk)
        events: list[Event] = [Prefilled(one.request.id, one.read, len(prompt), 0, one.begun)]
        if params.num_prompt_logprobs is not None:
            told = tuple(_told(int(token), params.num_prompt_logprobs) for token in prompt[max(1, begin) : one.read])
            events.append(PromptLogprobs(one.request.id, max(1, begin), told))
        return events

    def _write(self, one: _Running) -> list[Event]:
        params, events = one.request.params, []
        assert params is not None
        for index, answer in enumerate(one.answers):
            if index in one.ended:
                continue
            place = len(answer)
            if self.script:
                token = self.script[place] if place < len(self.script) else one.request.eos_token_ids[0]
            else:
                token = int(one.request.prompt[-1])
            answer.append(token)
            reason = None
            if (token in one.request.eos_token_ids and not params.ignore_eos) or token in params.stop_token_ids:
                reason = "stop"
            elif len(answer) == params.max_tokens:
                reason = "length"
            if reason is not None:
                one.ended[index] = (reason, token if token in params.stop_token_ids else None)
            told = None if params.num_logprobs is None else _told(token, params.num_logprobs)
            events.append(TokenChosen(one.request.id, token, -0.5, index, told, reason))
        return events


def _told(token: int, top: int) -> TokenLogprobs:
    ids = tuple([token, *(other for other in range(32, 64) if other != token)][:top])
    return TokenLogprobs(token, -0.5, 1, ids, tuple(-0.5 - place for place in range(top)))
