"""`paddle-qwen1m calibrate`: finds sparse budgets for a checkpoint."""

from __future__ import annotations

import argparse

from paddle_qwen1m.calibrate import flags as calibrate_flags
from paddle_qwen1m.commands.arguments import add_debug, add_model_options
from paddle_qwen1m.options import Face, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    calibrate_flags.add_flags(parser)
    add_model_options(parser, without=options_of(Face.COMMAND).keys() - set(calibrate_flags.MODEL_OPTIONS))
    add_debug(parser)


def run(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.calibrate.command import calibrate

    return calibrate(arguments)
