"""`paddle-qwen1m plan`: prints what fits on which GPUs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from paddle_qwen1m.commands import FAILED
from paddle_qwen1m.commands.arguments import add_debug, as_input, at_least, size
from paddle_qwen1m.dtypes import QUANTIZATIONS
from paddle_qwen1m.options import Face, options_of
from paddle_qwen1m.streams import InputError, name_argument, say

if TYPE_CHECKING:
    from paddle_qwen1m.config import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="7B, 14B, a checkpoint directory, or a hub name")
    card = parser.add_mutually_exclusive_group()
    card.add_argument("--gpu", metavar="NAME", help="a card, such as H100-80GB, H200 or RTX-4090")
    card.add_argument("--gpu-memory", type=size, metavar="SIZE", help="bytes that may be used of each, such as 141GB")
    parser.add_argument("--table", action="store_true", help="instead: cards and lengths of the published models")
    parser.add_argument("--json", action="store_true", help="a JSON object in place of lines")
    for name in ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=at_least(1), metavar="N", help=_llm_help(name))
    parser.add_argument("--max-model-len", type=_length, metavar="N", help=f"{_llm_help('max_model_len')}, or auto")
    parser.add_argument(
        "--kv-cache-dtype", choices=("bfloat16", *QUANTIZATIONS), help="default: int8 where a context fits no other way"
    )
    parser.add_argument(
        "--kv-scales",
        metavar="FILE",
        help="whose layers in 16 bits an 8-bit cache has (default: those of kv_scales.json beside the weights)",
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help=_llm_help("quantization"))
    add_debug(parser)


def _llm_help(name: str) -> str:
    return options_of(Face.LLM)[name].flag_help.replace("%", "%%")


def _length(text: str) -> int | None:
    return None if text == "auto" else at_least(1)(text)


def run(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.config import published_budgets
    from paddle_qwen1m.options import GPU_BATCHED_TOKENS, EngineOptions
    from paddle_qwen1m.planning import GPUS, plan, published, table, usable

    chunk = arguments.max_num_batched_tokens
    if arguments.table:
        for line in table(chunk or GPU_BATCHED_TOKENS, arguments.kv_cache_dtype, arguments.quantization):
            say(line)
        return 0
    if arguments.model is None or (arguments.gpu is None and arguments.gpu_memory is None):
        raise InputError("plan needs --model and --gpu or --gpu-memory, or --table")
    if arguments.gpu is not None and arguments.gpu.upper() not in GPUS:
        raise InputError(f"--gpu {arguments.gpu}: give its --gpu-memory, or one of {', '.join(GPUS)}")
    ranks = arguments.tensor_parallel_size or 1
    memory = arguments.gpu_memory or usable(arguments.gpu.upper(), ranks)
    with as_input():
        config, quantization = published(arguments.model), arguments.quantization
        budgets = None if config is None else published_budgets(config)
        beside = None
        if config is None:
            from paddle_qwen1m.check import read_shapes

            config, budgets, stored, beside = read_shapes(name_argument("--model", arguments.model))
            quantization = quantization or stored
        in_16_bits = _layers_in_16_bits(arguments.kv_scales or beside, config)
        given = {"max_num_seqs": arguments.max_num_seqs} if arguments.max_num_seqs else {}
        options = EngineOptions(
            max_num_batched_tokens=chunk,
            kv_cache_dtype=arguments.kv_cache_dtype,
            quantization=quantization,
            **given,
        )
        length = arguments.max_model_len
        made = plan(config, memory, ranks=ranks, length=length, options=options, budgets=budgets, in_16_bits=in_16_bits)
    if arguments.json:
        say(json.dumps(made.as_json()))
    else:
        for line in made.lines():
            say(line)
    return 0 if made.fits else FAILED


def _layers_in_16_bits(path: str | Path | None, config: ModelConfig) -> int:
    """How many a file of scales names; ValueError, naming it, for one of another model."""
    from paddle_qwen1m.cache.kv_scales import KVScales

    if path is None:
        return 0
    scales = KVScales.from_file(path)
    scales.check_fit(config, "", str(path))
    return len(scales.in_16_bits)
