"""Weights: a streaming loader for checkpoints in the published safetensors layout."""

from __future__ import annotations

from .checkpoint import Checkpoint
from .loader import Slot, load_checkpoint
from .safetensors import CheckpointError, TensorInfo

__all__ = ["Checkpoint", "CheckpointError", "Slot", "TensorInfo", "load_checkpoint"]
