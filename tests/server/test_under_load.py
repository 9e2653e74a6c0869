"""The server under load that takes minutes: many clients, a very long prompt, thousands of malformed bodies."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import http_requests
import httpx
import pytest
import resident_memory
from bodies import EVIL, KINDS, bodies
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from mixed_requests import Maker
from serving import CHECKPOINT, Server, serve_needle

from paddle_qwen1m import LLM
from paddle_qwen1m.server.texts import Texts

pytestmark = pytest.mark.slow
MEGABYTE = 10**6
INTER_TOKEN_MS = 500
"""The bound that holds on a CPU."""


@pytest.mark.skipif(sys.version_info < (3, 10), reason="llguidance needs Python 3.10")
def test_two_hundred_mixed_requests_with_disconnects(texts: Texts) -> None:
    options: dict[str, Any] = {"max_model_len": 32768, "sparse_threshold": 4096}
    maker = Maker(lambda text: texts.encode(text).tolist(), 11)
    with (
        serve_needle(texts, kv_cache_memory_bytes=4 * 10**8, prefix_temperature_tolerance=0.0, **options) as server,
        LLM(str(CHECKPOINT), kv_cache_memory_bytes=3 * 10**8, enable_prefix_caching=False, **options) as alone,
    ):
        resident = []
        for number in range(2):
            http_requests.check(server, maker.cases(100, 1, 20_000), alone, number)
            gc.collect()
            resident.append(resident_memory.resident_bytes())
    assert resident[1] - resident[0] <= 100 * MEGABYTE


def gauge(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return float(next(line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"vllm:{name}{{")))


def test_a_prompt_of_60_000_tokens_is_never_silent_and_leaves_at_once(texts: Texts) -> None:
    with serve_needle(texts, max_model_len=65536, kv_cache_memory_bytes=1_200_000_000) as server:
        prompt = [(40 + place * place) % 700 for place in range(60_000)]
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": True, "return_progress": True}
        moments, progress, answered = [], [], []

        def another() -> None:
            started = time.monotonic()
            assert httpx.post(f"{server.url}/v1/completions", json={"prompt": [40], "max_tokens": 4}, timeout=60)
            answered.append((time.monotonic() - started, len(progress)))

        started = time.monotonic()
        with server.client.stream("POST", "/v1/completions", json=body, timeout=60) as response:
            thread = threading.Thread(target=another)
            for line in response.iter_lines():
                moments.append(time.monotonic() - started)
                if "prompt_progress" in line:
                    progress.append(json.loads(line[6:])["prompt_progress"]["processed"])
                    if len(progress) == 3:
                        thread.start()
                if progress and progress[-1] >= 30_000 and answered:
                    break
        assert moments[0] <= 1.0
        assert max(after - before for before, after in zip(moments, moments[1:])) <= 6.0
        assert progress == sorted(progress) and len(set(progress)) >= 5 and progress[0] == 0
        assert answered[0][0] < 30
        left = time.monotonic()
        while gauge(server, "num_requests_running") or gauge(server, "kv_cache_usage_perc"):
            assert time.monotonic() - left < 2 * INTER_TOKEN_MS / 1000, "its work goes on"
        server.wait(lambda: server.engine.is_idle and server.engine.metrics.pages_held == 0, 2 * INTER_TOKEN_MS / 1000)


@pytest.fixture(scope="module")
def needle(texts: Texts) -> Iterator[Server]:
    with serve_needle(texts, max_model_len=4096, kv_cache_memory_bytes=200_000_000) as server:
        yield server


JSON = {"content-type": "application/json"}


def answers_normally(server: Server) -> None:
    assert server.complete("The", max_tokens=2, temperature=0).status_code == 200
    server.wait(lambda: server.thread.num_running == server.thread.num_waiting == 0)
    server.wait(lambda: server.engine.is_idle and server.engine.metrics.pages_held == 0)


def drawn(number: int) -> list[tuple[str, bytes]]:
    """So many bodies, and where to send them."""
    made: list[tuple[str, bytes]] = []

    @hypothesis_settings(max_examples=number, deadline=None, database=None, phases=[Phase.generate],
                         suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(bodies())
    def keep(one: tuple[str, bytes]) -> None:
        made.append(one)

    keep()
    return made


def test_five_thousand_malformed_bodies(needle: Server) -> None:
    made = [(path, raw) for path in KINDS for raw in EVIL] + drawn(5000)
    assert len(made) >= 5000

    def ask(some: list[tuple[str, bytes]]) -> int:
        """Sends them; what the process holds then."""
        for path, raw in some:
            answer = needle.client.post(path, content=raw, headers=JSON, timeout=60)
            assert answer.status_code in (200, 400, 404), f"{raw!r}: {answer.text}"
        answers_normally(needle)
        gc.collect()
        return resident_memory.resident_bytes()

    before = ask(made)  # so many compiled grammars are kept, and room that only a few of the bodies need
    files = len(os.listdir("/proc/self/fd"))
    assert ask(made[1000:]) - before <= 50 * MEGABYTE
    assert len(os.listdir("/proc/self/fd")) <= files + 4


def test_a_body_of_a_hundred_megabytes_is_not_read(needle: Server) -> None:
    address = needle.url[7:].split(":")
    before = resident_memory.resident_bytes()
    with socket.create_connection(address) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"100000\r\n" + b"[" * (1 << 20) + b"\r\n"
        sent = 0
        try:
            for _ in range(100):
                connection.sendall(chunk)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 100
    assert resident_memory.resident_bytes() - before <= 20 * MEGABYTE
    answers_normally(needle)


def test_five_hundred_connections_that_send_a_byte_a_second_do_not_stop_it(needle: Server) -> None:
    address = needle.url[7:].split(":")
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow = [socket.create_connection(address) for _ in range(500)]
    try:
        for place, connection in enumerate(slow):
            connection.sendall(f"{head}Content-Length: 60000\r\n\r\n".encode() if place % 2 else b"GET /")
        for second in range(14):
            began = time.monotonic()
            for connection in slow:
                try:
                    connection.sendall(b"x")
                except (BrokenPipeError, ConnectionResetError):
                    assert second >= 9  # heads must be there within ten seconds
            started = time.monotonic()
            assert needle.complete("The", max_tokens=2).status_code == 200
            assert time.monotonic() - started < 3
            time.sleep(max(0.0, 1 - (time.monotonic() - began)))
    finally:
        for connection in slow:
            connection.close()
    answers_normally(needle)
