"""Tells whether this machine and a checkpoint will work: a finding a line, OK, WARN or FAIL with what to do."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

from paddle_qwen1m.config_keys import own_quantization
from paddle_qwen1m.memory import available_gpu_memory, available_host_memory
from paddle_qwen1m.plan import MemoryPlan, longest_context, parameters, plan_memory, weight_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from paddle_qwen1m.config import ModelConfig, SparseBudgets
    from paddle_qwen1m.paddlenlp.hub import Checkpoint

OK, WARN, FAIL = "OK", "WARN", "FAIL"
GPU_INDEX = "https://www.paddlepaddle.org.cn/packages/stable/cu126/"
SAMPLE = "The quick brown fox: 1,048,576 tokens\n\tnaïve café, 百万 токенов 🙂"


@dataclass(frozen=True)
class Finding:
    level: str
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5} {self.topic + ':':<15} {self.text}"


@dataclass(frozen=True)
class CheckOptions:
    """The options of `from_pretrained` that decide what a checkpoint needs."""

    from_hf_hub: bool = False
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    quantization: str | None = None
    sparse_budgets: str | None = None
    sparse: bool = True


def check_machine() -> Iterator[Finding]:
    """Versions, custom ops and GPU of this machine."""
    yield from _guarded("versions", _versions)
    yield from _guarded("custom ops", _ops)
    yield from _guarded("GPU", _gpu)


def check_checkpoint(name: str, options: CheckOptions) -> Iterator[Finding]:
    """What a checkpoint is and needs: a directory, or a hub name, of which no weights are fetched."""
    try:
        from paddle_qwen1m.paddlenlp.hub import locate

        checkpoint = locate(name, from_hf_hub=options.from_hf_hub)
    except Exception as error:
        yield _failure("checkpoint", error)
        return
    yield from _guarded("model", lambda: _model(checkpoint))
    yield from _guarded("files", lambda: _files(checkpoint))
    yield from _guarded("tokenizer", lambda: _tokenizer(checkpoint))
    yield from _guarded("sparse budgets", lambda: _budgets(checkpoint, options))
    yield from _guarded("memory", lambda: _memory(checkpoint, options))


def available_memory() -> int | None:
    """Bytes this process can still take: the GPU's memory, or what the kernel or a container's limit leaves."""
    from paddle_qwen1m import ops

    return available_gpu_memory() if ops.on_gpu() else available_host_memory()


def _guarded(topic: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that stops with an exception is a FAIL that says what the exception said."""
    try:
        yield from check()
    except Exception as error:
        yield _failure(topic, error)


def _failure(topic: str, error: Exception) -> Finding:
    return Finding(FAIL, topic, " ".join(str(error).split()) or type(error).__name__)


def _versions() -> Iterator[Finding]:
    import paddle
    import paddlenlp

    import paddle_qwen1m

    yield Finding(
        OK,
        "versions",
        f"paddle-qwen1m {paddle_qwen1m.__version__}, python {platform.python_version()}, "
        f"paddle {paddle.version.full_version}, paddlenlp {paddlenlp.__version__}",
    )


def _ops() -> Iterator[Finding]:
    from paddle_qwen1m import ops

    ops.load()
    yield Finding(
        OK, "custom ops", f"{ops.LIBRARY}, {ops.cpu_isa()} kernels, {len(os.sched_getaffinity(0))} CPU threads"
    )
    if ops.cpu_isa() == "generic":
        yield Finding(WARN, "custom ops", "this CPU has neither AVX2 nor AVX-512: the plain kernels are slow")


def _gpu() -> Iterator[Finding]:
    import paddle

    from paddle_qwen1m import ops

    if paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        cuda = paddle.device.cuda
        major, minor = cuda.get_device_capability()
        name = f"{cuda.device_count()} x {cuda.get_device_name()}, compute capability {major}.{minor}"
        obstacle = ops.gpu_obstacle()
        if obstacle is None:
            yield Finding(OK, "GPU", f"{name}: computes on one of them")
        else:
            yield Finding(WARN, "GPU", f"{name}: present, not used; {obstacle}")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            WARN, "GPU", f"present, but this Paddle is built without CUDA: pip install paddlepaddle-gpu -i {GPU_INDEX}"
        )
    else:
        yield Finding(OK, "GPU", "none; computes on the CPU")


def _model(checkpoint: Checkpoint) -> Iterator[Finding]:
    from paddle_qwen1m.config_keys import remarks

    config = _read_config(checkpoint)
    dual_chunk = config.dual_chunk
    yield Finding(
        OK,
        "model",
        f"{parameters(config) / 1e6:,.0f}M parameters, {config.num_layers} layers, {config.num_heads} query and "
        f"{config.num_kv_heads} KV heads; DCA chunk_size {dual_chunk.chunk_size:,}, local_size "
        f"{dual_chunk.local_size:,}; temperature beyond {dual_chunk.original_max_position_embeddings:,} tokens",
    )
    for line in remarks(checkpoint.read_config()):
        yield Finding(WARN, "model", line)


def _files(checkpoint: Checkpoint) -> Iterator[Finding]:
    from paddle_qwen1m.paddlenlp.hub import WEIGHTS, WEIGHTS_INDEX, read_json
    from paddle_qwen1m.weights import Checkpoint as Weights
    from paddle_qwen1m.weights.checkpoint import index_metadata
    from paddle_qwen1m.weights.sharding import rank_sets
    from paddle_qwen1m.weights.source import open_source

    index = checkpoint.file(WEIGHTS_INDEX)
    if checkpoint.hub is not None:
        shards = set(read_json(index)["weight_map"].values()) if index is not None else {WEIGHTS}
        missing = [shard for shard in sorted(shards) if checkpoint.hub.cached(shard) is None]
        if missing:
            size = index_metadata(read_json(index)).get("total_size") if index is not None else None
            needs = f" (all of them: {size / 1e9:,.1f} GB)" if isinstance(size, int) and size > 0 else ""
            yield Finding(
                WARN, "files", f"{len(missing)} of {len(shards)} weight files are fetched at the first load{needs}"
            )
            return
    sets = rank_sets(checkpoint.read_config())
    if sets is not None:
        cut = open_source(checkpoint.directory)
        yield Finding(
            WARN,
            "files",
            f"{len(cut.tensors)} tensors, cut for {sets} ranks, complete; one process cannot load them: start {sets} "
            f"(`python -m paddle.distributed.launch --nproc_per_node {sets} paddle-qwen1m generate ...`), or convert "
            "them with --format huggingface",
        )
        return
    weights = Weights(checkpoint.directory)
    files = {tensor.file for tensor in weights.tensors.values()}
    yield Finding(
        OK,
        "files",
        f"{len(weights.tensors)} tensors in {len(files)} file(s), {_gb(weights.total_bytes)}, complete",
    )


def _tokenizer(checkpoint: Checkpoint) -> Iterator[Finding]:
    from paddlenlp.transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.fetch_tokenizer()))
    ids = tokenizer(SAMPLE)["input_ids"]
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back != SAMPLE:
        yield Finding(FAIL, "tokenizer", f"{SAMPLE!r} comes back as {back!r}: tokenizer files are damaged or mixed")
        return
    vocabulary = _read_config(checkpoint).vocab_size
    if max(ids) >= vocabulary:
        yield Finding(
            FAIL, "tokenizer", f"gives id {max(ids)}, the model's vocabulary has {vocabulary}: of another model"
        )
        return
    if not tokenizer.chat_template:
        yield Finding(WARN, "tokenizer", "no chat template: only --raw prompts work")
        return
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": SAMPLE}], tokenize=False, add_generation_prompt=True
    )
    if tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) != text:
        yield Finding(
            FAIL, "tokenizer", "a chat prompt does not survive encoding and decoding: tokenizer files are damaged"
        )
        return
    yield Finding(OK, "tokenizer", f"{type(tokenizer).__name__}; text and a chat prompt come back as they were")


def _budgets(checkpoint: Checkpoint, options: CheckOptions) -> Iterator[Finding]:
    from paddle_qwen1m.config import SPARSE_CONFIG
    from paddle_qwen1m.paddlenlp import look_up_budgets

    if not options.sparse:
        yield Finding(OK, "sparse budgets", "sparse prefill is switched off")
        return
    budgets, source = look_up_budgets(checkpoint, _read_config(checkpoint), options.sparse_budgets)
    if budgets is None:
        yield Finding(
            WARN,
            "sparse budgets",
            f"none: every prefill is dense; put {SPARSE_CONFIG} beside the weights or give --sparse-budgets",
        )
    else:
        yield Finding(OK, "sparse budgets", source)


def _memory(checkpoint: Checkpoint, options: CheckOptions) -> Iterator[Finding]:
    from paddle_qwen1m import ops
    from paddle_qwen1m.model import device_dtypes
    from paddle_qwen1m.options import default_batched_tokens
    from paddle_qwen1m.paddlenlp import look_up_budgets
    from paddle_qwen1m.parallel.split import local_config
    from paddle_qwen1m.weights.sharding import rank_sets

    config = _read_config(checkpoint)
    ranks = rank_sets(checkpoint.read_config()) or 1
    held = local_config(config, ranks)
    budgets = look_up_budgets(checkpoint, config, options.sparse_budgets)[0] if options.sparse else None
    rows = options.max_num_batched_tokens or default_batched_tokens(ops.on_gpu())
    storage, compute = device_dtypes(options.dtype or config.dtype)
    quantization = options.quantization or own_quantization(checkpoint.read_config())
    weights = weight_bytes(held, storage, quantization)

    def plan(length: int) -> MemoryPlan:
        return plan_memory(
            held,
            length,
            max_num_batched_tokens=rows,
            cache_dtype=options.kv_cache_dtype or compute,
            weight_bytes=weights,
            budgets=budgets,
            dtype=compute,
            quantization=quantization,
            degree=ranks,
        )

    most = config.max_position_embeddings
    limit = options.max_model_len or most
    if limit > most:
        yield Finding(FAIL, "memory", f"--max-model-len {limit:,} is more than the model has: {most:,} tokens")
        limit = most
    need = plan(limit)
    text = (
        f"{limit:,} tokens need {_gb(need.total)}{f' on each of {ranks} ranks' if ranks > 1 else ''} "
        f"({_gb(need.weights)} weights, {_gb(need.cache)} KV cache, {_gb(need.activations)} activations)"
    )
    available = available_memory()
    if available is None:
        yield Finding(WARN, "memory", f"{text}; this machine does not say how much it has")
        return
    text = f"{text}, {_gb(available)} available"
    share = available
    if ranks > 1:
        where = "a GPU" if ops.on_gpu() else "to all of them on this machine"
        text = f"{text} {where}"
        share = available if ops.on_gpu() else available // ranks
    if need.total <= share:
        yield Finding(OK, "memory", text)
        return
    longest = longest_context(limit, lambda length: plan(length).total <= share)
    if longest is None:
        yield Finding(FAIL, "memory", f"{text}: the weights alone do not fit")
    else:
        yield Finding(WARN, "memory", f"{text}: give --max-model-len {longest} or less")


def read_shapes(name: str) -> tuple[ModelConfig, SparseBudgets | None, str | None, Path | None]:
    """The shapes, sparse budgets and quantization of a checkpoint, a directory or a hub name, of which no weights are
    fetched, and the file of an 8-bit cache's scales beside them.
    """
    from paddle_qwen1m.paddlenlp import look_up_budgets
    from paddle_qwen1m.paddlenlp.hub import locate
    from paddle_qwen1m.paddlenlp.scales import KV_SCALES

    checkpoint = locate(name)
    config = _read_config(checkpoint)
    budgets = look_up_budgets(checkpoint, config, None)[0]
    return config, budgets, own_quantization(checkpoint.read_config()), checkpoint.extra_file(KV_SCALES)


def _read_config(checkpoint: Checkpoint) -> ModelConfig:
    from paddle_qwen1m.config import ModelConfig

    return ModelConfig.from_dict(checkpoint.read_config(), str(checkpoint.config_path))


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
