"""Options as an engine uses them: held against the model and its device, every default filled in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.dtypes import QUANTIZATIONS
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import (
    EngineOptions,
    default_batched_tokens,
    default_inter_token_ms,
    default_pause_tokens,
)


@dataclass(frozen=True)
class Settled:
    """What an engine works by where options may leave it open."""

    max_model_len: int
    max_num_batched_tokens: int
    max_inter_token_ms: int
    max_pause_tokens: int
    kv_cache_dtype: str

    def over(self, options: EngineOptions) -> EngineOptions:
        """The options with these values."""
        return replace(options, **vars(self))


def check(options: EngineOptions, model: Qwen2OneM, budgets: SparseBudgets | None, *, named: bool) -> None:
    """ValueError for what the model or its device does not allow. named: whether its weights have a name."""
    config = model.config
    if options.max_model_len is not None and options.max_model_len > config.max_position_embeddings:
        raise ValueError(
            f"max_model_len must be at most max_position_embeddings, {config.max_position_embeddings}, got "
            f"{options.max_model_len}"
        )
    if model.on_gpu and options.kv_cache_dtype not in (None, model.compute_dtype, *QUANTIZATIONS):
        raise ValueError(
            f"kv_cache_dtype on a GPU must be that of the computation, {model.compute_dtype}, or "
            f"{' or '.join(QUANTIZATIONS)}, got {options.kv_cache_dtype}"
        )
    if options.quantization != model.quantization:
        raise ValueError(
            f"quantization is of the weights, which are kept as {model.quantization or model.dtype}, got "
            f"{options.quantization}: it is chosen when they are loaded"
        )
    if budgets is not None and budgets.vertical.shape != (config.num_layers, config.num_heads):
        raise ValueError(
            f"the sparse budgets are for {budgets.vertical.shape} (layers, heads), the model has "
            f"{(config.num_layers, config.num_heads)}"
        )
    if options.prefix_store is not None and not named:
        raise ValueError("prefix_store needs a name for the weights, the checkpoint's digest")


def settle(options: EngineOptions, model: Qwen2OneM) -> Settled:
    """Fills defaults in."""
    on_gpu = model.on_gpu
    batched = options.max_num_batched_tokens or default_batched_tokens(on_gpu)
    return Settled(
        max_model_len=options.max_model_len or model.config.max_position_embeddings,
        max_num_batched_tokens=batched,
        max_inter_token_ms=options.max_inter_token_ms or default_inter_token_ms(on_gpu),
        max_pause_tokens=min(options.max_pause_tokens or default_pause_tokens(on_gpu), batched),
        kv_cache_dtype=options.kv_cache_dtype or model.compute_dtype,
    )
