"""Qwen2.5-7B/14B-Instruct-1M on PaddlePaddle. Importing this package registers the model with PaddleNLP.

That is cheap: PaddleNLP, which takes seconds, is not imported here. The model is registered as soon as PaddleNLP's
modules have been imported, at once where they already are.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from paddle_qwen1m import threads  # notes OMP_NUM_THREADS before Paddle is imported, which sets it
from paddle_qwen1m.paddlenlp import registration

if TYPE_CHECKING:
    from paddle_qwen1m.engine import SamplingParams, StructuredOutputsParams
    from paddle_qwen1m.llm import LLM
    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

__all__ = ["LLM", "Qwen2OneMForCausalLM", "SamplingParams", "StructuredOutputsParams", "register", "threads"]
__version__ = "0.1.0"

# Advice for those who build extensions, which every import of Paddle repeats.
warnings.filterwarnings("ignore", "No ccache found", UserWarning)
warnings.filterwarnings("ignore", "Setuptools is replacing distutils", UserWarning)


def register() -> None:
    """Make PaddleNLP's Auto classes recognise Qwen2.5-1M checkpoints. Safe to call again."""
    registration.install()


_HOMES = {
    "LLM": "llm",
    "Qwen2OneMForCausalLM": "paddlenlp",
    "SamplingParams": "engine",
    "StructuredOutputsParams": "engine",
}
"""Where names are that are imported when they are asked for."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
