"""Runs requests on the model: admission, chunked prefill, batched decode, sampling."""

from paddle_qwen1m.engine.core import Completion, PrefillProgress, SamplingParams
from paddle_qwen1m.engine.engine import Engine, PrefilledContext

__all__ = ["Completion", "Engine", "PrefillProgress", "PrefilledContext", "SamplingParams"]
