"""What a client sees of a stream while the engine is busy, and what is left of its work when it goes away."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time

import httpx
import pytest
from fake_engine import FakeEngine
from serving import Server, serve

from paddle_qwen1m.server.settings import Settings

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def test_a_byte_comes_at_once_then_by_the_clock_and_the_role_with_the_first_token(texts) -> None:
    with serve(texts, settings=Settings(ping_seconds=0.2)) as server:
        server.engine.hold.set()
        threading.Timer(1.0, server.engine.hold.clear).start()
        lines = server.stream(CHAT, BODY)
    assert lines[0][1].startswith(":") and lines[0][0] < 0.5
    data = [place for place, (_, line) in enumerate(lines) if line.startswith("data:")]
    assert data[0] >= 4 and all(line.startswith(":") for _, line in lines[: data[0]])
    assert lines[data[0]][0] > 0.9
    assert json.loads(lines[data[0]][1][6:])["choices"][0]["delta"]["role"] == "assistant"
    moments = [moment for moment, _ in lines]
    assert max(after - before for before, after in zip(moments, moments[1:])) < 0.6
    assert Settings().ping_seconds == 5


def test_pings_can_be_chunks_that_clients_count(texts) -> None:
    with serve(texts, settings=Settings(ping_seconds=0.1, ping="chunk")) as server:
        server.engine.hold.set()
        threading.Timer(0.5, server.engine.hold.clear).start()
        events = server.events(CHAT, BODY)
    assert events[0]["choices"] == [] and events[0]["object"] == "chat.completion.chunk"


def test_progress_of_a_prefill_grows_from_nothing_to_all(server: Server, texts) -> None:
    server.engine.chunk, server.engine.step_seconds = 10, 0.02
    body = {"prompt": [40] * 45, "max_tokens": 2, "return_progress": True}
    told = [event["prompt_progress"] for event in server.events("/v1/completions", body) if "prompt_progress" in event]
    processed = [one["processed"] for one in told]
    assert processed[0] == 0 and processed[-1] == 45 and len(processed) > 3 and processed == sorted(set(processed))
    assert all((one["total"], one["cache"]) == (45, 0) and one["time_ms"] >= 0 for one in told)


def test_progress_chunks_take_the_place_of_pings(texts) -> None:
    with serve(texts, settings=Settings(ping_seconds=0.1)) as server:
        server.engine.hold.set()
        threading.Timer(0.5, server.engine.hold.clear).start()
        events = server.events(CHAT, {**BODY, "return_progress": True})
    times = [event["prompt_progress"]["time_ms"] for event in events if "prompt_progress" in event]
    assert len(times) > 3 and times == sorted(times)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_work(server: Server, stream: bool) -> None:
    server.engine.hold.set()
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=0.6) as client:
        client.post(CHAT, json={**BODY, "stream": stream})
    server.wait(lambda: len(server.engine.aborted) == 1 and server.engine.is_idle, 2)
    server.wait(
        lambda: 'vllm:num_requests_waiting{engine="0",model_name="needle"} 0.0' in server.client.get("/metrics").text, 2
    )


def test_a_failure_in_the_middle_of_a_stream_is_an_event(server: Server) -> None:
    server.engine.step_seconds = 0.05
    threading.Timer(0.3, lambda: setattr(server.engine, "failure", RuntimeError("secret prompt"))).start()
    lines = [line for _, line in server.stream(CHAT, {**BODY, "max_tokens": 1000})]
    assert lines[-1] == "data: [DONE]"
    error = json.loads(lines[-2][6:])["error"]
    assert error["code"] == 503 and "secret" not in error["message"]
    assert server.client.get("/health").status_code == 503
    assert server.chat().status_code == 503


def test_an_engine_that_fails_without_work_is_seen(server: Server) -> None:
    server.engine.failure = RuntimeError("rank 1 has ended")
    server.wait(lambda: server.client.get("/health").status_code == 503, 3)


def test_a_request_that_the_engine_trips_over_fails_alone(server: Server, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(server.engine, "add", lambda _request: 1 / 0)
        for stream in (False, True):
            assert server.post(CHAT, {**BODY, "stream": stream}).status_code == 500
    assert server.chat(max_tokens=1).status_code == 200


def test_errors_that_come_early_have_a_status_though_a_stream_was_asked_for(server: Server) -> None:
    answer = server.post(CHAT, {**BODY, "stream": True, "max_tokens": 5000})
    assert answer.status_code == 400 and "5000" in answer.json()["error"]["message"]


@pytest.mark.parametrize("megabytes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_second_client_is_answered_while_a_long_text_is_tokenised(texts, megabytes: int) -> None:
    document = "The access code for Anna is 12345. And more of it.\n" * (20_000 * megabytes)
    answers: list[httpx.Response] = []
    with serve(texts, FakeEngine(max_model_len=1 << 20)) as server:

        def tokenize() -> None:
            answers.append(httpx.post(f"{server.url}/tokenize", json={"prompt": document}, timeout=60))

        def slowest_of_others() -> float:
            """Seconds that a request took meanwhile."""
            thread = threading.Thread(target=tokenize)
            thread.start()
            seconds = []
            while thread.is_alive():
                started = time.monotonic()
                assert server.client.get("/health").status_code == 200
                seconds.append(time.monotonic() - started)
                time.sleep(0.01)
            assert len(seconds) > 10
            return max(seconds)

        # whatever else the machine does makes it longer
        assert any(slowest_of_others() < 0.5 for _ in range(3))
    told = answers[-1].json()
    assert told["count"] == len(told["tokens"]) > 100_000


def test_while_it_loads_it_says_so(texts) -> None:
    loading, engine = threading.Event(), FakeEngine()

    def load() -> FakeEngine:
        loading.wait(10)
        return engine

    with serve(texts, engine, load=load, loaded=False) as server:
        assert server.client.get("/health").status_code == 503
        answer = server.chat(max_tokens=1)
        assert answer.status_code == 503 and "loading" in answer.json()["error"]["message"]
        loading.set()
        server.wait(lambda: server.client.get("/health").status_code == 200)
        assert server.chat(max_tokens=1).status_code == 200
    assert engine.is_closed


def test_requests_drain_when_it_ends(texts) -> None:
    engine = FakeEngine()
    engine.step_seconds = 0.05
    answers = []
    with serve(texts, engine) as server:
        asking = threading.Thread(target=lambda: answers.append(server.chat(max_tokens=10)))
        asking.start()
        server.wait(lambda: bool(engine.added))
        server.uvicorn.should_exit = True
        asking.join(10)
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 10


def test_a_round_of_mixed_requests_with_disconnects_leaves_nothing(server: Server) -> None:
    server.engine.step_seconds, server.engine.chunk = 0.002, 64
    random.seed(13)
    plans = [
        (random.randrange(1, 300), random.randrange(1, 60), random.random() < 0.3, random.random() < 0.5)
        for _ in range(40)
    ]

    async def ask(client: httpx.AsyncClient, plan: tuple[int, int, bool, bool]) -> int | None:
        prompt, tokens, leaves, stream = plan
        body = {"prompt": [40] * prompt, "max_tokens": tokens, "stream": stream}
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if leaves:
                    await asyncio.sleep(random.random() * 0.05)
                    return None
                text = (await answer.aread()).decode()
        except httpx.ReadTimeout:
            return None
        assert answer.status_code == 200
        return text.count('"text":') if stream else json.loads(text)["usage"]["completion_tokens"]

    async def round_() -> list[int | None]:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:
            return await asyncio.gather(*(ask(client, plan) for plan in plans))

    outcomes = asyncio.run(round_())
    assert all(got == plan[1] for plan, got in zip(plans, outcomes) if not plan[2] and not plan[3])
    server.wait(lambda: server.engine.is_idle and server.thread.num_running == server.thread.num_waiting == 0)
    server.wait(lambda: len(server.uvicorn.server_state.connections) <= 1)  # the fixture's own
