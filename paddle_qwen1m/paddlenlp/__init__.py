"""PaddleNLP's side: the Auto classes know the model, and its class has PaddleNLP's from_pretrained and generate().

Inside this folder `paddlenlp` is PaddleNLP. Names are imported when they are asked for: the registration needs none of
them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paddle_qwen1m.paddlenlp.causal_lm import Qwen2OneMForCausalLM
    from paddle_qwen1m.paddlenlp.loading import (
        HUB_OPTIONS,
        config_dict,
        find_budgets,
        find_ours,
        is_ours,
        look_up_budgets,
        model_config,
    )

__all__ = [
    "HUB_OPTIONS",
    "Qwen2OneMForCausalLM",
    "config_dict",
    "find_budgets",
    "find_ours",
    "is_ours",
    "look_up_budgets",
    "model_config",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "causal_lm" if name == "Qwen2OneMForCausalLM" else "loading"
    return getattr(import_module(f"{__name__}.{home}"), name)
