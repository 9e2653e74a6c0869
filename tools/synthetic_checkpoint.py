"""Writes checkpoints of any size with random bits, for the tests of the converter and its benchmark."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import numpy as np

from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.weights.tensors import published_shapes

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "dual_chunk_attention_config": {
        "chunk_size": 1024,
        "local_size": 256,
        "original_max_position_embeddings": 1024,
    },
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1048576,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1e5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


Values = Callable[[str, int], Iterator[bytes]]
"""Pieces of so many bytes of the tensor of this name."""


def random_bits(seed: int) -> Values:
    """Whatever bits, numbers or not."""
    random = np.random.default_rng(seed)
    return lambda _name, size: (random.bytes(min(1 << 22, size - begin)) for begin in range(0, size, 1 << 22))


def write_checkpoint(
    directory: Path, shards: int, seed: int = 0, *, values: Values | None = None, **config_keys: Any
) -> Path:
    """A bfloat16 checkpoint in the published layout, its tensors over `shards` files of about equal size.

    values: of the tensors, random bits by default. config_keys: hidden_size and so on, over those of CONFIG.
    """
    config = {**CONFIG, **config_keys}
    values = values or random_bits(seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": 2}))
    tensors = published_shapes(ModelConfig.from_dict(config))
    total = 2 * sum(int(np.prod(shape)) for shape in tensors.values())
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    done = 0
    for name, shape in tensors.items():
        groups[min(shards - 1, done * shards // total)][name] = shape
        done += 2 * int(np.prod(shape))
    assert all(groups), f"{shards} shards are too many for {len(tensors)} tensors"
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in group.items():
            begin, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        raw = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            for name, shape in group.items():
                for piece in values(name, 2 * int(np.prod(shape))):
                    out.write(piece)
        weight_map.update(dict.fromkeys(group, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory
