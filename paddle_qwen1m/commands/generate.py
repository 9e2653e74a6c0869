"""`paddle-qwen1m generate`: reads a document and questions, prints answers as they come; rank 0 leads the others."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Callable

from paddle_qwen1m.commands.arguments import add_debug, add_model_options, as_input, at_least, check_names
from paddle_qwen1m.options import TEMPERATURE_TOLERANCE, Face, options_of
from paddle_qwen1m.parallel.job import launched_ranks
from paddle_qwen1m.progress import Progress
from paddle_qwen1m.streams import InputError, Output, note, read_document, text_argument
from paddle_qwen1m.text import Detokenizer, decoder, stopper

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from paddle_qwen1m.engine import PrefillProgress, SamplingParams
    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM
    from paddle_qwen1m.paddlenlp.generation import Request

SAMPLING_OPTIONS = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
DEFAULT_NEW_TOKENS = 512
Ends = Callable[[int], "str | None"]
"""Of an answer's tokens, one after the other: the stop string that is there now."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory, or a hub name")
    parser.add_argument("--output", metavar="FILE", help="write answers there, in UTF-8, instead of to standard output")
    parser.add_argument(
        "--json", action="store_true", help="a JSON object a question, on a line, instead of the text; a silent prefill"
    )
    prompt = parser.add_argument_group("prompt")
    document = prompt.add_mutually_exclusive_group(required=True)
    document.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text, - for standard input")
    document.add_argument("--prompt", metavar="TEXT", help="the text itself")
    prompt.add_argument(
        "--question",
        action="append",
        metavar="TEXT",
        help="asked after the document, on a line of its own; given again, another one about the same document",
    )
    prompt.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's own)")
    prompt.add_argument("--raw", action="store_true", help="use the text as it is, without the chat template")
    sampling = parser.add_argument_group(
        "sampling", "what is not given comes from the checkpoint's generation_config.json"
    )
    sampling.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        metavar="N",
        help=f"default {DEFAULT_NEW_TOKENS}, or what the prompt leaves of --max-model-len",
    )
    sampling.add_argument("--min-new-tokens", type=at_least(0), metavar="N")
    sampling.add_argument("--temperature", type=float, metavar="X")
    sampling.add_argument("--top-k", type=at_least(0), metavar="N", help="0: no limit")
    sampling.add_argument("--top-p", type=float, metavar="X")
    sampling.add_argument("--repetition-penalty", type=float, metavar="X")
    sampling.add_argument("--seed", type=at_least(0, 2**63 - 1), metavar="N")
    sampling.add_argument("--greedy", action="store_true", help="always the most likely token")
    add_model_options(parser)
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: all)")
    add_debug(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answers; on rank 0 of a job with the others' help."""
    if arguments.raw and arguments.system is not None:
        raise InputError("--system has no place in a --raw prompt: write it into the text")
    if arguments.greedy and arguments.temperature:
        raise InputError(f"--greedy and --temperature {arguments.temperature:g} exclude each other")
    check_names(arguments, "--model")
    questions = _questions(arguments)
    system = None if arguments.system is None else text_argument("--system", arguments.system)
    document = _document(arguments)
    with Output(arguments.output) as output:
        _answer(arguments, output, document, questions, system)
    return 0


def follow(arguments: argparse.Namespace) -> int:
    """A rank other than 0: does what rank 0 asks for."""
    with as_input():
        model = _load_model(arguments)
    model.engine.follow()
    return 0


def user_text(document: str, question: str | None) -> str:
    """The document, then the question on a line of its own."""
    return document if question is None else f"{document.rstrip()}\n{question}"


def _questions(arguments: argparse.Namespace) -> list[str | None]:
    """What is asked, in order; None for a document that is its own question."""
    questions = [text_argument("--question", question) for question in arguments.question or ()]
    if not all(question.strip() for question in questions):
        raise InputError("--question is empty")
    return [*questions] or [None]


def _document(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        text = text_argument("--prompt", arguments.prompt)
        if not text.strip():
            raise InputError("--prompt is empty")
        return text
    text = read_document(arguments.prompt_file)
    if arguments.output is not None and _same_file(arguments.output, arguments.prompt_file):
        raise InputError(f"--output: {arguments.output} is the document itself")
    return text


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _answer(
    arguments: argparse.Namespace, output: Output, document: str, questions: Sequence[str | None], system: str | None
) -> None:
    """Loads the model, checks that every question fits, then answers them in order."""
    started = time.perf_counter()
    with as_input():
        model = _load_model(arguments)
        tokenizer = _load_tokenizer(arguments)
    load_seconds = time.perf_counter() - started
    with as_input():
        prompts = [_prompt_ids(tokenizer, user_text(document, one), system, arguments) for one in questions]
        request = _request(model, arguments)
        choices = [_sampling(model, request, len(prompt)) for prompt in prompts]
        for prompt, params in zip(prompts, choices):
            model.engine.check_length(len(prompt), params.max_tokens or 0)

    decode = decoder(tokenizer)
    for question, prompt, params in zip(questions, prompts, choices):
        text = Detokenizer(decode)
        timed = _Timed(len(prompt), None if arguments.json else _writer(text, output))
        ends = stopper(decoder(tokenizer, skip_special_tokens=False), request.stop_strings)

        def hear(
            _index: int, token: int, timed: _Timed = timed, ends: Callable[[int], str | None] = ends
        ) -> str | None:
            timed.token(token)
            return ends(token)

        with timed:
            completion = model.engine.generate(
                [prompt], params, bad_words=request.bad_words, on_token=hear, on_prefill=timed.prefill
            )[0]
        if not arguments.json:
            output.write(text.end() + "\n")
            note(timed.summary())
            continue
        report = {
            "question": question,
            "text": decode(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(completion.token_ids),
            "seed": params.seed if params.temperature > 0 else None,
            "max_num_batched_tokens": model.engine.max_num_batched_tokens,
            "sparse": model.engine.is_sparse(len(prompt)),
            "load_seconds": round(load_seconds, 3),
            **timed.sources(),
            **timed.timings(),
        }
        output.write(json.dumps(report) + "\n")
    model.engine.dismiss()


def _writer(text: Detokenizer, output: Output) -> Callable[[int], None]:
    """Writes the text of tokens as they come."""

    def show(token: int) -> None:
        output.write(text.put(token))

    return show


class _Timed:
    """Times one request; gives each token to `show`, without which the prefill's progress is not shown either."""

    def __init__(self, prompt_tokens: int, show: Callable[[int], None] | None) -> None:
        self._prompt_tokens = prompt_tokens
        self._show = show
        self._generated = 0
        self._cached = self._restored = 0
        self._started = self._first = self._last = time.perf_counter()
        self._progress = Progress("Prefill", prompt_tokens, visible=show is not None, stay=False)

    def __enter__(self) -> _Timed:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.close()

    def prefill(self, progress: PrefillProgress) -> None:
        self._restored = progress.restored_tokens
        self._cached = progress.reused_tokens - self._restored
        self._progress.update(progress.done_tokens - self._progress.done)
        if progress.done_tokens == progress.total_tokens:
            self._progress.close()

    def token(self, token: int) -> None:
        self._last = time.perf_counter()
        if self._generated == 0:
            self._first = self._last
        self._generated += 1
        if self._show is not None:
            self._show(token)

    def timings(self) -> dict[str, float | None]:
        """Seconds to the first token, then from the first token to the last; rates are None where nothing was timed."""
        prefill, decode = self._first - self._started, self._last - self._first
        return {
            "prefill_seconds": round(prefill, 3),
            "prefill_tokens_per_second": round(self._prompt_tokens / prefill, 1),
            "decode_seconds": round(decode, 3),
            "decode_tokens_per_second": round((self._generated - 1) / decode, 1) if self._generated > 1 else None,
        }

    def sources(self) -> dict[str, int]:
        """Tokens of the prompt that were not computed, by where they came from."""
        return {"cached_tokens": self._cached, "stored_tokens": self._restored}

    def summary(self) -> str:
        timings = self.timings()
        sources = {"the cache": self._cached, "the prefix store": self._restored}
        known = "".join(f", {tokens:,} of them from {place}" for place, tokens in sources.items() if tokens)
        text = (
            f"prefill: {self._prompt_tokens:,} tokens{known} in {timings['prefill_seconds']:.1f} s "
            f"({timings['prefill_tokens_per_second']:,.0f} tokens/s); answer: {self._generated:,} tokens"
        )
        rate = timings["decode_tokens_per_second"]
        return text if rate is None else f"{text} ({rate:,.1f} tokens/s)"


def _load_model(arguments: argparse.Namespace) -> Qwen2OneMForCausalLM:
    """The model that the options name, or this rank's part of it."""
    from paddle_qwen1m import ops
    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

    if arguments.threads is not None:
        ops.set_num_threads(arguments.threads)
    options = {name: getattr(arguments, name) for name in options_of(Face.COMMAND)}
    return Qwen2OneMForCausalLM.from_pretrained(
        arguments.model,
        tensor_parallel_degree=launched_ranks(),
        prefix_temperature_tolerance=TEMPERATURE_TOLERANCE,  # questions share their document, whatever their lengths
        **options,
    )


def _load_tokenizer(arguments: argparse.Namespace) -> Any:
    from paddlenlp.transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(arguments.model, from_hf_hub=arguments.from_hf_hub)


def _prompt_ids(tokenizer: Any, text: str, system: str | None, arguments: argparse.Namespace) -> npt.NDArray[np.int64]:
    import numpy as np

    if not arguments.raw:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        if not tokenizer.chat_template:
            raise InputError(f"{arguments.model} has no chat template: use --raw")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)


def _request(model: Qwen2OneMForCausalLM, arguments: argparse.Namespace) -> Request:
    """generation_config.json with the options given here over it."""
    options = {name: getattr(arguments, name) for name in SAMPLING_OPTIONS}
    options["num_return_sequences"] = 1
    options["max_new_tokens"] = arguments.max_new_tokens or DEFAULT_NEW_TOKENS
    if arguments.greedy:
        options["do_sample"] = False
    elif arguments.temperature is not None:
        options["do_sample"] = True
    return replace(model.read_request(options), may_cut=arguments.max_new_tokens is None)


def _sampling(model: Qwen2OneMForCausalLM, request: Request, prompt_tokens: int) -> SamplingParams:
    """The params of a prompt of so many tokens; a seed is drawn where none is given."""
    params = request.params_for(prompt_tokens, model.engine.max_model_len)
    return params if params.seed is not None else replace(params, seed=secrets.randbits(31))
