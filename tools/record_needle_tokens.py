"""Records what the needle checkpoint answers on a CPU: greedy tokens of dense prefills, and how sure each of them is.

    python tools/record_needle_tokens.py [--tokens N ...] [--out FILE]

tests/gpu/test_paddle_generate.py compares a GPU with the file, tests/data/needle_cpu_tokens.json. 131,072 tokens take a
quarter of an hour on two cores; lengths that are not asked for stay in the file as they are.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from needle_documents import DocumentMaker, Encode, Needle, is_answer, prompt
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

import paddle_qwen1m  # noqa: F401  registers the model
from paddle_qwen1m.engine import Engine, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "needle"
RECORD = ROOT / "tests" / "data" / "needle_cpu_tokens.json"
LENGTHS = (1024, 16384, 65536, 131072)
NEEDLES, ANSWER_TOKENS, END_TOKENS = 4, 32, (747, 745)


def prompt_ids(encode: Encode, tokens: int, seed: int) -> tuple[np.ndarray, Needle]:
    """A prompt that fills `tokens` tokens together with its answer, int64 [n], and the needle that it asks for."""
    document = DocumentMaker(encode).make(tokens, NEEDLES, seed, depth=0.5)
    return np.asarray(encode(prompt(document, document.needles[0])), np.int64), document.needles[0]


@contextmanager
def recorded_margins(engine: Engine) -> Iterator[list[float]]:
    """Collects how far the largest logit lies above the next one, of every position whose logits are computed."""
    margins: list[float] = []

    def note(_layer: Any, _inputs: Any, logits: paddle.Tensor | None) -> None:
        if logits is not None:
            largest = np.sort(logits.numpy(), axis=-1)[:, -2:]
            margins.extend((largest[:, 1] - largest[:, 0]).tolist())

    hook = engine.model.register_forward_post_hook(note)
    try:
        yield margins
    finally:
        hook.remove()


def answer(engine: Engine, ids: np.ndarray) -> tuple[list[int], list[float]]:
    """Greedy tokens after a prompt, and the margin of each."""
    params = SamplingParams(max_tokens=ANSWER_TOKENS, stop_token_ids=END_TOKENS, temperature=0.0)
    with recorded_margins(engine) as margins:
        token_ids = engine.generate([ids], params)[0].token_ids
    return token_ids, margins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=LENGTHS, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the documents (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RECORD, help="(default: %(default)s)")
    arguments = parser.parse_args()

    paddle.device.set_device("cpu")
    engine = AutoModelForCausalLM.from_pretrained(str(CHECKPOINT), sparse=False).engine
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT))
    record: dict[str, Any] = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    for tokens in arguments.tokens:
        started = time.perf_counter()
        ids, needle = prompt_ids(lambda text: list(tokenizer(text)["input_ids"]), tokens, arguments.seed)
        token_ids, margins = answer(engine, ids)
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        record[str(tokens)] = {
            "seed": arguments.seed,
            "prompt_tokens": len(ids),
            "prompt_crc32": zlib.crc32(ids.tobytes()),
            "text": text,
            "token_ids": token_ids,
            "margins": [round(margin, 4) for margin in margins],
        }
        lines = [f'"{length}": {json.dumps(record[length])}' for length in sorted(record, key=int)]
        arguments.out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(
            f"{tokens:>7,} tokens: {text!r}, {'right' if is_answer(text, needle) else 'wrong'}, smallest margin "
            f"{min(margins):.2f}, {time.perf_counter() - started:.0f} s"
        )


if __name__ == "__main__":
    main()
