"""An engine's events as OpenAI's objects: what is new of each answer, chunks of a stream, and whole responses."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Callable

from paddle_qwen1m import __version__
from paddle_qwen1m.outputs import Answer, Collector, Logprob
from paddle_qwen1m.server.calls import Call
from paddle_qwen1m.server.engine_thread import EngineThread, Ticket
from paddle_qwen1m.server.texts import Texts
from paddle_qwen1m.server.tools import Arguments, CallBegun, CallReader, Content
from paddle_qwen1m.server.tools import Part as ToolPart

FINGERPRINT = f"paddle-qwen1m-{__version__}"
LEAST_LOGPROB = -9999.0
"""For minus infinity, which JSON has not."""

Entry = dict[int, Logprob]


@dataclass
class Change:
    """What is new of choice `index`."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Entry] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class _Sent:
    characters: int = 0
    tokens: int = 0
    finished: bool = False


class Running:
    """A call that the engine works on; `changes` follows it, `close` drops what is left.

    on_close: called once, then.
    """

    def __init__(self, call: Call, engine: EngineThread, texts: Texts, on_close: Callable[[Running], None]) -> None:
        self.call = call
        self.started = time.perf_counter()
        self._engine, self._notify, self._on_close = engine, asyncio.Event(), on_close
        self._is_closed = False
        params = call.requests[0].params
        assert params is not None
        tokens = texts.tokens(skip_special_tokens=params.skip_special_tokens)
        self.collectors = [Collector(one, prompt.text, tokens) for one, prompt in zip(call.requests, call.prompts)]
        self._sent = [[_Sent() for _ in one.answers] for one in self.collectors]
        self._tickets: list[Ticket] = [engine.submit(one, self._notify) for one in call.requests]

    @property
    def prompt_tokens(self) -> int:
        return self.call.num_tokens

    @property
    def cached_tokens(self) -> int:
        return sum(one.num_reused or 0 for one in self.collectors)

    @property
    def completion_tokens(self) -> int:
        return 0 if self.call.score_only else sum(one.num_generated for one in self.collectors)

    @property
    def processed_tokens(self) -> int:
        return sum(one.num_prefilled for one in self.collectors)

    async def changes(self) -> AsyncIterator[list[Change]]:
        """What is new, each time something is; an empty list where the prefill got on. EngineGone when it failed."""
        while not all(one.finished for one in self.collectors):
            await self._notify.wait()
            self._notify.clear()
            changes: list[Change] = []
            is_news = False
            for number, (ticket, one) in enumerate(zip(self._tickets, self.collectors)):
                events = ticket.take()
                for event in events:
                    ended = one.take(event)
                    if ended is not None:
                        self._engine.stop(ticket, *ended)
                if events:
                    is_news = True
                    changes += self._changes(number)
            if is_news:
                yield changes

    async def taken(self) -> None:
        """Returns when the engine has accepted every request; raises Refused where it does not."""
        while not all(ticket.is_taken for ticket in self._tickets):
            await self._notify.wait()
            self._notify.clear()
            for ticket in self._tickets:
                ticket.check()
        self._notify.set()  # events may have come meanwhile

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for ticket in self._tickets:
            self._engine.abort(ticket)
        self._on_close(self)

    def _changes(self, number: int) -> list[Change]:
        collector, changes = self.collectors[number], []
        for answer, sent in zip(collector.answers, self._sent[number]):
            text = "" if answer.text is None else answer.text.text
            is_new = len(text) > sent.characters or len(answer.token_ids) > sent.tokens
            ends = answer.finish_reason is not None and not sent.finished
            if not (is_new or ends):
                continue
            changes.append(
                Change(
                    number * len(collector.answers) + answer.index,
                    text[sent.characters :],
                    answer.token_ids[sent.tokens :],
                    answer.logprobs[sent.tokens :],
                    answer.finish_reason,
                    answer.stop_reason,
                )
            )
            sent.characters, sent.tokens, sent.finished = len(text), len(answer.token_ids), ends or sent.finished
        return changes

    def answers(self) -> list[Answer]:
        """Of all prompts, in the order of choices."""
        return [answer for one in self.collectors for answer in one.answers]

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "audio_tokens": 0,
                "cached_tokens": self.cached_tokens,
                "image_tokens": 0,
                "text_tokens": self.prompt_tokens,
            },
            "completion_tokens_details": {
                "accepted_prediction_tokens": 0,
                "audio_tokens": 0,
                "reasoning_tokens": 0,
                "rejected_prediction_tokens": 0,
                "text_tokens": self.completion_tokens,
            },
        }

    def progress(self) -> dict[str, Any]:
        return {
            "total": self.prompt_tokens,
            "cache": self.cached_tokens,
            "processed": self.processed_tokens,
            "time_ms": round(1000 * (time.perf_counter() - self.started)),
        }


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class Renderer:
    """What chat and completions have in common. as_ids: tokens are written "token_id:N"."""

    object = chunk_object = ""

    def __init__(self, running: Running, model: str, *, as_ids: bool, with_ids: bool) -> None:
        self.running, self._model = running, model
        self._as_ids, self._with_ids = as_ids, with_ids
        self._created = int(time.time())
        params = running.call.requests[0].params
        assert params is not None
        self.params = params

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.running.call.id, "object": kind, "created": self._created, "model": self._model}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self.head(self.chunk_object), "choices": choices, "system_fingerprint": FINGERPRINT, **more}

    def usage_chunk(self) -> dict[str, Any]:
        return self.chunk([], usage=self.running.usage())

    def progress_chunk(self) -> dict[str, Any]:
        return self.chunk([], prompt_progress=self.running.progress())

    def choices(self, change: Change) -> list[dict[str, Any]]:
        """Choices of the chunks that tell a change."""
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed."""
        raise NotImplementedError

    def ids(self, index: int, token_ids: list[int]) -> dict[str, Any]:
        return {"token_ids": token_ids} if self._with_ids else {}

    def prompt_logprobs(self, number: int) -> dict[str, Any]:
        """vLLM's field of a choice, by token id."""
        collector = self.running.collectors[number]
        if self.params.prompt_logprobs is None:
            return {}
        entries = collector.prompt_logprobs
        return {
            "prompt_logprobs": [
                None if one is None else {str(token): {"logprob": finite(told.logprob), "rank": told.rank,
                                                       "decoded_token": told.decoded_token}
                                          for token, told in one.items()}
                for one in entries
            ]
        }  # fmt: skip

    def token(self, token: int, told: Logprob) -> str:
        return f"token_id:{token}" if self._as_ids else told.decoded_token or ""


class ChatRenderer(Renderer):
    """Of /v1/chat/completions."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, running: Running, model: str, *, as_ids: bool, with_ids: bool) -> None:
        super().__init__(running, model, as_ids=as_ids, with_ids=with_ids)
        count = len(running.answers())
        self._has_role = [False] * count
        self._calls = [CallReader() if running.call.calls_tools else None for _ in range(count)]

    def choices(self, change: Change) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = []
        index, ends = change.index, change.finish_reason is not None
        if not self._has_role[index]:
            self._has_role[index] = True
            choices.append(self._choice(index, {"role": "assistant", "content": "", "refusal": None}))
        deltas = [_delta(part) for part in self._parts(index, change.text, ends)]
        logprobs = self._logprobs(change.token_ids, change.logprobs) if self.params.logprobs is not None else None
        tells_tokens = bool(change.token_ids) and (logprobs is not None or self._with_ids)
        if not deltas and (ends or tells_tokens):
            deltas = [{}]
        for place, delta in enumerate(deltas):
            choice = self._choice(index, delta, logprobs if place == 0 else None)
            if place == 0:
                choice.update(self.ids(index, change.token_ids))
            choices.append(choice)
        if ends:
            last = choices[-1]
            if last["delta"] and "role" not in last["delta"]:
                last = self._choice(index, {})
                choices.append(last)
            last["finish_reason"] = self._finish_reason(index, change.finish_reason)
            last["stop_reason"] = change.stop_reason
        return choices

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(self.running.answers()):
            text = "" if answer.text is None else answer.text.text
            content, calls = "", []
            for part in self._parts(index, text, True):
                if isinstance(part, Content):
                    content += part.text
                elif isinstance(part, CallBegun):
                    calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
                else:
                    calls[part.index]["function"]["arguments"] += part.text  # type: ignore[index, operator]
            message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
            message.update(refusal=None, annotations=[])
            if calls:
                message["tool_calls"] = calls
            asked = self.params.logprobs is not None
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(answer.token_ids, answer.logprobs) if asked else None,
                    "finish_reason": self._finish_reason(index, answer.finish_reason),
                    "stop_reason": answer.stop_reason,
                    **self.ids(index, answer.token_ids),
                }
            )
        body = {**self.head(self.object), "choices": choices, "usage": self.running.usage()}
        body.update(service_tier="default", system_fingerprint=FINGERPRINT, **self.prompt_logprobs(0))
        if self._with_ids:
            body["prompt_token_ids"] = self.running.call.prompts[0].ids.tolist()
        return body

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return super().chunk(choices, service_tier="default", **more)

    def _choice(self, index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _parts(self, index: int, text: str, ends: bool) -> list[ToolPart]:
        reader = self._calls[index]
        if reader is None:
            return [Content(text)] if text else []
        return reader.feed(text) + (reader.end() if ends else [])

    def _finish_reason(self, index: int, reason: str | None) -> str | None:
        reader = self._calls[index]
        called = reader is not None and reader.num_calls > 0 and not self.running.call.named_tool
        return "tool_calls" if called and reason == "stop" else reason

    def _logprobs(self, token_ids: list[int], entries: list[Entry]) -> dict[str, Any]:
        most = self.params.num_logprobs or 0
        content = []
        for token, entry in zip(token_ids, entries):
            likeliest = sorted(entry.items(), key=lambda one: one[1].rank or 0)[:most]
            content.append({**self._told(token, entry[token]), "top_logprobs": [self._told(*one) for one in likeliest]})
        return {"content": content, "refusal": None}

    def _told(self, token: int, told: Logprob) -> dict[str, Any]:
        text = self.token(token, told)
        return {"token": text, "logprob": finite(told.logprob), "bytes": list(text.encode())}


class CompletionRenderer(Renderer):
    """Of /v1/completions."""

    object = chunk_object = "text_completion"

    def __init__(self, running: Running, model: str, *, as_ids: bool, with_ids: bool, texts: Texts) -> None:
        super().__init__(running, model, as_ids=as_ids, with_ids=with_ids)
        self._texts = texts
        self._offsets = [0] * len(running.answers())
        self._echoed = [not running.call.echo] * len(running.answers())

    def choices(self, change: Change) -> list[dict[str, Any]]:
        text, logprobs, ids = self._of_prompt(change.index)
        if not self.running.call.score_only:
            text += change.text
            ids += change.token_ids
            if logprobs is not None:
                logprobs = _appended(logprobs, self._logprobs(change.index, change.token_ids, change.logprobs))
        if not (text or change.finish_reason or (logprobs and logprobs["tokens"]) or self._with_ids):
            return []
        return [self._choice(change.index, text, logprobs, ids, change.finish_reason, change.stop_reason)]

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(self.running.answers()):
            text = "" if answer.text is None else answer.text.text
            change = Change(index, text, answer.token_ids, answer.logprobs, answer.finish_reason, answer.stop_reason)
            choice = self.choices(change)[0]
            choice.update(self.prompt_logprobs(index // self.params.n) if not self.running.call.echo else {})
            choices.append(choice)
        head = self.head(self.object)
        return {**head, "choices": choices, "system_fingerprint": FINGERPRINT, "usage": self.running.usage()}

    def _choice(
        self, index: int, text: str, logprobs: Any, ids: list[int], finish_reason: str | None, stop_reason: Any
    ) -> dict[str, Any]:
        if self.running.call.score_only and finish_reason is not None:
            finish_reason = "length"
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            **self.ids(index, ids),
        }

    def _of_prompt(self, index: int) -> tuple[str, dict[str, Any] | None, list[int]]:
        """The prompt, where it is to be told and was not yet."""
        logprobs: dict[str, Any] | None = None
        if self.params.logprobs is not None:
            logprobs = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        if self._echoed[index]:
            return "", logprobs, []
        self._echoed[index] = True
        number = index // self.params.n
        prompt, ids = self.running.call.prompts[number], self.running.call.prompts[number].ids.tolist()
        if logprobs is not None:
            logprobs = self._logprobs(index, ids, self.running.collectors[number].prompt_logprobs)
        text = prompt.text if prompt.text is not None else self._texts.decode(ids)
        return text, logprobs, ids

    def _logprobs(self, index: int, token_ids: list[int], entries: list[Entry | None] | list[Entry]) -> dict[str, Any]:
        most = self.params.num_logprobs or 0
        told: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, entry in zip(token_ids, entries):
            if entry is None:
                text = f"token_id:{token}" if self._as_ids else self._texts.decode([token])
                logprob, top = None, None
            else:
                text, logprob = self.token(token, entry[token]), finite(entry[token].logprob)
                likeliest = sorted(entry.items(), key=lambda one: one[1].rank or 0)[:most]
                top = {self.token(*one): finite(one[1].logprob) for one in likeliest}
                top.setdefault(text, logprob)
            told["text_offset"].append(self._offsets[index])
            told["token_logprobs"].append(logprob)
            told["tokens"].append(text)
            told["top_logprobs"].append(top)
            self._offsets[index] += len(text)
        return told


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _appended(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {name: first[name] + second[name] for name in first}


def _delta(part: ToolPart) -> dict[str, Any]:
    if isinstance(part, Content):
        return {"content": part.text}
    if isinstance(part, CallBegun):
        called = {"name": part.name, "arguments": ""}
        return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": called}]}
    assert isinstance(part, Arguments)
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
