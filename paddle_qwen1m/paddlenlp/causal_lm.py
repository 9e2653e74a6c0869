"""Qwen2.5-1M as a PaddleNLP model: from_pretrained, forward and generate over this package's engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
from paddle_qwen1m.engine import Engine
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import Dtype, EngineOptions, describe_loading_options, read_loading_options
from paddle_qwen1m.paddlenlp.generation import (
    OPTIONS,
    TokenIds,
    drawn_seed,
    read_batch,
    read_positions,
    read_request,
)
from paddle_qwen1m.paddlenlp.hub import Checkpoint
from paddle_qwen1m.paddlenlp.loading import (
    GENERATION_CONFIG,
    choose_engine_options,
    describe,
    find_budgets,
    find_checkpoint,
    join_ranks,
    model_config,
    read_generation_config,
    read_weights,
)
from paddle_qwen1m.parallel.group import ALONE, Group

Function = TypeVar("Function", bound=Callable[..., Any])


def _with_options(function: Function) -> Function:
    """Ends a docstring with the table of options; `python -OO` keeps no docstring to end."""
    if function.__doc__ is not None:
        function.__doc__ = function.__doc__.rstrip() + "\n\n" + describe_loading_options(" " * 8)
    return function


class Qwen2OneMForCausalLM(PretrainedModel):  # type: ignore[misc]
    """Qwen2.5-1M for generation: a PaddleNLP model whose forward pass and generation are this package's engine.

    It runs on Paddle's device, a GPU where the package was built with CUDA kernels.
    config: PaddleNLP's Qwen2Config with a `dual_chunk_attention_config`. dtype: how weights are kept ("float32",
    "bfloat16", "float16"; default the config's). A CPU computes in float32 whatever they are kept in; a GPU computes in
    what they are kept in, and keeps float32 as bfloat16, which one line says.
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
    ) -> None:
        super().__init__(config)
        storage = Dtype().read("dtype", dtype or config.dtype or "float32")
        self.model = Qwen2OneM(model_config(config), storage, group)
        if self.model.dtype != storage:
            logger.info(f"weights are kept as {self.model.dtype}: a GPU does not compute in {storage}")
        self.engine = Engine(self.model, options or EngineOptions(), budgets)
        self.use_generation_config(GenerationConfig.from_model_config(config))
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
        engine_options = choose_engine_options(shapes, given)
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
        generation = checkpoint.extra_file(GENERATION_CONFIG)
        with no_init_weights(_enable=True):
            model = cls(config, dtype=given.get("dtype"), options=engine_options, budgets=budgets, group=group)
        if generation is not None:
            model.use_generation_config(read_generation_config(generation))
        read_weights(model.model, checkpoint, described, group)
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
                slot.write(paddle.to_tensor(values, place=paddle.CPUPlace()).astype(slot.tensor.dtype))

    def use_generation_config(self, generation_config: GenerationConfig) -> None:
        """Make these generate()'s defaults; prompt and answer are returned unless trunc_input is set afterwards."""
        generation_config.trunc_input = False
        self.generation_config = generation_config
        self._known = generation_config, generation_config.decode_strategy

    @paddle.no_grad()
    def forward(
        self,
        input_ids: TokenIds,
        positions: Sequence[int] | None = None,
        attention_mask: Any | None = None,
    ) -> paddle.Tensor:
        """Logits float32 [B, n, vocab] for the tokens after the given positions.

        input_ids: integers [N] or [B, N]. positions: n columns of input_ids; default: the last one alone, since the
        logits of every position of a long prompt do not fit any memory. attention_mask: 0 for padding, on the left
        only.
        """
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
        input_ids: TokenIds | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Any | None = None,
        streamer: Any | None = None,
        **options: Any,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Continue every prompt of a batch; each row comes out as it would alone.

        input_ids: integers [N] or [B, N], a tensor, an array or lists.
        generation_config: in place of `self.generation_config` (the checkpoint's generation_config.json).
        attention_mask: 0 for padding, on the left only.
        streamer: PaddleNLP's TextStreamer or TextIteratorStreamer, for one prompt; it gets the new tokens, whatever its
            skip_prompt says.
        options, each over the config's: max_new_tokens (or max_length, which counts new tokens too), min_new_tokens (or
            min_length), do_sample or decode_strategy ("greedy_search", "sampling"), temperature (0 is greedy), top_k,
            top_p, repetition_penalty (over prompt and answer, greedy too), eos_token_id (one or a list; [] for none),
            pad_token_id, seed (every row starts from it; without one each row draws its own from Paddle's generator, so
            that `paddle.seed` repeats a run), trunc_input. Beams and several answers a prompt do not exist.

        Returns ids int64 [B, N + new], prompt and answer, shorter answers padded on the right with pad_token_id, and
        scores float32 [B, 1], the mean log-probability of a row's new tokens. trunc_input=True gives PaddleNLP's own
        form, ids of the new tokens alone, and so does `model.generation_config.trunc_input = True`; the trunc_input of
        another GenerationConfig is not looked at, since there True is the default and cannot be told from a choice.

        Raises TypeError or ValueError before any work for input and options that cannot be used.
        """
        if input_ids is None:
            raise ValueError(f"generate() needs input_ids; its options are: {', '.join(OPTIONS)}")
        if generation_config is not None and not isinstance(generation_config, GenerationConfig):
            raise TypeError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}")
        batch = read_batch(input_ids, attention_mask, self.config.vocab_size)
        base = self.generation_config if generation_config is None else generation_config
        known, usual_strategy = self._known
        request = read_request(
            base,
            options,
            usual_strategy=usual_strategy if base is known else None,
            trunc_input=base is known and base.trunc_input,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            vocab_size=self.config.vocab_size,
        )
        prompts = batch.prompts
        self.engine.check_length(max(map(len, prompts)), request.params.max_new_tokens)
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"a streamer shows one answer, got a batch of {len(prompts)} prompts")
        params = [request.params] * len(prompts)
        if request.params.temperature > 0 and request.params.seed is None:
            params = [replace(one, seed=drawn_seed()) for one in params]

        if streamer is None:
            completions = self.engine.generate(prompts, params)
        else:
            try:
                if getattr(streamer, "skip_prompt", False):
                    streamer.put(_tensor(prompts[0][None]))
                completions = self.engine.generate(
                    prompts, params, on_token=lambda _, token: streamer.put(_tensor(np.array([[token]])))
                )
            finally:
                streamer.end()

        longest = max(len(completion.token_ids) for completion in completions)
        answers = np.full([len(prompts), longest], request.pad_token_id, dtype=np.int64)
        for row, completion in enumerate(completions):
            answers[row, : len(completion.token_ids)] = completion.token_ids
        ids = answers if request.trunc_input else np.concatenate([batch.ids, answers], axis=1)
        scores = np.array([[np.mean(completion.logprobs)] for completion in completions], dtype=np.float32)
        return _tensor(ids), _tensor(scores)

    def save_pretrained(self, *_arguments: Any, **_options: Any) -> NoReturn:
        """Always raises: the weights are those of the checkpoint, and stay there as they are."""
        raise NotImplementedError(
            "this class reads the published layout and writes nothing: copy the checkpoint's directory instead"
        )


def _tensor(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(array, place=paddle.CPUPlace())
