"""What from_pretrained decides before weights are read: whose checkpoint it is, its shapes, its sparse budgets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paddlenlp.generation import GenerationConfig
from paddlenlp.transformers.configuration_utils import PretrainedConfig
from paddlenlp.utils.log import logger

from paddle_qwen1m.config import EngineOptions, ModelConfig, SparseBudgets, published_budgets
from paddle_qwen1m.paddlenlp.hub import Checkpoint, HubError, locate, read_json

DUAL_CHUNK = "dual_chunk_attention_config"
SPARSE_CONFIG = "sparse_attention_config.json"
GENERATION_CONFIG = "generation_config.json"
PUBLISHED = "those published for this shape, which the package carries"
ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2OneMForCausalLM")
HUB_OPTIONS = ("from_hf_hub", "from_aistudio", "cache_dir", "subfolder")
INSTEAD = {
    "torch_dtype": 'dtype="bfloat16"',
    "device_map": 'paddle.device.set_device("cpu") before loading',
    "device": 'paddle.device.set_device("cpu") before loading',
    "trust_remote_code": "nothing: no code is fetched, `import paddle_qwen1m` is the code",
    "attn_implementation": "nothing: attention is always this package's own",
    "use_flash_attention": "nothing: attention is always this package's own",
    "load_in_8bit": "nothing: weights are float32, bfloat16 or float16",
    "load_in_4bit": "nothing: weights are float32, bfloat16 or float16",
    "token": "the environment variable HF_TOKEN",
    "revision": "the directory of a copy of that revision",
    "local_files_only": "the environment variable HF_HUB_OFFLINE=1, or the directory itself",
}


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a Qwen2 causal language model with dual chunk attention."""
    architectures = config.get("architectures") or [""]
    return bool(config.get(DUAL_CHUNK)) and architectures[-1] in ARCHITECTURES


def model_config(config: PretrainedConfig) -> ModelConfig:
    """The package's own configuration out of PaddleNLP's."""
    return ModelConfig.from_dict(config.to_dict())


def find_ours(name: Any, builtin: dict[Sequence[str], Any], options: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint when it is ours; None leaves `name` to PaddleNLP: built-in names, other models, unknown names.

    Raises FileNotFoundError for a path that does not exist.
    """
    if not isinstance(name, (str, os.PathLike)) or os.path.isfile(name) or any(name in names for names in builtin):
        return None
    try:
        checkpoint = locate(name, **{key: options[key] for key in HUB_OPTIONS if options.get(key) is not None})
        config = options.get("config")
        described = checkpoint.read_config() if config is None else config_dict(config)
    except HubError as error:
        logger.warning(str(error))
        return None
    except FileNotFoundError:
        if os.path.isdir(name):
            return None
        raise
    except ValueError:
        return None
    return checkpoint if is_ours(described) else None


def find_budgets(
    checkpoint: Checkpoint,
    config: ModelConfig,
    explicit: str | os.PathLike[str] | SparseBudgets | None,
    options: EngineOptions,
) -> SparseBudgets | None:
    """The budgets of `look_up_budgets`; one log line says when they are the published ones or when there are none."""
    budgets, source = look_up_budgets(checkpoint, config, explicit)
    if budgets is None:
        logger.warning(
            f"{checkpoint.name} has no {SPARSE_CONFIG}: prompts longer than {options.sparse_threshold:,} tokens are "
            "prefilled densely; give sparse_budgets=FILE (--sparse-budgets FILE) for sparse prefill"
        )
    elif source == PUBLISHED:
        logger.info(f"{checkpoint.name} has no {SPARSE_CONFIG}: using the budgets published for this shape")
    return budgets


def look_up_budgets(
    checkpoint: Checkpoint, config: ModelConfig, explicit: str | os.PathLike[str] | SparseBudgets | None
) -> tuple[SparseBudgets | None, str]:
    """Sparse budgets and their source: `explicit`, else the file beside the weights, else those published for this
    shape, else None. Raises ValueError for a file that does not fit the model.
    """
    if isinstance(explicit, SparseBudgets):
        return explicit, "given"
    path = checkpoint.extra_file(SPARSE_CONFIG) if explicit is None else Path(explicit)
    if path is not None:
        return SparseBudgets.from_file(path, config.num_layers, config.num_heads), str(path)
    return published_budgets(config), PUBLISHED


def read_generation_config(path: Path) -> GenerationConfig:
    """PaddleNLP's object for the file, without `_from_model_config`: with it PaddleNLP would lose do_sample."""
    values = {key: value for key, value in read_json(path).items() if key != "_from_model_config"}
    return GenerationConfig(**values)


def config_dict(config: PretrainedConfig | dict[str, Any]) -> dict[str, Any]:
    return config if isinstance(config, dict) else config.to_dict()


def refuse(unknown: dict[str, Any]) -> None:
    """TypeError for options that do not exist, naming what to write instead."""
    names = sorted(unknown)
    if not names:
        return
    hints: list[str] = [f"instead of {key} write {INSTEAD[key]}" for key in names if key in INSTEAD]
    options = (
        "dtype, config, sparse_budgets, sparse, sparse_threshold, max_num_batched_tokens, max_model_len, "
        "kv_cache_dtype, tensor_parallel_degree"
    )
    raise TypeError(
        f"from_pretrained() has no option {', '.join(names)}; "
        + "".join(f"{hint}; " for hint in hints)
        + f"it has: {options}, {', '.join(HUB_OPTIONS)}"
    )
