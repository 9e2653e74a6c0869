"""`paddle-qwen1m convert`: writes a checkpoint in another format."""

from __future__ import annotations

import argparse
import time

from paddle_qwen1m.commands.arguments import add_debug, as_input, at_least, size
from paddle_qwen1m.dtypes import DTYPES, QUANTIZATIONS
from paddle_qwen1m.streams import directory_argument, file_argument, say, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="directory with a checkpoint in any of the formats")
    parser.add_argument(
        "destination", metavar="DST", help="a new or empty directory, or that of the same command before"
    )
    parser.add_argument("--format", required=True, choices=["paddlenlp", "tensor-parallel", "huggingface"])
    parser.add_argument(
        "--tensor-parallel-size", type=at_least(1), default=1, metavar="N", help="ranks of the format tensor-parallel"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="round to this type (default: as in the checkpoint)")
    parser.add_argument(
        "--quantization",
        choices=[*QUANTIZATIONS, "none"],
        help="round the linears' weights to 8 bits, or back to 16 what was rounded (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--max-shard-size", type=size, metavar="SIZE", help="such as 5GB or 512MiB (default: shards as they are)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything again and compare shapes and checksums")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, from index and headers")
    add_debug(parser)


def run(arguments: argparse.Namespace) -> int:
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
