"""`paddle-qwen1m calibrate-kv`: makes the scales of an 8-bit cache from a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from paddle_qwen1m.commands.arguments import add_debug, as_input, at_least
from paddle_qwen1m.options import Face, options_of
from paddle_qwen1m.streams import file_argument, name_argument, read_document, say, shown

if TYPE_CHECKING:
    from paddle_qwen1m.cache.kv_scales import KVScales


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, or a hub name")
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8, - for standard input (default: one of the package's own)"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="where the scales go; as kv_scales.json beside the weights they are found",
    )
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--from-hf-hub", action="store_true", help=options_of(Face.COMMAND)["from_hf_hub"].flag_help)
    add_debug(parser)


def run(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m import ops
    from paddle_qwen1m.paddlenlp.scales import TEXT

    name_argument("MODEL", arguments.model)
    target = Path(file_argument("--out", arguments.out))
    text = read_document(arguments.text) if arguments.text is not None else TEXT.read_text(encoding="utf-8")
    if arguments.threads is not None:
        ops.set_num_threads(arguments.threads)
    with as_input():
        scales = scales_of(arguments.model, text, from_hf_hub=arguments.from_hf_hub)
        scales.write(target)
    exponents = scales.exponents
    say(
        f"{shown(arguments.out)}: {exponents.shape[0]} layers, {exponents.shape[1]} KV heads; "
        f"{(exponents > 0).mean():.0%} of the rotation pairs divided, by up to {2 ** int(exponents.max())}; "
        f"centres up to {scales.largest_centre:.4g}"
    )
    say(scales.summary())
    return 0


def scales_of(name: str, text: str, *, from_hf_hub: bool = False) -> KVScales:
    """Scales of a checkpoint from a text. Raises as from_pretrained does, and `make_scales`."""
    from paddlenlp.transformers import AutoTokenizer

    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM
    from paddle_qwen1m.paddlenlp.loading import find_checkpoint
    from paddle_qwen1m.paddlenlp.scales import make_scales
    from paddle_qwen1m.weights.digest import checkpoint_digest

    options = {"from_hf_hub": from_hf_hub}
    checkpoint = find_checkpoint(name, options)
    model = Qwen2OneMForCausalLM.from_pretrained(checkpoint, **options)
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.fetch_tokenizer()))
    return make_scales(model.engine, tokenizer, text, checkpoint_digest(checkpoint.fetch_weights()))
