"""The application: routes parse, check, hand to the engine and render; made of the engine that it is given."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Callable, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from paddle_qwen1m import __version__
from paddle_qwen1m.engine import SamplingParams
from paddle_qwen1m.server.answers import DONE, ChatRenderer, CompletionRenderer, Renderer, Running, event
from paddle_qwen1m.server.calls import Call, Reader
from paddle_qwen1m.server.engine_thread import READY, EngineGone, EngineThread, Refused
from paddle_qwen1m.server.errors import ApiError, bad, internal
from paddle_qwen1m.server.metrics import CONTENT_TYPE, Metrics
from paddle_qwen1m.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Model,
    TokenizeRequest,
    check_template,
    read_body,
)
from paddle_qwen1m.server.security import Guard
from paddle_qwen1m.server.settings import WAITING_CONTEXTS, Settings
from paddle_qwen1m.server.streams import COMMENT, EventStream, disconnected
from paddle_qwen1m.server.texts import Texts

logger = logging.getLogger(__name__)

PREPARE_SECONDS = 0.5
"""How long a stream waits for its request to be read before its first byte; errors have a status of HTTP till then."""
SLOWEST_BODY = 1024
"""Bytes a second that a body must have on average, once it took client_seconds."""
SMALL_BODY = 1 << 14
"""Bytes that are read in the event loop."""
TEXT_THREADS, GRAMMAR_THREADS = 4, 2
LIST_PART = 1 << 14
"""Values that are made JSON at once."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Body = TypeVar("Body", bound=Model)
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServedModel:
    """What is served besides the engine. names: that requests may give, the first one is told. root: where it came
    from. defaults: fields of SamplingParams that hold where a request says nothing.
    """

    names: Sequence[str]
    root: str
    texts: Texts
    defaults: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: Sequence[int] = ()


def create_app(engine: EngineThread, model: ServedModel, settings: Settings) -> FastAPI:
    """The application; its lifespan starts the engine's thread and closes the engine."""
    return _Server(engine, model, settings).app


class _Server:
    def __init__(self, engine: EngineThread, model: ServedModel, settings: Settings) -> None:
        self._engine, self._model, self._settings = engine, model, settings
        self._reader = Reader(model.texts, model.defaults, model.eos_token_ids, settings)
        self._metrics = Metrics(engine, model.names[0])
        self._created = int(time.time())
        self._unread_bytes = self._preparing = self._prompt_logprobs_bytes = 0
        self._page = resources.files("paddle_qwen1m.server").joinpath("page/index.html").read_bytes()
        self.app = FastAPI(lifespan=self._lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        for method, path, handler in (
            ("GET", "/", self._show_page),
            ("GET", "/health", self._health),
            ("GET", "/version", self._version),
            ("GET", "/metrics", self._show_metrics),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name:path}", self._one_model),
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._complete),
            ("POST", "/tokenize", self._tokenize),
            ("POST", "/detokenize", self._detokenize),
            ("GET", "/tokenizer_info", self._tokenizer_info),
            ("POST", "/reset_prefix_cache", self._reset_prefix_cache),
        ):
            self.app.router.add_route(path, handler, methods=[method])
        self.app.add_exception_handler(ApiError, _answer_error)
        self.app.add_exception_handler(HTTPException, _answer_error)
        self.app.add_middleware(_Failures, whole=settings.log_requests)
        self.app.add_middleware(Guard, settings=settings)
        if settings.allowed_origins:
            self.app.add_middleware(
                CORSMiddleware,
                allow_origins=list(settings.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            )

    @asynccontextmanager
    async def _lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        self._engine.start()
        with ThreadPoolExecutor(TEXT_THREADS, "text") as self._text_threads:
            self._grammar_threads = ThreadPoolExecutor(GRAMMAR_THREADS, "grammar")
            try:
                yield
            finally:
                self._grammar_threads.shutdown(wait=False)
                await self._engine.close()

    # --- routes ---

    async def _show_page(self, _request: Request) -> Response:
        headers = {
            "Content-Security-Policy": PAGE_POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return Response(self._page, headers=headers, media_type="text/html; charset=utf-8")

    async def _health(self, _request: Request) -> Response:
        return Response(status_code=200 if self._engine.state == READY else 503)

    async def _version(self, _request: Request) -> Response:
        return _json({"version": __version__})

    async def _show_metrics(self, _request: Request) -> Response:
        return Response(await self._in_thread(self._metrics.text), media_type=CONTENT_TYPE)

    async def _models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [self._card(name) for name in self._model.names]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_model(name)
        return _json(self._card(name))

    async def _chat(self, request: Request) -> Any:
        body = await self._read(request, ChatRequest)
        return await self._answer(request, body, self._reader.chat, ChatRenderer)

    async def _complete(self, request: Request) -> Any:
        body = await self._read(request, CompletionRequest)
        return await self._answer(request, body, self._reader.completion, self._completion_renderer)

    async def _tokenize(self, request: Request) -> Response:
        body = await self._read(request, TokenizeRequest)
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad("give prompt or messages")

        def tokenize() -> bytes:
            if body.prompt is not None:
                text, special = body.prompt, body.add_special_tokens is not False
            else:
                assert body.messages is not None
                tools = self._reader.tool_schemas(body.tools)
                text, special = self._reader.conversation(body.messages, body, tools), bool(body.add_special_tokens)
            ids = self._model.texts.encode(text, special=special).tolist()
            strings = self._model.texts.token_strings(ids) if body.return_token_strs else None
            length = self._engine.limits.max_model_len
            counts = _encoded({"count": len(ids), "max_model_len": length})
            texts = b"null" if strings is None else _encoded_list(strings)
            return counts[:-1] + b',"tokens":' + _encoded_list(ids) + b',"token_strs":' + texts + b"}"

        with self._prepared(request.state.num_bytes):
            return Response(await self._in_thread(tokenize), media_type="application/json")

    async def _detokenize(self, request: Request) -> Response:
        body = await self._read(request, DetokenizeRequest)
        self._check_model(body.model)
        vocab = self._limits().vocab_size
        if any(not 0 <= token < vocab for token in body.tokens):
            raise bad(f"tokens must be 0 to {vocab - 1}", "tokens")
        with self._prepared(request.state.num_bytes):
            return _json({"prompt": await self._in_thread(lambda: self._model.texts.decode(body.tokens))})

    async def _tokenizer_info(self, _request: Request) -> Response:
        return _json(self._model.texts.config)

    async def _reset_prefix_cache(self, _request: Request) -> Response:
        self._limits()
        self._engine.reset_prefix_cache()
        return Response(status_code=200)

    # --- answering ---

    async def _answer(
        self,
        request: Request,
        body: Any,
        read: Callable[[Any, str, Any], Call],
        renderer: Callable[..., Renderer],
    ) -> Any:
        self._check_model(body.model)
        check_template(body)
        if body.stream_options is not None and not body.stream:
            raise bad("stream_options needs stream: true", "stream_options")
        prefix = "chatcmpl" if renderer is ChatRenderer else "cmpl"
        call_id = f"{prefix}-{uuid.uuid4().hex}"
        num_bytes = request.state.num_bytes

        async def start() -> Renderer:
            with self._prepared(num_bytes):
                call = await self._in_thread(lambda: read(body, call_id, self._limits()))
                params = call.requests[0].params
                if params is not None and params.structured_outputs is not None:
                    await self._compile(params)
            running = self._start(call)
            try:
                await running.taken()
            except BaseException:
                running.close()
                raise
            as_ids, with_ids = bool(body.return_tokens_as_token_ids), bool(body.return_token_ids)
            return renderer(running, self._model.names[0], as_ids=as_ids, with_ids=with_ids)

        starting = asyncio.ensure_future(start())
        if body.stream:
            done, _ = await asyncio.wait([starting], timeout=PREPARE_SECONDS)
            if done:
                starting.result()
            return self._stream(starting, body)
        return await self._whole(request, starting)

    def _start(self, call: Call) -> Running:
        """Hands a call to the engine, if there is room."""
        limits, engine = self._limits(), self._engine
        if engine.num_waiting + len(call.requests) > self._settings.max_waiting:
            raise _busy(f"{engine.num_waiting} requests wait, at most {self._settings.max_waiting} may (--max-waiting)")
        most = self._settings.waiting_tokens(limits.max_model_len)
        if engine.waiting_tokens + call.num_tokens > most:
            raise _busy(f"the prompts that wait have more than {most} tokens (--max-waiting-tokens)")
        if self._prompt_logprobs_bytes + call.prompt_logprobs_bytes > self._settings.max_prompt_logprobs_bytes:
            raise _busy("other calls' prompts have log-probabilities that take --max-prompt-logprobs-bytes")
        self._prompt_logprobs_bytes += call.prompt_logprobs_bytes
        return Running(call, engine, self._model.texts, self._closed)

    def _closed(self, running: Running) -> None:
        self._prompt_logprobs_bytes -= running.call.prompt_logprobs_bytes

    def _completion_renderer(self, running: Running, model: str, **options: bool) -> CompletionRenderer:
        return CompletionRenderer(running, model, texts=self._model.texts, **options)

    @contextmanager
    def _followed(self, running: Running) -> Iterator[Any]:
        """Whatever happens, the call's work and what it holds are gone afterwards."""
        followed = self._metrics.follow(running)
        try:
            yield followed
        finally:
            running.close()
            followed.ended()
            self._log(running)

    async def _whole(self, request: Request, starting: asyncio.Future[Renderer]) -> Response:
        """The response that is not streamed; nothing is left of it when the client goes away."""

        async def answer() -> bytes:
            renderer = await starting
            with self._followed(renderer.running) as followed:
                async for changes in renderer.running.changes():
                    followed.saw(changes)
                return await self._in_thread(lambda: _encoded(renderer.whole()))

        answering = asyncio.ensure_future(answer())
        watching = asyncio.ensure_future(disconnected(request.receive))
        try:
            await asyncio.wait([answering, watching], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return Response(status_code=499)  # nobody reads it
            return Response(await self._told(answering), media_type="application/json")
        finally:
            starting.add_done_callback(_drop)
            for task in (starting, answering, watching):
                task.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)

    async def _told(self, answer: asyncio.Future[bytes]) -> bytes:
        try:
            return await answer
        except (EngineGone, Refused) as error:
            raise _as_api_error(error) from error

    def _stream(self, starting: asyncio.Future[Renderer], body: Any) -> EventStream:
        """The streamed response, whose renderer may still be made."""
        settings = self._settings
        options = body.stream_options
        with_usage = settings.enable_force_include_usage or bool(options is not None and options.include_usage)

        async def events() -> AsyncIterator[bytes]:
            try:
                renderer = await starting
                with self._followed(renderer.running) as followed:
                    if body.return_progress:
                        yield event(renderer.progress_chunk())
                    async for changes in renderer.running.changes():
                        followed.saw(changes)
                        pieces = [
                            event(renderer.chunk([choice], **({"usage": None} if with_usage else {})))
                            for change in changes
                            for choice in renderer.choices(change)
                        ]
                        if body.return_progress and not changes:
                            pieces.append(event(renderer.progress_chunk()))
                        if pieces:
                            yield b"".join(pieces)
                    if with_usage:
                        yield event(renderer.usage_chunk())
            except Exception as error:
                yield event(_as_api_error(error, whole=settings.log_requests).body)
            finally:
                starting.add_done_callback(_drop)
                starting.cancel()
            yield DONE

        def ping() -> bytes:
            renderer = starting.result() if starting.done() and not starting.cancelled() else None
            if renderer is not None and body.return_progress:
                return event(renderer.progress_chunk())
            return event(renderer.chunk([])) if renderer is not None and settings.ping == "chunk" else COMMENT

        return EventStream(
            events(),
            ping,
            ping_seconds=settings.ping_seconds,
            client_seconds=settings.client_seconds,
            max_unread=settings.max_unread_bytes,
        )

    # --- what routes share ---

    def _limits(self) -> Any:
        try:
            return self._engine.limits
        except EngineGone as error:
            raise _as_api_error(error) from None

    def _card(self, name: str) -> dict[str, Any]:
        limits = self._engine.limits if self._engine.state == READY else None
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "paddle-qwen1m",
            "root": self._model.root,
            "parent": None,
            "max_model_len": None if limits is None else limits.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._model.names:
            raise ApiError(404, f"the model is not served here: it is {self._model.names[0]!r}", "model")

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        """The request in a body, which is bounded while it comes."""
        raw = await self._read_bytes(request)
        depth = self._settings.max_json_depth
        request.state.num_bytes = len(raw)
        if len(raw) <= SMALL_BODY:
            return read_body(kind, raw, depth)
        with self._prepared(len(raw)):
            return await self._in_thread(lambda: read_body(kind, raw, depth))

    async def _read_bytes(self, request: Request) -> bytes:
        limits, settings = self._limits(), self._settings
        most = settings.body_bytes(limits.max_model_len)
        too_large = ApiError(413, f"the body may have {most} bytes (--max-body-bytes)", headers={"Connection": "close"})
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        loop, size, pieces = asyncio.get_running_loop(), 0, []
        started, more = loop.time(), True
        try:
            while more:
                late = started + settings.client_seconds + size / SLOWEST_BODY - loop.time()
                left = min(settings.client_seconds, late)
                try:
                    message = await asyncio.wait_for(request.receive(), max(0.0, left))
                except asyncio.TimeoutError:
                    raise ApiError(408, "the body came too slowly", headers={"Connection": "close"}) from None
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client went away")
                piece, more = message.get("body", b""), message.get("more_body", False)
                size += len(piece)
                self._unread_bytes += len(piece)
                pieces.append(piece)
                if size > most:
                    raise too_large
                if self._unread_bytes > WAITING_CONTEXTS * most:
                    raise _busy("the bodies that are being read take too much memory (--max-body-bytes)")
        finally:
            self._unread_bytes -= size
        return b"".join(pieces)

    @contextmanager
    def _prepared(self, num_bytes: int) -> Iterator[None]:
        """A call whose texts are being read counts as one that waits."""
        if self._preparing + self._engine.num_waiting >= self._settings.max_waiting:
            raise _busy(f"at most {self._settings.max_waiting} requests may wait (--max-waiting)")
        self._preparing += 1
        self._unread_bytes += num_bytes
        try:
            yield
        finally:
            self._preparing -= 1
            self._unread_bytes -= num_bytes

    async def _in_thread(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, function)

    async def _compile(self, params: SamplingParams) -> None:
        """Has the engine compile, within a time, what answers must look like; requests and events go on meanwhile."""
        loop, seconds = asyncio.get_running_loop(), self._settings.grammar_seconds
        compiling = loop.run_in_executor(self._grammar_threads, self._engine.prepare, params)
        try:
            await asyncio.wait_for(asyncio.shield(compiling), seconds)
        except asyncio.TimeoutError:
            compiling.add_done_callback(_drop)
            raise bad(f"the schema or grammar takes more than {seconds:g} s to compile (--grammar-seconds)") from None
        except ValueError as error:
            raise bad(str(error), "structured_outputs") from None

    def _log(self, running: Running) -> None:
        """A line about a call, without what was asked and answered unless the operator wants that."""
        reasons = ",".join(str(answer.finish_reason or "abort") for answer in running.answers()[:8])
        seconds = time.perf_counter() - running.started
        logger.info(
            "%s: %d tokens in, %d of them cached, %d out, %s, %.2f s",
            running.call.id, running.prompt_tokens, running.cached_tokens, running.completion_tokens, reasons, seconds,
        )  # fmt: skip
        if self._settings.log_requests:
            prompts = [one.text for one in running.call.prompts]
            texts = [one.text.text for one in running.answers() if one.text is not None]
            logger.info("%s: prompts %r, answers %r", running.call.id, prompts, texts)


class _Failures:
    """Turns what nobody expected into a 500 that tells nothing but an id."""

    def __init__(self, app: ASGIApp, whole: bool) -> None:
        self._app, self._whole = app, whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Any) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http":
                raise
            told = _as_api_error(error, whole=self._whole)
            if not begun:
                await told.response()(scope, receive, send)


async def _answer_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = "there is nothing at this path" if error.status_code == 404 else str(error.detail)
        error = ApiError(error.status_code, message, headers=error.headers)
    assert isinstance(error, ApiError)
    return error.response()


def _as_api_error(error: Exception, *, whole: bool = False) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineGone):
        return ApiError(503, str(error), headers={"Retry-After": "5"})
    if isinstance(error, Refused):
        return bad(str(error))
    return internal(error, whole=whole)


def _busy(message: str) -> ApiError:
    return ApiError(429, message, headers={"Retry-After": "2"})


def _drop(made: asyncio.Future[Any]) -> None:
    """Nobody waits for this any more: its error is none, its call is dropped."""
    if not made.cancelled() and made.exception() is None and isinstance(made.result(), Renderer):
        made.result().running.close()


def _encoded(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def _encoded_list(values: Sequence[Any]) -> bytes:
    """Of any number of values; other threads can go on after each part."""
    parts = (_encoded(values[at : at + LIST_PART])[1:-1] for at in range(0, len(values), LIST_PART))
    return b"[" + b",".join(parts) + b"]"


def _json(body: Any) -> Response:
    return Response(_encoded(body), media_type="application/json")
