"""A whole Qwen2 forward pass in numpy float64, dual chunk attention pair by pair: what every entry point must compute.

It reads checkpoints with the safetensors package and shares no code with the model, only the oracles of the ops.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  numpy's name for bfloat16, which safetensors.numpy looks up
import numpy as np
import safetensors.numpy

import oracle


class OracleModel:
    """The model of a checkpoint directory; `dual_chunk` replaces its dual_chunk_attention_config."""

    def __init__(self, directory: Path, dual_chunk: dict[str, int] | None = None) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.dual_chunk = dual_chunk or self.config["dual_chunk_attention_config"]
        self.weights: dict[str, np.ndarray] = {}
        for file in directory.glob("*.safetensors"):
            self.weights.update(safetensors.numpy.load_file(file))
        self.weights = {name: array.astype(np.float64) for name, array in self.weights.items()}

    def logits(self, token_ids: Sequence[int], prompt_length: int | None = None) -> np.ndarray:
        """Logits float64 [n, vocab] of every position; m is that of `prompt_length`, by default of all the tokens."""
        hidden = oracle.embedding(np.asarray(token_ids), self.weights["model.embed_tokens.weight"])
        original_length = self.dual_chunk["original_max_position_embeddings"]
        m = oracle.temperature(prompt_length or len(token_ids), original_length)
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            hidden = hidden + self._attention(self._norm(hidden, prefix + "input_layernorm"), prefix + "self_attn.", m)
            hidden = hidden + self._mlp(self._norm(hidden, prefix + "post_attention_layernorm"), prefix + "mlp.")
        tied = self.config["tie_word_embeddings"]
        head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return oracle.linear(self._norm(hidden, "model.norm"), head)

    def _norm(self, hidden: np.ndarray, name: str) -> np.ndarray:
        return oracle.rms_norm(hidden, self.weights[name + ".weight"], self.config["rms_norm_eps"])

    def _attention(self, hidden: np.ndarray, prefix: str, m: float) -> np.ndarray:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        head_dim = self.config.get("head_dim", self.config["hidden_size"] // heads)
        q, k, v = (
            oracle.linear(hidden, self.weights[f"{prefix}{x}_proj.weight"], self.weights[f"{prefix}{x}_proj.bias"])
            for x in "qkv"
        )
        chunk_size = self.dual_chunk["chunk_size"]
        out = oracle.pairwise_dca(
            q.reshape(-1, heads, head_dim),
            k.reshape(-1, kv_heads, head_dim),
            v.reshape(-1, kv_heads, head_dim),
            oracle.inverse_frequencies(head_dim, self.config["rope_theta"]),
            chunk_size - self.dual_chunk["local_size"],
            chunk_size,
            m * m / head_dim**0.5,
        )
        return oracle.linear(out.reshape(-1, heads * head_dim), self.weights[prefix + "o_proj.weight"])

    def _mlp(self, hidden: np.ndarray, prefix: str) -> np.ndarray:
        gate_up = [oracle.linear(hidden, self.weights[f"{prefix}{x}_proj.weight"]) for x in ("gate", "up")]
        return oracle.linear(
            oracle.silu_mul(np.concatenate(gate_up, axis=-1)), self.weights[prefix + "down_proj.weight"]
        )
