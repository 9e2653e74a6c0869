"""The flags of `paddle-qwen1m calibrate`, but for the options of the model."""

from __future__ import annotations

import argparse

from paddle_qwen1m.calibrate.strategies import COST, RECALL, STRATEGIES
from paddle_qwen1m.server.flags import whole

MODEL_OPTIONS = ("max_num_batched_tokens", "dtype", "sparse_threshold", "sparse_budgets", "from_hf_hub")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, or a hub name")
    parser.add_argument(
        "--text", required=True, nargs="+", metavar="FILE",
        help="UTF-8 texts as long as the budgets are for, such as prompts with question and answer at the end; special "
        "tokens written out are read as such",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, metavar="FILE",
        help="the budgets, such as MODEL/sparse_attention_config.json; beside it FILE.report.md and FILE.report.json",
    )  # fmt: skip
    parser.add_argument("--tokens", type=whole, metavar="N", help="of each text, its first ones (default: all)")
    parser.add_argument(
        "--strategy", choices=list(STRATEGIES), default="least",
        help="least: the cheapest columns and diagonals that keep --recall; published: one of five pairs and an "
        "increment by its recall, as in the published files; output: those of all heads with which the layers' outputs "
        "change least, at --cost in the mean and whatever their recall (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--recall", type=float, default=RECALL, metavar="X",
        help="share of a head's attention that least and published keep (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--cost", type=float, default=COST, metavar="X",
        help="share of the keys that a head of least may visit, or all heads in the mean with output "
        "(default: %(default)s)",
    )  # fmt: skip
