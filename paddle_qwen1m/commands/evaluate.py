"""`paddle-qwen1m eval`: measures what a checkpoint keeps of long texts."""

from __future__ import annotations

import argparse

from paddle_qwen1m.commands.arguments import add_debug
from paddle_qwen1m.evaluate import flags as evaluate_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for own in evaluate_flags.add_flags(parser):
        add_debug(own)


def run(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.evaluate.command import evaluate

    return evaluate(arguments)
