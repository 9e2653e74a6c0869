"""What a user chooses is one table: from_pretrained, its docstring, the command and the README have the same."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddle_qwen1m.commands.arguments import add_model_options
from paddle_qwen1m.options import (
    ACCEPTED,
    ANY,
    AUTO,
    OPTIONS,
    EngineOptions,
    Face,
    Option,
    options_of,
    read_llm_options,
    read_loading_options,
)
from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TABLE = options_of(Face.LOADING)


def readme_row(option: Option) -> str:
    flag = f" (`{option.flag}`)" if option.default == "on" and option.faces & Face.COMMAND else ""
    return f"| `{option.name}`{flag} | {option.default} | {option.help} |"


def test_the_readme_has_the_table() -> None:
    command, python = options_of(Face.COMMAND), options_of(Face.LLM)
    for rows in (command.values(), [option for name, option in python.items() if name not in command]):
        table = "\n".join(["| option | default | meaning |", "|---|---|---|", *map(readme_row, rows)])
        assert table in README, f"paste this into the README:\n{table}"


def test_the_command_has_the_options_it_should() -> None:
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    text = re.sub(r"\s+", " ", parser.format_help())
    for option in OPTIONS:
        assert (f"{option.flag} " in text) == bool(option.faces & Face.COMMAND), option.name
        assert not option.faces & Face.COMMAND or option.help in text, option.name


def test_what_the_command_leaves_out_counts_as_not_given() -> None:
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    assert read_loading_options(vars(parser.parse_args([]))) == {"from_hf_hub": False}
    given = parser.parse_args(["--no-sparse", "--max-model-len", "7", "--dtype", "float16", "--from-hf-hub"])
    assert read_loading_options(vars(given)) == {
        "sparse": False,
        "max_model_len": 7,
        "dtype": "float16",
        "from_hf_hub": True,
    }


def test_the_docstring_of_from_pretrained_has_every_option() -> None:
    text = " ".join((Qwen2OneMForCausalLM.from_pretrained.__doc__ or "").split())
    for option in TABLE.values():
        assert f"{option.name}: {option.help} (default: {option.default})" in text


def test_none_counts_as_not_given() -> None:
    assert read_loading_options(dict.fromkeys(TABLE)) == {}


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("max_model_len", np.int64(5), 5),
        ("dtype", paddle.bfloat16, "bfloat16"),
        ("kv_cache_dtype", "paddle.float16", "float16"),
        ("sparse", np.bool_(False), False),
        ("sparse", 0, False),
        ("cache_dir", Path("/a/b"), "/a/b"),
        ("tensor_parallel_degree", -1, -1),
    ],
)
def test_values_are_read(name: str, value: Any, read: Any) -> None:
    got = read_loading_options({name: value})[name]
    assert got == read
    assert type(got) is type(read)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_model_len", 0, "max_model_len must be a whole number of at least 1, got 0"),
        ("max_model_len", "4096", "max_model_len must be a whole number of at least 1, got '4096'"),
        ("max_model_len", 4096.0, "max_model_len must be a whole number of at least 1, got 4096.0"),
        ("max_num_batched_tokens", True, "max_num_batched_tokens must be a whole number of at least 1, got True"),
        ("sparse_threshold", -1, "sparse_threshold must be a whole number of at least 0, got -1"),
        ("sparse_threshold", float("nan"), "sparse_threshold must be a whole number of at least 0, got nan"),
        ("sparse", "false", "sparse must be True or False, got 'false'"),
        ("from_hf_hub", "yes", "from_hf_hub must be True or False, got 'yes'"),
        ("dtype", "int8", "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ("kv_cache_dtype", 8, "kv_cache_dtype must be one of float32, bfloat16, float16, int8, fp8, got 8"),
        ("cache_dir", 3, "cache_dir must be a path, got 3"),
        ("tensor_parallel_degree", "2", "tensor_parallel_degree must be a whole number of at least -1, got '2'"),
    ],
)
def test_values_that_cannot_be_used_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read_loading_options({name: value})
    assert str(error.value) == message
    if name in EngineOptions.__dataclass_fields__:
        with pytest.raises(ValueError) as error:
            EngineOptions(**{name: value})
        assert str(error.value) == message


def test_unknown_options_are_refused_with_those_that_exist() -> None:
    with pytest.raises(TypeError, match="no option max_lenght; it has: max_model_len, ") as error:
        read_loading_options({"max_lenght": 3})
    assert all(name in str(error.value) for name in TABLE)


def test_llm_reads_what_users_of_vllm_write() -> None:
    given = read_llm_options(
        {
            "max_model_len": "auto",
            "dtype": "half",
            "kv_cache_dtype": "auto",
            "gpu_memory_utilization": 0.9,
            "enforce_eager": True,
            "enable_chunked_prefill": True,
            "quantization": None,
            "trust_remote_code": True,
            "swap_space": 4,
            "tokenizer_mode": "auto",
        }
    )
    assert given == {
        "max_model_len": AUTO,
        "dtype": "float16",
        "gpu_memory_utilization": 0.9,
        "enforce_eager": True,
        "enable_chunked_prefill": True,
    }
    assert read_llm_options({"max_model_len": -1}) == {"max_model_len": AUTO}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("quantization", "awq", "quantization must be fp8 or int8, got 'awq': .* those that others quantised are not"),
        ("kv_cache_dtype", "fp8_e5m2", "kv_cache_dtype='fp8_e5m2': biases of these models .* int8 takes a byte"),
        ("kv_cache_dtype", "float64", "kv_cache_dtype must be one of float32, .*, int8, fp8, got 'float64'"),
        ("enable_chunked_prefill", False, "enable_chunked_prefill=False: it is always on; .* max_num_batched_tokens"),
        ("max_model_len", 0, "at least 1, got 0; 'auto' takes the longest that fits"),
        ("max_model_len", "1.01e6", "got '1.01e6'; 'auto' takes the longest that fits"),
        ("gpu_memory_utilization", 0, "must be a number above 0, at most 1, got 0"),
        ("gpu_memory_utilization", 1.5, "must be a number above 0, at most 1, got 1.5"),
        ("gpu_memory_utilization", "0.9", "must be a number above 0, at most 1, got '0.9'"),
        ("prefix_temperature_tolerance", -1e-3, "must be a number of at least 0, got -0.001"),
        ("prefix_temperature_tolerance", float("nan"), "got nan"),
        ("pipeline_parallel_size", 2, "pipeline_parallel_size=2 is not there: leave it out, or write 1"),
        ("tokenizer_mode", "slow", "tokenizer_mode='slow' is not there: leave it out, or write 'auto'"),
    ],
)
def test_llm_refuses_what_is_not_there(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_llm_options({name: value})


def test_llm_names_its_options_and_what_to_write_instead() -> None:
    with pytest.raises(TypeError, match="no option download_dir; instead of download_dir write cache_dir; ") as error:
        read_llm_options({"download_dir": "/x"})
    assert all(name in str(error.value) for name in options_of(Face.LLM))


def test_what_is_accepted_is_no_option() -> None:
    assert not set(ACCEPTED) & {option.name for option in OPTIONS}
    given = {name: 1 if allowed is ANY else allowed[0] for name, allowed in ACCEPTED.items()}
    assert read_llm_options(given) == {}


def test_defaults_in_words_are_those_of_the_engine() -> None:
    for name, default in vars(EngineOptions()).items():
        option = options_of(Face.LLM).get(name)
        is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if option is not None and is_number and name.startswith(("max_num_seqs", "prefix")):
            assert float(option.default.partition(";")[0].replace(",", "")) == default
