"""The one forward pass: Qwen2 with dual chunk attention over a paged cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from typing import Callable

import numpy as np
import paddle
from paddle import nn

from paddle_qwen1m import ops
from paddle_qwen1m.attention.attend import attend
from paddle_qwen1m.attention.selector import Projected, Selector
from paddle_qwen1m.attention.step import Step
from paddle_qwen1m.cache import LayerCache
from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.dtypes import itemsize
from paddle_qwen1m.parallel.group import ALONE, Group
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.parallel.split import local_config
from paddle_qwen1m.weights import Slot
from paddle_qwen1m.weights.eight_bit import SCALES, choose_blocks, linears
from paddle_qwen1m.weights.tensors import published_tensors


def weight(shape: list[int], dtype: str) -> paddle.Tensor:
    """Memory for a weight; the loader fills it."""
    tensor = paddle.empty(shape, dtype)
    tensor.stop_gradient = True
    return tensor


def vocabulary_table(config: ModelConfig, group: Group, dtype: str) -> paddle.Tensor:
    """Memory for a rank's share of the embedding or the head, as many rows on every rank.

    Rows behind the vocabulary, which the last ranks have where it does not divide, are zeros; their logits are cut off.
    """
    share = local_config(config, group.degree).vocab_size
    table = weight([share, config.hidden_size], dtype)
    spare = min(share, max(0, (group.rank + 1) * share - config.vocab_size))
    if spare:
        zeros = paddle.to_tensor(np.zeros([spare, config.hidden_size], np.float32), place=paddle.CPUPlace())
        table[share - spare :].copy_(zeros.astype(dtype), True)
    return table


def device_dtypes(dtype: str) -> tuple[str, str]:
    """How weights of `dtype` are kept on Paddle's current device, and what is computed in.

    A CPU keeps them as they are and computes in float32; a GPU computes in what it keeps, float32 as bfloat16.
    """
    if not ops.on_gpu():
        return dtype, "float32"
    kept = "bfloat16" if dtype == "float32" else dtype
    return kept, kept


def unrounded_dtype(model: Qwen2OneM) -> str:
    """Of keys and values that an 8-bit cache does not round: the type of the weights, where that has 16 bits."""
    return model.dtype if itemsize(model.dtype) == 2 else "bfloat16"


class DecoderLayer(nn.Layer):
    """Pre-norm attention and SwiGLU of a rank's share. The projections of q, k, v and of gate, up are a weight each.

    quantization: how the weights of its four linears are kept, fp8 or int8; None: as `dtype`, like the rest.
    """

    def __init__(
        self, config: ModelConfig, number: int, dtype: str, group: Group, quantization: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.local = local = local_config(config, group.degree)
        self.group = group
        self.number = number
        self.quantization = quantization
        self.register_buffer("input_norm", weight([local.hidden_size], dtype))
        self._register_linear("qkv_weight", dtype)
        self.register_buffer("qkv_bias", weight([local.qkv_width], dtype))
        self._register_linear("output_weight", dtype)
        self.register_buffer("post_attention_norm", weight([local.hidden_size], dtype))
        self._register_linear("gate_up_weight", dtype)
        self._register_linear("down_weight", dtype)

    def _register_linear(self, name: str, dtype: str) -> None:
        heights, widths = linears(self.local)[name]
        shape = [sum(heights), sum(widths)]
        if self.quantization is None:
            self.register_buffer(name, weight(shape, dtype))
            return
        blocks = choose_blocks(self.quantization, heights, widths)
        self.register_buffer(name, weight(shape, "uint8"))
        self.register_buffer(f"{name}{SCALES}", weight([*blocks.grid((shape[0], shape[1]))], "float32"))

    def linear(self, x: paddle.Tensor, name: str) -> paddle.Tensor:
        """x [T, K] times the transpose of the weight of that name [N, K]: activations [T, N]."""
        held = getattr(self, name)
        if self.quantization is not None:
            held = ops.Weight8(held, getattr(self, f"{name}{SCALES}"), self.quantization)
        return ops.linear(x, held)

    def project(self, hidden: paddle.Tensor, step: Step, cache: LayerCache) -> tuple[paddle.Tensor, Projected]:
        """Queries [V, T, H, D], rotated, and what they are of. Keys and values go to the cache."""
        projected = Projected(self.linear(hidden, "qkv_weight"), self.qkv_bias)
        q = ops.rotate_and_cache(*projected, step.rotary, step.slots, cache.keys, cache.values, cache.quantised)
        return q, projected

    def attention(
        self,
        hidden: paddle.Tensor,
        step: Step,
        cache: LayerCache,
        selector: Selector | None,
        rows: paddle.Tensor | None = None,
    ) -> Generator[None, None, paddle.Tensor]:
        """What attention adds to `rows` int64 [n] of the step, by default to all: [n, hidden]."""
        q, projected = self.project(hidden, step, cache)
        out = (yield from attend(q, projected, cache, step, selector)).reshape([hidden.shape[0], -1])
        if rows is not None:
            out = ops.gather_rows(out, rows)
        return self.group.all_reduce(self.linear(out, "output_weight"))

    def mlp(self, hidden: paddle.Tensor) -> paddle.Tensor:
        return self.group.all_reduce(self.linear(ops.silu_mul(self.linear(hidden, "gate_up_weight")), "down_weight"))


AttentionObserver = Callable[[DecoderLayer, paddle.Tensor, paddle.Tensor], None]
"""Called with (layer, what its attention got, what it gave), activations [T, hidden] both."""


class Qwen2OneM(nn.Layer):
    """Qwen2 for 1M tokens, on Paddle's current device. `dtype` is how the weights are kept, `compute_dtype` the type of
    the activations: see `device_dtypes`. In a tensor parallel group it is one rank's share: `config` is that of the
    whole model, `local` that of the share. placement: which rank has which heads, by default in published order.
    quantization: how the layers' linears are kept, fp8 or int8; None: as the rest. ValueError for one that the shapes
    do not allow.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        group: Group = ALONE,
        placement: Placement | None = None,
        quantization: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.group = group
        self.placement = placement or Placement.published(config, group.degree)
        assert self.placement.degree == group.degree
        self.local = local_config(config, group.degree)
        self.on_gpu = ops.on_gpu()
        dtype, self.compute_dtype = device_dtypes(dtype)
        self.dtype, self.quantization = dtype, quantization
        self.register_buffer("embedding", vocabulary_table(config, group, dtype))
        self.layers = nn.LayerList(
            [DecoderLayer(config, number, dtype, group, quantization) for number in range(config.num_layers)]
        )
        self.register_buffer("norm", weight([config.hidden_size], dtype))
        if config.tie_word_embeddings:
            self.head = self.embedding
        else:
            self.register_buffer("head", vocabulary_table(config, group, dtype))

    def layer_by_layer(
        self,
        step: Step,
        caches: Sequence[LayerCache],
        selectors: Sequence[Selector] | None = None,
        observe: AttentionObserver | None = None,
    ) -> Generator[None, None, paddle.Tensor | None]:
        """The forward pass. Fills the caches, one a layer; pauses behind each layer, and in it behind each group of its
        attention: at the same points on every rank, with no collective under way. observe: sees each layer's attention,
        of a step that wants no logits.

        Returns what `logits` takes for the rows [n, hidden] whose logits the step wants, None without any. In a
        prefill's last layer the other rows only have their keys and values cached.
        """
        assert observe is None or step.logit_rows is None
        eps, vocabulary, group = self.config.rms_norm_eps, self.config.vocab_size, self.group
        first = group.rank * self.local.vocab_size
        residual = group.all_reduce(ops.embedding(step.ids, self.embedding, first=first, vocabulary=vocabulary))
        normed = ops.rms_norm(residual, self.layers[0].input_norm, eps)
        for number, layer in enumerate(self.layers):
            selector, rows = selectors[number] if selectors else None, None
            if step.lengths is None and observe is None and number + 1 == len(self.layers):
                if step.logit_rows is None:
                    group.mark(layer.project(normed, step, caches[number])[0])
                    yield
                    return None
                step, rows = step.of_last_layer(), step.logit_rows
                residual = ops.gather_rows(residual, rows)
            following = self.layers[number + 1].input_norm if number + 1 < len(self.layers) else self.norm
            # What is added has no name: its memory is free again while the next is computed.
            normed = ops.add_rms_norm(
                (yield from _observed(layer, normed, step, caches[number], selector, rows, observe)),
                residual,
                layer.post_attention_norm,
                eps,
            )
            normed = ops.add_rms_norm(layer.mlp(normed), residual, following, eps)
            group.mark(normed)
            yield
        if step.lengths is not None:
            return normed
        return None if step.logit_rows is None else normed[: step.num_logits]

    def logits(self, rows: paddle.Tensor) -> paddle.Tensor:
        """Logits float32 [n, vocab] of rows [n, hidden] that a forward pass gave."""
        return self.group.gather_columns(ops.linear(rows, self.head, float32=True), self.config.vocab_size)

    def slots(self) -> dict[str, Slot]:
        """Every published tensor's name with where it, or the rank's part of it, goes."""
        parameters, slots = dict(self.named_buffers()), {}
        taken: Counter[str] = Counter()
        for tensor in published_tensors(self.config).values():
            if tensor.parameter is None:
                continue
            part = tensor.part(self.placement, self.group.rank)
            scales = parameters.get(f"{tensor.parameter}{SCALES}")
            slot = Slot(
                parameters[tensor.parameter],
                taken[tensor.parameter],
                tensor.shape,
                part,
                None if scales is None else ops.Weight8(parameters[tensor.parameter], scales, str(self.quantization)),
            )
            taken[tensor.parameter] += slot.held_shape[0]
            slots[tensor.name] = slot
        return slots


def _observed(
    layer: DecoderLayer,
    normed: paddle.Tensor,
    step: Step,
    cache: LayerCache,
    selector: Selector | None,
    rows: paddle.Tensor | None,
    observe: AttentionObserver | None,
) -> Generator[None, None, paddle.Tensor]:
    out = yield from layer.attention(normed, step, cache, selector, rows)
    if observe is not None:
        observe(layer, normed, out)
    return out
