"""From what a client sent to requests of the engine: prompts, sampling params, bounds; refusals give the reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from paddle_qwen1m.engine import Request, SamplingParams, StructuredOutputsParams
from paddle_qwen1m.engine.admission import Limits
from paddle_qwen1m.engine.params import MAX_LISTED, MAX_LOGPROBS, MAX_STOP_BYTES, MAX_STOPS
from paddle_qwen1m.server.errors import bad
from paddle_qwen1m.server.protocol import ChatRequest, CompletionRequest, Message, NamedTool, Sampling, Tool
from paddle_qwen1m.server.settings import Settings
from paddle_qwen1m.server.texts import Texts
from paddle_qwen1m.server.tools import call_grammar

DEFAULT_COMPLETION_TOKENS = 16
LOGPROB_BYTES = 256
"""About what one entry of a prompt's log-probabilities takes."""
PLAIN_FIELDS = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "seed",
    "n", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "bad_words", "logit_bias",
    "allowed_token_ids", "skip_special_tokens",
)  # fmt: skip
"""Of SamplingParams, under the same name in a request."""
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


@dataclass(frozen=True)
class Prompt:
    """text: None where token ids were sent."""

    ids: np.ndarray
    text: str | None


@dataclass
class Call:
    """What one HTTP request asks of the engine: a request a prompt, each with n answers.

    calls_tools: whether answers are read for calls. echo: whether answers begin with their prompt; score_only: and have
    nothing else. prompt_logprobs_bytes: what the prompts' log-probabilities will take.
    """

    id: str
    requests: list[Request]
    prompts: list[Prompt]
    calls_tools: bool = False
    named_tool: bool = False
    echo: bool = False
    score_only: bool = False
    prompt_logprobs_bytes: int = field(default=0)

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


class Reader:
    """Reads requests for one model. Its methods may take seconds: they are not for the event loop."""

    def __init__(
        self,
        texts: Texts,
        defaults: Mapping[str, Any],
        eos_token_ids: Sequence[int],
        settings: Settings,
    ) -> None:
        self._texts, self._defaults, self._settings = texts, dict(defaults), settings
        self._eos_token_ids = tuple(eos_token_ids)
        for name, most in (
            ("max_logprobs", MAX_LOGPROBS),
            ("max_stop_strings", MAX_STOPS),
            ("max_stop_bytes", MAX_STOP_BYTES),
            ("max_listed", MAX_LISTED),
        ):
            if getattr(settings, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(settings, name)}")

    def chat(self, request: ChatRequest, call_id: str, limits: Limits) -> Call:
        """ApiError 400 for what cannot be served."""
        tools, choice = self._tools(request)
        text = self.conversation(request.messages, request, tools if choice != "none" else [])
        prompt = self._cut(Prompt(self._texts.encode(text, special=False), text), request, limits)
        structured = self._structured(request)
        forced = isinstance(choice, NamedTool) or choice == "required"
        if forced:
            if structured is not None:
                raise bad("a tool_choice that forces a call excludes response_format and structured_outputs")
            chosen = [one for one in tools if not isinstance(choice, NamedTool) or one["name"] == choice.function.name]
            if not chosen:
                raise bad("tool_choice names a function that is not among the tools", "tool_choice")
            several = not isinstance(choice, NamedTool) and request.parallel_tool_calls is not False
            structured = StructuredOutputsParams(grammar=call_grammar(chosen, several=several))
        if request.top_logprobs is not None and not request.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        params = self._params(request, structured, logprobs, request.prompt_logprobs)
        call = self._call(request, call_id, [prompt], params, asked, self._defaults.get("max_tokens"), limits)
        call.calls_tools = bool(tools) and choice != "none"
        call.named_tool = isinstance(choice, NamedTool)
        return call

    def completion(self, request: CompletionRequest, call_id: str, limits: Limits) -> Call:
        """ApiError 400 for what cannot be served."""
        if request.suffix:
            raise bad("suffix is not there: the model writes on from its prompt alone", "suffix")
        prompts = [self._cut(one, request, limits) for one in self._prompts(request.prompt)]
        score_only = request.max_tokens == 0
        if score_only and not request.echo:
            raise bad("max_tokens must be at least 1, or 0 with echo", "max_tokens")
        echoed = request.logprobs if request.echo else None
        prompt_logprobs = request.prompt_logprobs if echoed is None else echoed
        params = self._params(request, self._structured(request), request.logprobs, prompt_logprobs)
        asked = 1 if score_only else request.max_tokens
        call = self._call(request, call_id, prompts, params, asked, DEFAULT_COMPLETION_TOKENS, limits)
        call.echo, call.score_only = bool(request.echo), score_only
        return call

    def conversation(self, messages: Sequence[Message], request: Any, tools: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of messages, by the chat template."""
        if request.continue_final_message and request.add_generation_prompt:
            raise bad("continue_final_message needs add_generation_prompt: false: they exclude each other")
        keywords = dict(request.chat_template_kwargs or {})
        for name in ("chat_template", "tokenize", "messages", "context_data"):
            if name in keywords:
                raise bad(f"chat_template_kwargs cannot set {name}", "chat_template_kwargs")
        if tools:
            keywords["tools"] = [{"type": "function", "function": dict(tool)} for tool in tools]
        if getattr(request, "documents", None):
            keywords["documents"] = request.documents
        keywords["add_generation_prompt"] = request.add_generation_prompt
        return self._texts.chat([_plain(one) for one in messages], request.continue_final_message, **keywords)

    def tool_schemas(self, tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
        if tools is not None and len(tools) > self._settings.max_tools:
            raise bad(f"tools must be at most {self._settings.max_tools} (--max-tools), got {len(tools)}", "tools")
        return [tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools or ()]

    def _tools(self, request: ChatRequest) -> tuple[list[dict[str, Any]], Any]:
        if request.tools is not None and not request.tools:
            raise bad("tools must not be empty: leave it out", "tools")
        tools = self.tool_schemas(request.tools)
        choice = request.tool_choice or ("auto" if tools else "none")
        if choice != "none" and not tools:
            raise bad("tool_choice needs tools", "tool_choice")
        return tools, choice

    def _prompts(self, given: Any) -> list[Prompt]:
        """A text, token ids, or a list of either."""
        if isinstance(given, str):
            return [Prompt(self._texts.encode(given), given)]
        if not isinstance(given, list) or not given:
            raise bad("prompt must be a text, a list of token ids, or a list of texts or of such lists", "prompt")
        if isinstance(given[0], int):
            return [Prompt(_ids(given), None)]
        self._check_choices(len(given), 1)
        return [
            Prompt(self._texts.encode(one), one) if isinstance(one, str) else Prompt(_ids(one), None) for one in given
        ]

    def _cut(self, prompt: Prompt, request: Sampling, limits: Limits) -> Prompt:
        """The prompt's last tokens, as many as truncate_prompt_tokens says; -1: as many as fit."""
        keep = request.truncate_prompt_tokens
        if keep is None:
            return prompt
        if keep != -1 and keep < 1:
            raise bad("truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens")
        if keep == -1:
            keep = max(1, limits.max_model_len - (request.max_tokens or DEFAULT_COMPLETION_TOKENS))
        return prompt if len(prompt.ids) <= keep else Prompt(prompt.ids[-keep:], None)

    def _check_choices(self, prompts: int, n: int) -> None:
        most = self._settings.max_choices
        if prompts * n > most:
            raise bad(f"n x prompts must be at most {most} (--max-choices), got {n} x {prompts}", "n")

    def _structured(self, request: Sampling) -> StructuredOutputsParams | None:
        """What an answer must look like, from whichever field says so."""
        ways: dict[str, Any] = {}
        if request.structured_outputs is not None:
            if request.structured_outputs.structural_tag is not None:
                raise bad("structured_outputs has json, regex, choice, grammar and json_object, not structural_tag")
            ways.update(request.structured_outputs.model_dump(by_alias=True, exclude_none=True))
        ways.update({way: value for name, way in GUIDED.items() if (value := getattr(request, name)) is not None})
        wanted = request.response_format
        if wanted is not None and wanted.type == "json_object":
            ways["json_object"] = True
        elif wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema_ is None:
                raise bad("response_format json_schema needs json_schema.schema", "response_format")
            ways["json"] = wanted.json_schema.schema_
        if not ways:
            return None
        try:
            params = StructuredOutputsParams(**ways)
        except ValueError as error:
            raise bad(str(error), "structured_outputs") from None
        size, most = _size(ways), self._settings.max_grammar_bytes
        if size > most:
            raise bad(f"a schema or grammar must be at most {most} bytes (--max-grammar-bytes), got {size}")
        return params

    def _params(
        self,
        request: Sampling,
        structured: StructuredOutputsParams | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """Request over generation_config.json over OpenAI's defaults; max_tokens is set for each prompt."""
        bounds = self._settings
        for name, value in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
            if value is not None and not -1 <= value <= bounds.max_logprobs:
                raise bad(f"{name} must be at most {bounds.max_logprobs} (--max-logprobs), got {value}", name)
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if len(stops) > bounds.max_stop_strings:
            raise bad(f"stop must be at most {bounds.max_stop_strings} texts (--max-stop-strings)", "stop")
        if any(len(text.encode()) > bounds.max_stop_bytes for text in stops):
            raise bad(f"a stop text must be at most {bounds.max_stop_bytes} bytes (--max-stop-bytes)", "stop")
        if not all(stops):
            raise bad("a stop text must not be empty", "stop")
        for name in ("logit_bias", "bad_words", "allowed_token_ids"):
            if len(getattr(request, name) or ()) > bounds.max_listed:
                raise bad(f"{name} must have at most {bounds.max_listed} entries (--max-listed)", name)
        if not all(token.isdecimal() for token in request.logit_bias or ()):
            raise bad("logit_bias must be by token ids", "logit_bias")
        if not all(request.bad_words or ()):
            raise bad("bad_words must not hold an empty text", "bad_words")
        if request.best_of not in (None, 1, request.n):
            raise bad("best_of is not there: ask for n answers", "best_of")
        given = {name: value for name in PLAIN_FIELDS if (value := getattr(request, name)) is not None}
        values = {**{name: value for name, value in self._defaults.items() if name != "max_tokens"}, **given}
        try:
            return SamplingParams(
                **{**values, "max_tokens": None},
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                structured_outputs=structured,
            )
        except ValueError as error:
            raise bad(str(error)) from None

    def _call(
        self,
        request: Sampling,
        call_id: str,
        prompts: list[Prompt],
        params: SamplingParams,
        asked: int | None,
        default: int | None,
        limits: Limits,
    ) -> Call:
        self._check_choices(len(prompts), params.n)
        if asked is not None and asked < 1:
            raise bad(f"max_tokens must be at least 1, got {asked}", "max_tokens")
        bad_words = self._texts.bad_words(params.bad_words) if params.bad_words else ()
        requests, prompt_logprobs_bytes = [], 0
        for number, prompt in enumerate(prompts):
            length = len(prompt.ids)
            room = limits.max_model_len - length
            # What nobody asked for gives way to the prompt.
            tokens = asked if asked is not None else max(1, min(room, default or room))
            self._check_length(length, tokens, limits)
            try:
                own = _with_max_tokens(params, tokens)
                one = Request(
                    f"{call_id}-{number}", prompt.ids, own,
                    eos_token_ids=self._eos_token_ids, bad_words=bad_words, cache_salt=request.cache_salt or "",
                )  # fmt: skip
                limits.check(one)
            except ValueError as error:
                raise bad(str(error)) from None
            if params.num_prompt_logprobs is not None:
                prompt_logprobs_bytes += length * (params.num_prompt_logprobs + 1) * LOGPROB_BYTES
            requests.append(one)
        most = self._settings.max_prompt_logprobs_bytes
        if prompt_logprobs_bytes > most:
            raise bad(
                f"the prompt's log-probabilities would take {prompt_logprobs_bytes:,} bytes, at most {most:,} may "
                "(--max-prompt-logprobs-bytes): ask for fewer of them, or a shorter prompt"
            )
        return Call(call_id, requests, prompts, prompt_logprobs_bytes=prompt_logprobs_bytes)

    def _check_length(self, prompt: int, answer: int, limits: Limits) -> None:
        length = limits.max_model_len
        if prompt < 1:
            raise bad("the prompt has no tokens", "prompt")
        if prompt + answer > length:
            raise bad(
                f"You passed {prompt} input tokens and requested {answer} output tokens. However, the model's context "
                f"length is only {length} tokens, resulting in a maximum input length of {max(0, length - answer)} "
                "tokens. Please reduce the length of the input prompt or the number of requested output tokens."
            )


def _with_max_tokens(params: SamplingParams, tokens: int) -> SamplingParams:
    return replace(params, max_tokens=tokens, min_tokens=min(params.min_tokens, tokens))


def _ids(value: Any) -> np.ndarray:
    """Token ids int64 [n]."""
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise bad("a prompt that is a list must hold whole numbers, or be a list of prompts", "prompt")
    try:
        return np.asarray(value, np.int64)
    except OverflowError:
        raise bad("a prompt's token ids must be numbers of the vocabulary", "prompt") from None


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates take it: content is text, arguments of calls are objects."""
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type not in ("text", "refusal"):
                raise bad("the model reads text alone: a message's parts must be of type text", "messages")
        content = "".join(part.text or part.refusal or "" for part in content)
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": content or ""}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_calls:
        plain["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.function.name,
             "arguments": _arguments(call.function.arguments)}}
            for call in message.tool_calls
        ]  # fmt: skip
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _arguments(given: str | dict[str, Any] | None) -> Any:
    """Templates write arguments as JSON: a client's text is read first, or it would be written twice."""
    if not isinstance(given, str):
        return given or {}
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


def _size(ways: Mapping[str, Any]) -> int:
    return sum(
        len((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode())
        for value in ways.values()
    )
