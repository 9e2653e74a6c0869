"""The one forward pass: Qwen2 with dual chunk attention over a paged cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from functools import partial
from typing import Callable

import numpy as np
import paddle
from paddle import nn

from paddle_qwen1m import ops
from paddle_qwen1m.attention.attend import attend, decode, keep
from paddle_qwen1m.attention.selector import Projected, Selector
from paddle_qwen1m.attention.step import Step
from paddle_qwen1m.cache import LayerCache
from paddle_qwen1m.config import LANE_ROWS, LANE_ROWS_IN_FP8, ModelConfig
from paddle_qwen1m.dtypes import FP8, dtype_name, itemsize
from paddle_qwen1m.parallel.group import ALONE, Group
from paddle_qwen1m.parallel.lanes import Activations, Lanes, Product
from paddle_qwen1m.parallel.mailboxes import Mailboxes
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.parallel.split import local_config
from paddle_qwen1m.weights import Slot
from paddle_qwen1m.weights.eight_bit import FILE_BLOCKS, SCALES, choose_blocks, linears
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


def multiplies_in_fp8(local: ModelConfig, quantization: str | None) -> bool:
    """Whether many rows of a rank's share are multiplied in FP8: by weights that are, in blocks that Hopper takes."""
    if quantization != FP8 or not ops.on_gpu() or not ops.multiplies_rows8():
        return False
    return all(choose_blocks(FP8, *shape) == FILE_BLOCKS[FP8] for shape in linears(local).values())


def unrounded_dtype(model: Qwen2OneM) -> str:
    """Of keys and values that an 8-bit cache does not round: the type of the weights, where that has 16 bits."""
    return model.dtype if itemsize(model.dtype) == 2 else "bfloat16"


class DecoderLayer(nn.Layer):
    """Pre-norm attention and SwiGLU of a rank's share. The projections of q, k, v and of gate, up are a weight each.

    quantization: how the weights of its four linears are kept, fp8 or int8; None: as `dtype`, like the rest. in_fp8:
    many rows are multiplied in FP8, too.
    """

    def __init__(
        self,
        config: ModelConfig,
        number: int,
        dtype: str,
        group: Group,
        quantization: str | None = None,
        *,
        in_fp8: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.local = local = local_config(config, group.degree)
        self.number = number
        self.quantization, self.in_fp8 = quantization, in_fp8
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

    def linear(self, x: Activations, name: str) -> paddle.Tensor:
        """x [T, K] times the transpose of the weight of that name [N, K]: activations [T, N]."""
        return self._multiply(x, self._held(name))

    def product(self, name: str, times: int, mailboxes: Mailboxes | None = None) -> Product:
        """`linear` by the weight of that name, for so many calls, whose results are summed over the ranks. mailboxes:
        by which they may be sent.
        """
        held = self._held(name, times)
        if mailboxes is not None and self.quantization is None:
            return partial(mailboxes.product, weight=held)
        return lambda x: self._multiply(x, held)

    def gated_product(self, times: int) -> Product:
        """The MLP's first product and SiLU, for so many calls: what its second product takes."""
        held = self._held("gate_up_weight", times)

        def gated(x: Activations) -> Activations:
            rows8 = self._rows8(x)
            if rows8 is None:
                return ops.gated_linear(x, held)
            assert isinstance(rows8, ops.Rows8) and isinstance(held, ops.Weight8), "a lane's rows are in one part"
            return ops.gated_product8(rows8, held)

        return gated

    def _held(self, name: str, times: int = 1) -> paddle.Tensor | ops.Weight8:
        """A weight for so many products. What is widened for several is widened once."""
        held = getattr(self, name)
        if self.quantization is None:
            return held
        kind = ops.WidenedOnce if times > 1 else ops.Weight8
        return kind(held, getattr(self, f"{name}{SCALES}"), self.quantization)

    def _multiply(self, x: Activations, held: paddle.Tensor | ops.Weight8) -> paddle.Tensor:
        rows8 = self._rows8(x)
        if rows8 is None:
            return ops.linear(x, held)
        assert isinstance(held, ops.Weight8), "rows are in FP8 where weights are"
        return ops.product8(rows8, held, dtype_name(self.qkv_bias.dtype))

    def _rows8(self, x: Activations) -> ops.Rows8 | list[ops.Rows8] | None:
        """x in FP8, where as many rows are multiplied so."""
        if not isinstance(x, paddle.Tensor):
            return x
        return ops.round_rows(x) if self.takes_rows8(x.shape[0]) else None

    def takes_rows8(self, rows: int) -> bool:
        """Whether so many rows are multiplied in FP8."""
        return self.in_fp8 and rows > ops.FEW_ROWS_OF_8_BITS

    def project(self, hidden: Activations) -> Projected:
        """The projections of rows [T, hidden]."""
        return Projected(self.linear(hidden, "qkv_weight"), self.qkv_bias, self.local.num_heads)

    def attention(
        self,
        hidden: Activations,
        step: Step,
        cache: LayerCache,
        selector: Selector | None,
        rows: paddle.Tensor | None = None,
    ) -> Generator[None, None, paddle.Tensor]:
        """What the rank's heads make of `rows` int64 [n] of the step, by default of all, from its rows [T, hidden]: [n,
        H D], to be projected by "output_weight". Rows that another rank with the same heads attends for are zeros. Keys
        and values of all rows go to the cache.
        """
        if self._rotates_at_once(hidden, step, cache):
            weights, where = (self.qkv_weight, self.qkv_bias), (step.rotary, step.slots, cache.keys, cache.values)
            heads = decode(ops.rotating_linear(hidden, *weights, *where), cache, step)
        else:
            projected = self.project(hidden)
            del hidden  # the memory of what is not needed is free again while the next is computed
            heads = yield from attend(projected, cache, step, selector)
        heads = heads.reshape([heads.shape[0], -1])
        own = rows if step.attended is None else step.attended
        return heads if own is None else ops.gather_rows(heads, own)

    def _rotates_at_once(self, hidden: Activations, step: Step, cache: LayerCache) -> bool:
        """Whether a decode step's projections are rotated, and its keys cached, as they are made."""
        if step.lengths is None or self.quantization is not None or cache.quantised is not None:
            return False
        return isinstance(hidden, paddle.Tensor) and hidden.shape[0] <= ops.FEW_ROWS


AttentionObserver = Callable[[DecoderLayer, paddle.Tensor, paddle.Tensor], None]
"""Called with (layer, what its attention got, activations [T, hidden], what the rank's heads made of it, [T, H D])."""


class Qwen2OneM(nn.Layer):
    """Qwen2 for 1M tokens, on Paddle's current device. `dtype` is how the weights are kept, `compute_dtype` the type of
    the activations: see `device_dtypes`. In a tensor parallel group it is one rank's share: `config` is that of the
    whole model, `local` that of the share. placement: which rank has which heads, by default in published order.
    quantization: how the layers' linears are kept, fp8 or int8; None: as the rest. ValueError for one that the shapes
    do not allow. in_fp8: whether many rows are multiplied in FP8; else weights of 8 bits are widened.
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
        self.in_fp8 = multiplies_in_fp8(self.local, quantization)
        self.register_buffer("embedding", vocabulary_table(config, group, dtype))
        self.layers = nn.LayerList(
            [
                DecoderLayer(config, number, dtype, group, quantization, in_fp8=self.in_fp8)
                for number in range(config.num_layers)
            ]
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
        config, is_decode = self.config, step.lengths is not None
        shape, at_once = (step.ids.shape[0], config.hidden_size), LANE_ROWS_IN_FP8 if self.in_fp8 else LANE_ROWS
        with Lanes(self.group, *shape, config.rms_norm_eps, split=not is_decode, at_once=at_once) as lanes:
            return (yield from self._through(lanes, step, caches, selectors, observe))

    def _through(
        self,
        lanes: Lanes,
        step: Step,
        caches: Sequence[LayerCache],
        selectors: Sequence[Selector] | None,
        observe: AttentionObserver | None,
    ) -> Generator[None, None, paddle.Tensor | None]:
        """`layer_by_layer`, on these lanes."""
        assert observe is None or step.logit_rows is None
        takes_rows8 = self.layers[0].takes_rows8 if observe is None else None  # who observes sees what is not rounded
        lanes.add(step.ids, [self._embed], self.layers[0].input_norm, takes_rows8)
        normed = lanes.all_rows()
        for number, layer in enumerate(self.layers):
            selector, rows = selectors[number] if selectors else None, None
            is_last = number + 1 == len(self.layers)
            if step.lengths is None and observe is None and is_last:
                if step.logit_rows is None:
                    projected = layer.project(normed)
                    keep(projected, caches[number], step)
                    self.group.mark(projected.qkv)
                    yield
                    return None
                step, rows = step.of_last_layer(), step.logit_rows
                lanes = lanes.of_rows(rows)
            following = self.norm if is_last else self.layers[number + 1].input_norm
            attention = layer.attention(normed, step, caches[number], selector, rows)
            if observe is None:
                del normed  # the layer's alone
            heads = yield from attention
            if observe is not None:
                observe(layer, normed, heads)
                del normed
            # What a product has widened is gone with it.
            times, boxes = lanes.count, lanes.mailboxes
            lanes.add(heads, [layer.product("output_weight", times, boxes)], layer.post_attention_norm, takes_rows8)
            del heads
            lanes.add(
                None,
                [layer.gated_product(times), layer.product("down_weight", times, boxes)],
                following,
                None if is_last else takes_rows8,
            )
            normed = lanes.all_rows()
            self._mark(normed)
            yield
        if step.lengths is not None:
            return normed
        return None if step.logit_rows is None else normed[: step.num_logits]

    def _mark(self, rows: Activations) -> None:
        """For other ranks to see that this one has come so far."""
        last = rows[-1] if isinstance(rows, list) else rows
        self.group.mark(last.numbers if isinstance(last, ops.Rows8) else last)

    def _embed(self, ids: paddle.Tensor) -> paddle.Tensor:
        """The rank's part of the residual stream before the first layer."""
        first, vocabulary = self.group.rank * self.local.vocab_size, self.config.vocab_size
        return ops.embedding(ids, self.embedding, first=first, vocabulary=vocabulary)

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
