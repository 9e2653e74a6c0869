"""Which checkpoints become Qwen2OneMForCausalLM, and that every other one keeps PaddleNLP's own class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from paddlenlp.transformers.auto.modeling import _BaseAutoModelClass

from paddle_qwen1m import register
from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "vocab_size": 64,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
DUAL_CHUNK = {"chunk_size": 192, "local_size": 64, "original_max_position_embeddings": 192}


def test_a_checkpoint_with_dual_chunk_attention_gets_this_packages_class(needle: Qwen2OneMForCausalLM) -> None:
    assert type(needle) is Qwen2OneMForCausalLM
    assert needle.training is False
    assert needle.config.hidden_size == 512


def test_our_own_architecture_name_is_recognised(copied_needle: Callable[..., Path]) -> None:
    directory = copied_needle(architectures=["Qwen2OneMForCausalLM"])
    assert type(AutoModelForCausalLM.from_pretrained(str(directory))) is Qwen2OneMForCausalLM


def test_a_checkpoint_without_dual_chunk_attention_keeps_paddlenlps_class(tmp_path: Path) -> None:
    stock = Qwen2ForCausalLM(Qwen2Config(**TINY))
    stock.save_pretrained(str(tmp_path), safe_serialization=True)
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert type(loaded) is Qwen2ForCausalLM
    ids = paddle.to_tensor([[1, 2, 3]])
    stock.eval(), loaded.eval()
    np.testing.assert_allclose(loaded(ids)[0].numpy(), stock(ids)[0].numpy(), atol=1e-6)


def test_other_auto_classes_keep_paddlenlps_classes(tmp_path: Path) -> None:
    config = Qwen2Config(**TINY, dual_chunk_attention_config=DUAL_CHUNK)
    assert type(AutoModel.from_config(config)) is Qwen2Model


def test_another_architecture_with_dual_chunk_attention_is_not_ours() -> None:
    config = Qwen2Config(**{**TINY, "architectures": ["LlamaForCausalLM"]}, dual_chunk_attention_config=DUAL_CHUNK)
    found = AutoModelForCausalLM._get_model_class_from_config(None, None, config)
    assert found.__name__ == "LlamaForCausalLM"


def test_registering_again_changes_nothing() -> None:
    before = [_BaseAutoModelClass.__dict__[name] for name in ("_from_pretrained", "_get_model_class_from_config")]
    register()
    after = [_BaseAutoModelClass.__dict__[name] for name in ("_from_pretrained", "_get_model_class_from_config")]
    assert before == after


def test_from_config_gives_random_weights_that_paddle_seed_repeats() -> None:
    config = Qwen2Config(**TINY, dual_chunk_attention_config=DUAL_CHUNK)
    models = []
    for _ in range(2):
        paddle.seed(5)
        models.append(AutoModelForCausalLM.from_config(config))
    assert type(models[0]) is Qwen2OneMForCausalLM
    first, second = (model(np.arange(9)).numpy() for model in models)
    np.testing.assert_array_equal(first, second)
    assert np.ptp(first) > 0
    table = models[0].model.slots()["model.embed_tokens.weight"].tensor.numpy()
    assert abs(table.std() - 0.02) < 0.002
    assert (models[0].model.slots()["model.norm.weight"].tensor.numpy() == 1).all()
    assert not np.array_equal(first, AutoModelForCausalLM.from_config(config)(np.arange(9)).numpy())


def test_from_config_honours_dtype() -> None:
    config = Qwen2Config(**TINY, dual_chunk_attention_config=DUAL_CHUNK)
    model = AutoModelForCausalLM.from_config(config, dtype="bfloat16")
    assert model.model.slots()["lm_head.weight"].tensor.dtype == paddle.bfloat16
    assert np.isfinite(model([[1, 2, 3]]).numpy()).all()


@pytest.mark.parametrize(("dtype", "kept"), [(None, "bfloat16"), ("float32", "float32"), (paddle.float16, "float16")])
def test_weights_are_kept_in_the_checkpoints_dtype_or_the_one_asked_for(
    needle_checkpoint: Path, dtype: Any, kept: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), dtype=dtype)
    assert model.model.slots()["lm_head.weight"].tensor.dtype == getattr(paddle, kept)


def test_bfloat16_and_widened_weights_give_the_same_logits(
    needle_checkpoint: Path, needle: Qwen2OneMForCausalLM
) -> None:
    wide = AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), dtype="float32")
    ids = np.arange(40)[None] * 7
    np.testing.assert_allclose(wide(ids).numpy(), needle(ids).numpy(), atol=2e-4)


def test_a_config_given_by_hand_replaces_config_json(
    needle_checkpoint: Path, copied_needle: Callable[..., Path]
) -> None:
    directory = copied_needle(dual_chunk_attention_config=None)
    config = json.loads((needle_checkpoint / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(str(directory), config=config)
    assert type(model) is Qwen2OneMForCausalLM


def test_paddlenlps_loading_options_are_accepted(needle_checkpoint: Path) -> None:
    options = {
        "low_cpu_mem_usage": True,
        "convert_from_torch": True,
        "tensor_parallel_degree": 1,
        "tensor_parallel_rank": 0,
        "tensor_parallel_output": False,
        "subfolder": None,
    }
    assert type(AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), **options)) is Qwen2OneMForCausalLM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_dtype": "bfloat16"}, 'no option torch_dtype; instead of torch_dtype write dtype="bfloat16"'),
        ({"device_map": "auto"}, "instead of device_map write paddle.device.set_device"),
        ({"trust_remote_code": True}, "instead of trust_remote_code write nothing"),
        ({"max_lenght": 3}, "no option max_lenght; it has: max_model_len, max_num_batched_tokens, dtype"),
    ],
)
def test_options_that_do_not_exist_are_refused_with_what_does(
    needle_checkpoint: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError) as error:
        AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), **options)
    assert message in str(error.value)


def test_a_dtype_that_weights_cannot_have_is_refused(needle_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), dtype="int8")


def test_loading_an_ordinary_checkpoint_with_our_class_says_so(copied_needle: Callable[..., Path]) -> None:
    directory = copied_needle(dual_chunk_attention_config=None)
    with pytest.raises(ValueError, match="is not a Qwen2 checkpoint with a dual_chunk_attention_config"):
        Qwen2OneMForCausalLM.from_pretrained(directory)


def test_a_directory_that_does_not_exist_is_named() -> None:
    for load in (
        Qwen2OneMForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        AutoTokenizer.from_pretrained,
    ):
        with pytest.raises(FileNotFoundError, match="/no/such/model: no such directory"):
            load("/no/such/model")


def test_nothing_is_written_into_the_checkpoint_directory(copied_needle: Callable[..., Path]) -> None:
    directory = copied_needle()
    before = sorted((path.name, path.stat().st_mtime_ns) for path in directory.iterdir())
    AutoModelForCausalLM.from_pretrained(str(directory))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in directory.iterdir()) == before


def test_saving_is_refused_with_a_reason(needle: Qwen2OneMForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="copy the checkpoint's directory"):
        needle.save_pretrained(str(tmp_path))
