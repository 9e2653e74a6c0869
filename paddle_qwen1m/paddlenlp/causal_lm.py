"""Qwen2.5-1M as a PaddleNLP model: from_pretrained, forward and generate over this package's engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Callable, NoReturn, TypeVar

import numpy as np
import paddle
from paddlenlp.generation import GenerationConfig
from paddlenlp.transformers import PretrainedModel, Qwen2Config
from paddlenlp.transformers.configuration_utils import PretrainedConfig
from paddlenlp.transformers.model_utils import no_init_weights
from paddlenlp.utils.log import logger

from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.dtypes import QUANTIZATIONS, dtype_name
from paddle_qwen1m.engine import Engine, SamplingParams
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions, Face, describe_options, read_loading_options
from paddle_qwen1m.paddlenlp.batch import TokenIds, read_batch, read_positions
from paddle_qwen1m.paddlenlp.generation import OPTIONS, Defaults, Request, drawn_seed, read_request
from paddle_qwen1m.paddlenlp.hub import Checkpoint
from paddle_qwen1m.paddlenlp.loading import (
    choose_engine_options,
    choose_quantization,
    describe,
    find_budgets,
    find_checkpoint,
    join_ranks,
    model_config,
    name_weights,
    place_heads,
    read_defaults,
    read_weights,
    tell_weights,
)
from paddle_qwen1m.paddlenlp.scales import find_scales, use_scales
from paddle_qwen1m.parallel.group import ALONE, Group
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.text import decoder, stopper
from paddle_qwen1m.weights.digest import checkpoint_digest

Function = TypeVar("Function", bound=Callable[..., Any])


def _with_options(function: Function) -> Function:
    """Ends a docstring with the table of options; `python -OO` keeps no docstring to end."""
    if function.__doc__ is not None:
        function.__doc__ = function.__doc__.rstrip() + "\n\n" + describe_options(Face.LOADING, " " * 8)
    return function


class Qwen2OneMForCausalLM(PretrainedModel):  # type: ignore[misc]
    """Qwen2.5-1M for generation: a PaddleNLP model whose forward pass and generation are this package's engine.

    It runs on Paddle's device, a GPU where the package was built with CUDA kernels.
    config: PaddleNLP's Qwen2Config with a `dual_chunk_attention_config`. dtype: how weights are kept ("float32",
    "bfloat16", "float16"; default the config's). placement: which rank of the group has which heads. weights: names
    them in a prefix store. A CPU computes in float32 whatever they are kept in; a GPU computes in what they are kept
    in, and keeps float32 as bfloat16, which one line says.
    Building it directly, or by `from_config`, gives random weights: normal(0, initializer_range), reproducible by
    `paddle.seed`. `engine` is the engine for callers who need more than generate.
    """

    config_class = Qwen2Config
    base_model_prefix = "model"

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        dtype: str | None = None,
        options: EngineOptions | None = None,
        budgets: SparseBudgets | None = None,
        group: Group = ALONE,
        placement: Placement | None = None,
        weights: str = "",
    ) -> None:
        super().__init__(config)
        storage = dtype_name(dtype or config.dtype or "float32")
        options = options or EngineOptions()
        self.model = Qwen2OneM(model_config(config), storage, group, placement, options.quantization)
        if self.model.dtype != storage:
            logger.info(f"weights are kept as {self.model.dtype}: a GPU does not compute in {storage}")
        self.engine = Engine(self.model, options, budgets, weights=weights)
        self.use_defaults(Defaults.of(GenerationConfig.from_model_config(config)))
        self.eval()

    @classmethod
    @_with_options
    def from_pretrained(cls, name: str | os.PathLike[str] | Checkpoint, **options: Any) -> Qwen2OneMForCausalLM:
        """Load a checkpoint in the published safetensors layout from a directory or by its hub name.

        Raises TypeError for an option that does not exist, FileNotFoundError, HubError (an OSError),
        weights.CheckpointError, ValueError or job.StartError, each saying what does not fit. The options:

        """
        given = read_loading_options(options)
        checkpoint = find_checkpoint(name, given)
        described = describe(checkpoint, given.get("config"))
        config = Qwen2Config.from_dict(described)
        shapes = model_config(config)
        # Every row comes out as it would alone: a prefix is reused where nothing depends on who was there first.
        given["quantization"] = quantization = choose_quantization(checkpoint, given)
        own = {"enable_prefix_caching": True, "prefix_temperature_tolerance": 0.0}
        engine_options = choose_engine_options(shapes, {**own, **given})
        group = join_ranks(
            checkpoint,
            described,
            shapes,
            given.get("tensor_parallel_degree", 1),
            given.get("tensor_parallel_rank"),
        )
        budgets = (
            find_budgets(checkpoint, shapes, given.get("sparse_budgets"), engine_options)
            if engine_options.sparse
            else None
        )
        defaults = read_defaults(checkpoint, described)
        quantised = engine_options.kv_cache_dtype in QUANTIZATIONS
        named = quantised or engine_options.prefix_store is not None
        weights = checkpoint_digest(checkpoint.fetch_weights()) if named else ""
        scales = find_scales(checkpoint, shapes, given.get("kv_scales"), weights) if quantised else None
        with no_init_weights(_enable=True):
            model = cls(
                config,
                dtype=given.get("dtype"),
                options=engine_options,
                budgets=budgets,
                group=group,
                placement=place_heads(described, shapes, budgets, group),
                weights=name_weights(weights, quantization),
            )
        model.use_defaults(defaults)
        if group.rank == 0:
            tell_weights(model.model)
        read_weights(model.model, checkpoint, described, group)
        use_scales(model.engine, checkpoint, scales, weights)
        return model

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> Qwen2OneMForCausalLM:
        return cls(config, **kwargs)

    def _init_weights(self, layer: paddle.nn.Layer) -> None:
        """Random weights for the whole network, when PaddleNLP walks over its layers after building it."""
        if layer is not self.model:
            return
        random = np.random.default_rng(drawn_seed())
        with paddle.no_grad():
            for name, slot in self.model.slots().items():
                if name.endswith("norm.weight"):
                    values = np.ones(slot.held_shape, dtype=np.float32)
                elif name.endswith(".bias"):
                    values = np.zeros(slot.held_shape, dtype=np.float32)
                else:
                    values = random.standard_normal(slot.held_shape, dtype=np.float32) * self.config.initializer_range
                slot.write(values)

    def use_defaults(self, defaults: Defaults) -> None:
        """Make these generate()'s defaults; `generation_config` shows them and may be changed."""
        self.generation_config, self._defaults = defaults.config, defaults

    @paddle.no_grad()
    def forward(
        self,
        input_ids: TokenIds | Mapping[str, Any],
        positions: Sequence[int] | None = None,
        attention_mask: Any | None = None,
    ) -> paddle.Tensor:
        """Logits float32 [B, n, vocab] for the tokens after the given positions.

        input_ids: integers [N] or [B, N], or what a tokenizer returned. positions: n columns of input_ids; default: the
        last one alone, since the logits of every position of a long prompt do not fit any memory. attention_mask: 0 for
        padding, on the left only.
        """
        if isinstance(input_ids, Mapping):
            input_ids, attention_mask = _unpacked(input_ids, attention_mask)
        batch = read_batch(input_ids, attention_mask, self.config.vocab_size)
        columns = read_positions(positions, batch)
        self.engine.check_length(batch.ids.shape[1])
        wanted, order = np.unique(columns, return_inverse=True)
        rows = [
            self.engine.logits(prompt, [int(column) - start for column in wanted])[order]
            for prompt, start in zip(batch.prompts, batch.starts)
        ]
        return _tensor(np.stack(rows))

    @paddle.no_grad()
    def generate(
        self,
        input_ids: TokenIds | Mapping[str, Any] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Any | None = None,
        streamer: Any | None = None,
        tokenizer: Any | None = None,
        **options: Any,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Continue every prompt of a batch; each row comes out as it would alone.

        input_ids: integers [N] or [B, N], a tensor, an array or lists; or what a tokenizer returned, mask included.
        generation_config: in place of `self.generation_config` (the checkpoint's generation_config.json).
        attention_mask: 0 for padding, on the left only. Without one, pad_token_id at the start of a row is padding
            unless it is the one id that ends an answer, as in PaddleNLP.
        streamer: PaddleNLP's TextStreamer or TextIteratorStreamer, or anything with put(ids) and end(), for one prompt;
            it gets the new tokens, whatever its skip_prompt says.
        tokenizer: what makes text of tokens, for stop_strings.
        options, each over the config's: max_new_tokens (or max_length, which counts new tokens too), min_new_tokens (or
            min_length), do_sample or decode_strategy ("greedy_search", "sampling"), temperature (0 is greedy), top_k (0
            or -1 is off), top_p, min_p, repetition_penalty (over prompt and answer, greedy too), presence_penalty and
            frequency_penalty (over the answer), logit_bias ({id: added to its logit}, or sequence_bias of single
            tokens), bad_words_ids ([[id, ...], ...]: sequences that no answer has) and suppress_tokens ([id, ...]),
            stop_strings (a text or a list of texts that end an answer, with the token that completes one), eos_token_id
            (one or a list; -1 or [] for none), pad_token_id, seed (every row starts from it; without one each row draws
            its own from Paddle's generator, so that `paddle.seed` repeats a run), num_return_sequences (answers a
            prompt, with do_sample alone; answer j is what seed + j gives), trunc_input.
            Without max_new_tokens it is the file's, else 20, and at most what the prompt leaves of max_model_len.

        Returns ids int64 [B * num_return_sequences, N + new], prompt and answer, the answers of a prompt one after the
        other, shorter ones padded on the right with pad_token_id; and scores float32 [B * num_return_sequences, 1], the
        mean log-probability of a row's new tokens. trunc_input=True gives PaddleNLP's own form, ids of the new tokens
        alone, and so does `model.generation_config.trunc_input = True`; the trunc_input of another GenerationConfig is
        not looked at, since there True is the default and cannot be told from a choice.

        Raises TypeError or ValueError before any work for input and options that cannot be used. What the engine does
        not have (beams, typical_p, force_words_ids, ...) is refused by name.
        """
        if isinstance(input_ids, Mapping):
            inputs = {**input_ids, **options}
            input_ids, attention_mask = _unpacked(inputs, attention_mask)
            options = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        if input_ids is None:
            raise ValueError(f"generate() needs input_ids; its options are: {', '.join(OPTIONS)}")
        if generation_config is not None and not isinstance(generation_config, GenerationConfig):
            raise TypeError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}")
        request = self.read_request(options, generation_config)
        batch = read_batch(input_ids, attention_mask, self.config.vocab_size, request.padding, request.pad_is_end)
        samples = request.num_return_sequences
        prompts = [prompt for prompt in batch.prompts for _ in range(samples)]
        params = [self._params(request, prompt, row % samples) for row, prompt in enumerate(prompts)]
        if streamer is not None:
            _check_streamer(streamer, len(prompts))
        if request.stop_strings and tokenizer is None:
            if generation_config is not None or options.get("stop_strings"):
                raise ValueError("stop_strings needs the tokenizer: generate(..., tokenizer=tokenizer)")
            logger.warning("stop_strings of generation_config has no effect without generate(..., tokenizer=tokenizer)")

        ends = [_end_at(request.stop_strings, tokenizer) for _ in prompts]

        def hear(row: int, token: int) -> str | None:
            if streamer is not None:
                streamer.put(_tensor(np.array([[token]])))
            return ends[row](token)

        try:
            if streamer is not None and getattr(streamer, "skip_prompt", False):
                streamer.put(_tensor(prompts[0][None]))
            completions = self.engine.generate(prompts, params, bad_words=request.bad_words, on_token=hear)
        finally:
            if streamer is not None:
                streamer.end()

        longest = max(len(completion.token_ids) for completion in completions)
        answers = np.full([len(prompts), longest], request.pad_token_id, dtype=np.int64)
        for row, completion in enumerate(completions):
            answers[row, : len(completion.token_ids)] = completion.token_ids
        whole = np.concatenate([np.repeat(batch.ids, samples, axis=0), answers], axis=1)
        scores = np.array([[np.mean(completion.logprobs)] for completion in completions], dtype=np.float32)
        return _tensor(answers if request.trunc_input else whole), _tensor(scores)

    def read_request(self, options: Mapping[str, Any], generation_config: GenerationConfig | None = None) -> Request:
        """What `generate` would do with these options. Raises as it does."""
        return read_request(
            self._defaults,
            self.generation_config if generation_config is None else generation_config,
            options,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            vocab_size=self.config.vocab_size,
        )

    def _params(self, request: Request, prompt: np.ndarray, sample: int) -> SamplingParams:
        """The params of one row, answer number `sample` of its prompt. ValueError where it does not fit."""
        params = request.params_for(len(prompt), self.engine.max_model_len)
        self.engine.check_length(len(prompt), params.max_tokens or 0)
        if params.temperature == 0:
            return params
        return replace(params, seed=drawn_seed() if params.seed is None else (params.seed + sample) % 2**63)

    def release_cache(self) -> None:
        """Give back the KV cache, which outlives calls; the next call makes one again."""
        self.engine.release_cache()

    def save_pretrained(self, *_arguments: Any, **_options: Any) -> NoReturn:
        """Always raises: the weights are those of the checkpoint, and stay there as they are."""
        raise NotImplementedError(
            "this class reads the published layout and writes nothing: copy the checkpoint's directory instead"
        )


def _unpacked(inputs: Mapping[str, Any], attention_mask: Any | None) -> tuple[Any, Any | None]:
    """input_ids and attention_mask of what a tokenizer returned; a mask given beside it holds."""
    if "input_ids" not in inputs:
        raise ValueError(f"the inputs have no input_ids, but: {', '.join(inputs)}")
    return inputs["input_ids"], inputs.get("attention_mask") if attention_mask is None else attention_mask


def _end_at(stop: Sequence[str], tokenizer: Any | None) -> Callable[[int], str | None]:
    """What takes an answer's tokens, and returns the text among `stop` that one of them completes."""
    if not stop or tokenizer is None:
        return lambda token: None
    return stopper(decoder(tokenizer, skip_special_tokens=False), stop)


def _check_streamer(streamer: Any, rows: int) -> None:
    methods = [getattr(streamer, name, None) for name in ("put", "end")]
    if isinstance(streamer, type) or not all(map(callable, methods)):
        raise TypeError(
            "a streamer is an object with put(ids) and end(): TextStreamer(tokenizer) prints, "
            "TextIteratorStreamer(tokenizer) is iterated in another thread, both of paddlenlp.generation; got "
            f"{streamer!r}"
        )
    if rows > 1:
        raise ValueError(f"a streamer shows one answer, got a batch of {rows} prompts")


def _tensor(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(array, place=paddle.CPUPlace())
