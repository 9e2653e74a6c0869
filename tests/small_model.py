"""A random two-layer model whose DCA chunks are 128 tokens, and sparse budgets for it."""

from __future__ import annotations

import numpy as np
import paddle

from paddle_qwen1m.config import DualChunkConfig, ModelConfig, SparseBudgets
from paddle_qwen1m.model import Qwen2OneM

CONFIG = ModelConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    hidden_size=64,
    intermediate_size=96,
    vocab_size=101,
    rms_norm_eps=1e-6,
    rope_theta=1e5,
    max_position_embeddings=1 << 20,
    tie_word_embeddings=False,
    dtype="float32",
    dual_chunk=DualChunkConfig(chunk_size=160, local_size=32, original_max_position_embeddings=160),
)
BUDGETS = SparseBudgets.uniform(40, 110, CONFIG.num_layers, CONFIG.num_heads)


def random_model(rng: np.random.Generator, config: ModelConfig = CONFIG) -> Qwen2OneM:
    """Random weights, scaled so that attention is far from uniform."""
    model = Qwen2OneM(config, "float32")
    for name, buffer in model.named_buffers():
        numbers = rng.standard_normal(buffer.shape) * (1.0 if "embedding" in name or "norm" in name else 0.25)
        buffer.copy_(paddle.to_tensor(numbers.astype(np.float32)), False)
    return model
