"""Writes a checkpoint of a published shape whose weights are random, with a tokenizer of its vocabulary's size.

    python tools/random_checkpoint.py 7B DIR

Weights are normal(0, 0.02), norms 1, in bfloat16. The tokenizer reads texts as that of checkpoints/needle does, and
every other token of the vocabulary stands for a made-up word: answers become text at the cost that they have with
the published one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from synthetic_checkpoint import write_checkpoint

from paddle_qwen1m.planning import PUBLISHED_KEYS

NEEDLE = Path(__file__).resolve().parent.parent / "checkpoints" / "needle"
TINY = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
}
SHAPES = {**PUBLISHED_KEYS, "tiny": {**PUBLISHED_KEYS["7B"], **TINY}}
NOISE = 1 << 24
"""Numbers that are drawn; larger tensors repeat them."""


def write_random_checkpoint(directory: Path, shape: str, shards: int = 2) -> Path:
    """The checkpoint of the shape of this name, in a directory that is made."""
    noise = _bfloat16(np.random.default_rng(0).standard_normal(NOISE, np.float32) * np.float32(0.02))

    def values(name: str, size: int) -> Iterator[bytes]:
        if name.endswith("norm.weight"):
            yield _bfloat16(np.ones(size // 2, np.float32))
            return
        for begin in range(0, size, len(noise)):
            yield noise[: size - begin]

    write_checkpoint(directory, shards, values=values, **SHAPES[shape])
    _write_tokenizer(directory, SHAPES[shape]["vocab_size"])
    return directory


def _bfloat16(values: np.ndarray) -> bytes:
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def _write_tokenizer(directory: Path, size: int) -> None:
    for name in ("merges.txt", "tokenizer_config.json"):
        shutil.copy(NEEDLE / name, directory)
    tokenizer = json.loads((NEEDLE / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    known = {*vocabulary.values(), *(added["id"] for added in tokenizer["added_tokens"])}
    vocabulary.update({f"Ġw{token}": token for token in range(size) if token not in known})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    print(write_random_checkpoint(arguments.directory, arguments.shape))


if __name__ == "__main__":
    main()
