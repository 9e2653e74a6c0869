"""The one forward pass: Qwen2 with dual chunk attention over a paged cache."""

from __future__ import annotations

import paddle
from paddle import nn

from paddle_qwen1m import ops
from paddle_qwen1m.attention.attend import LayerBudgets, Observer, attend
from paddle_qwen1m.attention.step import Step
from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.config import ModelConfig, SparseBudgets
from paddle_qwen1m.weights import Slot


def weight(shape: list[int], dtype: str) -> paddle.Tensor:
    """Memory for a weight; the loader fills it."""
    tensor = paddle.empty(shape, dtype)
    tensor.stop_gradient = True
    return tensor


def device_dtypes(dtype: str) -> tuple[str, str]:
    """How weights of `dtype` are kept on Paddle's current device, and what is computed in.

    A CPU keeps them as they are and computes in float32; a GPU computes in what it keeps, float32 as bfloat16.
    """
    if not ops.on_gpu():
        return dtype, "float32"
    kept = "bfloat16" if dtype == "float32" else dtype
    return kept, kept


class DecoderLayer(nn.Layer):
    """Pre-norm attention and SwiGLU. The projections of q, k, v and of gate, up are one weight each."""

    def __init__(self, config: ModelConfig, number: int, dtype: str) -> None:
        super().__init__()
        self.config = config
        self.number = number
        hidden, inner = config.hidden_size, config.intermediate_size
        self.register_buffer("input_norm", weight([hidden], dtype))
        self.register_buffer("qkv_weight", weight([config.qkv_width, hidden], dtype))
        self.register_buffer("qkv_bias", weight([config.qkv_width], dtype))
        self.register_buffer("output_weight", weight([hidden, config.num_heads * config.head_dim], dtype))
        self.register_buffer("post_attention_norm", weight([hidden], dtype))
        self.register_buffer("gate_up_weight", weight([2 * inner, hidden], dtype))
        self.register_buffer("down_weight", weight([hidden, inner], dtype))

    def attention(
        self,
        hidden: paddle.Tensor,
        step: Step,
        cache: PagedCache,
        budgets: LayerBudgets | None,
        observe: Observer | None,
    ) -> paddle.Tensor:
        keys, values = cache.keys[self.number], cache.values[self.number]
        qkv = ops.linear(hidden, self.qkv_weight)
        q = ops.rotate_and_cache(qkv, self.qkv_bias, step.rotary, step.slots, keys, values)
        chunk_len = self.config.dual_chunk.chunk_len
        out = attend(q, qkv, self.qkv_bias, keys, values, step, chunk_len, self.number, budgets, observe)
        return ops.linear(out.reshape([hidden.shape[0], -1]), self.output_weight)

    def mlp(self, hidden: paddle.Tensor) -> paddle.Tensor:
        return ops.linear(ops.silu_mul(ops.linear(hidden, self.gate_up_weight)), self.down_weight)

    def slots(self) -> dict[str, Slot]:
        """Where the layer's published tensors go."""
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        slots = {
            "input_layernorm.weight": Slot(self.input_norm, 0, (hidden,)),
            "self_attn.o_proj.weight": Slot(self.output_weight, 0, (hidden, query)),
            "post_attention_layernorm.weight": Slot(self.post_attention_norm, 0, (hidden,)),
            "mlp.gate_proj.weight": Slot(self.gate_up_weight, 0, (inner, hidden)),
            "mlp.up_proj.weight": Slot(self.gate_up_weight, inner, (inner, hidden)),
            "mlp.down_proj.weight": Slot(self.down_weight, 0, (hidden, inner)),
        }
        for name, row, rows in (("q", 0, query), ("k", query, key), ("v", query + key, key)):
            slots[f"self_attn.{name}_proj.weight"] = Slot(self.qkv_weight, row, (rows, hidden))
            slots[f"self_attn.{name}_proj.bias"] = Slot(self.qkv_bias, row, (rows,))
        return {f"model.layers.{self.number}.{name}": slot for name, slot in slots.items()}


class Qwen2OneM(nn.Layer):
    """Qwen2 for 1M tokens, on Paddle's current device. `dtype` is how the weights are kept, `compute_dtype` the type of
    the activations: see `device_dtypes`.
    """

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        super().__init__()
        self.config = config
        self.on_gpu = ops.on_gpu()
        dtype, self.compute_dtype = device_dtypes(dtype)
        self.dtype = dtype
        self.register_buffer("embedding", weight([config.vocab_size, config.hidden_size], dtype))
        self.layers = nn.LayerList([DecoderLayer(config, number, dtype) for number in range(config.num_layers)])
        self.register_buffer("norm", weight([config.hidden_size], dtype))
        if config.tie_word_embeddings:
            self.head = self.embedding
        else:
            self.register_buffer("head", weight([config.vocab_size, config.hidden_size], dtype))

    def forward(
        self,
        step: Step,
        cache: PagedCache,
        budgets: list[LayerBudgets] | None = None,
        observe: Observer | None = None,
    ) -> paddle.Tensor | None:
        """Fills the cache; logits float32 [n, vocab] of the rows whose logits the step wants, None without any."""
        eps = self.config.rms_norm_eps
        residual = ops.embedding(step.ids, self.embedding)
        normed = ops.rms_norm(residual, self.layers[0].input_norm, eps)
        for number, layer in enumerate(self.layers):
            mixed = layer.attention(normed, step, cache, budgets[number] if budgets else None, observe)
            normed = ops.add_rms_norm(mixed, residual, layer.post_attention_norm, eps)
            delta = layer.mlp(normed)
            following = self.layers[number + 1].input_norm if number + 1 < len(self.layers) else self.norm
            normed = ops.add_rms_norm(delta, residual, following, eps)
        if step.lengths is None:
            if step.logit_rows is None:
                return None
            normed = ops.gather_rows(normed, step.logit_rows)
        return ops.linear(normed, self.head, float32=True)

    def slots(self) -> dict[str, Slot]:
        """Every published tensor's name with where it goes."""
        config = self.config
        vocabulary = (config.vocab_size, config.hidden_size)
        slots = {
            "model.embed_tokens.weight": Slot(self.embedding, 0, vocabulary),
            "model.norm.weight": Slot(self.norm, 0, (config.hidden_size,)),
        }
        if not config.tie_word_embeddings:
            slots["lm_head.weight"] = Slot(self.head, 0, vocabulary)
        for layer in self.layers:
            slots.update(layer.slots())
        return slots


def layer_budgets(budgets: SparseBudgets) -> list[LayerBudgets]:
    return [LayerBudgets(budgets, layer) for layer in range(len(budgets.vertical))]
