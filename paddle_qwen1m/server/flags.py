"""The flags of `paddle-qwen1m serve`, in vLLM's spelling: the tables of options.py and settings.py, and a few names."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paddle_qwen1m.options import ACCEPTED, ANY, Always, Face, Number, Option, Switch, Whole, options_of
from paddle_qwen1m.server.settings import API_KEY_VARIABLE, SERVER_OPTIONS, Settings
from paddle_qwen1m.streams import InputError

MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
ALWAYS_ON = ("enable_auto_tool_choice", "enable_prompt_tokens_details", "enable_tokenizer_info_endpoint")
SHORT = {"tensor_parallel_size": ["-tp"]}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, or a hub name")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="where it listens (default: %(default)s)")
    server.add_argument("--served-model-name", nargs="+", metavar="NAME", help="names of the model (default: MODEL)")
    server.add_argument(
        "--api-key", nargs="+", action="extend", default=[], metavar="KEY",
        help=f"requests need one of these keys; also from the environment variable {API_KEY_VARIABLE}",
    )  # fmt: skip
    server.add_argument("--api-key-file", metavar="FILE", help="the same, a key a line")
    server.add_argument("--allowed-origins", nargs="+", default=[], metavar="URL", help="web pages that may ask (CORS)")
    server.add_argument("--allowed-hosts", nargs="+", default=[], metavar="NAME", help="Host headers besides localhost")
    server.add_argument("--chat-template", metavar="FILE", help="in place of the checkpoint's, in Jinja's language")
    server.add_argument("--tool-call-parser", choices=["hermes"], help="how calls are written: there is one way")
    for option in SERVER_OPTIONS:
        _add(server, option)
    add_model_flags(parser)
    same = parser.add_argument_group("accepted, and without effect")
    for name in (*ALWAYS_ON, *(name for name, allowed in ACCEPTED.items() if allowed is ANY)):
        same.add_argument(_flag(name), nargs="?", help=argparse.SUPPRESS)


def add_model_flags(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """The options of LLM, without those named."""
    group = parser.add_argument_group("model")
    for option in _model_options():
        if option.name not in without:
            _add(group, option)


def _model_options() -> list[Option]:
    return list(options_of(Face.LLM).values())


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add(group: Any, option: Option) -> None:
    flags = [_flag(option.name), *SHORT.get(option.name, ())]
    text = f"{option.help} (default: {option.default})".replace("%", "%%")
    if isinstance(option.type, (Switch, Always)):
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    kind: Any = str
    if option.name == "max_model_len":
        kind = _length
    elif isinstance(option.type, Whole):
        kind = whole
    elif isinstance(option.type, Number):
        kind = float
    group.add_argument(*flags, type=kind, metavar="N" if kind is not str else "X", help=text)


def whole(text: str) -> int:
    """A whole number; 1k is 1,000 and 1K is 1,024."""
    found = re.fullmatch(r"(\d+)([kmgKMG]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number such as 131072, 131k (131,000) or 128K (131,072)"
        )
    return int(found[1]) * MULTIPLES[found[2]]


def _length(text: str) -> int | str:
    return text if text == "auto" else -1 if text == "-1" else whole(text)


def spelled(argv: Sequence[str]) -> list[str]:
    """Flags with dashes: --max_model_len is --max-model-len."""
    return [_dashed(one) if one.startswith("--") else one for one in argv]


def _dashed(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was said about the model, as LLM takes it."""
    values = {option.name: getattr(arguments, option.name, None) for option in _model_options()}
    return {name: value for name, value in values.items() if value is not None}


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What was said about the server. InputError for what cannot be used."""
    values = {option.name: getattr(arguments, option.name) for option in SERVER_OPTIONS}
    try:
        return Settings(
            host=arguments.host,
            api_keys=_keys(arguments),
            allowed_origins=tuple(arguments.allowed_origins),
            allowed_hosts=tuple(name.lower() for name in arguments.allowed_hosts),
            **{name: value for name, value in values.items() if value is not None},
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def _keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    keys = list(arguments.api_key)
    if API_KEY_VARIABLE in os.environ:
        keys.append(os.environ[API_KEY_VARIABLE])
    if arguments.api_key_file is not None:
        try:
            lines = Path(arguments.api_key_file).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file: cannot read {arguments.api_key_file}: {error}") from None
        if not lines:
            raise InputError(f"--api-key-file: {arguments.api_key_file} has no key")
        keys += lines
    return tuple(keys)
