"""Runs requests on the model: admission, chunked prefill, batched decode, sampling."""

from paddle_qwen1m.engine.admission import NotEnoughMemory
from paddle_qwen1m.engine.core import (
    Completion,
    Event,
    Finished,
    Logits,
    Metrics,
    Prefilled,
    PrefillProgress,
    PromptLogprobs,
    Request,
    TokenChosen,
    TokenLogprobs,
)
from paddle_qwen1m.engine.engine import Engine
from paddle_qwen1m.engine.params import SamplingParams, StructuredOutputsParams

__all__ = [
    "Completion",
    "Engine",
    "Event",
    "Finished",
    "Logits",
    "Metrics",
    "NotEnoughMemory",
    "PrefillProgress",
    "Prefilled",
    "PromptLogprobs",
    "Request",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokenChosen",
    "TokenLogprobs",
]
