"""An engine for many requests, from a checkpoint: its memory is decided before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, Callable

from paddlenlp.transformers import AutoTokenizer
from paddlenlp.utils.log import logger

from paddle_qwen1m import ops
from paddle_qwen1m.config import ModelConfig, SparseBudgets
from paddle_qwen1m.dtypes import QUANTIZATIONS
from paddle_qwen1m.engine import Engine, SamplingParams
from paddle_qwen1m.engine.admission import Allowance, Capacity, Need, choose_capacity, fitting_options
from paddle_qwen1m.engine.grammar import GrammarCompiler
from paddle_qwen1m.engine.params import StructuredOutputsParams
from paddle_qwen1m.engine.rules import Grammar
from paddle_qwen1m.memory import available_host_memory, driver_memory
from paddle_qwen1m.model import Qwen2OneM, device_dtypes
from paddle_qwen1m.options import AUTO, EngineOptions
from paddle_qwen1m.paddlenlp.generation_keys import token_ids
from paddle_qwen1m.paddlenlp.hub import Checkpoint, read_json
from paddle_qwen1m.paddlenlp.loading import (
    GENERATION_CONFIG,
    HUB_OPTIONS,
    choose_engine_options,
    choose_quantization,
    describe,
    find_budgets,
    find_checkpoint,
    join_ranks,
    look_up_budgets,
    name_weights,
    place_heads,
    read_weights,
    tell_weights,
)
from paddle_qwen1m.paddlenlp.scales import find_scales, use_scales
from paddle_qwen1m.parallel.group import Group
from paddle_qwen1m.parallel.split import check_degree
from paddle_qwen1m.weights.digest import checkpoint_digest
from paddle_qwen1m.weights.sharding import rank_sets

MEGABYTE = 1 << 20
UNKNOWN = 1 << 40
"""Megabytes of a machine that does not say how many it has."""
TAKEN_FROM_FILE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TOKENIZER_JSON = "tokenizer.json"


@dataclass(frozen=True)
class Checked:
    """What a caller's process reads of a checkpoint. defaults: fields of SamplingParams that its file sets."""

    defaults: dict[str, Any]
    eos_token_ids: tuple[int, ...]


def check(name: str, options: Mapping[str, Any]) -> Checked:
    """Finds a checkpoint and reads what it says of itself. Raises as from_pretrained does."""
    checkpoint = find_checkpoint(name, dict(options))
    described = describe(checkpoint, None)
    shapes = ModelConfig.from_dict(described, "config.json")
    check_degree(shapes, options.get("tensor_parallel_size", 1), "tensor_parallel_size")
    path = checkpoint.extra_file(GENERATION_CONFIG)
    file = {} if path is None else read_json(path)
    ends = [token for source in (described, file) for token in _ends(source)]
    return Checked(_sampling_defaults(file, str(path)), tuple(dict.fromkeys(ends)))


@dataclass(frozen=True)
class Identity:
    """What answers depend on beside options. longest: tokens of prompt and answer that the model was made for.
    sparse_above: only prompts with more tokens are prefilled sparsely; None: none, for want of budgets. weights,
    budgets: digests.
    """

    weights: str
    longest: int
    sparse_above: int | None
    budgets: str | None


def identify(name: str, options: Mapping[str, Any]) -> Identity:
    """Of a checkpoint with these options of LLM, sparse prefill not switched off. Raises as from_pretrained does."""
    given = dict(options)
    checkpoint = find_checkpoint(name, given)
    shapes = ModelConfig.from_dict(describe(checkpoint, None), "config.json")
    budgets, _ = look_up_budgets(checkpoint, shapes, given.get("sparse_budgets"))
    return Identity(
        checkpoint_digest(checkpoint.fetch_weights()),
        shapes.max_position_embeddings,
        None if budgets is None else choose_engine_options(shapes, given).sparse_threshold,
        None if budgets is None else sha256(budgets.vertical.tobytes() + budgets.slash.tobytes()).hexdigest(),
    )


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose weights can be read layer by layer. dtype: how they are kept. weights: their digest.
    sparse_threshold: only prompts with more tokens are prefilled sparsely, where there are budgets.
    """

    directory: Path
    config: ModelConfig
    dtype: str
    weights: str
    sparse_threshold: int
    budgets: SparseBudgets | None
    budgets_source: str


def open_weights(name: str, options: Mapping[str, Any]) -> Opened:
    """Finds a checkpoint, fetches its files and reads no weights. Raises as from_pretrained does."""
    given = dict(options)
    checkpoint = find_checkpoint(name, given)
    described = describe(checkpoint, None)
    if rank_sets(described) is not None:
        raise ValueError(f"{checkpoint.name} is a set of weights for tensor parallel ranks: convert it back first")
    shapes = ModelConfig.from_dict(described, "config.json")
    budgets, source = look_up_budgets(checkpoint, shapes, given.get("sparse_budgets"))
    directory = checkpoint.fetch_weights()
    threshold = choose_engine_options(shapes, given).sparse_threshold
    dtype = given.get("dtype") or shapes.dtype
    return Opened(directory, shapes, dtype, checkpoint_digest(directory), threshold, budgets, source)


def load_tokenizer(name: str, options: Mapping[str, Any]) -> Any:
    """The tokenizer of a checkpoint."""
    return AutoTokenizer.from_pretrained(name, **{key: options[key] for key in HUB_OPTIONS if key in options})


def load_engine(model: str, options: Mapping[str, Any]) -> Engine:
    """This rank's part of an engine that serves many requests, its KV cache made. `options`: LLM's, read.

    Every rank of tensor_parallel_size calls it; they agree on the cache before any reads its weights. Raises as
    from_pretrained does, ValueError for a max_model_len that the cache cannot hold, NotEnoughMemory.
    """
    given = dict(options)
    checkpoint = find_checkpoint(model, given)
    described = describe(checkpoint, None)
    shapes = ModelConfig.from_dict(described, "config.json")
    given["quantization"] = quantization = choose_quantization(checkpoint, given)
    asked_length = given.pop("max_model_len", None)
    chosen = choose_engine_options(shapes, {"enable_prefix_caching": True, **given})
    chosen = replace(chosen, cuda_graph=not given.get("enforce_eager", False))
    group = join_ranks(checkpoint, described, shapes, given.get("tensor_parallel_size", 1), None)
    budgets = find_budgets(checkpoint, shapes, given.get("sparse_budgets"), chosen) if chosen.sparse else None
    dtype = given.get("dtype") or shapes.dtype
    kept, computed = device_dtypes(dtype)
    shape: dict[str, Any] = {"kept": kept, "computed": computed, "on_gpu": ops.on_gpu()}
    allowance = _allowance(group, given)

    def decide(in_16_bits: int) -> Fitted:
        """What fits, where so many layers of an 8-bit cache stay in 16 bits."""
        layers: dict[str, Any] = {**shape, "in_16_bits": in_16_bits}
        fitting = fitting_options(shapes, group.degree, chosen, budgets, allowance, asked_length, **layers)
        need = Need.of(shapes, group.degree, fitting, budgets, **layers)
        return Fitted(fitting, need, choose_capacity(need, allowance, asked_length))

    fitted = decide(0)
    weights = checkpoint_digest(checkpoint.fetch_weights())
    quantised = fitted.chosen.kv_cache_dtype in QUANTIZATIONS
    scales = find_scales(checkpoint, shapes, given.get("kv_scales"), weights) if quantised else None
    counted = group.share(0 if scales is None else len(scales.in_16_bits))
    if counted:
        fitted = decide(counted)
    if group.rank == 0:
        fitted.tell(given, asked_length)
    engine = Engine(
        Qwen2OneM(shapes, dtype, group, place_heads(described, shapes, budgets, group), quantization),
        fitted.options,
        budgets,
        weights=name_weights(weights, quantization),
        compile_grammar=_grammars(checkpoint, shapes.vocab_size),
    )
    if group.rank == 0:
        tell_weights(engine.model)
    read_weights(engine.model, checkpoint, described, group)
    use_scales(engine, checkpoint, scales, weights)
    if quantised and len(engine.in_16_bits) != counted:  # measured just now, and kept: found above at the next load
        fitted = decide(len(engine.in_16_bits))
        if group.rank == 0:
            fitted.tell(given, asked_length)
        engine.configure(fitted.options, budgets)
    engine.reserve()
    return engine


@dataclass(frozen=True)
class Fitted:
    """What was chosen so that contexts fit, and what follows from it."""

    chosen: EngineOptions
    need: Need
    capacity: Capacity

    @property
    def options(self) -> EngineOptions:
        """The engine's."""
        capacity = self.capacity
        return replace(self.chosen, max_model_len=capacity.max_model_len, cache_tokens=capacity.cache_tokens)

    def tell(self, given: Mapping[str, Any], asked_length: int | None) -> None:
        """What was chosen beside what was given, and how it is chosen otherwise; how large the cache becomes."""
        capacity, need = self.capacity, self.need
        for name in ("kv_cache_dtype", "max_num_batched_tokens"):
            value = getattr(self.chosen, name)
            if name not in given and value is not None:
                logger.info(f"{name}={value}, since max_model_len would not fit otherwise; what is given is kept to")
        if asked_length == AUTO:
            logger.info(
                f"max_model_len='auto': {capacity.max_model_len:,} tokens, of {need.longest:,} that the model has"
            )
        contexts = capacity.cache_tokens / capacity.max_model_len
        logger.info(
            f"KV cache: {capacity.cache_tokens:,} tokens, {need.cache(capacity.cache_tokens) / 1e9:.1f} GB a rank, "
            f"{contexts:.2f} times max_model_len ({capacity.max_model_len:,})"
        )


def _allowance(group: Group, given: Mapping[str, Any]) -> Allowance:
    """What every rank may take: as much as the one with least may."""
    cache_bytes = given.get("kv_cache_memory_bytes")
    if ops.on_gpu():
        memory = driver_memory()
        utilization = given.get("gpu_memory_utilization")
        allowance = Allowance.of_gpu(memory.free, memory.total, utilization, cache_bytes)
    else:
        allowance = Allowance.of_host(available_host_memory(), cache_bytes)
    total, cache = _least(group, allowance.total), allowance.cache
    return replace(allowance, total=total, cache=cache if allowance.exact else _least(group, cache))


def _least(group: Group, size: int | None) -> int | None:
    megabytes = group.smallest(UNKNOWN if size is None else size // MEGABYTE)
    return None if megabytes >= UNKNOWN else megabytes * MEGABYTE


def _grammars(checkpoint: Checkpoint, vocab_size: int) -> Callable[[StructuredOutputsParams], Grammar]:
    """Compiles structured outputs, in any thread, for the checkpoint's tokenizer, which is read at the first one."""
    reading = Lock()

    @lru_cache(1)
    def compiler() -> GrammarCompiler:
        path = checkpoint.file(TOKENIZER_JSON)
        if path is None:
            raise ValueError(f"structured_outputs needs {TOKENIZER_JSON}, which {checkpoint.name} has not")
        file = checkpoint.extra_file(GENERATION_CONFIG)
        sources = [checkpoint.read_config()] + ([] if file is None else [read_json(file)])
        return GrammarCompiler(path, vocab_size, sorted({token for source in sources for token in _ends(source)}))

    def compile_grammar(params: StructuredOutputsParams) -> Grammar:
        with reading:
            made = compiler()
        return made.compile(params)

    return compile_grammar


def _ends(source: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer, as a config names them."""
    value = source.get("eos_token_id")
    return () if value is None else tuple(token for token in token_ids("eos_token_id", value) if token >= 0)


def _sampling_defaults(file: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Those fields of SamplingParams that generation_config.json sets; greedy where it says that nothing is sampled.

    ValueError naming `source` for what cannot be used.
    """
    fields = {name: file[name] for name in TAKEN_FROM_FILE if file.get(name) is not None}
    if file.get("max_new_tokens") is not None:
        fields["max_tokens"] = file["max_new_tokens"]
    if file.get("do_sample") is False:
        fields["temperature"] = 0.0
    try:
        SamplingParams(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return fields
