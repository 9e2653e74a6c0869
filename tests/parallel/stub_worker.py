"""Ranks that serve an engine without a model, which answers by arithmetic and fails where it is told to.

The k-th token of an answer is (sum of the prompt + k) mod 1000; a prompt that begins with one of `ORDERS` does more, or
is told how many objects, at most 999, the garbage collector leaves alone.
"""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import paddle

from paddle_qwen1m.engine import (
    Completion,
    Event,
    Finished,
    Metrics,
    Prefilled,
    Request,
    SamplingParams,
    TokenChosen,
    TokenLogprobs,
)
from paddle_qwen1m.engine.admission import Limits, NotEnoughMemory
from paddle_qwen1m.parallel.group import Group, start
from paddle_qwen1m.parallel.job import launched_rank, launched_ranks
from paddle_qwen1m.parallel.worker import serve

LIMITS = Limits(max_model_len=2_000_000, max_position_embeddings=2_000_000, vocab_size=10_000, cache_tokens=2_000_000)
ORDERS = {
    name: 5000 + number for number, name in enumerate(("refuse", "raise", "raise in 1", "exit", "slow", "frozen"))
}
ERRORS = {"ValueError": ValueError, "NotEnoughMemory": NotEnoughMemory, "KeyError": KeyError}


class StubEngine:
    """Every step gives each request a token, whose rank is its place in the answer."""

    def __init__(self, group: Group) -> None:
        self.limits, self._generated = LIMITS, 0
        self._group = group
        self._requests: dict[str, Request] = {}
        self._answers: dict[str, list[int]] = {}
        self._stopped: dict[str, Any] = {}

    @property
    def is_idle(self) -> bool:
        return not self._requests

    @property
    def metrics(self) -> Metrics:
        return Metrics(running=len(self._requests), generated_tokens=self._generated)

    def prepare(self, params: SamplingParams) -> None:
        """Takes the seconds that a regular expression names; 0: there is no such."""
        assert params.structured_outputs is not None and params.structured_outputs.regex is not None
        if params.structured_outputs.regex == "0":
            raise ValueError("structured_outputs: no such grammar")
        time.sleep(float(params.structured_outputs.regex))

    def add(self, request: Request) -> None:
        if request.prompt[0] == ORDERS["refuse"]:
            raise ValueError("structured_outputs: no such grammar")
        self._requests[request.id], self._answers[request.id] = request, []

    def abort(self, request_id: str) -> bool:
        self._stopped.pop(request_id, None)
        return self._requests.pop(request_id, None) is not None

    def stop(self, request_id: str, index: int, reason: int | str) -> bool:
        self._stopped[request_id] = reason
        return request_id in self._requests

    def reset_prefix_cache(self) -> bool:
        return self.is_idle

    def step(self) -> list[Event]:
        events: list[Event] = []
        for request in list(self._requests.values()):
            order = int(request.prompt[0])
            self._obey(self._group.share(order))
            events += self._events(request)
        return events

    def follow(self) -> None:
        self._obey(self._group.share(None))

    def _obey(self, order: int) -> None:
        rank = self._group.rank
        if (order, rank) in ((ORDERS["raise"], 0), (ORDERS["raise in 1"], 1)):
            raise LookupError("the dog ate it")
        if order == ORDERS["exit"] and rank == 1:
            os._exit(3)
        if order == ORDERS["slow"]:
            time.sleep(0.05)
        self._group.all_reduce(paddle.ones([4]))

    def _events(self, request: Request) -> list[Event]:
        answer, length = self._answers[request.id], len(request.prompt)
        token = (int(request.prompt.sum()) + len(answer)) % 1000
        if request.prompt[0] == ORDERS["frozen"]:
            token = min(gc.get_freeze_count(), 999)
        logprobs = TokenLogprobs(token, -0.1 * token, len(answer) + 1, (token, 7), (-0.1 * token, -float("inf")))
        events: list[Event] = [] if answer else [Prefilled(request.id, length, length, 0, 1.5)]
        answer.append(token)
        self._generated += 1
        events.append(TokenChosen(request.id, token, -0.1 * token, 0, logprobs))
        reason = self._stopped.get(request.id)
        if reason is not None or len(answer) == request.params.max_tokens:
            ended = "length" if reason is None else "stop"
            completion = Completion(answer, [-0.1 * one for one in answer], ended, 0, reason, [logprobs])
            events.append(Finished(request.id, (completion,)))
            self.abort(request.id)
        return events


def load(model: str, options: dict[str, Any]) -> StubEngine:
    """model: how the loading goes, as "rank what" where it goes wrong."""
    rank, _, what = model.partition(" ")
    if rank == str(launched_rank()):
        print(f"this is rank {rank}, about to fail", flush=True)
        if what == "exit":
            os._exit(3)
        raise ERRORS[what]("there is no such thing")
    return StubEngine(start(launched_ranks()))


def main() -> None:
    serve(load)
