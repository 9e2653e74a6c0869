"""`paddle-qwen1m generate` on several GPUs or CPU processes; only rank 0 reads the prompt and prints.

    python -m paddle.distributed.launch --devices 0,1,2,3 tools/generate.py --model DIR --prompt-file FILE
    python -m paddle.distributed.launch --nproc_per_node 2 tools/generate.py --model DIR --prompt-file FILE    on a CPU

The tensor parallel degree is the number of processes that the launcher starts. A rank that fails or dies ends all.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys

from paddle_qwen1m import cli
from paddle_qwen1m.parallel.job import StartError, launched_rank, launched_ranks


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    cli.generate_arguments(parser)
    with contextlib.ExitStack() as stack:
        if launched_rank() != 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        arguments = parser.parse_args()
    arguments.tensor_parallel_degree = launched_ranks()
    return arguments


def help_rank_0(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.parallel.follow import follow

    with cli.as_input():
        model = cli.load_model(arguments)
    follow(model.engine)
    return 0


def main() -> int:
    arguments = read_arguments()
    os.environ.setdefault("GLOG_minloglevel", "2")  # read as Paddle is imported
    from paddle_qwen1m.parallel.group import start

    try:
        group = start(launched_ranks())
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.FAILED
    command = cli.generate if group.rank == 0 else help_rank_0
    status = cli.execute(command, arguments, logging.INFO, group.fail)
    return status if status == 0 else group.fail("interrupted, or its output was closed", status)


if __name__ == "__main__":
    sys.exit(main())
