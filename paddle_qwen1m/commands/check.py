"""`paddle-qwen1m check`: prints what was found about this machine and a checkpoint."""

from __future__ import annotations

import argparse
from itertools import chain

from paddle_qwen1m.commands import FAILED
from paddle_qwen1m.commands.arguments import add_debug, add_model_options, check_names
from paddle_qwen1m.options import Face, options_of
from paddle_qwen1m.streams import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint directory, or a hub name; without it the machine alone"
    )
    store = [name for name in options_of(Face.COMMAND) if name.startswith("prefix_store")]
    add_model_options(parser, without=["sparse_threshold", *store])
    add_debug(parser)


def run(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.check import FAIL, CheckOptions, check_checkpoint, check_machine

    findings = check_machine()
    if arguments.model is not None:
        check_names(arguments, "MODEL")
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
