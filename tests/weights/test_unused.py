"""Tensors that config.json says are not needed are compared with what is used, and not dropped in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paddlenlp.transformers import AutoModelForCausalLM
from paddlenlp.utils.log import logger
from safetensors.numpy import load_file, save_file

import paddle_qwen1m  # noqa: F401

TIED = Path(__file__).parents[1] / "data" / "reference" / "group1_tied_f32"
TABLE = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def with_tensors(tmp_path: Path) -> Callable[..., str]:
    """A tied checkpoint to whose tensors those of the function are added."""

    def write(make: Callable[[dict[str, np.ndarray], dict[str, Any]], dict[str, np.ndarray]]) -> str:
        directory = tmp_path / "checkpoint"
        shutil.copytree(TIED, directory)
        tensors = load_file(directory / "model.safetensors")
        config = json.loads((directory / "config.json").read_text())
        save_file({**tensors, **make(tensors, config)}, directory / "model.safetensors")
        return str(directory)

    return write


def test_a_head_that_is_the_embedding_changes_nothing(with_tensors: Callable[..., str]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        with_tensors(lambda tensors, _: {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    )
    ids = np.arange(20)
    np.testing.assert_array_equal(loaded(ids).numpy(), AutoModelForCausalLM.from_pretrained(str(TIED))(ids).numpy())


@pytest.mark.parametrize(("factor", "lines"), [(1, 0), (100, 1)])
def test_a_rotary_table_of_another_base_is_a_line_in_the_log(
    with_tensors: Callable[..., str], monkeypatch: pytest.MonkeyPatch, factor: float, lines: int
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda message, *_: logged.append(str(message)))

    def table(_: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        base = config["rope_theta"] * factor
        return {TABLE: (base ** -(np.arange(0, size, 2) / size)).astype(np.float32)}

    AutoModelForCausalLM.from_pretrained(with_tensors(table))
    assert len([line for line in logged if f"{TABLE} is not of config.json's rotary base" in line]) == lines


@pytest.mark.parametrize(
    ("suffix", "kind"), [("qweight", "GPTQ or AWQ"), ("weight_scale_inv", "FP8 in blocks"), ("weight_scale", "FP8")]
)
def test_quantised_weights_are_named_where_the_config_says_nothing(
    with_tensors: Callable[..., str], suffix: str, kind: str
) -> None:
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    directory = with_tensors(lambda *_: {name: np.ones(4, np.float32)})
    with pytest.raises(
        ValueError, match=rf"The weights are quantised \({kind}.*load the checkpoint they were made from"
    ):
        AutoModelForCausalLM.from_pretrained(directory)
