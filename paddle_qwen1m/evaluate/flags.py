"""The flags of `paddle-qwen1m eval`."""

from __future__ import annotations

import argparse

from paddle_qwen1m.server.flags import add_model_flags, whole

NOT_HERE = ("seed", "sparse", "generation_config")
"""Options of LLM that an evaluation decides: answers are greedy, and --compare says what is sparse."""


def add_flags(parser: argparse.ArgumentParser) -> tuple[argparse.ArgumentParser, ...]:
    """Adds what can be evaluated; returns the parser of each."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    needle = _kind(kinds, "needle", "a map of which depth of which length is found again", samples=1)
    needle.add_argument("--depths", type=whole, default=10, metavar="N", help="default %(default)s")
    needle.add_argument(
        "--haystack", default="filler", metavar="FILE",
        help="text that codes are hidden in: a UTF-8 file, `prose` or `filler`, sentences of this package; filler is "
        "what checkpoints/needle knows (default: %(default)s)",
    )  # fmt: skip
    ruler = _kind(kinds, "ruler", "RULER's tasks: needles, variables, common and frequent words", samples=20)
    ruler.add_argument("--tasks", nargs="+", metavar="TASK", help="such as niah_single_1 vt cwe (default: all)")
    ruler.add_argument(
        "--qa-data", nargs="+", metavar="FILE",
        help="SQuAD's JSON for the task qa_1, HotpotQA's for qa_2, as published (default: these two are left out)",
    )  # fmt: skip
    ruler.add_argument(
        "--haystack", default="prose", metavar="FILE",
        help="text that needles are hidden in: a UTF-8 file, `prose` or `filler` (default: %(default)s)",
    )  # fmt: skip
    perplexity = _kind(kinds, "perplexity", "how likely a text is, the further it has been read", samples=1)
    perplexity.add_argument("--text", required=True, metavar="FILE", help="UTF-8, - for standard input")
    return needle, ruler, perplexity


def _kind(kinds: argparse._SubParsersAction, name: str, summary: str, samples: int) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, or a hub name")
    parser.add_argument("--out", required=True, metavar="DIR", help="results, and answers to go on from")
    parser.add_argument(
        "--lengths", type=whole, nargs="+", required=True, metavar="N",
        help="tokens of prompt and answer, of the model's tokenizer, such as 4096 or 128K",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=whole, default=samples, metavar="N", help="documents of each length (default: %(default)s)"
    )
    parser.add_argument(
        "--compare", default="sparse", metavar="NAMES",
        help="configurations, with commas between them: dense, sparse, forced (sparse with the keys alone that are "
        "visited in any case), rope (without dual chunks), int8 and kvfp8 (keys and values), w8 and fp8 (weights "
        "in 8 bits), or several such as sparse+int8; differences are from the first one (default: %(default)s)",
    )  # fmt: skip
    if name != "perplexity":
        parser.add_argument(
            "--seed", type=whole, default=0, metavar="N", help="of the documents (default: %(default)s)"
        )
        parser.add_argument(
            "--score", choices=["generation", "logits"], default="generation",
            help="by the text of answers, or by whether each token of the right answer, behind the question in the "
            "prompt, is the likeliest one (default: %(default)s)",
        )  # fmt: skip
        parser.add_argument("--raw", action="store_true", help="prompts are plain text, without the chat template")
    endpoint = parser.add_argument_group("endpoint", "a server is asked, and MODEL gives the tokenizer alone")
    endpoint.add_argument("--base-url", metavar="URL", help="such as http://127.0.0.1:8000/v1; key: OPENAI_API_KEY")
    endpoint.add_argument("--served-model", metavar="NAME", help="what it calls the model (default: its first one)")
    add_model_flags(parser, without=NOT_HERE)
    return parser
