"""The mixed requests of tests/mixed_requests.py over HTTP, from many clients at once, some of which go away."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import httpx
from mixed_requests import AT_ONCE, Case, Outcome
from mixed_requests import check as check_outcome
from serving import Server

from paddle_qwen1m import LLM, SamplingParams
from paddle_qwen1m.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

LEAVES_WITHIN = 1.0
"""Seconds in which a client goes away that will."""


def body_of(case: Case) -> dict[str, Any]:
    """What a client sends for a case."""
    keywords, others = case.mistake or ({}, {})
    body: dict[str, Any] = {**case.kind.keywords, **keywords}
    body.pop("skip_reading_prefix_cache", None)  # is not for clients
    structured = body.get("structured_outputs")
    if structured is not None:
        body["structured_outputs"] = {name: value for name, value in asdict(structured).items() if value is not None}
    body["prompt"] = others.get("prompt", case.prompt).tolist()
    return {**body, "return_token_ids": True, "return_tokens_as_token_ids": True}


async def ask(client: httpx.AsyncClient, case: Case, chance: random.Random) -> tuple[int, list[dict[str, Any]]] | None:
    """Status, and the choices as an answer that is not streamed has them; None where the client went away."""
    stream, pause = chance.random() < 0.5, chance.random() * LEAVES_WITHIN
    stream &= "prompt_logprobs" not in case.kind.keywords  # a stream does not have them

    async def answer() -> tuple[int, list[dict[str, Any]]]:
        async with client.stream("POST", "/v1/completions", json={**body_of(case), "stream": stream}) as response:
            raw = await response.aread()
        if response.status_code != 200:
            return response.status_code, []
        return _gathered(raw.decode()) if stream else (200, json.loads(raw)["choices"])

    if case.abort_after is None:
        return await answer()
    try:
        return await asyncio.wait_for(answer(), pause)
    except asyncio.TimeoutError:
        return None


def _gathered(stream: str) -> tuple[int, list[dict[str, Any]]]:
    """Status, and the choices of a stream, put together. A busy server may have begun one before it refuses: the status
    is the error's then.
    """
    lines = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    choices: dict[int, dict[str, Any]] = defaultdict(
        lambda: {"text": "", "token_ids": [], "logprobs": {"tokens": [], "token_logprobs": [], "top_logprobs": []}}
    )
    for line in lines[:-1]:
        event = json.loads(line)
        if "error" in event:
            return event["error"]["code"], []
        for piece in event["choices"]:
            one = choices[piece["index"]]
            one["text"] += piece["text"]
            one["token_ids"] += piece["token_ids"]
            for name, values in one["logprobs"].items():
                values += (piece["logprobs"] or {}).get(name, [])
            one.update({name: piece[name] for name in ("index", "finish_reason", "stop_reason")})
    return 200, [choices[index] for index in sorted(choices)]


def _output(case: Case, choices: list[dict[str, Any]]) -> RequestOutput:
    params = SamplingParams(**case.kind.keywords)
    answers = [
        CompletionOutput(
            choice["index"], choice["text"], choice["token_ids"],
            logprobs=None if params.logprobs is None else _entries(choice["logprobs"]),
            finish_reason=choice["finish_reason"], stop_reason=choice["stop_reason"],
        )
        for choice in choices
    ]  # fmt: skip
    told = choices[0].get("prompt_logprobs")
    prompt_logprobs = None if told is None else [_likelihoods(entry) for entry in told]
    return RequestOutput(case.name, None, case.prompt.tolist(), prompt_logprobs, answers, True, RequestMetrics(0.0))


def _likelihoods(told: dict[str, Any] | None) -> dict[int, Logprob] | None:
    return None if told is None else {int(token): Logprob(one["logprob"], one["rank"]) for token, one in told.items()}


def _entries(told: dict[str, Any]) -> list[dict[int, Logprob]]:
    entries = []
    for top in told["top_logprobs"]:
        ordered = sorted(top.items(), key=lambda one: -one[1])
        entries.append({int(name[9:]): Logprob(value, rank) for rank, (name, value) in enumerate(ordered, 1)})
    return entries


async def _ask_all(server: Server, cases: Sequence[Case], seed: int) -> Outcome:
    outcome, room = Outcome(), asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)

    async def one(client: httpx.AsyncClient, case: Case, chance: random.Random) -> None:
        async with room:
            got = await ask(client, case, chance)
        if got is None:
            outcome.aborted.add(case.name)
            return
        status, choices = got
        assert status in (200, 400), f"{case.name}: {status}"
        if status == 200:
            outcome.outputs[case.name] = _output(case, choices)
        else:
            outcome.refused[case.name] = ValueError("400")

    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        await asyncio.gather(*(one(client, case, random.Random(f"{seed} {case.name}")) for case in cases))
    return outcome


def check(server: Server, cases: Sequence[Case], alone: LLM, seed: int = 0) -> None:
    """Has the server answer the cases; each gets what its options promise, greedy ones what they get alone, and
    afterwards there is no request, page or connection left.
    """
    server.wait(lambda: server.engine.metrics.pages_held == 0)
    connections = server.num_connections
    outcome = asyncio.run(_ask_all(server, cases, seed))
    check_outcome(cases, outcome)
    asked = [case for case in cases if case.kind.is_greedy and case.name in outcome.outputs and case.mistake is None]
    assert asked
    outputs = alone.generate(
        [case.prompt.tolist() for case in asked],
        [SamplingParams(**case.kind.keywords) for case in asked],
        use_tqdm=False,
    )
    for case, expected in zip(asked, outputs):
        got = [one.token_ids for one in outcome.outputs[case.name].outputs]
        assert got == [one.token_ids for one in expected.outputs], case.name
    server.wait(lambda: server.thread.num_running == server.thread.num_waiting == 0)
    server.wait(lambda: server.engine.is_idle and server.engine.metrics.pages_held == 0)
    server.wait(lambda: server.num_connections <= connections)
