"""What a user chooses is one table: from_pretrained, its docstring, the command and the README have the same."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddle_qwen1m import cli
from paddle_qwen1m.options import LOADING, EngineOptions, Option, read_loading_options
from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TABLE = {option.name: option for option in LOADING}


def readme_row(option: Option) -> str:
    flag = f" (`{option.flag}`)" if option.default == "on" else ""
    return f"| `{option.name}`{flag} | {option.default} | {option.help} |"


def test_the_readme_has_the_table() -> None:
    table = "\n".join(
        ["| option | default | meaning |", "|---|---|---|"] + [readme_row(o) for o in LOADING if o.command]
    )
    assert table in README, f"paste this into the README:\n{table}"


def test_the_command_has_the_options_it_should() -> None:
    parser = argparse.ArgumentParser()
    cli._add_model_options(parser)
    text = re.sub(r"\s+", " ", parser.format_help())
    for option in LOADING:
        assert (f"{option.flag} " in text) == option.command, option.name
        assert not option.command or option.help in text, option.name


def test_what_the_command_leaves_out_counts_as_not_given() -> None:
    parser = argparse.ArgumentParser()
    cli._add_model_options(parser)
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
    for option in LOADING:
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
        ("kv_cache_dtype", 8, "kv_cache_dtype must be one of float32, bfloat16, float16, got 8"),
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
    assert all(option.name in str(error.value) for option in LOADING)
