"""`paddle-qwen1m serve`: answers requests over HTTP, as OpenAI's interface does."""

from __future__ import annotations

import argparse

from paddle_qwen1m.commands.arguments import add_debug
from paddle_qwen1m.server.flags import add_flags
from paddle_qwen1m.streams import InputError, name_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    add_debug(parser)


def run(arguments: argparse.Namespace) -> int:
    name_argument("MODEL", arguments.model)
    try:
        from paddle_qwen1m.server.command import serve
    except ModuleNotFoundError as error:
        raise InputError(f"serve needs {error.name}: pip install 'paddle-qwen1m[serve]'") from error
    return serve(arguments)
