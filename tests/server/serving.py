"""A server on a free port, in this process: with the fake engine behind it, or with the needle checkpoint's."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import httpx
import uvicorn
from fake_engine import FakeEngine

from paddle_qwen1m.engine.interface import Serving
from paddle_qwen1m.llm import start_serving
from paddle_qwen1m.server.app import ServedModel, create_app
from paddle_qwen1m.server.connections import protocol
from paddle_qwen1m.server.engine_thread import EngineThread
from paddle_qwen1m.server.settings import Settings
from paddle_qwen1m.server.texts import Texts

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "needle"
EOS = (747, 745)


class Server:
    """One that runs; `url` is where."""

    def __init__(self, engine: Any, url: str, thread: EngineThread, uvicorn_server: uvicorn.Server) -> None:
        self.engine, self.url, self.thread, self.uvicorn = engine, url, thread, uvicorn_server
        self.client = httpx.Client(base_url=url, timeout=30)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    @property
    def num_connections(self) -> int:
        """Open ones, those of `client` among them."""
        return len(self.uvicorn.server_state.connections)

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def stream(self, path: str, body: Any) -> list[tuple[float, str]]:
        """The lines of a stream that are not empty, with the seconds at which they came."""
        started = time.monotonic()
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            return [(time.monotonic() - started, line) for line in response.iter_lines() if line]

    def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream; its last one is [DONE]."""
        lines = [line[6:] for _, line in self.stream(path, body) if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def wait(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.01)


@contextmanager
def serve(
    texts: Texts,
    engine: FakeEngine | None = None,
    *,
    settings: Settings | None = None,
    load: Callable[[], Serving] | None = None,
    loaded: bool = True,
    **model: Any,
) -> Iterator[Server]:
    """Runs a server while the context lasts."""
    engine, settings = engine or FakeEngine(), settings or Settings()
    thread = EngineThread(load or (lambda: engine))
    served = ServedModel(**{"names": ["needle"], "root": "needle", "texts": texts, "eos_token_ids": EOS, **model})
    config = uvicorn.Config(
        create_app(thread, served, settings),
        host="127.0.0.1", port=0, http=protocol(settings.header_seconds), ws="none", log_level="critical",
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    running = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    running.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    one = Server(engine, f"http://127.0.0.1:{port}", thread, server)
    try:
        if loaded:
            one.wait(lambda: one.client.get("/health").status_code == 200)
        yield one
    finally:
        engine.hold.clear()
        one.client.close()
        server.should_exit = True
        running.join(20)
        assert not running.is_alive()


@contextmanager
def serve_needle(
    texts: Texts, *, settings: Settings | None = None, defaults: dict[str, Any] | None = None, **options: Any
) -> Iterator[Server]:
    """Runs the needle checkpoint; `engine` of the server is the model's. options: LLM's."""
    loaded: list[Any] = []

    def load() -> Serving:
        loaded.append(start_serving(str(CHECKPOINT), options))
        return loaded[0]

    with serve(texts, load=load, settings=settings, defaults=defaults or {}) as server:
        server.engine = loaded[0]
        yield server
