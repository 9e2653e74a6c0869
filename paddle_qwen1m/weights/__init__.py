"""Weights: a streaming loader for safetensors checkpoints, and the converter between their forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .digest import checkpoint_digest
from .safetensors import CheckpointError, TensorInfo

if TYPE_CHECKING:
    from .bar import LoadingBar
    from .loader import Slot, load_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "LoadingBar", "Slot", "TensorInfo", "checkpoint_digest", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    """What needs Paddle, which takes seconds to import and is of no use to the converter."""
    if name in ("Slot", "load_checkpoint"):
        from . import loader

        return getattr(loader, name)
    if name == "LoadingBar":
        from .bar import LoadingBar

        return LoadingBar
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
