"""Says what a file or directory is that is no checkpoint in safetensors, and what to do with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

ADAPTERS: Mapping[str, str] = {
    "adapter_config.json": "a LoRA adapter",
    "lora_config.json": "a LoRA adapter of PaddleNLP",
    "prefix_config.json": "a prefix of PaddleNLP",
}
WEIGHTS: Mapping[str, str] = {
    ".bin": "PyTorch's pickled weights",
    ".pt": "PyTorch's pickled weights",
    ".pth": "PyTorch's pickled weights",
    ".ckpt": "PyTorch's pickled weights",
    ".pdparams": "Paddle's pickled weights",
    ".gguf": "GGUF weights",
    ".npz": "numpy weights",
    ".msgpack": "Flax weights",
    ".h5": "TensorFlow weights",
}
QUANTIZATIONS: Mapping[str, str] = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8 in blocks",
    ".weight_scale": "FP8 or int8",
    ".SCB": "bitsandbytes, 8 bits",
    ".weight.absmax": "bitsandbytes, 4 bits",
    ".quant_weight": "PaddleNLP",
}
"""What the name of a tensor ends in when weights are quantised, and by what."""
REWRITE = (
    "Hugging Face transformers writes safetensors: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT), to "
    "load from OUT"
)


def describe_file(path: str | os.PathLike[str]) -> str:
    """What a file is that holds or lists weights, and what to do with it; "" for any other."""
    file = Path(path)
    if file.suffix == ".safetensors" or file.name.endswith((".index.json", "config.json")):
        return f"one file of a checkpoint: give the directory that holds it, {file.parent}"
    kind = WEIGHTS.get(file.suffix)
    return f"a file of {kind}, which are not read. {REWRITE}" if kind else ""


def describe_adapter(directory: Path) -> str:
    """What a directory holds that is to be added to the weights of another model, and what to do; "" where nothing."""
    for name, kind in ADAPTERS.items():
        if (directory / name).is_file():
            return (
                f"it holds {kind} ({name}){_base_of(directory / name)}, which is not applied here: merge it into its "
                "base model (PEFT: merge_and_unload, then save_pretrained) and load what that wrote; where it is "
                "merged already, remove that file"
            )
    return ""


def describe_weights(directory: Path) -> str:
    """What weights lie in a directory that has no safetensors, and what to do with them; "" where there are none."""
    found: dict[str, list[str]] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix in WEIGHTS and path.name != "training_args.bin":
            found.setdefault(WEIGHTS[path.suffix], []).append(path.name)
    what = " and ".join(
        f"{kind} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})" for kind, names in found.items()
    )
    return f"it holds {what}, which are not read. {REWRITE}" if what else ""


def describe_quantised(tensors: Iterable[str]) -> str:
    """By what tensors of these names are quantised; "" where they are not."""
    found = {kind for name in tensors for suffix, kind in QUANTIZATIONS.items() if name.endswith(suffix)}
    return ", ".join(sorted(found))


def _base_of(path: Path) -> str:
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" for {base}" if isinstance(base, str) else ""
