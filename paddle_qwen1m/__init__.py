"""Qwen2.5-7B/14B-Instruct-1M on PaddlePaddle. Importing this package registers the model with PaddleNLP.

That is cheap: PaddleNLP, which takes seconds, is not imported here. The model is registered as soon as PaddleNLP's Auto
classes have been imported, at once where they already are.
"""

from __future__ import annotations

import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

from paddle_qwen1m import threads  # notes OMP_NUM_THREADS before Paddle is imported, which sets it

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

__all__ = ["Qwen2OneMForCausalLM", "register", "threads"]
__version__ = "0.1.0"

AUTO_CLASSES = "paddlenlp.transformers"

# Advice for those who build extensions, which every import of Paddle repeats.
warnings.filterwarnings("ignore", "No ccache found", UserWarning)
warnings.filterwarnings("ignore", "Setuptools is replacing distutils", UserWarning)


def register() -> None:
    """Make PaddleNLP's Auto classes recognise Qwen2.5-1M checkpoints. Safe to call again."""
    from paddle_qwen1m.paddlenlp.registration import wrap_auto_classes

    wrap_auto_classes()


def __getattr__(name: str) -> Any:
    if name == "Qwen2OneMForCausalLM":
        from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

        return Qwen2OneMForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _RegisteringLoader(Loader):
    """Loads a module as `loader` does, then registers the model."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        register()


class _AutoClassesFinder(MetaPathFinder):
    """Finds PaddleNLP's Auto classes where they are, once, and has them loaded by a _RegisteringLoader."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


if AUTO_CLASSES in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _AutoClassesFinder())
