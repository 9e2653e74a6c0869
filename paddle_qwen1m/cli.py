"""The command paddle-qwen1m: reads arguments, runs one of commands/, says how it ended.

Exit status: 0 done, 1 failed, 2 wrong arguments or input, 130 interrupted. Errors are one line on stderr. Under
paddle.distributed.launch every process runs the command: rank 0 leads `generate`, the others hold their part of the
model and follow; other commands are rank 0's alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Callable, Protocol

from paddle_qwen1m import __version__
from paddle_qwen1m.commands import (
    FAILED,
    calibrate,
    calibrate_kv,
    check,
    convert,
    evaluate,
    generate,
    lm_eval,
    plan,
    serve,
    store,
)
from paddle_qwen1m.parallel.job import launched_rank, launched_ranks
from paddle_qwen1m.server.flags import spelled
from paddle_qwen1m.streams import InputError, note, open_standard_streams

BAD_INPUT, INTERRUPTED = 2, 130
RANK_0_SECONDS = 30.0
"""Rank 0 may take so much longer than another one to find out, and say, that the arguments are wrong."""
HARNESS = "lm-eval"
"""The command whose arguments are another program's."""


class Body(Protocol):
    """What a module of commands/ has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Says what the command takes."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Does it; the exit status."""


@dataclass(frozen=True)
class Command:
    """A command of the line; PaddleNLP logs from `log_level` on while it runs."""

    name: str
    summary: str
    body: Body
    log_level: int = logging.INFO


COMMANDS = (
    Command("generate", "answer a question about a document, or continue a text", generate),
    Command("check", "tell whether this machine and a checkpoint will work", check, logging.ERROR),
    Command("plan", "tell what fits on which GPUs, and what to change where it does not", plan),
    Command("serve", "answer requests over HTTP, as OpenAI's interface does", serve),
    Command("eval", "measure what a checkpoint keeps of long texts", evaluate, logging.ERROR),
    Command(HARNESS, "lm-evaluation-harness with the model paddle_qwen1m", lm_eval),
    Command("calibrate", "find sparse budgets for a checkpoint", calibrate, logging.ERROR),
    Command("convert", "write a checkpoint in another format", convert),
    Command("calibrate-kv", "make the scales of an 8-bit cache for a checkpoint", calibrate_kv, logging.ERROR),
    Command("store", "show, check or cut down the prefixes that are kept in a folder", store),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paddle-qwen1m", description="Qwen2.5-7B/14B-Instruct-1M on PaddlePaddle")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = commands.add_parser(command.name, help=command.summary, description=command.summary, allow_abbrev=False)
        command.body.add_arguments(own)
        own.set_defaults(run=command.body.run, log_level=command.log_level)
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
    """What the command line says; rank 0 alone prints help and errors, and is left the time to: the launcher ends all
    when the first one ends with an error. Ends the process as argparse does.
    """
    with ExitStack() as stack:
        if rank != 0:
            stack.push(_leave_errors_to_rank_0)
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        given = sys.argv[1:] if argv is None else list(argv)
        if given[:1] == [HARNESS]:
            own = _parser().parse_args(given[:1])
            own.arguments, own.debug = given[1:], False
            return own
        return _parser().parse_args(spelled(given))


def _leave_errors_to_rank_0(_kind: object, error: BaseException | None, _traceback: object) -> None:
    if isinstance(error, SystemExit) and error.code:
        time.sleep(RANK_0_SECONDS)


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
        return generate.run(arguments) if group.rank == 0 else generate.follow(arguments)

    return _execute(command, arguments, group.fail)


def _interrupted(_signal: int, _frame: object) -> None:
    """Ctrl-C, which paddle.distributed.launch passes on as SIGTERM, several times."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


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
