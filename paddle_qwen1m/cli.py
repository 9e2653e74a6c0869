"""The command paddle-qwen1m: reads arguments and files, runs the engine, prints; each subcommand is one Command below.

Exit status: 0 done, 1 failed, 2 wrong arguments or input, 130 interrupted. Errors are one line on stderr. Under
paddle.distributed.launch every process runs the command: rank 0 leads `generate`, the others hold their part of the
model and follow; other commands are rank 0's alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import secrets
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from paddle_qwen1m import __version__
from paddle_qwen1m.calibrate import flags as calibrate_flags
from paddle_qwen1m.dtypes import DTYPES, QUANTIZATIONS
from paddle_qwen1m.evaluate import flags as evaluate_flags
from paddle_qwen1m.options import (
    TEMPERATURE_TOLERANCE,
    Dtype,
    Face,
    Place,
    Quantization,
    Size,
    Switch,
    Whole,
    options_of,
)
from paddle_qwen1m.parallel.job import launched_rank, launched_ranks
from paddle_qwen1m.progress import Progress
from paddle_qwen1m.server.flags import add_flags, spelled
from paddle_qwen1m.streams import (
    InputError,
    Output,
    directory_argument,
    file_argument,
    json_file,
    name_argument,
    note,
    open_standard_streams,
    read_document,
    say,
    shown,
    text_argument,
)
from paddle_qwen1m.text import Detokenizer, decoder, stopper

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from paddle_qwen1m.cache.store import StoredDocument
    from paddle_qwen1m.config import ModelConfig
    from paddle_qwen1m.engine import PrefillProgress, SamplingParams
    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM
    from paddle_qwen1m.paddlenlp.generation import Request

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
SAMPLING_OPTIONS = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
DEFAULT_NEW_TOKENS = 512
HARNESS = "lm-eval"
"""The command whose arguments are another program's."""


@dataclass(frozen=True)
class Command:
    """A command: `configure` adds its arguments, `run` returns the exit status. PaddleNLP logs from `log_level` on."""

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    log_level: int = logging.INFO


def user_text(document: str, question: str | None) -> str:
    """The document, then the question on a line of its own."""
    return document if question is None else f"{document.rstrip()}\n{question}"


def _at_least(lowest: int, highest: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        if value > highest:
            raise argparse.ArgumentTypeError(f"must be at most {highest}, got {value}")
        return value

    return parse


def _add_model_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """The options of from_pretrained that the command has, without those named."""
    group = parser.add_argument_group("model")
    for option in options_of(Face.COMMAND).values():
        if option.name in without:
            continue
        kind: dict[str, Any] = {"metavar": "DIR" if isinstance(option.type, Place) else "FILE"}
        if isinstance(option.type, Switch):
            kind = {"action": "store_true"} if option.default == "off" else {"action": "store_false", "default": None}
        elif isinstance(option.type, Dtype):
            kind = {"choices": option.type.names}
        elif isinstance(option.type, Quantization):
            kind = {"choices": option.type.texts}
        elif isinstance(option.type, Whole):
            kind = {"metavar": "N", "type": _at_least(option.type.lowest)}
        elif isinstance(option.type, Size):
            kind = {"metavar": "SIZE", "type": _size}
        group.add_argument(option.flag, dest=option.name, help=option.flag_help, **kind)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
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
        type=_at_least(1),
        metavar="N",
        help=f"default {DEFAULT_NEW_TOKENS}, or what the prompt leaves of --max-model-len",
    )
    sampling.add_argument("--min-new-tokens", type=_at_least(0), metavar="N")
    sampling.add_argument("--temperature", type=float, metavar="X")
    sampling.add_argument("--top-k", type=_at_least(0), metavar="N", help="0: no limit")
    sampling.add_argument("--top-p", type=float, metavar="X")
    sampling.add_argument("--repetition-penalty", type=float, metavar="X")
    sampling.add_argument("--seed", type=_at_least(0, 2**63 - 1), metavar="N")
    sampling.add_argument("--greedy", action="store_true", help="always the most likely token")
    _add_model_options(parser)
    parser.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads (default: all)")
    _add_debug(parser)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint directory, or a hub name; without it the machine alone"
    )
    store = [name for name in options_of(Face.COMMAND) if name.startswith("prefix_store")]
    _add_model_options(parser, without=["sparse_threshold", *store])
    _add_debug(parser)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="7B, 14B, a checkpoint directory, or a hub name")
    card = parser.add_mutually_exclusive_group()
    card.add_argument("--gpu", metavar="NAME", help="a card, such as H100-80GB, H200 or RTX-4090")
    card.add_argument("--gpu-memory", type=_size, metavar="SIZE", help="bytes that may be used of each, such as 141GB")
    parser.add_argument("--table", action="store_true", help="instead: cards and lengths of the published models")
    parser.add_argument("--json", action="store_true", help="a JSON object in place of lines")
    for name in ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=_at_least(1), metavar="N", help=_llm_help(name))
    parser.add_argument("--max-model-len", type=_length, metavar="N", help=f"{_llm_help('max_model_len')}, or auto")
    parser.add_argument(
        "--kv-cache-dtype", choices=("bfloat16", *QUANTIZATIONS), help="default: int8 where a context fits no other way"
    )
    parser.add_argument(
        "--kv-scales",
        metavar="FILE",
        help="whose layers in 16 bits an 8-bit cache has (default: those of kv_scales.json beside the weights)",
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help=_llm_help("quantization"))
    _add_debug(parser)


def _llm_help(name: str) -> str:
    return options_of(Face.LLM)[name].flag_help.replace("%", "%%")


def _length(text: str) -> int | None:
    return None if text == "auto" else _at_least(1)(text)


def _plan(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.config import published_budgets
    from paddle_qwen1m.engine.admission import LEFT_TO_THE_DRIVER
    from paddle_qwen1m.options import GPU_BATCHED_TOKENS, EngineOptions
    from paddle_qwen1m.planning import GPUS, plan, published, table

    chunk = arguments.max_num_batched_tokens
    if arguments.table:
        for line in table(chunk or GPU_BATCHED_TOKENS, arguments.kv_cache_dtype, arguments.quantization):
            say(line)
        return 0
    if arguments.model is None or (arguments.gpu is None and arguments.gpu_memory is None):
        raise InputError("plan needs --model and --gpu or --gpu-memory, or --table")
    if arguments.gpu is not None and arguments.gpu.upper() not in GPUS:
        raise InputError(f"--gpu {arguments.gpu}: give its --gpu-memory, or one of {', '.join(GPUS)}")
    memory = arguments.gpu_memory or GPUS[arguments.gpu.upper()] - LEFT_TO_THE_DRIVER
    with as_input():
        config, quantization = published(arguments.model), arguments.quantization
        budgets = None if config is None else published_budgets(config)
        beside = None
        if config is None:
            from paddle_qwen1m.check import read_shapes

            config, budgets, stored, beside = read_shapes(name_argument("--model", arguments.model))
            quantization = quantization or stored
        in_16_bits = _layers_in_16_bits(arguments.kv_scales or beside, config)
        given = {"max_num_seqs": arguments.max_num_seqs} if arguments.max_num_seqs else {}
        options = EngineOptions(
            max_num_batched_tokens=chunk,
            kv_cache_dtype=arguments.kv_cache_dtype,
            quantization=quantization,
            **given,
        )
        ranks = arguments.tensor_parallel_size or 1
        length = arguments.max_model_len
        made = plan(config, memory, ranks=ranks, length=length, options=options, budgets=budgets, in_16_bits=in_16_bits)
    if arguments.json:
        say(json.dumps(made.as_json()))
    else:
        for line in made.lines():
            say(line)
    return 0 if made.fits else FAILED


def _layers_in_16_bits(path: str | Path | None, config: ModelConfig) -> int:
    """How many a file of scales names; ValueError, naming it, for one of another model."""
    from paddle_qwen1m.cache.kv_scales import KVScales

    if path is None:
        return 0
    scales = KVScales.from_file(path)
    scales.check_fit(config, "", str(path))
    return len(scales.in_16_bits)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show warnings, log lines and the traceback of an error")


def _check(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.check import FAIL, CheckOptions, check_checkpoint, check_machine

    findings = check_machine()
    if arguments.model is not None:
        _check_names(arguments, "MODEL")
        options = CheckOptions(
            from_hf_hub=arguments.from_hf_hub,
            max_model_len=arguments.max_model_len,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            dtype=arguments.dtype,
            kv_cache_dtype=arguments.kv_cache_dtype,
            quantization=arguments.quantization,
            sparse_budgets=arguments.sparse_budgets,
            sparse=arguments.sparse is not False,
        )
        findings = chain(findings, check_checkpoint(arguments.model, options))
    failed = False
    for finding in findings:
        say(str(finding))
        failed |= finding.level == FAIL
    return FAILED if failed else 0


def _generate(arguments: argparse.Namespace) -> int:
    """Answers; on rank 0 of a job with the others' help."""
    if arguments.raw and arguments.system is not None:
        raise InputError("--system has no place in a --raw prompt: write it into the text")
    if arguments.greedy and arguments.temperature:
        raise InputError(f"--greedy and --temperature {arguments.temperature:g} exclude each other")
    _check_names(arguments, "--model")
    questions = _questions(arguments)
    system = None if arguments.system is None else text_argument("--system", arguments.system)
    document = _document(arguments)
    with Output(arguments.output) as output:
        _answer(arguments, output, document, questions, system)
    return 0


def _check_names(arguments: argparse.Namespace, model: str) -> None:
    """InputError for a checkpoint, given as `model`, or a file that cannot be named or read."""
    name_argument(model, arguments.model)
    if arguments.sparse_budgets is not None:
        json_file("--sparse-budgets", arguments.sparse_budgets)


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
        run = _Run(len(prompt), None if arguments.json else _writer(text, output))
        ends = stopper(decoder(tokenizer, skip_special_tokens=False), request.stop_strings)

        def hear(_index: int, token: int, run: _Run = run, ends: Callable[[int], str | None] = ends) -> str | None:
            run.token(token)
            return ends(token)

        with run:
            completion = model.engine.generate(
                [prompt], params, bad_words=request.bad_words, on_token=hear, on_prefill=run.prefill
            )[0]
        if not arguments.json:
            output.write(text.end() + "\n")
            note(run.summary())
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
            **run.sources(),
            **run.timings(),
        }
        output.write(json.dumps(report) + "\n")
    model.engine.dismiss()


def _writer(text: Detokenizer, output: Output) -> Callable[[int], None]:
    """Writes the text of tokens as they come."""

    def show(token: int) -> None:
        output.write(text.put(token))

    return show


class _Run:
    """Times one request; gives each token to `show`, without which the prefill's progress is not shown either."""

    def __init__(self, prompt_tokens: int, show: Callable[[int], None] | None) -> None:
        self._prompt_tokens = prompt_tokens
        self._show = show
        self._generated = 0
        self._cached = self._restored = 0
        self._started = self._first = self._last = time.perf_counter()
        self._progress = Progress("Prefill", prompt_tokens, visible=show is not None, stay=False)

    def __enter__(self) -> _Run:
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


@contextmanager
def as_input() -> Iterator[None]:
    """What the model refuses here is the user's input, not a failure; a damaged checkpoint is one all the same."""
    from paddle_qwen1m.weights import CheckpointError

    try:
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError) as error:
        raise InputError(str(error)) from error


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


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    _add_debug(parser)


def _serve(arguments: argparse.Namespace) -> int:
    name_argument("MODEL", arguments.model)
    try:
        from paddle_qwen1m.server.command import serve
    except ModuleNotFoundError as error:
        raise InputError(f"serve needs {error.name}: pip install 'paddle-qwen1m[serve]'") from error
    return serve(arguments)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    for own in evaluate_flags.add_flags(parser):
        _add_debug(own)


def _eval(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.evaluate.command import evaluate

    return evaluate(arguments)


def _harness_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="...", help="lm-evaluation-harness's own: see its --help")


def _harness(arguments: argparse.Namespace) -> int:
    try:
        from paddle_qwen1m.evaluate.harness import main as harness
    except ModuleNotFoundError as error:
        raise InputError(f"lm-eval needs {error.name}: pip install 'paddle-qwen1m[lm-eval]'") from error
    harness(arguments.arguments)
    return 0


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    calibrate_flags.add_flags(parser)
    _add_model_options(parser, without=options_of(Face.COMMAND).keys() - set(calibrate_flags.MODEL_OPTIONS))
    _add_debug(parser)


def _calibrate(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.calibrate.command import calibrate

    return calibrate(arguments)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="directory with a checkpoint in any of the formats")
    parser.add_argument(
        "destination", metavar="DST", help="a new or empty directory, or that of the same command before"
    )
    parser.add_argument("--format", required=True, choices=["paddlenlp", "tensor-parallel", "huggingface"])
    parser.add_argument(
        "--tensor-parallel-size", type=_at_least(1), default=1, metavar="N", help="ranks of the format tensor-parallel"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="round to this type (default: as in the checkpoint)")
    parser.add_argument(
        "--quantization",
        choices=[*QUANTIZATIONS, "none"],
        help="round the linears' weights to 8 bits, or back to 16 what was rounded (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--max-shard-size", type=_size, metavar="SIZE", help="such as 5GB or 512MiB (default: shards as they are)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything again and compare shapes and checksums")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, from index and headers")
    _add_debug(parser)


def _size(text: str) -> int:
    """Bytes, such as 512MiB or 5GB."""
    try:
        return Size().read("size", text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 512MiB") from None


def _convert(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.weights.convert import convert, describe, plan
    from paddle_qwen1m.weights.eight_bit import LOSSES

    directory_argument("SRC", arguments.source)
    file_argument("DST", arguments.destination)
    wanted = {
        "degree": arguments.tensor_parallel_size,
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "max_shard_bytes": arguments.max_shard_size,
    }
    with as_input():
        if arguments.dry_run:
            for line in describe(plan(arguments.source, arguments.format, **wanted)):
                say(line)
            return 0
        started = time.perf_counter()
        outcome = convert(arguments.source, arguments.destination, arguments.format, verify=arguments.verify, **wanted)
    seconds = time.perf_counter() - started
    say(
        f"{shown(arguments.destination)}: {arguments.format}, {outcome.files} files of weights, "
        f"{outcome.nbytes:,} bytes"
        f"{f', {outcome.kept} of them there already' if outcome.kept else ''}"
        f"{', verified' if arguments.verify else ''}; {seconds:.1f} s"
    )
    if arguments.quantization in LOSSES:
        say(f"rounded to {arguments.quantization}: {LOSSES[arguments.quantization]}")
    return 0


def _calibrate_kv_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, or a hub name")
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8, - for standard input (default: one of the package's own)"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="where the scales go; as kv_scales.json beside the weights they are found",
    )
    parser.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--from-hf-hub", action="store_true", help=options_of(Face.COMMAND)["from_hf_hub"].flag_help)
    _add_debug(parser)


def _calibrate_kv(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m import ops
    from paddle_qwen1m.paddlenlp.scales import TEXT, calibrate_checkpoint

    name_argument("MODEL", arguments.model)
    target = Path(file_argument("--out", arguments.out))
    text = read_document(arguments.text) if arguments.text is not None else TEXT.read_text(encoding="utf-8")
    if arguments.threads is not None:
        ops.set_num_threads(arguments.threads)
    with as_input():
        scales = calibrate_checkpoint(arguments.model, text, from_hf_hub=arguments.from_hf_hub)
        scales.write(target)
    exponents = scales.exponents
    say(
        f"{shown(arguments.out)}: {exponents.shape[0]} layers, {exponents.shape[1]} KV heads; "
        f"{(exponents > 0).mean():.0%} of the rotation pairs divided, by up to {2 ** int(exponents.max())}; "
        f"centres up to {scales.largest_centre:.4g}"
    )
    say(scales.summary())
    return 0


def _store_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list", "verify", "prune"], help="what to do")
    parser.add_argument("directory", metavar="DIR", help="folder that --prefix-store named")
    parser.add_argument("--size", type=_size, help="prune: most bytes that stay, such as 100GB; the least used go")
    _add_debug(parser)


def _store(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.cache import store

    if (arguments.action == "prune") != (arguments.size is not None):
        raise InputError("--size says how many bytes may stay: prune needs it, list and verify have no use for it")
    folder, name = Path(file_argument("DIR", arguments.directory)), shown(arguments.directory)
    if not folder.is_dir():
        raise InputError(f"{name} is no folder")
    with as_input():
        store.prepare(folder)
    if arguments.action == "prune":
        removed, nbytes = store.prune(folder, arguments.size)
        say(f"{name}: {removed} files removed, {nbytes:,} bytes")
        return 0
    if arguments.action == "verify":
        files = list(store.verify(folder))
        damaged = [(file.path, reason) for file, reason in files if reason is not None]
        for path, reason in damaged:
            say(f"{path}: {reason}")
        nbytes = sum(file.nbytes for file, _ in files)
        say(f"{name}: {len(files)} files, {nbytes:,} bytes, {len(damaged)} cannot be used")
        return FAILED if damaged else 0
    documents, unreadable = store.documents(folder)
    for one in documents:
        say(_described(one))
    for path, reason in unreadable:
        say(f"{path}: {reason}")
    say(f"{name}: {len(documents)} documents, {sum(one.nbytes for one in documents):,} bytes")
    return 0


def _described(document: StoredDocument) -> str:
    made = document.made_under
    return "  ".join(
        (
            f"{document.name[:12]}  {document.tokens:>9,} tokens",
            "dense" if made.get("sparse") is None else "sparse",
            f"{made.get('cache_dtype')}",
            f"weights {str(made.get('weights'))[:12]}",
            f"ranks {document.ranks}",
            f"{document.files} files",
            f"{document.nbytes:,} bytes",
            time.strftime("used %Y-%m-%d %H:%M", time.localtime(document.used)),
        )
    )


COMMANDS = (
    Command("generate", "answer a question about a document, or continue a text", _generate_arguments, _generate),
    Command("check", "tell whether this machine and a checkpoint will work", _check_arguments, _check, logging.ERROR),
    Command("plan", "tell what fits on which GPUs, and what to change where it does not", _plan_arguments, _plan),
    Command("serve", "answer requests over HTTP, as OpenAI's interface does", _serve_arguments, _serve),
    Command("eval", "measure what a checkpoint keeps of long texts", _eval_arguments, _eval, logging.ERROR),
    Command(HARNESS, "lm-evaluation-harness with the model paddle_qwen1m", _harness_arguments, _harness),
    Command("calibrate", "find sparse budgets for a checkpoint", _calibrate_arguments, _calibrate, logging.ERROR),
    Command("convert", "write a checkpoint in another format", _convert_arguments, _convert),
    Command(
        "calibrate-kv",
        "make the scales of an 8-bit cache for a checkpoint",
        _calibrate_kv_arguments,
        _calibrate_kv,
        logging.ERROR,
    ),
    Command("store", "show, check or cut down the prefixes that are kept in a folder", _store_arguments, _store),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paddle-qwen1m", description="Qwen2.5-7B/14B-Instruct-1M on PaddlePaddle")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = commands.add_parser(command.name, help=command.summary, description=command.summary, allow_abbrev=False)
        command.configure(own)
        own.set_defaults(run=command.run, log_level=command.log_level)
    return parser


@contextmanager
def _quiet(log_level: int) -> Iterator[None]:
    """Keeps away what is of no use here: import warnings, and PaddleNLP's error line about a bos_token Qwen has not."""

    def useful(record: logging.LogRecord) -> bool:
        return record.levelno >= log_level and "bos_token" not in record.getMessage()

    os.environ.setdefault("GLOG_minloglevel", "2")
    logger = logging.getLogger("PaddleNLP")
    logger.addFilter(useful)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(useful)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of paddle-qwen1m; returns the exit status."""
    open_standard_streams()
    try:
        rank, ranks = launched_rank(), launched_ranks()
    except ValueError as error:
        return _end_alone(f"PADDLE_TRAINER_ID and PADDLE_TRAINERS_NUM, the launcher's variables: {error}", BAD_INPUT)
    arguments = _arguments(argv, rank)
    if arguments.command == "generate" and ranks > 1:
        return _generate_on_ranks(arguments)
    if rank != 0:
        return 0
    return _execute(arguments.run, arguments, _end_alone)


def _arguments(argv: Sequence[str] | None, rank: int) -> argparse.Namespace:
    """What the command line says; rank 0 alone prints help and errors. Ends the process as argparse does."""
    with ExitStack() as stack:
        if rank != 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        given = sys.argv[1:] if argv is None else list(argv)
        if given[:1] == [HARNESS]:
            own = _parser().parse_args(given[:1])
            own.arguments, own.debug = given[1:], False
            return own
        return _parser().parse_args(spelled(given))


def _generate_on_ranks(arguments: argparse.Namespace) -> int:
    """This rank's part of `generate`; a rank that fails ends all."""
    with nullcontext() if arguments.debug else _quiet(arguments.log_level):
        from paddle_qwen1m.parallel.group import start
        from paddle_qwen1m.parallel.job import StartError

    signal.signal(signal.SIGTERM, _interrupted)
    try:
        group = start(launched_ranks())
    except (StartError, ValueError) as error:
        return _end_alone(str(error), FAILED if isinstance(error, StartError) else BAD_INPUT)
    except KeyboardInterrupt:
        return _end_alone("interrupted", INTERRUPTED)

    def command(arguments: argparse.Namespace) -> int:
        import paddlenlp  # noqa: F401  (it takes off the signal handlers that it finds)

        signal.signal(signal.SIGTERM, _interrupted)
        return _generate(arguments) if group.rank == 0 else _follow(arguments)

    return _execute(command, arguments, group.fail)


def _interrupted(_signal: int, _frame: object) -> None:
    """Ctrl-C, which paddle.distributed.launch passes on as SIGTERM, several times."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _follow(arguments: argparse.Namespace) -> int:
    """A rank other than 0: does what rank 0 asks for."""
    with as_input():
        model = _load_model(arguments)
    model.engine.follow()
    return 0


def _execute(
    command: Callable[[argparse.Namespace], int],
    arguments: argparse.Namespace,
    end: Callable[[str, int], int],
) -> int:
    """Runs a command; returns its exit status, of a failure what `end` makes of reason and status."""
    try:
        with nullcontext() if arguments.debug else _quiet(arguments.log_level):
            return command(arguments)
    except KeyboardInterrupt:
        return end("interrupted", INTERRUPTED)
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        return end(_reason(error), BAD_INPUT if isinstance(error, InputError) else FAILED)


def _end_alone(reason: str, status: int) -> int:
    note("\ninterrupted" if status == INTERRUPTED else f"error: {reason}")
    return status


def _reason(error: Exception) -> str:
    """One line that says what went wrong; of memory that could not be had, how much and what takes less."""
    text = " ".join(str(error).split()) or type(error).__name__
    refused = re.search(r"alloc memory of (?P<bytes>\d+) size|allocate (?P<size>[\d.]+ ?[KMGT]i?B)|bad_alloc", text)
    if not isinstance(error, MemoryError) or refused is None:
        return text
    size = f"{int(refused['bytes']) / 1e9:.2f} GB" if refused["bytes"] else refused["size"] or "what was wanted"
    return (
        f"out of memory: {size} more could not be had; a smaller --max-num-batched-tokens, --kv-cache-dtype or --dtype "
        "bfloat16 on a CPU, and a shorter prompt take less; `paddle-qwen1m check MODEL` counts what is needed"
    )


if __name__ == "__main__":
    sys.exit(main())
