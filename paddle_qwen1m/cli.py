"""The command paddle-qwen1m: reads arguments and files, runs the engine, prints; each subcommand is one Command below.

Exit status: 0 done, 1 failed, 2 wrong arguments or input, 130 interrupted. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import secrets
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from paddle_qwen1m.dtypes import DTYPES
from paddle_qwen1m.options import LOADING, Dtype, Switch, Whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from paddle_qwen1m.engine import PrefillProgress, SamplingParams
    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
SAMPLING_OPTIONS = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class InputError(Exception):
    """What the user gave cannot be used; the message says what and why."""


@dataclass(frozen=True)
class Command:
    """A command: `configure` adds its arguments, `run` returns the exit status. PaddleNLP logs from `log_level` on."""

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    log_level: int = logging.INFO


class TextStream:
    """Turns tokens into text as they come, holding back what does not yet end on a whole character."""

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self._decode = decode
        self._write = write
        self._tokens: list[int] = []
        self._context = 0
        self._written = 0

    def put(self, token: int) -> None:
        self._tokens.append(token)
        text = self._pending()
        if text and not text.endswith(REPLACEMENT):
            self._write(text)
            self._context, self._written = self._written, len(self._tokens)

    def end(self) -> None:
        """Write what was held back, incomplete characters included."""
        text = self._pending()
        if text:
            self._write(text)
            self._context = self._written = len(self._tokens)

    def _pending(self) -> str:
        """Text of the tokens not yet written, decoded together with those just before them."""
        known = self._decode(self._tokens[self._context : self._written])
        return self._decode(self._tokens[self._context :])[len(known) :]


def read_document(name: str) -> str:
    """Text of a UTF-8 file, or of standard input for `-`. Raises InputError when it is missing, empty or not UTF-8."""
    title = "standard input" if name == "-" else name
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"--prompt-file: cannot read {title}: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompt-file: {title} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from error
    if not text.strip():
        raise InputError(f"--prompt-file: {title} is empty")
    return text


def user_text(document: str, question: str | None) -> str:
    """The document, then the question on a line of its own."""
    return document if question is None else f"{document.rstrip()}\n{question}"


def _at_least(lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return parse


def _add_model_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """The options of from_pretrained that the command has, without those named."""
    group = parser.add_argument_group("model")
    for option in LOADING:
        if not option.command or option.name in without:
            continue
        kind: dict[str, Any] = {"metavar": "FILE"}
        if isinstance(option.type, Switch):
            kind = {"action": "store_true"} if option.default == "off" else {"action": "store_false", "default": None}
        elif isinstance(option.type, Dtype):
            kind = {"choices": DTYPES}
        elif isinstance(option.type, Whole):
            kind = {"metavar": "N", "type": _at_least(option.type.lowest)}
        group.add_argument(option.flag, dest=option.name, help=option.flag_help, **kind)


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`, which tools/generate.py has too."""
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory, or a hub name")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the text, and no progress"
    )
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt-file", required=True, metavar="FILE", help="UTF-8 text, - for standard input")
    prompt.add_argument("--question", metavar="TEXT", help="asked after the document, on a line of its own")
    prompt.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's own)")
    prompt.add_argument("--raw", action="store_true", help="use the text as it is, without the chat template")
    sampling = parser.add_argument_group(
        "sampling", "what is not given comes from the checkpoint's generation_config.json"
    )
    sampling.add_argument("--max-new-tokens", type=_at_least(1), default=512, metavar="N", help="default %(default)s")
    sampling.add_argument("--min-new-tokens", type=_at_least(0), metavar="N")
    sampling.add_argument("--temperature", type=float, metavar="X")
    sampling.add_argument("--top-k", type=_at_least(0), metavar="N", help="0: no limit")
    sampling.add_argument("--top-p", type=float, metavar="X")
    sampling.add_argument("--repetition-penalty", type=float, metavar="X")
    sampling.add_argument("--seed", type=_at_least(0), metavar="N")
    sampling.add_argument("--greedy", action="store_true", help="always the most likely token")
    _add_model_options(parser)
    parser.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads (default: all)")
    _add_debug(parser)
    parser.set_defaults(tensor_parallel_degree=1)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint directory, or a hub name; without it the machine alone"
    )
    _add_model_options(parser, without=["sparse_threshold"])
    _add_debug(parser)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show warnings, log lines and the traceback of an error")


def _check(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.check import FAIL, CheckOptions, check_checkpoint, check_machine

    findings = check_machine()
    if arguments.model is not None:
        options = CheckOptions(
            from_hf_hub=arguments.from_hf_hub,
            max_model_len=arguments.max_model_len,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            dtype=arguments.dtype,
            kv_cache_dtype=arguments.kv_cache_dtype,
            sparse_budgets=arguments.sparse_budgets,
            sparse=arguments.sparse is not False,
        )
        findings = chain(findings, check_checkpoint(arguments.model, options))
    failed = False
    for finding in findings:
        print(finding, flush=True)
        failed |= finding.level == FAIL
    return FAILED if failed else 0


def generate(arguments: argparse.Namespace) -> int:
    """Answers; on rank 0 of a job with the others' help."""
    if arguments.raw and arguments.system is not None:
        raise InputError("--system has no place in a --raw prompt: write it into the text")
    if arguments.greedy and arguments.temperature:
        raise InputError(f"--greedy and --temperature {arguments.temperature:g} exclude each other")
    if arguments.question is not None and not arguments.question.strip():
        raise InputError("--question is empty")
    text = user_text(read_document(arguments.prompt_file), arguments.question)
    from paddle_qwen1m.parallel.follow import Leader

    started = time.perf_counter()
    with as_input():
        model = load_model(arguments)
        tokenizer = _load_tokenizer(arguments)
    load_seconds = time.perf_counter() - started
    with as_input():
        prompt = _prompt_ids(tokenizer, text, arguments)
        params = _sampling(model, arguments, len(prompt))
        model.engine.check_length(len(prompt), params.max_new_tokens)

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    run = _Run(len(prompt), progress=not arguments.json)
    stream = TextStream(decode, _print_now)

    def on_token(_index: int, token: int) -> None:
        run.token()
        if not arguments.json:
            stream.put(token)

    leader = Leader(model.engine)
    with run:
        completion = leader.generate([prompt], [params], on_token=on_token, on_prefill=run.prefill)[0]
    leader.close()
    report = {
        "text": decode(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(prompt),
        "completion_tokens": len(completion.token_ids),
        "seed": params.seed if params.temperature > 0 else None,
        "load_seconds": round(load_seconds, 3),
        **run.timings(),
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        stream.end()
        print(flush=True)
        print(run.summary(), file=sys.stderr)
    return 0


class _Run:
    """Times one request and shows how far its prefill is: a bar on a terminal, nothing elsewhere."""

    def __init__(self, prompt_tokens: int, progress: bool) -> None:
        from tqdm import tqdm

        self._prompt_tokens = prompt_tokens
        self._generated = 0
        self._started = self._first = self._last = time.perf_counter()
        self._bar = tqdm(
            total=prompt_tokens,
            desc="Prefill",
            unit=" tokens",
            unit_scale=True,
            leave=False,
            file=sys.stderr,
            disable=not (progress and sys.stderr.isatty()),
        )

    def __enter__(self) -> _Run:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.close()

    def prefill(self, progress: PrefillProgress) -> None:
        self._bar.update(progress.done_tokens - self._bar.n)
        if progress.done_tokens == progress.total_tokens:
            self._bar.close()

    def token(self) -> None:
        self._last = time.perf_counter()
        if self._generated == 0:
            self._first = self._last
        self._generated += 1

    def timings(self) -> dict[str, float | None]:
        """Seconds to the first token, then from the first token to the last; rates are None where nothing was timed."""
        prefill, decode = self._first - self._started, self._last - self._first
        return {
            "prefill_seconds": round(prefill, 3),
            "prefill_tokens_per_second": round(self._prompt_tokens / prefill, 1),
            "decode_seconds": round(decode, 3),
            "decode_tokens_per_second": round((self._generated - 1) / decode, 1) if self._generated > 1 else None,
        }

    def summary(self) -> str:
        timings = self.timings()
        text = (
            f"prefill: {self._prompt_tokens:,} tokens in {timings['prefill_seconds']:.1f} s "
            f"({timings['prefill_tokens_per_second']:,.0f} tokens/s); answer: {self._generated:,} tokens"
        )
        rate = timings["decode_tokens_per_second"]
        return text if rate is None else f"{text} ({rate:,.1f} tokens/s)"


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


@contextmanager
def as_input() -> Iterator[None]:
    """What the model refuses here is the user's input, not a failure; a damaged checkpoint is one all the same."""
    from paddle_qwen1m.weights import CheckpointError

    try:
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise InputError(str(error)) from error


def load_model(arguments: argparse.Namespace) -> Qwen2OneMForCausalLM:
    """The model that the options name, or this rank's part of it."""
    from paddle_qwen1m import ops
    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

    if arguments.threads is not None:
        ops.set_num_threads(arguments.threads)
    options = {option.name: getattr(arguments, option.name) for option in LOADING if option.command}
    return Qwen2OneMForCausalLM.from_pretrained(
        arguments.model,
        tensor_parallel_degree=arguments.tensor_parallel_degree,
        **options,
    )


def _load_tokenizer(arguments: argparse.Namespace) -> Any:
    from paddlenlp.transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(arguments.model, from_hf_hub=arguments.from_hf_hub)


def _prompt_ids(tokenizer: Any, text: str, arguments: argparse.Namespace) -> npt.NDArray[np.int64]:
    import numpy as np

    if not arguments.raw:
        messages = [{"role": "user", "content": text}]
        if arguments.system is not None:
            messages.insert(0, {"role": "system", "content": arguments.system})
        if not tokenizer.chat_template:
            raise InputError(f"{arguments.model} has no chat template: use --raw")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return np.asarray(tokenizer(text)["input_ids"], dtype=np.int64)


def _sampling(model: Qwen2OneMForCausalLM, arguments: argparse.Namespace, prompt_tokens: int) -> SamplingParams:
    """generation_config.json with the options given here over it; a seed is drawn where none is given."""
    options = {name: getattr(arguments, name) for name in SAMPLING_OPTIONS}
    options["num_return_sequences"] = 1
    if arguments.greedy:
        options["do_sample"] = False
    elif arguments.temperature is not None:
        options["do_sample"] = True
    params = model.read_request(options).params_for(prompt_tokens, model.engine.max_model_len)
    return params if params.seed is not None else replace(params, seed=secrets.randbits(31))


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
    parser.add_argument("--quantization", choices=["none", "int8", "fp8"], default="none", help="default %(default)s")
    parser.add_argument(
        "--max-shard-size", type=_size, metavar="SIZE", help="such as 5GB or 512MiB (default: shards as they are)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything again and compare shapes and checksums")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, from index and headers")
    _add_debug(parser)


def _size(text: str) -> int:
    """Bytes, such as 512MiB or 5GB."""
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 512MiB")
    return int(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")


def _convert(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.weights.convert import convert, describe, plan

    if arguments.quantization != "none":
        raise InputError(
            f"--quantization {arguments.quantization}: there are no kernels that compute with {arguments.quantization} "
            "weights yet; leave it out"
        )
    wanted = {
        "degree": arguments.tensor_parallel_size,
        "dtype": arguments.dtype,
        "max_shard_bytes": arguments.max_shard_size,
    }
    with as_input():
        if arguments.dry_run:
            for line in describe(plan(arguments.source, arguments.format, **wanted)):
                print(line)
            return 0
        started = time.perf_counter()
        outcome = convert(arguments.source, arguments.destination, arguments.format, verify=arguments.verify, **wanted)
    seconds = time.perf_counter() - started
    print(
        f"{arguments.destination}: {arguments.format}, {outcome.files} files of weights, {outcome.nbytes:,} bytes"
        f"{f', {outcome.kept} of them there already' if outcome.kept else ''}"
        f"{', verified' if arguments.verify else ''}; {seconds:.1f} s"
    )
    return 0


COMMANDS = (
    Command("generate", "answer a question about a document, or continue a text", generate_arguments, generate),
    Command("check", "tell whether this machine and a checkpoint will work", _check_arguments, _check, logging.ERROR),
    Command("convert", "write a checkpoint in another format", _convert_arguments, _convert),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paddle-qwen1m", description="Qwen2.5-7B/14B-Instruct-1M on PaddlePaddle")
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of paddle-qwen1m; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return execute(arguments.run, arguments, arguments.log_level, _show_error)


def _show_error(reason: str, status: int) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return status


def execute(
    command: Callable[[argparse.Namespace], int],
    arguments: argparse.Namespace,
    log_level: int,
    on_error: Callable[[str, int], int],
) -> int:
    """Runs a command; returns its exit status, of a failure what `on_error` makes of reason and status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with nullcontext() if arguments.debug else _quiet(log_level):
            return command(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush is quiet
        return FAILED
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        return on_error(_one_line(error), BAD_INPUT if isinstance(error, InputError) else FAILED)


if __name__ == "__main__":
    sys.exit(main())
