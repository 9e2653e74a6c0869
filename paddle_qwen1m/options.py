"""What a user chooses when a checkpoint is loaded: one table that from_pretrained, LLM, the command and README read."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Flag, auto
from textwrap import fill
from typing import Any

from paddle_qwen1m.config import SPARSE_THRESHOLD
from paddle_qwen1m.dtypes import CACHE_DTYPES, DTYPES, FP8, INT8, QUANTIZATIONS, dtype_name

CPU_BATCHED_TOKENS, GPU_BATCHED_TOKENS = 2048, 32768
CPU_PAUSE_TOKENS, GPU_PAUSE_TOKENS = 256, 2048
CPU_INTER_TOKEN_MS, GPU_INTER_TOKEN_MS = 500, 200
MAX_NUM_SEQS = 32
BORDER_PARTS = 8
TEMPERATURE_TOLERANCE = 1e-3
STORED_TOKENS = 8192
SIZE = re.compile(r"(\d+)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
AUTO = -1
"""max_model_len: the longest that fits."""


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
class Length(Whole):
    """A whole number of at least `lowest`; "auto", or -1, is AUTO."""

    def read(self, name: str, value: Any) -> int:
        if isinstance(value, str) and value == "auto":
            return AUTO
        try:
            return AUTO if value == AUTO else super().read(name, value)
        except ValueError as error:
            raise ValueError(f"{error}; 'auto' takes the longest that fits") from None


@dataclass(frozen=True)
class Number:
    """A number above `above`, or equal to it where `closed`, and at most `highest`."""

    above: float
    highest: float = math.inf
    closed: bool = False

    def read(self, name: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, (bool, str)) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (number > self.above or (self.closed and number == self.above)) or not number <= self.highest:
            least = f"of at least {self.above:g}" if self.closed else f"above {self.above:g}"
            most = "" if self.highest == math.inf else f", at most {self.highest:g}"
            raise ValueError(f"{name} must be a number {least}{most}, got {value!r}")
        return number


@dataclass(frozen=True)
class Dtype:
    """The name of one of these types, or Paddle's object for it; "auto" is not to choose one."""

    names: tuple[str, ...] = DTYPES

    def read(self, name: str, value: Any) -> str | None:
        if isinstance(value, str) and value == "auto":
            return None
        return dtype_name({"half": "float16", "float": "float32"}.get(str(value), value), name, self.names)


@dataclass(frozen=True)
class CacheDtype(Dtype):
    """The same for keys and values, for which other engines have more types."""

    names: tuple[str, ...] = CACHE_DTYPES

    def read(self, name: str, value: Any) -> str | None:
        if value == "fp8_e4m3":
            return FP8
        if isinstance(value, str) and value.startswith(("fp8_", "int4", "nvfp4", "int8_")):
            raise ValueError(
                f"{name}={value!r}: biases of these models put outliers into keys that such a type rounds away; "
                f"{INT8} takes a byte a number, and keeps the answers"
            )
        return super().read(name, value)


@dataclass(frozen=True)
class Quantization:
    """One of QUANTIZATIONS, for which other engines have names of formats of files."""

    texts: tuple[str, ...] = QUANTIZATIONS

    def read(self, name: str, value: Any) -> str:
        if value not in self.texts:
            raise ValueError(
                f"{name} must be {' or '.join(self.texts)}, got {value!r}: weights are rounded as they are loaded, or "
                "come from what `paddle-qwen1m convert` wrote; those that others quantised are not read"
            )
        return str(value)


@dataclass(frozen=True)
class Always:
    """A switch that is on whatever is said."""

    instead: str

    def read(self, name: str, value: Any) -> bool:
        if not Switch().read(name, value):
            raise ValueError(f"{name}=False: it is always on; {self.instead}")
        return True


@dataclass(frozen=True)
class Choice:
    """One of these texts."""

    texts: tuple[str, ...]

    def read(self, name: str, value: Any) -> str:
        if value not in self.texts:
            raise ValueError(f"{name} must be {' or '.join(map(repr, self.texts))}, got {value!r}")
        return str(value)


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
class Size:
    """Bytes: a whole number, or a text such as 512MiB or 5GB."""

    def read(self, name: str, value: Any) -> int:
        found = SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if found is None:
            return Whole(1).read(name, value)
        number = int(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
        return Whole(1).read(name, number)


@dataclass(frozen=True)
class Given:
    """Whatever it is, it is looked at where it is used."""

    def read(self, name: str, value: Any) -> Any:
        return value


class Face(Flag):
    """Who has an option: from_pretrained, LLM, the command (a switch that is on by default as --no-NAME)."""

    LOADING = auto()
    LLM = auto()
    COMMAND = auto()


PYTHON = Face.LOADING | Face.LLM
EVERYWHERE = PYTHON | Face.COMMAND


@dataclass(frozen=True)
class Option:
    """A keyword. `default` says in words what holds without it. README lists those that the command or LLM has."""

    name: str
    type: Whole | Number | Dtype | Switch | Place | Size | Given | Quantization | Always | Choice
    default: str
    help: str
    faces: Face = Face.LOADING

    @property
    def flag(self) -> str:
        """How the command spells it."""
        return f"--{'no-' if self.default == 'on' else ''}{self.name.replace('_', '-')}"

    @property
    def flag_help(self) -> str:
        return f"no {self.help}" if self.default == "on" else f"{self.help} (default: {self.default})"


OPTIONS = (
    Option(
        "max_model_len",
        Whole(1),
        "the model's max_position_embeddings",
        "most tokens of prompt and answer together",
        EVERYWHERE,
    ),
    Option(
        "max_num_batched_tokens",
        Whole(1),
        f"{CPU_BATCHED_TOKENS:,} on a CPU, {GPU_BATCHED_TOKENS:,} on a GPU",
        "tokens of one prefill chunk: smaller takes less memory, and 63,488, 84,736 or 126,976, which cut a DCA chunk "
        "evenly, read a million tokens a few percent sooner; a dense answer stays the same, a sparse one may change, "
        "because its keys are chosen anew for each chunk",
        EVERYWHERE,
    ),
    Option(
        "dtype",
        Dtype(),
        "as in the checkpoint",
        "how weights are kept: float32, bfloat16 or float16; a CPU computes in float32 whatever they are kept in, a "
        "GPU in what they are kept in, float32 as bfloat16",
        EVERYWHERE,
    ),
    Option(
        "quantization",
        Quantization(),
        "as in the checkpoint: none, or what it was converted to",
        "how the weights of the layers' linears are kept: fp8 or int8 take half of 16 bits, rounded as they are "
        "loaded; head and embedding stay as dtype says",
        EVERYWHERE,
    ),
    Option(
        "kv_cache_dtype",
        CacheDtype(),
        "what is computed in; of LLM and serve int8, where max_model_len would not fit otherwise",
        "how keys and values are kept: int8 takes half of 16 bits, with scales a little more (see kv_scales); fp8 "
        "takes as much and loses more; on a CPU bfloat16 or float16, too",
        EVERYWHERE,
    ),
    Option(
        "kv_scales",
        Given(),
        "kv_scales.json beside the weights, else those made at the first load, kept in the user's cache folder",
        "JSON file with what keys of a byte are measured in, which `paddle-qwen1m calibrate-kv` makes",
        EVERYWHERE,
    ),
    Option(
        "sparse",
        Switch(),
        "on",
        "sparse prefill of long prompts",
        EVERYWHERE,
    ),
    Option(
        "sparse_threshold",
        Whole(0),
        f"config.json's, else {SPARSE_THRESHOLD:,}",
        "only longer prompts, in tokens, are prefilled sparsely",
        EVERYWHERE,
    ),
    Option(
        "sparse_budgets",
        Given(),
        "sparse_attention_config.json beside the weights, else those published for the shape",
        "JSON file with each head's number of columns and diagonals",
        EVERYWHERE,
    ),
    Option(
        "from_hf_hub",
        Switch(),
        "off",
        "look a name up on Hugging Face's hub first, not on PaddleNLP's; where the one lacks it, the other is tried",
        EVERYWHERE,
    ),
    Option("from_aistudio", Switch(), "off", "look a name up on AI Studio's hub, as in PaddleNLP", PYTHON),
    Option("cache_dir", Place(), "PaddleNLP's or Hugging Face's own", "where a hub's files are kept", PYTHON),
    Option("subfolder", Place(), "none", "the folder of the checkpoint that holds its files", PYTHON),
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
    Option("tokenizer", Place(), "the model's", "directory or hub name of another tokenizer", Face.LLM),
    Option("tensor_parallel_size", Whole(1), "1", "GPUs, or CPU processes, that share the model", Face.LLM),
    Option(
        "seed", Whole(0), "another one each time", "of the seeds that requests without one of their own get", Face.LLM
    ),
    Option(
        "gpu_memory_utilization",
        Number(0, 1),
        "what is free at start, less 1.5 GB",
        "share of a GPU's memory that weights, keys and values and workspace take together",
        Face.LLM,
    ),
    Option(
        "kv_cache_memory_bytes",
        Whole(1),
        "what the weights and the workspace leave; on a CPU a quarter of the memory available at start, divided by "
        "the ranks of the host",
        "bytes of a rank's keys and values, exactly",
        Face.LLM,
    ),
    Option("max_num_seqs", Whole(1), f"{MAX_NUM_SEQS}", "answers that are written at the same time", Face.LLM),
    Option("enforce_eager", Switch(), "off", "no CUDA graphs: slower on a GPU, nothing else", Face.LLM),
    Option(
        "enable_prefix_caching",
        Switch(),
        "on",
        "prompts reuse keys and values of earlier ones with the same beginning",
        PYTHON,
    ),
    Option(
        "prefix_border_parts",
        Whole(1),
        f"{BORDER_PARTS}",
        "the last chunk of a sparse prompt is cut at every such part of a chunk, where other prompts can go on from",
        Face.LLM,
    ),
    Option(
        "prefix_temperature_tolerance",
        Number(0, closed=True),
        f"{TEMPERATURE_TOLERANCE:g}; from_pretrained: 0",
        "above original_max_position_embeddings a prefix is reused where its m² differs by at most this share; 0: "
        "where it is equal",
        PYTHON,
    ),
    Option(
        "prefix_store",
        Place(),
        "none",
        "folder where prefixes of prompts are kept when the process ends, and found by the next one; its files reveal "
        "the text, and who can write there can change answers",
        EVERYWHERE,
    ),
    Option(
        "prefix_store_size",
        Size(),
        "no limit",
        "most bytes of all files in it, such as 500GB: the least recently used go",
        EVERYWHERE,
    ),
    Option(
        "prefix_store_min_tokens",
        Whole(1),
        f"{STORED_TOKENS:,}",
        "prefixes with fewer tokens are not kept",
        EVERYWHERE,
    ),
    Option(
        "max_inter_token_ms",
        Whole(1),
        f"{CPU_INTER_TOKEN_MS} on a CPU, {GPU_INTER_TOKEN_MS} on a GPU",
        "most milliseconds between the tokens of an answer while another prompt is read",
        Face.LLM,
    ),
    Option(
        "max_pause_tokens",
        Whole(1),
        f"{CPU_PAUSE_TOKENS} on a CPU, {GPU_PAUSE_TOKENS:,} on a GPU",
        "a prompt with at most so many tokens to compute starts in the pauses of a longer one",
        Face.LLM,
    ),
    Option(
        "generation_config",
        Choice(("auto", "vllm")),
        "auto",
        "what holds where no SamplingParams are given: generation_config.json, or 'vllm' for vLLM's own defaults",
        Face.LLM,
    ),
    Option(
        "enable_chunked_prefill",
        Always("for one chunk give max_num_batched_tokens as large as the longest prompt"),
        "on",
        "accepted: a prompt is always read in chunks",
        Face.LLM,
    ),
)

ANY = object()
ACCEPTED: dict[str, Any] = {
    "async_scheduling": ANY,
    "data_parallel_size": (1,),
    "cpu_offload_gb": (0,),
    "disable_cascade_attn": ANY,
    "disable_custom_all_reduce": ANY,
    "disable_log_requests": ANY,
    "disable_log_stats": ANY,
    "disable_sliding_window": ANY,
    "distributed_executor_backend": ("mp", "uni"),
    "enable_lora": (False,),
    "load_format": ("auto", "safetensors"),
    "max_logprobs": (20,),
    "max_seq_len_to_capture": ANY,
    "model_impl": ("auto",),
    "pipeline_parallel_size": (1,),
    "runner": ("auto", "generate"),
    "skip_tokenizer_init": (False,),
    "swap_space": ANY,
    "task": ("auto", "generate"),
    "tokenizer_mode": ("auto",),
    "trust_remote_code": ANY,
    "use_v2_block_manager": ANY,
}
"""Options that vLLM's users pass to LLM and that change nothing here: with these values, or ANY."""

INSTEAD = {
    "torch_dtype": 'dtype="bfloat16"',
    "device_map": 'paddle.device.set_device("cpu") before loading',
    "device": 'paddle.device.set_device("cpu") before loading',
    "trust_remote_code": "nothing: no code is fetched, `import paddle_qwen1m` is the code",
    "attn_implementation": "nothing: attention is always this package's own",
    "use_flash_attention": "nothing: attention is always this package's own",
    "load_in_8bit": 'quantization="int8"',
    "load_in_4bit": 'quantization="int8"; there are none of 4 bits',
    "token": "the environment variable HF_TOKEN",
    "revision": "the directory of a copy of that revision",
    "local_files_only": "the environment variable HF_HUB_OFFLINE=1, or the directory itself",
}
INSTEAD_IN_LLM = {
    "block_size": "nothing: pages are chosen to fit the attention's chunks",
    "download_dir": "cache_dir",
    "hf_token": "the environment variable HF_TOKEN",
    "hf_overrides": "nothing: the checkpoint's config.json counts",
    "num_gpu_blocks_override": "kv_cache_memory_bytes",
    "tensor_parallel_degree": "tensor_parallel_size",
    "tokenizer_revision": "the directory of a copy of that revision",
}


def options_of(face: Face) -> dict[str, Option]:
    """Those that a face has, by name."""
    return {option.name: option for option in OPTIONS if face & option.faces}


def read_loading_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What from_pretrained was given, checked; None counts as not given.

    TypeError for options that do not exist, naming what to write instead; ValueError for a value that cannot be used.
    """
    return _read("from_pretrained()", options_of(Face.LOADING), given, INSTEAD)


def read_llm_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same for LLM, whose max_model_len may be AUTO; what changes nothing here is left out."""
    table = options_of(Face.LLM)
    table["max_model_len"] = replace(table["max_model_len"], type=Length(1))
    accepted = {name: value for name, value in given.items() if name in ACCEPTED}
    for name, value in accepted.items():
        allowed = ACCEPTED[name]
        if value is not None and allowed is not ANY and value not in allowed:
            raise ValueError(f"{name}={value!r} is not there: leave it out, or write {' or '.join(map(repr, allowed))}")
    rest = {name: value for name, value in given.items() if name not in accepted}
    return _read("LLM()", table, rest, {**INSTEAD, **INSTEAD_IN_LLM})


def _read(
    face: str, table: Mapping[str, Option], given: Mapping[str, Any], instead: Mapping[str, str]
) -> dict[str, Any]:
    unknown = sorted(set(given) - set(table))
    if unknown:
        hints = "".join(f"instead of {name} write {instead[name]}; " for name in unknown if name in instead)
        raise TypeError(f"{face} has no option {', '.join(unknown)}; {hints}it has: {', '.join(table)}")
    read = {name: table[name].type.read(name, value) for name, value in given.items() if value is not None}
    return {name: value for name, value in read.items() if value is not None}


def describe_options(face: Face, indent: str) -> str:
    """The table as lines of a docstring."""
    lines = [f"{one.name}: {one.help} (default: {one.default})." for one in options_of(face).values()]
    return "\n".join(fill(line, 120, initial_indent=indent, subsequent_indent=f"{indent}    ") for line in lines)


def default_batched_tokens(on_gpu: bool) -> int:
    """Tokens of one prefill chunk where nobody chose them."""
    return GPU_BATCHED_TOKENS if on_gpu else CPU_BATCHED_TOKENS


def default_pause_tokens(on_gpu: bool) -> int:
    """Tokens of a short prompt where nobody chose them."""
    return GPU_PAUSE_TOKENS if on_gpu else CPU_PAUSE_TOKENS


def default_inter_token_ms(on_gpu: bool) -> int:
    """Bound of the time between tokens where nobody chose it."""
    return GPU_INTER_TOKEN_MS if on_gpu else CPU_INTER_TOKEN_MS


@dataclass(frozen=True)
class EngineOptions:
    """Limits and switches of one engine; those with a name in OPTIONS are described there.

    page_size: tokens of a KV cache page. cuda_graph: whether a decode step on a GPU is captured and replayed.
    cache_tokens: how many tokens the KV cache holds, exactly; default: those of a call, and some more.
    """

    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    sparse: bool = True
    sparse_threshold: int = SPARSE_THRESHOLD
    page_size: int | None = None
    kv_cache_dtype: str | None = None
    quantization: str | None = None
    cuda_graph: bool = True
    cache_tokens: int | None = None
    enable_prefix_caching: bool = False
    max_num_seqs: int = MAX_NUM_SEQS
    max_inter_token_ms: int | None = None
    max_pause_tokens: int | None = None
    prefix_border_parts: int = BORDER_PARTS
    prefix_temperature_tolerance: float = TEMPERATURE_TOLERANCE
    prefix_store: str | None = None
    prefix_store_size: int | None = None
    prefix_store_min_tokens: int = STORED_TOKENS

    def __post_init__(self) -> None:
        types: dict[str, Any] = {option.name: option.type for option in OPTIONS}
        types.update(page_size=Whole(1), cache_tokens=Whole(1), cuda_graph=Switch())
        if self.prefix_store is not None and not self.enable_prefix_caching:
            raise ValueError("prefix_store needs enable_prefix_caching=True: what comes out of it goes into that cache")
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and name in types:
                types[name].read(name, value)
