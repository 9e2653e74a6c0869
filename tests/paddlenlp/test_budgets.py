"""Where the sparse budgets come from, first that exists, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from paddlenlp.transformers import AutoModelForCausalLM

from paddle_qwen1m.config import SPARSE_CONFIG, ModelConfig, SparseBudgets
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.paddlenlp import find_budgets

LAYERS, HEADS = 4, 4


def budgets_file(path: Path, vertical: int, slash: int, layers: int = LAYERS) -> Path:
    heads = {str(head): ["vertical_and_slash", vertical, slash, 1.0] for head in range(HEADS)}
    path.write_text(json.dumps([heads] * layers))
    return path


def sizes(model: Any) -> tuple[int, int]:
    return int(model.engine.budgets.vertical[0, 0]), int(model.engine.budgets.slash[0, 0])


def test_an_explicit_file_comes_first(copied_needle: Callable[..., Path], tmp_path: Path) -> None:
    directory = copied_needle()
    budgets_file(directory / SPARSE_CONFIG, 200, 300)
    explicit = budgets_file(tmp_path / "mine.json", 40, 150)
    assert sizes(AutoModelForCausalLM.from_pretrained(str(directory), sparse_budgets=explicit)) == (40, 150)
    assert sizes(AutoModelForCausalLM.from_pretrained(str(directory))) == (200, 300)


def test_budgets_may_be_given_as_an_object(needle_checkpoint: Path) -> None:
    given = SparseBudgets.uniform(31, 100, LAYERS, HEADS)
    assert sizes(AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), sparse_budgets=given)) == (31, 100)


@pytest.mark.parametrize(("layers", "heads", "hidden"), [(28, 28, 3584), (48, 40, 5120)])
def test_the_published_models_get_their_published_figures(
    logged: list[str], layers: int, heads: int, hidden: int
) -> None:
    config = ModelConfig.from_dict(
        {
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 4,
            "hidden_size": hidden,
            "intermediate_size": 1,
            "vocab_size": 8,
            "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192},
        }
    )
    checkpoint: Any = SimpleNamespace(name="Qwen/Big-1M", extra_file=lambda _: None)
    budgets = find_budgets(checkpoint, config, None, EngineOptions())
    assert budgets is not None
    assert budgets.vertical.shape == (layers, heads)
    assert logged == [f"Qwen/Big-1M has no {SPARSE_CONFIG}: using the budgets published for this shape"]


def test_without_any_the_prefill_is_dense_and_the_option_is_named(
    copied_needle: Callable[..., Path], logged: list[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(copied_needle(without=(SPARSE_CONFIG,))))
    assert model.engine.budgets is None
    assert not model.engine.is_sparse(1_000_000)
    (line,) = (line for line in logged if SPARSE_CONFIG in line)
    assert "prompts longer than 32,768 tokens are prefilled densely; give sparse_budgets=FILE" in line
    assert line.endswith(f"--text FILE... --out {SPARSE_CONFIG}`")


def test_sparse_can_be_switched_off(copied_needle: Callable[..., Path], logged: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(copied_needle(without=(SPARSE_CONFIG,))), sparse=False)
    assert not model.engine.is_sparse(1_000_000)
    assert not [line for line in logged if SPARSE_CONFIG in line]


def test_the_threshold_is_strict_and_an_option(needle_checkpoint: Path) -> None:
    usual = AutoModelForCausalLM.from_pretrained(str(needle_checkpoint))
    assert (usual.engine.is_sparse(32768), usual.engine.is_sparse(32769)) == (False, True)
    lower = AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), sparse_threshold=2048)
    assert (lower.engine.is_sparse(2048), lower.engine.is_sparse(2049)) == (False, True)


@pytest.mark.parametrize(
    ("keys", "options", "sparse_from"),
    [
        ({"sparse_attention_threshold": 4096}, {}, 4097),
        ({"sparse_attention_threshold": 4096}, {"sparse_threshold": 100}, 101),
        ({"sparse_attention_enabled": False}, {}, None),
        ({"sparse_attention_enabled": False}, {"sparse": True}, 32769),
        ({"sparse_attention_enabled": True}, {}, 32769),
    ],
)
def test_config_json_decides_where_the_caller_does_not(
    copied_needle: Callable[..., Path], keys: dict[str, Any], options: dict[str, Any], sparse_from: int | None
) -> None:
    dual_chunk = {"chunk_size": 1024, "local_size": 256, "original_max_position_embeddings": 1024, **keys}
    directory = copied_needle(dual_chunk_attention_config=dual_chunk)
    engine = AutoModelForCausalLM.from_pretrained(str(directory), **options).engine
    if sparse_from is None:
        assert not engine.is_sparse(10**6)
    else:
        assert (engine.is_sparse(sparse_from - 1), engine.is_sparse(sparse_from)) == (False, True)


def test_an_explicit_file_switches_sparse_on(copied_needle: Callable[..., Path], tmp_path: Path) -> None:
    dual_chunk = {"chunk_size": 1024, "local_size": 256, "sparse_attention_enabled": False}
    directory = copied_needle(dual_chunk_attention_config=dual_chunk)
    explicit = budgets_file(tmp_path / "mine.json", 40, 150)
    assert AutoModelForCausalLM.from_pretrained(str(directory), sparse_budgets=explicit).engine.is_sparse(40_000)


def test_budgets_in_config_json_count_where_no_file_lies_beside(
    copied_needle: Callable[..., Path], logged: list[str]
) -> None:
    layer = {str(head): ["vertical_and_slash", 50, 160, 1.0] for head in range(HEADS)}
    dual_chunk = {"chunk_size": 1024, "local_size": 256, "sparse_attention_config": [layer] * LAYERS}
    directory = copied_needle(dual_chunk_attention_config=dual_chunk)
    beside = SparseBudgets.from_file(directory / SPARSE_CONFIG, LAYERS, HEADS)
    model = AutoModelForCausalLM.from_pretrained(str(directory))
    assert np.array_equal(model.engine.budgets.slash, beside.slash)
    line = f"{directory / SPARSE_CONFIG} counts, not the sparse_attention_config in config.json"
    assert line in logged
    (directory / SPARSE_CONFIG).unlink()
    logged.clear()
    assert sizes(AutoModelForCausalLM.from_pretrained(str(directory))) == (50, 160)
    assert line not in logged


def test_budgets_of_another_shape_are_refused(needle_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"sparse_budgets: has budgets for \(3, 4\) \(layers, heads\), the model has"):
        AutoModelForCausalLM.from_pretrained(
            str(needle_checkpoint), sparse_budgets=SparseBudgets.uniform(31, 100, 3, HEADS)
        )


def test_a_file_that_does_not_fit_the_model_is_named(needle_checkpoint: Path, tmp_path: Path) -> None:
    short = budgets_file(tmp_path / "short.json", 40, 150, layers=3)
    with pytest.raises(ValueError, match=r"short\.json.*\(3, 4\) \(layers, heads\), the model has \(4, 4\)"):
        AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), sparse_budgets=short)
    with pytest.raises(ValueError, match=r"none\.json"):
        AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), sparse_budgets=tmp_path / "none.json")


def test_fewer_diagonals_than_are_always_kept_are_refused(needle_checkpoint: Path, tmp_path: Path) -> None:
    narrow = budgets_file(tmp_path / "narrow.json", 1000, 99)
    with pytest.raises(
        ValueError, match=r"narrow\.json.*layer 0 head 0.*100 diagonals.*got vertical_and_slash 1000 99"
    ):
        AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), sparse_budgets=narrow)


def test_limits_of_from_pretrained_reach_the_engine(needle_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(needle_checkpoint), max_num_batched_tokens=100, max_model_len=5000, kv_cache_dtype="bfloat16"
    )
    options = model.engine.options
    assert (options.max_num_batched_tokens, options.max_model_len, options.kv_cache_dtype) == (100, 5000, "bfloat16")
    assert np.isfinite(model(np.arange(300)).numpy()).all()
    with pytest.raises(ValueError, match="max_num_batched_tokens must be a whole number of at least 1, got 0"):
        AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), max_num_batched_tokens=0)
