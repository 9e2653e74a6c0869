"""LLM: many prompts answered at once, offline, with the calls and names that users of vLLM know."""

from __future__ import annotations

import copy
import os
import random
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Callable, TypeVar, Union, cast

import numpy as np

from paddle_qwen1m.engine import Finished, Logits, Metrics, Request, SamplingParams
from paddle_qwen1m.engine.interface import Serving
from paddle_qwen1m.options import Face, describe_options, read_llm_options
from paddle_qwen1m.outputs import Collector, RequestOutput, Tokens
from paddle_qwen1m.paddlenlp import serving
from paddle_qwen1m.progress import Progress
from paddle_qwen1m.text import bad_word_tokens, decoder, until

Prompt = Union[str, Sequence[int], Mapping[str, Any]]
Message = Mapping[str, Any]
ManyChats = list[Sequence[Message]]
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")

Function = TypeVar("Function", bound=Callable[..., Any])


def _with_options(function: Function) -> Function:
    """Ends a docstring with the table of options; `python -OO` keeps no docstring to end."""
    if function.__doc__ is not None:
        function.__doc__ = function.__doc__.rstrip() + "\n\n" + describe_options(Face.LLM, " " * 8)
    return function


class LLM:
    """A model that answers prompts, on Paddle's device or on several GPUs.

    It holds memory, and with tensor_parallel_size > 1 processes, until `shutdown`, the end of a `with`, or its own.
    """

    @_with_options
    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        """Loads a checkpoint, by its directory or hub name, and makes the KV cache.

        Raises TypeError for an option that does not exist, ValueError for one that cannot be used, a max_model_len
        that the cache cannot hold among them, engine.NotEnoughMemory when weights and workspace do not fit,
        FileNotFoundError, HubError or weights.CheckpointError for the checkpoint. The options:

        """
        given = read_llm_options(options)
        name = os.fspath(model)
        checked = serving.check(name, given)
        other = given.pop("tokenizer", None)
        self._tokenizer = serving.load_tokenizer(name, given) if other is None else serving.load_tokenizer(other, {})
        self._eos_token_ids = checked.eos_token_ids
        self._defaults = checked.defaults if given.pop("generation_config", "auto") == "auto" else {}
        seed = given.pop("seed", None)
        self._seeds = None if seed is None else random.Random(seed)
        self._numbers = count()
        self._engine: Serving | None = start_serving(name, given)
        self._end = weakref.finalize(self, self._engine.close)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_error: object) -> None:
        self.shutdown()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers to prompts, in their order.

        prompts: one or several: a text, token ids, or a dict with "prompt" or "prompt_token_ids", and "cache_salt"
        where only prompts with the same one may share what is cached.
        sampling_params: for all, or one each; without them the checkpoint's generation_config.json holds. An answer
        ends where max_model_len is reached, whatever max_tokens says. use_tqdm: whether progress is shown on stderr.

        Raises TypeError or ValueError, before any work, for a prompt or params that cannot be used. Whatever interrupts
        the call, its requests are dropped and the next call can come.
        """
        listed = _listed(prompts)
        params = self._params(sampling_params, len(listed))
        for one in {id(one): one for one in params}.values():
            self._serving.prepare(one)
        return self._run([self._collector(*pair) for pair in zip(listed, params)], use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation or several, lists of {"role": ..., "content": ...}.

        chat_template: in place of the tokenizer's, in Jinja's language. continue_final_message: the answer goes on with
        the last message, with add_generation_prompt=False. tools: JSON schemas. chat_template_kwargs: what else the
        template knows. The rest as in `generate`.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message=True needs add_generation_prompt=False: they exclude each other")
        if not messages:
            raise ValueError("messages is empty")
        conversations = cast(ManyChats, [messages] if isinstance(messages[0], Mapping) else list(messages))
        tokenizer = self._tokenizer
        if chat_template is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.init_chat_template(chat_template)
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: give chat_template")
        keywords = {"add_generation_prompt": add_generation_prompt, **(chat_template_kwargs or {})}
        if tools is not None:
            keywords["tools"] = list(tools)
        texts = []
        for conversation in conversations:
            text = tokenizer.apply_chat_template(list(conversation), tokenize=False, **keywords)
            texts.append(_continued(text, conversation[-1]) if continue_final_message else text)
        return self.generate(texts, sampling_params, use_tqdm=use_tqdm)

    def logits(self, prompt_token_ids: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """Logits float32 [len(positions), vocab] after the prompt's tokens at `positions`, which ascend.

        What is before the first of them can come from the cache, as for an answer. Raises ValueError for a prompt or
        positions that cannot be used.
        """
        ids = np.asarray(prompt_token_ids, np.int64)
        request = Request(str(next(self._numbers)), ids, logit_positions=tuple(positions))
        engine = self._serving
        engine.limits.check(request)
        values: list[np.ndarray] = []
        finished = False
        engine.add(request)
        try:
            while not finished:
                for event in engine.step():
                    if isinstance(event, Logits):
                        values.append(event.values)
                    finished |= isinstance(event, Finished)
        except BaseException:
            engine.abort(request.id)
            raise
        return np.concatenate(values)

    def get_tokenizer(self) -> Any:
        """The tokenizer of prompts and answers."""
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._serving.limits.max_model_len

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where no params are given: the checkpoint's generation_config.json."""
        return SamplingParams(**self._defaults)

    def get_metrics(self) -> Metrics:
        """How many requests wait and run, which pages are held, and what was computed and reused so far."""
        return self._serving.metrics

    def reset_prefix_cache(self) -> bool:
        """Forgets what prompts left in the cache for others."""
        return self._serving.reset_prefix_cache()

    def shutdown(self) -> None:
        """Gives back memory and ends processes; again does nothing."""
        self._engine = None
        self._end()

    @property
    def _serving(self) -> Serving:
        if self._engine is None:
            raise RuntimeError("this LLM was shut down: make a new one")
        return self._engine

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
        """Params for each prompt."""
        if given is None or isinstance(given, SamplingParams):
            return [given or self.get_default_sampling_params()] * prompts
        params = list(given)
        strangers = [one for one in params if not isinstance(one, SamplingParams)]
        if strangers:
            raise TypeError(f"sampling_params must be SamplingParams, one or a list of them, got {strangers[0]!r}")
        if len(params) != prompts:
            raise ValueError(f"got {prompts} prompts and {len(params)} sampling params: give one for all, or one each")
        return params

    def _collector(self, prompt: Prompt, params: SamplingParams) -> Collector:
        """The request for a prompt, and what gathers its answers. TypeError or ValueError for one that is none."""
        text, ids, salt = self._read(prompt)
        limits = self._serving.limits
        params = replace(params)  # which checks what was changed since it was made
        room = limits.max_model_len - len(ids)
        if room < 1:
            limits.check_length(len(ids), 1)
        params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        params.min_tokens = min(params.min_tokens, params.max_tokens)
        if params.seed is None and self._seeds is not None:
            params.seed = self._seeds.getrandbits(63)
        request = Request(
            str(next(self._numbers)),
            ids,
            params,
            eos_token_ids=self._eos_token_ids,
            bad_words=bad_word_tokens(self._encode, params.bad_words),
            cache_salt=salt,
        )
        limits.check(request)
        return Collector(request, text, self._tokens(params) if params.detokenize else None)

    def _read(self, prompt: Prompt) -> tuple[str | None, np.ndarray, str]:
        """Text, ids int64 [n] and salt of a prompt."""
        text, ids, salt = None, prompt, ""
        if isinstance(prompt, Mapping):
            unknown = sorted(set(prompt) - set(PROMPT_KEYS))
            if unknown or ("prompt" not in prompt and "prompt_token_ids" not in prompt):
                raise ValueError(f"a prompt that is a dict has {', '.join(PROMPT_KEYS)}; got {', '.join(prompt)}")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids", prompt.get("prompt"))
            salt = prompt.get("cache_salt") or ""
        if isinstance(ids, str):
            text, ids = ids, self._encode(ids)
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size > 0 and not np.issubdtype(array.dtype, np.integer)):
            raise TypeError(f"a prompt must be a text, a list of token ids or a dict of them, got {prompt!r:.200}")
        return text, array.astype(np.int64), salt

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def _tokens(self, params: SamplingParams) -> Tokens:
        answer = decoder(self._tokenizer, skip_special_tokens=params.skip_special_tokens)
        return Tokens(answer, decoder(self._tokenizer, skip_special_tokens=False))

    def _run(self, collectors: Sequence[Collector], visible: bool) -> list[RequestOutput]:
        """Serves requests that come together until all are done; those that are not at the end are dropped."""
        engine = self._serving
        running = {one.request.id: one for one in collectors}
        try:
            with _Shown(collectors, visible) as shown:
                for one in collectors:
                    engine.add(one.request)
                while running:
                    for event in engine.step():
                        one = running[event.id]
                        ended = one.take(event)
                        if ended is not None:
                            engine.stop(event.id, *ended)
                        shown.update(one)
                        if one.finished:
                            del running[event.id]
        except BaseException:
            for request_id in running:
                engine.abort(request_id)
            raise
        return [one.output() for one in collectors]


class _Shown:
    """The progress of requests: tokens of their prompts and answers, of which those that end early need fewer."""

    def __init__(self, collectors: Sequence[Collector], visible: bool) -> None:
        self._counted = {one.request.id: 0 for one in collectors}
        self._expected = {one.request.id: _most_tokens(one) for one in collectors}
        title = f"{len(collectors)} prompts" if len(collectors) != 1 else "1 prompt"
        self._progress = Progress(title, sum(self._expected.values()), visible=visible and bool(collectors))

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.close()

    def update(self, one: Collector) -> None:
        """Something has become of this request."""
        name, tokens = one.request.id, one.num_prefilled + one.num_generated
        if one.finished and tokens < self._expected[name]:
            self._progress.expect(self._progress.total - self._expected[name] + tokens)
            self._expected[name] = tokens
        if tokens > self._counted[name]:
            self._progress.update(tokens - self._counted[name])
            self._counted[name] = tokens


def _most_tokens(one: Collector) -> int:
    return len(one.request.prompt) + one.params.n * (one.params.max_tokens or 0)


def start_serving(model: str, options: dict[str, Any]) -> Serving:
    """The engine: in this process, or in one for each of several ranks."""
    if options.get("tensor_parallel_size", 1) == 1:
        return serving.load_engine(model, options)
    from paddle_qwen1m.parallel.remote import start_engine

    return start_engine(model, options)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Several prompts; a list of numbers is one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed: list[Any] = list(prompts)
    is_one = bool(listed) and all(isinstance(token, (int, np.integer)) for token in listed)
    return [listed] if is_one else listed


def _continued(text: str, last: Message) -> str:
    """The prompt up to the end of its last message, without what the template puts behind it."""
    content = last.get("content")
    if not isinstance(content, str):
        raise ValueError("continue_final_message: the last message's content must be a text")
    try:
        return until(text, content)
    except ValueError as error:
        raise ValueError(f"continue_final_message: {error}") from None
