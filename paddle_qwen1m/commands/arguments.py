"""What several commands share: kinds of arguments, the options of a model, and which refusals are the user's input."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Callable

from paddle_qwen1m.options import Dtype, Face, Place, Quantization, Size, Switch, Whole, options_of
from paddle_qwen1m.streams import InputError, json_file, name_argument


def at_least(lowest: int, highest: int = 2**31 - 1) -> Callable[[str], int]:
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


def size(text: str) -> int:
    """Bytes, such as 512MiB or 5GB."""
    try:
        return Size().read("size", text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 512MiB") from None


def add_model_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
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
            kind = {"metavar": "N", "type": at_least(option.type.lowest)}
        elif isinstance(option.type, Size):
            kind = {"metavar": "SIZE", "type": size}
        group.add_argument(option.flag, dest=option.name, help=option.flag_help, **kind)


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show warnings, log lines and the traceback of an error")


def check_names(arguments: argparse.Namespace, model: str) -> None:
    """InputError for a checkpoint, given as `model`, or a file that cannot be named or read."""
    name_argument(model, arguments.model)
    if arguments.sparse_budgets is not None:
        json_file("--sparse-budgets", arguments.sparse_budgets)


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
