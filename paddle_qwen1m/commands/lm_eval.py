"""`paddle-qwen1m lm-eval`: lm-evaluation-harness's own command, with the model paddle_qwen1m."""

from __future__ import annotations

import argparse

from paddle_qwen1m.streams import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="...", help="lm-evaluation-harness's own: see its --help")


def run(arguments: argparse.Namespace) -> int:
    try:
        from paddle_qwen1m.evaluate.harness import main as harness
    except ModuleNotFoundError as error:
        raise InputError(f"lm-eval needs {error.name}: pip install 'paddle-qwen1m[lm-eval]'") from error
    harness(arguments.arguments)
    return 0
