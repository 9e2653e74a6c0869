"""What from_pretrained decides, step by step: whose checkpoint it is, ranks, options, sparse budgets, weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paddlenlp.transformers.configuration_utils import PretrainedConfig
from paddlenlp.utils.log import logger

from paddle_qwen1m.config import PUBLISHED_SOURCE, SPARSE_CONFIG, ModelConfig, SparseBudgets, default_budgets
from paddle_qwen1m.config import is_ours as is_ours
from paddle_qwen1m.config_keys import BASE, DUAL_CHUNK, own_quantization, remarks
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.paddlenlp.generation import Defaults
from paddle_qwen1m.paddlenlp.generation_keys import is_known
from paddle_qwen1m.paddlenlp.hub import Checkpoint, HubError, locate, read_json
from paddle_qwen1m.parallel.group import Group, start
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.parallel.split import check_degree
from paddle_qwen1m.weights import LoadingBar, load_checkpoint
from paddle_qwen1m.weights.foreign import describe_adapter, describe_file
from paddle_qwen1m.weights.rotary_tables import compare_rotary_tables
from paddle_qwen1m.weights.sharding import rank_directory, rank_sets, recorded_placement
from paddle_qwen1m.weights.tensors import HEAD

GENERATION_CONFIG = "generation_config.json"
HUB_OPTIONS = ("from_hf_hub", "from_aistudio", "cache_dir", "subfolder")


def model_config(config: PretrainedConfig) -> ModelConfig:
    """The package's own configuration out of PaddleNLP's."""
    return ModelConfig.from_dict(config_dict(config), "config")


def find_ours(
    name: Any, builtin: dict[Sequence[str], Any], options: dict[str, Any], *, weights: bool = True
) -> Checkpoint | None:
    """The checkpoint when it is ours; None leaves `name` to PaddleNLP: built-in names, other models, unknown names.

    weights: whether it is wanted for these, or for its tokenizer alone. Raises FileNotFoundError for a path that does
    not exist, ValueError for a config.json that cannot be read and for what is no directory of weights.
    """
    if not isinstance(name, (str, os.PathLike)) or any(name in names for names in builtin):
        return None
    if os.path.isfile(name) and not (weights and describe_file(name)):
        return None
    try:
        checkpoint = locate(name, **{key: options[key] for key in HUB_OPTIONS if options.get(key) is not None})
        config = options.get("config")
        described = checkpoint.read_config() if config is None else config_dict(config)
    except HubError as error:
        logger.warning(str(error))
        return None
    except FileNotFoundError:
        if os.path.isdir(name) and not (weights and describe_adapter(Path(name))):
            return None
        raise
    return checkpoint if is_ours(described) else None


def find_checkpoint(name: str | os.PathLike[str] | Checkpoint, given: dict[str, Any]) -> Checkpoint:
    """The checkpoint of that name; says so where another hub than the one asked for has it."""
    if not isinstance(name, Checkpoint):
        name = locate(name, **{key: given[key] for key in HUB_OPTIONS if key in given})
    name.announce()
    return name


def describe(checkpoint: Checkpoint, config: PretrainedConfig | dict[str, Any] | None) -> dict[str, Any]:
    """config.json, or what is used in its place, checked and as transformers 4 and PaddleNLP spell it.

    What it says that is not used is a line in the log. Raises ValueError naming file, key and value.
    """
    described = checkpoint.read_config() if config is None else config_dict(config)
    source = str(checkpoint.config_path) if config is None else "config"
    if not is_ours(described):
        raise ValueError(
            f"{checkpoint.name} is not a Qwen2 checkpoint with a {DUAL_CHUNK} "
            f"(architectures: {described.get('architectures')}): PaddleNLP's own classes load it"
        )
    shapes = ModelConfig.from_dict(described, source)
    for line in remarks(described):
        logger.warning(f"{source}: {line}")
    others = ("dtype", "rope_parameters", "rope_scaling", "quantization_config")
    return {**{key: value for key, value in described.items() if key not in others}, **shapes.to_dict()}


def choose_quantization(checkpoint: Checkpoint, given: dict[str, Any]) -> str | None:
    """How the linears' weights are kept: as given, else as in the files. ValueError for two ways that differ."""
    stored, asked = own_quantization(checkpoint.read_config()), given.get("quantization")
    if stored is not None and asked not in (None, stored):
        raise ValueError(
            f"{checkpoint.name} holds weights in {stored}, got quantization={asked!r}: leave it out, or load the "
            "checkpoint that it was made from"
        )
    return stored or asked


def name_weights(digest: str, quantization: str | None) -> str:
    """The name of a checkpoint's weights as they are kept."""
    return digest if quantization is None or not digest else f"{digest}-{quantization}"


def tell_weights(model: Qwen2OneM) -> None:
    """A line on how weights of 8 bits are multiplied, where they are."""
    if model.quantization is None:
        return
    how = f"widened to {model.compute_dtype} as they are multiplied"
    if model.in_fp8:
        how = "many rows are multiplied in FP8"
    logger.info(f"the linears' weights are kept in {model.quantization}; {how}")


def join_ranks(
    checkpoint: Checkpoint, described: dict[str, Any], shapes: ModelConfig, degree: int, rank: int | None
) -> Group:
    """The ranks that share the model. ValueError for a degree or rank that does not fit, before they meet if it can be.

    degree, rank: as given, where -1 is PaddleNLP's word for one process and for the launcher's number.
    """
    degree = max(1, degree)
    check_degree(shapes, degree)
    sets = rank_sets(described)
    if sets not in (None, degree):
        raise ValueError(
            f"{checkpoint.name} is a set of weights for {sets} tensor parallel ranks: load it with "
            f"tensor_parallel_degree={sets} under a launcher of {sets} processes, or convert it for another "
            f"degree; got {degree}"
        )
    group = start(degree)
    if rank not in (None, -1, group.rank):
        raise ValueError(f"this process is rank {group.rank} of {degree}, got tensor_parallel_rank {rank}")
    return group


def place_heads(
    described: dict[str, Any], shapes: ModelConfig, budgets: SparseBudgets | None, group: Group
) -> Placement:
    """Which rank holds which heads: as a rank set says, else evenly by the budgets in use, else in published order.
    Every rank calls it and gets rank 0's.
    """
    placement = recorded_placement(described, shapes)
    if placement is None:
        placement = Placement.balanced(shapes, group.degree, budgets)
    if group.degree == 1:
        return placement
    return Placement.from_text(shapes, group.degree, group.share(placement.text))


def choose_engine_options(shapes: ModelConfig, given: dict[str, Any]) -> EngineOptions:
    """What was given; sparse prefill where config.json does not switch it off or budgets were given."""
    dual_chunk = shapes.dual_chunk
    sparse = given.get("sparse", "sparse_budgets" in given or dual_chunk.sparse_attention_enabled)
    chosen = {name: given[name] for name in EngineOptions.__dataclass_fields__ if name in given}
    return EngineOptions(
        **{"sparse_threshold": dual_chunk.sparse_attention_threshold, **chosen, "sparse": bool(sparse)}
    )


def read_weights(model: Qwen2OneM, checkpoint: Checkpoint, described: dict[str, Any], group: Group) -> None:
    """Fills the model: a whole checkpoint's tensors, of which a rank reads its part, or this rank's own folder."""
    directory, slots = checkpoint.fetch_weights(), model.slots()
    if rank_sets(described) is not None:
        directory = directory / rank_directory(group.rank, group.degree)
        slots = {name: slot.without_slicing() for name, slot in slots.items()}
    tied = {HEAD} if model.config.tie_word_embeddings else set()
    for line in compare_rotary_tables(directory, model.config):
        logger.warning(line)
    with LoadingBar(group) as bar:
        load_checkpoint(directory, slots, ignore=tied, bar=bar)


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
            "prefilled densely; give sparse_budgets=FILE (--sparse-budgets FILE) for sparse prefill, or find some with "
            f"`paddle-qwen1m calibrate {checkpoint.name} --text FILE... --out {SPARSE_CONFIG}`"
        )
    elif source == PUBLISHED_SOURCE:
        logger.info(f"{checkpoint.name} has no {SPARSE_CONFIG}: using the budgets published for this shape")
    return budgets


def look_up_budgets(
    checkpoint: Checkpoint, config: ModelConfig, explicit: str | os.PathLike[str] | SparseBudgets | None
) -> tuple[SparseBudgets | None, str]:
    """Sparse budgets and their source: `explicit`, else the file beside the weights, else those in config.json, else
    those published for this shape, else None. Raises ValueError for budgets that do not fit the model.
    """
    if isinstance(explicit, SparseBudgets):
        explicit.check_fit(config.num_layers, config.num_heads, "sparse_budgets: ")
        return explicit, "given"
    if explicit is not None:
        return SparseBudgets.from_file(Path(explicit), config.num_layers, config.num_heads), str(explicit)
    path = checkpoint.extra_file(SPARSE_CONFIG)
    if path is not None and config.dual_chunk.sparse_budgets is not None:
        logger.warning(f"{path} counts, not the sparse_attention_config in config.json")
    return default_budgets(config, path)


def read_defaults(checkpoint: Checkpoint, described: dict[str, Any]) -> Defaults:
    """generate()'s defaults: generation_config.json, else what config.json has of its keys, as old checkpoints do."""
    pad_token_id = described.get("pad_token_id")
    path = checkpoint.extra_file(GENERATION_CONFIG)
    if path is not None:
        return Defaults.from_file(read_json(path), str(path), pad_token_id)
    own = {key: value for key, value in described.items() if is_known(key)}
    return Defaults.from_file(own, f"{checkpoint.name}: config.json", pad_token_id)


def config_dict(config: PretrainedConfig | dict[str, Any]) -> dict[str, Any]:
    """The fields of a config. PaddleNLP's default rotary base gives way to rope_parameters, which it does not read."""
    if isinstance(config, dict):
        return config
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"config must be a Qwen2Config or a dict, got a {type(config).__name__}")
    values: dict[str, Any] = config.to_dict()
    if values.get("rope_theta") == BASE.default and (values.get("rope_parameters") or values.get("rope_scaling")):
        del values["rope_theta"]
    return values
