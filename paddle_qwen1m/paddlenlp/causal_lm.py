"""Qwen2.5-1M as a PaddleNLP model: from_pretrained, forward and generate over this package's engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import paddle
from paddlenlp.generation import GenerationConfig
from paddlenlp.transformers import PretrainedModel, Qwen2Config
from paddlenlp.transformers.configuration_utils import PretrainedConfig
from paddlenlp.transformers.model_utils import no_init_weights
from paddlenlp.utils.log import logger

from paddle_qwen1m.config import EngineOptions, SparseBudgets
from paddle_qwen1m.dtypes import dtype_name
from paddle_qwen1m.engine import Engine
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.paddlenlp.generation import (
    OPTIONS,
    TokenIds,
    drawn_seed,
    read_batch,
    read_positions,
    read_request,
)
from paddle_qwen1m.paddlenlp.hub import Checkpoint, locate
from paddle_qwen1m.paddlenlp.loading import (
    DUAL_CHUNK,
    GENERATION_CONFIG,
    config_dict,
    find_budgets,
    is_ours,
    model_config,
    read_generation_config,
    refuse,
)
from paddle_qwen1m.parallel.group import ALONE, Group, start
from paddle_qwen1m.weights import load_checkpoint
from paddle_qwen1m.weights.sharding import check_degree, rank_directory, rank_sets
from paddle_qwen1m.weights.tensors import HEAD


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
        storage = dtype_name(dtype or config.dtype or "float32")
        self.model = Qwen2OneM(model_config(config), storage, group)
        if self.model.dtype != storage:
            logger.info(f"weights are kept as {self.model.dtype}: a GPU does not compute in {storage}")
        self.engine = Engine(self.model, options or EngineOptions(), budgets)
        self.use_generation_config(GenerationConfig.from_model_config(config))
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | Checkpoint,
        *,
        dtype: str | None = None,
        config: PretrainedConfig | dict[str, Any] | None = None,
        sparse_budgets: str | os.PathLike[str] | SparseBudgets | None = None,
        sparse: bool | None = None,
        sparse_threshold: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        kv_cache_dtype: str | None = None,
        tensor_parallel_degree: int = 1,
        tensor_parallel_rank: int | None = None,
        tensor_parallel_output: bool = False,
        from_hf_hub: bool = False,
        from_aistudio: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        low_cpu_mem_usage: bool | None = None,
        convert_from_torch: bool | None = None,
        use_safetensors: bool | None = None,
        **unknown: Any,
    ) -> Qwen2OneMForCausalLM:
        """Load a checkpoint in the published safetensors layout from a directory or by its hub name.

        dtype: keep the weights as "float32", "bfloat16" or "float16"; default: as the checkpoint has them.
        config: used in place of config.json, as a Qwen2Config or a dict.
        sparse_budgets: a file in the format of sparse_attention_config.json. Without it the file of that name beside
            the weights counts, then, for the shapes of the published 7B and 14B models, their published figures;
            without any the prefill is dense.
        sparse: False prefills densely; default: what config.json says, else True.
        sparse_threshold: longer prompts, in tokens, are prefilled sparsely (default: config.json's, else 32,768).
        max_num_batched_tokens: tokens of one prefill step (default 2,048 on a CPU, 32,768 on a GPU).
        max_model_len: most tokens of prompt and answer together (default: the model's max_position_embeddings).
        kv_cache_dtype: how keys and values are kept (default, and on a GPU always: the dtype that is computed in).
        tensor_parallel_degree: how many processes, started by `python -m paddle.distributed.launch`, share the model;
            each reads its own part alone, and all of them call generate with the same input. tensor_parallel_rank:
            this process's number, which the launcher gives it anyway. tensor_parallel_output: accepted and without
            effect, logits are always whole.
        from_hf_hub, from_aistudio, cache_dir, subfolder: as in PaddleNLP. A name is looked up on PaddleNLP's hub, or on
            Hugging Face's with from_hf_hub=True; where the one lacks it, the other is tried.
        low_cpu_mem_usage, convert_from_torch, use_safetensors: accepted and without effect, because there is one
            loader: it reads the published files as they are, one tensor at a time, and writes nothing.

        Raises TypeError for other options, FileNotFoundError, HubError (an OSError), weights.CheckpointError,
        ValueError or job.StartError, each saying what does not fit.
        """
        refuse(unknown)
        checkpoint = (
            name
            if isinstance(name, Checkpoint)
            else locate(
                name, from_hf_hub=from_hf_hub, from_aistudio=from_aistudio, cache_dir=cache_dir, subfolder=subfolder
            )
        )
        checkpoint.announce()
        described = config_dict(config) if config is not None else checkpoint.read_config()
        if not is_ours(described):
            raise ValueError(
                f"{checkpoint.name} is not a Qwen2 checkpoint with a {DUAL_CHUNK} "
                f"(architectures: {described.get('architectures')}): PaddleNLP's own classes load it"
            )
        pretrained_config = Qwen2Config.from_dict(described)
        shapes = model_config(pretrained_config)
        degree = max(1, tensor_parallel_degree)
        check_degree(shapes, degree)
        sets = rank_sets(described)
        if sets not in (None, degree):
            raise ValueError(
                f"{checkpoint.name} is a set of weights for {sets} tensor parallel ranks: load it with "
                f"tensor_parallel_degree={sets} under a launcher of {sets} processes, or convert it for another "
                f"degree; got {degree}"
            )
        group = start(degree)
        if tensor_parallel_rank not in (None, -1, group.rank):
            raise ValueError(
                f"this process is rank {group.rank} of {degree}, got tensor_parallel_rank {tensor_parallel_rank}"
            )
        if sparse is None:
            sparse = sparse_budgets is not None or shapes.dual_chunk.sparse_attention_enabled
        if sparse_threshold is None:
            sparse_threshold = shapes.dual_chunk.sparse_attention_threshold
        chosen: dict[str, Any] = {
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_model_len": max_model_len,
            "kv_cache_dtype": kv_cache_dtype,
        }
        options = EngineOptions(
            sparse=bool(sparse),
            sparse_threshold=sparse_threshold,
            **{name: value for name, value in chosen.items() if value is not None},
        )
        storage = dtype_name(dtype or pretrained_config.dtype or "float32")
        budgets = find_budgets(checkpoint, shapes, sparse_budgets, options) if sparse else None
        generation = checkpoint.extra_file(GENERATION_CONFIG)
        with no_init_weights(_enable=True):
            model = cls(pretrained_config, dtype=storage, options=options, budgets=budgets, group=group)
        if generation is not None:
            model.use_generation_config(read_generation_config(generation))
        tied = {HEAD} if shapes.tie_word_embeddings else set()
        directory, slots = checkpoint.fetch_weights(), model.model.slots()
        if sets is not None:
            directory = directory / rank_directory(group.rank, degree)
            slots = {name: slot.without_slicing() for name, slot in slots.items()}
        load_checkpoint(directory, slots, ignore=tied, progress=group.rank == 0)
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
