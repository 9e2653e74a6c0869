"""What a user chooses when a checkpoint is loaded: one table that from_pretrained, the command and the README read."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from paddle_qwen1m.config import SPARSE_THRESHOLD
from paddle_qwen1m.dtypes import dtype_name

CPU_BATCHED_TOKENS, GPU_BATCHED_TOKENS = 2048, 32768


@dataclass(frozen=True)
class Whole:
    """A whole number of at least `lowest`."""

    lowest: int

    def read(self, name: str, value: Any) -> int:
        try:
            number = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = None
        if number is None or number < self.lowest:
            raise ValueError(f"{name} must be a whole number of at least {self.lowest}, got {value!r}")
        return number


@dataclass(frozen=True)
class Dtype:
    """The name of a floating point type, or Paddle's object for it."""

    def read(self, name: str, value: Any) -> str:
        return dtype_name(value, name)


@dataclass(frozen=True)
class Switch:
    """True or False."""

    def read(self, name: str, value: Any) -> bool:
        if isinstance(value, str) or value not in (True, False):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        return bool(value)


@dataclass(frozen=True)
class Place:
    """A path."""

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError(f"{name} must be a path, got {value!r}")
        return os.fspath(value)


@dataclass(frozen=True)
class Given:
    """Whatever it is, it is looked at where it is used."""

    def read(self, name: str, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Option:
    """A keyword of from_pretrained. `default` says in words what holds without it.

    command: whether the command has it too, a switch that is on by default as --no-NAME; the README lists these.
    """

    name: str
    type: Whole | Dtype | Switch | Place | Given
    default: str
    help: str
    command: bool = False

    @property
    def flag(self) -> str:
        """How the command spells it."""
        return f"--{'no-' if self.default == 'on' else ''}{self.name.replace('_', '-')}"

    @property
    def flag_help(self) -> str:
        return f"no {self.help}" if self.default == "on" else f"{self.help} (default: {self.default})"


LOADING = (
    Option(
        "max_model_len",
        Whole(1),
        "the model's max_position_embeddings",
        "most tokens of prompt and answer together",
        command=True,
    ),
    Option(
        "max_num_batched_tokens",
        Whole(1),
        f"{CPU_BATCHED_TOKENS:,} on a CPU, {GPU_BATCHED_TOKENS:,} on a GPU",
        "tokens of one prefill chunk: smaller takes less memory; a dense answer stays the same, a sparse one may "
        "change, because its keys are chosen anew for each chunk",
        command=True,
    ),
    Option(
        "dtype",
        Dtype(),
        "as in the checkpoint",
        "how weights are kept: float32, bfloat16 or float16; a CPU computes in float32 whatever they are kept in, a "
        "GPU in what they are kept in, float32 as bfloat16",
        command=True,
    ),
    Option(
        "kv_cache_dtype",
        Dtype(),
        "what is computed in",
        "how keys and values are kept; on a CPU bfloat16 halves the cache, on a GPU there is no other",
        command=True,
    ),
    Option(
        "sparse",
        Switch(),
        "on",
        "sparse prefill of long prompts",
        command=True,
    ),
    Option(
        "sparse_threshold",
        Whole(0),
        f"config.json's, else {SPARSE_THRESHOLD:,}",
        "only longer prompts, in tokens, are prefilled sparsely",
        command=True,
    ),
    Option(
        "sparse_budgets",
        Given(),
        "sparse_attention_config.json beside the weights, else those published for the shape",
        "JSON file with each head's number of columns and diagonals",
        command=True,
    ),
    Option(
        "from_hf_hub",
        Switch(),
        "off",
        "look a name up on Hugging Face's hub first, not on PaddleNLP's; where the one lacks it, the other is tried",
        command=True,
    ),
    Option("from_aistudio", Switch(), "off", "look a name up on AI Studio's hub, as in PaddleNLP"),
    Option("cache_dir", Place(), "PaddleNLP's or Hugging Face's own", "where a hub's files are kept"),
    Option("subfolder", Place(), "none", "the folder of the checkpoint that holds its files"),
    Option("config", Given(), "config.json", "used in its place: a Qwen2Config or a dict"),
    Option(
        "tensor_parallel_degree",
        Whole(-1),
        "1",
        "how many processes, started by `python -m paddle.distributed.launch`, share the model: each reads its own "
        "part alone, and all of them call generate with the same input",
    ),
    Option("tensor_parallel_rank", Whole(-1), "the launcher's", "this process's number"),
    Option("tensor_parallel_output", Given(), "no effect", "accepted for PaddleNLP's sake: logits are always whole"),
    Option("low_cpu_mem_usage", Given(), "no effect", "accepted: one tensor is read at a time in any case"),
    Option("convert_from_torch", Given(), "no effect", "accepted: the published files are read as they are"),
    Option("use_safetensors", Given(), "no effect", "accepted: there is one loader, of safetensors"),
)

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


def read_loading_options(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, checked; None counts as not given.

    TypeError for options that do not exist, naming what to write instead; ValueError for a value that cannot be used.
    """
    table = {option.name: option for option in LOADING}
    unknown = sorted(set(given) - set(table))
    if unknown:
        hints = "".join(f"instead of {name} write {INSTEAD[name]}; " for name in unknown if name in INSTEAD)
        raise TypeError(f"from_pretrained() has no option {', '.join(unknown)}; {hints}it has: {', '.join(table)}")
    return {name: table[name].type.read(name, value) for name, value in given.items() if value is not None}


def describe_loading_options(indent: str) -> str:
    """The table as lines of a docstring."""
    lines = [f"{one.name}: {one.help} (default: {one.default})." for one in LOADING]
    return "\n".join(fill(line, 120, initial_indent=indent, subsequent_indent=f"{indent}    ") for line in lines)


def default_batched_tokens(on_gpu: bool) -> int:
    """Tokens of one prefill chunk where nobody chose them."""
    return GPU_BATCHED_TOKENS if on_gpu else CPU_BATCHED_TOKENS


@dataclass(frozen=True)
class EngineOptions:
    """Limits and switches of one engine; those with a name in LOADING are described there.

    page_size: tokens of a KV cache page. cuda_graph: whether a decode step on a GPU is captured and replayed.
    cache_tokens: how many tokens the KV cache holds; default: those of a call, and some more.
    enable_prefix_caching: whether a prompt reuses the chunks that one of the same tokens has left in the cache.
    """

    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    sparse: bool = True
    sparse_threshold: int = SPARSE_THRESHOLD
    page_size: int | None = None
    kv_cache_dtype: str | None = None
    cuda_graph: bool = True
    cache_tokens: int | None = None
    enable_prefix_caching: bool = False

    def __post_init__(self) -> None:
        types = {option.name: option.type for option in LOADING}
        types.update(page_size=Whole(1), cache_tokens=Whole(1), cuda_graph=Switch(), enable_prefix_caching=Switch())
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and name in types:
                types[name].read(name, value)
