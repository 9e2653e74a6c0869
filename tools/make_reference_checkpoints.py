"""Makes what the tests compare logits with: tiny random Qwen2 checkpoints in the published layout, run by transformers.

It needs torch and transformers, which the package and its tests do not; in an environment of its own:

    python3 -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==4.57.6 safetensors numpy
    /tmp/reference/bin/python tools/make_reference_checkpoints.py tests/data checkpoints/needle

The checkpoints, in reference/ of the first directory, differ in head counts, head_dim, tying, dtype and sharding. Each
dual_chunk_attention_config has an L = chunk_size - local_size below the prompt's length and a chunk_size above it, so
two DCA chunks are used and dual chunk attention must equal the plain RoPE of transformers. Weights are
scaled so that attention is peaked and every bias and norm weight matters. Beside the weights lies reference.npz:

    input_ids           int32 [n]
    positions           int32 [P]      rows of logits; they include the last row and those around the DCA chunk boundary
    logits              float32 [P, vocab]    computed in float32 from the weights as they are stored
    greedy_ids          int32 [8]      greedy continuation
    penalised_ids       int32 [8]      greedy continuation with repetition_penalty 1.3

needle_oracle/exact.npz gets logits_last8, float64 [8, vocab]: the second directory's checkpoint on the prompt of
needle_oracle/oracle.npz, by transformers in float64 with float64 rotary angles. Left alone, transformers rounds angles
to float32: at position 900 an error of 3e-5, which moves one of the eight rows of oracle.npz by 1.8e-3.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

NEW_TOKENS = 8
REPETITION_PENALTY = 1.3
SMALLEST_MARGIN = 0.02
DISTINCT_TOKENS = 4
PROMPTS = 200
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Reference:
    """One checkpoint; its config.json has a head_dim only where that is not hidden_size / heads, as published."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    tied: bool
    dtype: str
    theta: float
    eps: float
    chunk_size: int
    local_size: int
    tokens: int
    shard_size: str = "5GB"

    @property
    def chunk_len(self) -> int:
        return self.chunk_size - self.local_size

    def config(self) -> dict[str, object]:
        assert self.local_size < self.chunk_len < self.tokens < self.tokens + NEW_TOKENS <= self.chunk_size
        explicit = {} if self.heads * self.head_dim == self.hidden else {"head_dim": self.head_dim}
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "dual_chunk_attention_config": {
                "chunk_size": self.chunk_size,
                "local_size": self.local_size,
                "original_max_position_embeddings": self.chunk_size,
            },
            "eos_token_id": self.vocab - 1,
            **explicit,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 65536,
            "max_window_layers": 2,
            "model_type": "qwen2",
            "num_attention_heads": self.heads,
            "num_hidden_layers": 2,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "sliding_window": None,
            "tie_word_embeddings": self.tied,
            "torch_dtype": self.dtype,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }


REFERENCES = (
    Reference("group1_tied_f32", 2, 2, 64, 128, 64, 97, True, "float32", 1e4, 1e-6, 448, 128, 400),
    Reference("group2_sharded_bf16", 4, 2, 64, 256, 64, 101, False, "bfloat16", 1e6, 1e-6, 448, 192, 433, "400KB"),
    Reference("group5_f16", 10, 2, 64, 64, 96, 113, False, "float16", 1e7, 1e-5, 256, 64, 248),
    Reference("group7_bf16", 14, 2, 64, 64, 80, 128, False, "bfloat16", 1e7, 1e-6, 512, 192, 400),
    Reference("one_kv_head_d128_f32", 4, 1, 128, 64, 64, 103, False, "float32", 1e5, 1e-6, 255, 127, 230),
    Reference("group7_d128_tied_bf16", 7, 1, 128, 64, 64, 109, True, "bfloat16", 1e7, 1e-6, 384, 128, 371),
)


def randomise(model: Qwen2ForCausalLM, seed: int) -> None:
    """Weights that keep activations near 1 and attention logits near 1.5; biases and norm weights far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif name.endswith("embed_tokens.weight"):
            value = 0.3 * noise
        elif name == "lm_head.weight":
            value = 2.0 * noise / parameter.shape[1] ** 0.5
        else:
            value = 1.2 * noise / parameter.shape[1] ** 0.5
        parameter.data.copy_(value)


def save(reference: Reference, directory: Path, seed: int) -> None:
    config = Qwen2Config(**reference.config(), attn_implementation="eager")
    model = Qwen2ForCausalLM(config)
    randomise(model, seed)
    model.to(DTYPES[reference.dtype]).save_pretrained(directory, max_shard_size=reference.shard_size)
    (directory / "generation_config.json").unlink()
    (directory / "config.json").write_text(json.dumps(reference.config(), indent=2) + "\n")


def continuation(model: Qwen2ForCausalLM, ids: torch.Tensor, penalty: float) -> tuple[np.ndarray, float]:
    """Greedy new tokens, and by how much the closest of them led the runner-up."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        repetition_penalty=penalty,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.scores)[:, 0].topk(2).values
    return out.sequences[0, ids.shape[1] :].int().numpy(), float((best[:, 0] - best[:, 1]).min())


@torch.no_grad()
def run(reference: Reference, directory: Path, seed: int) -> dict[str, np.ndarray]:
    model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    assert type(model) is Qwen2ForCausalLM and model.dtype == torch.float32
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    generator = torch.Generator().manual_seed(seed)
    eos = reference.vocab - 1
    for _ in range(PROMPTS):
        ids = torch.randint(0, eos, (1, reference.tokens), generator=generator)
        greedy, margin = continuation(model, ids, 1.0)
        penalised, penalised_margin = continuation(model, ids, REPETITION_PENALTY)
        clear = min(margin, penalised_margin) >= SMALLEST_MARGIN
        if clear and len(set(greedy)) >= DISTINCT_TOKENS and eos not in {*greedy, *penalised}:
            break
    else:
        raise RuntimeError(f"{reference.name}: no prompt of {PROMPTS} has a clear and varied greedy continuation")
    logits = model(ids).logits[0].numpy()
    n, length = reference.tokens, reference.chunk_len
    positions = sorted({*range(0, n, 9), length - 1, length, length + 1, *range(n - 8, n)})
    return {
        "input_ids": ids[0].int().numpy(),
        "positions": np.array(positions, np.int32),
        "logits": logits[positions].astype(np.float32),
        "greedy_ids": greedy,
        "penalised_ids": penalised,
    }


@torch.no_grad()
def exact_logits(directory: Path, input_ids: np.ndarray, rows: int) -> np.ndarray:
    """Logits float64 [rows, vocab] of the last positions; float64 throughout, rotary angles included."""
    model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    inv_freq = config.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(len(input_ids), dtype=torch.float64), inv_freq).repeat(1, 2)[None]
    model.model.rotary_emb.forward = lambda *_: (angles.cos(), angles.sin())
    return model(torch.tensor(input_ids, dtype=torch.int64)[None], logits_to_keep=rows).logits[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="make the reference checkpoints and logits of the tests")
    parser.add_argument("data", type=Path, help="tests/data; each checkpoint in its reference/ is replaced")
    parser.add_argument("needle", type=Path, help="checkpoints/needle")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed, reference in enumerate(REFERENCES):
        directory = arguments.data / "reference" / reference.name
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        save(reference, directory, seed)
        arrays = run(reference, directory, seed)
        np.savez(directory / "reference.npz", **arrays)
        size = sum(path.stat().st_size for path in directory.iterdir())
        print(f"{reference.name}: {size / 1e6:.2f} MB, {len(arrays['positions'])} rows of logits, ", end="")
        print(f"logits within {np.abs(arrays['logits']).max():.1f}, greedy {arrays['greedy_ids'].tolist()}")
    oracle = np.load(arguments.data / "needle_oracle" / "oracle.npz")
    exact = exact_logits(arguments.needle, oracle["input_ids"], rows=8)
    np.savez(arguments.data / "needle_oracle" / "exact.npz", logits_last8=exact)
    moved = np.abs(oracle["logits_last8"] - exact).max(axis=1)
    print("needle: float32 logits are off by " + " ".join(f"{row:.1e}" for row in moved))


if __name__ == "__main__":
    main()
