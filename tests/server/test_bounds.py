"""Each bound of a request: its default, the option that a refusal names, and what is answered afterwards."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest
from bodies import EVIL, bodies
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from serving import Server, serve

from paddle_qwen1m.server.settings import SERVER_OPTIONS, Settings

TOOL = {"type": "function", "function": {"name": "f"}}
MESSAGES = [{"role": "user", "content": "x"}]
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)


def nested(depth: int) -> object:
    return [] if depth == 1 else [nested(depth - 1)]


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"x": nested(64)}, "--max-json-depth"),
        ({"n": 129}, "--max-choices"),
        ({"prompt": ["x"] * 65, "n": 2}, "--max-choices"),
        ({"logprobs": 21}, "--max-logprobs"),
        ({"prompt_logprobs": 21}, "--max-logprobs"),
        ({"stop": ["x"] * 17}, "--max-stop-strings"),
        ({"stop": "ž" * 513}, "--max-stop-bytes"),
        ({"logit_bias": {str(token): 1.0 for token in range(4097)}}, "--max-listed"),
        ({"bad_words": ["x"] * 4097}, "--max-listed"),
        ({"allowed_token_ids": [1] * 4097}, "--max-listed"),
        ({"structured_outputs": {"regex": "x" * 65537}}, "--max-grammar-bytes"),
    ],
)
def test_a_refusal_names_its_option(server: Server, fields: dict, option: str) -> None:
    answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, **fields})
    assert answer.status_code == 400 and option in answer.json()["error"]["message"]
    assert server.complete("x", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"x": nested(63)},
        {"n": 128, "temperature": 1.0},
        {"logprobs": 20},
        {"stop": ["x" * 1024] * 16},
        {"logit_bias": {str(token % 1024): 1.0 for token in range(1024)}},
        {"bad_words": ["xyz"] * 4096},
    ],
)
def test_what_is_at_a_bound_is_served(server: Server, fields: dict) -> None:
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, **fields}).status_code == 200


def test_tools_are_bounded(server: Server) -> None:
    answer = server.post("/v1/chat/completions", {"messages": MESSAGES, "tools": [TOOL] * 129})
    assert answer.status_code == 400 and "--max-tools" in answer.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: Server) -> None:
    most = 16 * server.engine.limits.max_model_len + (1 << 20)
    with socket.create_connection(server.url[7:].split(":")) as connection:
        head = HEAD.format(most + 1)
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    body = json.dumps({"prompt": "x", "max_tokens": 1, "pad": ""}).encode()
    full = body.replace(b'"pad": ""', b'"pad": "' + b"x" * (most - len(body)) + b'"')
    headers = {"content-type": "application/json"}
    assert server.client.post("/v1/completions", content=full, headers=headers).status_code == 200
    pieces = (full[place : place + 65536] for place in range(0, len(full), 65536))
    chunked = server.client.post("/v1/completions", content=[*pieces, b"x"], headers=headers)
    assert chunked.status_code == 413


def test_prompt_logprobs_are_bounded_by_their_memory(texts) -> None:
    with serve(texts, settings=Settings(max_prompt_logprobs_bytes=100 * 256 * 3)) as server:
        assert server.complete([40] * 100, max_tokens=1, echo=True, logprobs=2).status_code == 200
        answer = server.complete([40] * 101, max_tokens=1, echo=True, logprobs=2)
        assert answer.status_code == 400 and "--max-prompt-logprobs-bytes" in answer.json()["error"]["message"]
    assert Settings().max_prompt_logprobs_bytes == 1 << 30


@pytest.mark.parametrize(
    ("bound", "prompts"), [({"max_waiting": 2}, [[40]] * 3), ({"max_waiting_tokens": 8}, [[40] * 9])]
)
def test_more_than_may_wait_is_told_to_come_back(texts, bound: dict, prompts: list) -> None:
    with serve(texts, settings=Settings(**bound)) as server:
        answer = server.complete(prompts, max_tokens=1)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
        assert server.complete([40], max_tokens=1).status_code == 200
    assert Settings().max_waiting == 256 and Settings().waiting_tokens(1000) == 8000


def test_too_long_input_is_refused_with_the_numbers(server: Server) -> None:
    for fields in ({"prompt": [40] * 4000, "max_tokens": 97}, {"prompt": [40] * 4097}):
        message = server.post("/v1/completions", fields).json()["error"]["message"]
        assert f"You passed {len(fields['prompt'])} input tokens" in message
        assert "context length is only 4096 tokens" in message
    chat = server.chat("word " * 8000)
    assert chat.status_code == 400 and "4096" in chat.json()["error"]["message"]


def test_a_grammar_compiles_beside_the_rest_and_within_its_time(texts) -> None:
    engine = FakeEngine()
    engine.compile_seconds = 3.0
    with serve(texts, engine, settings=Settings(grammar_seconds=1.5)) as server:
        answers: list[httpx.Response] = []
        body = {"prompt": "x", "structured_outputs": {"regex": "x"}}
        asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", json=body)))
        asking.start()
        assert server.complete("x", max_tokens=2).status_code == 200
        assert asking.is_alive(), "it still compiles"
        asking.join()
    assert answers[0].status_code == 400 and "--grammar-seconds" in answers[0].json()["error"]["message"]
    assert Settings().grammar_seconds == 5


def test_a_head_that_does_not_come_is_not_waited_for(texts) -> None:
    with serve(texts, settings=Settings(header_seconds=0.3)) as server:
        with socket.create_connection(server.url[7:].split(":")) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
            started = time.monotonic()
            with pytest.raises(ConnectionResetError):
                if connection.recv(1) == b"":
                    raise ConnectionResetError
            assert 0.2 < time.monotonic() - started < 3
        server.engine.step_seconds = 0.2  # a request whose head has come may take its time
        assert server.complete("x", max_tokens=3).status_code == 200
    assert Settings().header_seconds == 10


def test_a_body_that_does_not_come_is_not_waited_for(texts) -> None:
    with serve(texts, settings=Settings(client_seconds=0.3)) as server:
        with socket.create_connection(server.url[7:].split(":")) as connection:
            connection.sendall(HEAD.format(100).encode() + b"{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        assert server.complete("x", max_tokens=1).status_code == 200


def test_many_slow_connections_do_not_stop_the_server(server: Server) -> None:
    address = server.url[7:].split(":")
    slow = [socket.create_connection(address) for _ in range(200)]
    for place, connection in enumerate(slow):
        head = b"POST /v1/completions HTTP/1.1\r\n" if place % 2 else b"G"
        connection.sendall(head)
        if place % 4 == 3:
            connection.sendall(b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n{")
    for connection in slow:
        connection.sendall(b"X")
    started = time.monotonic()
    assert server.complete("x", max_tokens=2).status_code == 200
    assert time.monotonic() - started < 2
    for connection in slow:
        connection.close()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (Settings(max_unread_bytes=1 << 16), "unread"),
        (Settings(client_seconds=0.5), "nothing"),
    ],
)
def test_a_client_that_does_not_read_is_left(texts, settings: Settings, why: str) -> None:
    engine = FakeEngine(max_model_len=1 << 20)
    with serve(texts, engine, settings=settings) as server:
        body = json.dumps(
            {
                "prompt": [40],
                "max_tokens": 1 << 19,
                "n": 4,
                "temperature": 1.0,
                "ignore_eos": True,
                "stream": True,
                "logprobs": 20,
            }
        )
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        head = HEAD.format(len(body))
        connection.sendall(head.encode() + body.encode())
        server.wait(lambda: bool(engine.added))
        server.wait(lambda: engine.is_idle and bool(engine.aborted), 30)
        server.wait(lambda: server.thread.num_running == 0)
        connection.close()
    assert (Settings().client_seconds, Settings().max_unread_bytes) == (60, 4 << 20)


@pytest.mark.parametrize("raw", EVIL, ids=lambda raw: raw[:40].decode("latin-1"))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_evil_bodies_are_the_clients_fault(shared: Server, path: str, raw: bytes) -> None:
    answer = shared.client.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def shared(texts):
    with serve(texts, FakeEngine()) as one:
        yield one
        assert one.complete("x", max_tokens=1).status_code == 200
        one.wait(lambda: one.engine.is_idle and one.thread.num_running == one.thread.num_waiting == 0)


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bodies())
def test_whatever_fields_hold_nothing_fails(shared: Server, one: tuple[str, bytes]) -> None:
    path, raw = one
    answer = shared.client.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text


def test_every_option_has_the_default_that_its_table_says() -> None:
    for option in SERVER_OPTIONS:
        value, said = getattr(Settings(), option.name), option.default.replace(",", "")
        assert value is None or said in (
            str(value),
            f"{value:g}" if isinstance(value, float) else "",
            {False: "off"}.get(value),
        )
