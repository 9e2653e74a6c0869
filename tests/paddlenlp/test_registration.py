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
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForCausalLMPipe,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)
from paddlenlp.transformers.auto.modeling import _BaseAutoModelClass

from paddle_qwen1m import register
from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM
from paddle_qwen1m.weights.convert import convert

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
NEEDLE_DUAL_CHUNK = {"chunk_size": 1024, "local_size": 256, "original_max_position_embeddings": 1024}


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


def test_other_auto_classes_keep_paddlenlps_classes() -> None:
    assert type(AutoModel.from_config(Qwen2Config(**TINY))) is Qwen2Model


@pytest.mark.parametrize(
    "build",
    [
        AutoModel.from_config,
        AutoModelForTokenClassification.from_config,
        AutoModelForSequenceClassification.from_config,
        Qwen2ForCausalLM,
        Qwen2Model,
        Qwen2ForSequenceClassification,
        Qwen2ForCausalLMPipe,
        lambda config: Qwen2ForCausalLM(config=config),
        type("Derived", (Qwen2ForCausalLM,), {}),
    ],
)
def test_paddlenlps_own_qwen2_is_not_built_with_dual_chunk_attention(build: Callable[[Any], Any]) -> None:
    config = Qwen2Config(**TINY, dual_chunk_attention_config=DUAL_CHUNK)
    with pytest.raises(ValueError, match=r"would ignore the dual_chunk_attention_config.*use AutoModelForCausalLM"):
        build(config)


@pytest.mark.parametrize("load", [Qwen2ForCausalLM, AutoModel, AutoModelForTokenClassification])
def test_paddlenlps_own_qwen2_loads_what_was_converted_for_it_without_dual_chunk_attention(
    tmp_path: Path, needle_checkpoint: Path, load: Any
) -> None:
    """As README's words on stock PaddleNLP and this error together say."""
    convert(needle_checkpoint, tmp_path / "stock", "paddlenlp", dtype="float32")
    with pytest.raises(ValueError, match=r"config\.dual_chunk_attention_config = None"):
        load.from_pretrained(str(tmp_path / "stock"), dtype="float32")
    config = Qwen2Config.from_pretrained(str(tmp_path / "stock"))
    config.max_position_embeddings = 1024
    config.dual_chunk_attention_config = None
    model = load.from_pretrained(str(tmp_path / "stock"), config=config, dtype="float32")
    assert type(model).__module__ == "paddlenlp.transformers.qwen2.modeling"


def test_paddlenlps_own_qwen2_refuses_before_it_converts_anything(copied_needle: Callable[..., Path]) -> None:
    directory = copied_needle()
    before = sorted(path.name for path in directory.iterdir())
    with pytest.raises(ValueError, match="would ignore the dual_chunk_attention_config"):
        Qwen2ForCausalLM.from_pretrained(str(directory), convert_from_torch=True)
    assert sorted(path.name for path in directory.iterdir()) == before


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


LOADERS = [
    Qwen2OneMForCausalLM.from_pretrained,
    AutoModelForCausalLM.from_pretrained,
    AutoTokenizer.from_pretrained,
]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"architectures": ["Qwen2ForCausalLM"', "is not valid JSON"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'[{"architectures": []}]', "holds a list"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(
    copied_needle: Callable[..., Path], load: Callable[[str], Any], content: bytes, words: str
) -> None:
    directory = copied_needle()
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        load(str(directory))
    assert str(directory / "config.json") in str(error.value)


def rewrite(directory: Path, **changes: Any) -> str:
    values = {**json.loads((directory / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps(values))
    return str(directory)


def test_a_config_as_transformers_5_writes_it_gives_the_same_logits(
    needle: Qwen2OneMForCausalLM, copied_needle: Callable[..., Path], logged: list[str]
) -> None:
    directory = copied_needle(rope_theta=None, torch_dtype=None)
    name = rewrite(
        directory, rope_parameters={"rope_theta": 1e5, "rope_type": "default"}, dtype="bfloat16", layer_types=None
    )
    ids = np.arange(40)[None]
    model = AutoModelForCausalLM.from_pretrained(name)
    np.testing.assert_array_equal(model(ids).numpy(), needle(ids).numpy())
    assert model.config.rope_theta == 1e5
    given = AutoModelForCausalLM.from_pretrained(name, config=Qwen2Config.from_pretrained(name))
    np.testing.assert_array_equal(given(ids).numpy(), needle(ids).numpy())
    assert not [line for line in logged if "not known here" in line or "rotary base" in line]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type must be.*yarn"),
        ({"use_sliding_window": True}, "use_sliding_window must be false or null, got True"),
        ({"rope_theta": None}, "rope_theta must be a number above 1, got None"),
        ({"hidden_size": "512"}, "hidden_size must be a whole number of at least 1, got '512'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "got gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "got fp8"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number.*got nan"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused_by_file_key_and_value(
    copied_needle: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    directory = copied_needle()
    name = rewrite(directory, **changes)
    with pytest.raises(ValueError, match=words) as error:
        AutoModelForCausalLM.from_pretrained(name)
    assert str(error.value).startswith(str(directory / "config.json"))


def test_a_size_that_is_missing_is_not_taken_from_paddlenlps_defaults(copied_needle: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"config\.json: lacks hidden_size, vocab_size"):
        AutoModelForCausalLM.from_pretrained(str(copied_needle(hidden_size=None, vocab_size=None)))


def test_keys_that_nobody_knows_are_a_line_in_the_log(
    copied_needle: Callable[..., Path], logged: list[str], needle_checkpoint: Path
) -> None:
    directory = copied_needle(my_own_key=1, dual_chunk_attention_config={**NEEDLE_DUAL_CHUNK, "chunk_sise": 2})
    AutoModelForCausalLM.from_pretrained(str(directory))
    assert [line for line in logged if "not known here" in line] == [
        f"{directory / 'config.json'}: not known here and not used: my_own_key",
        f"{directory / 'config.json'}: not known here and not used in dual_chunk_attention_config: chunk_sise",
    ]
    logged.clear()
    AutoModelForCausalLM.from_pretrained(
        str(needle_checkpoint), config=Qwen2Config.from_pretrained(str(needle_checkpoint))
    )
    assert not [line for line in logged if "not known here" in line]


def test_a_config_of_another_kind_is_refused(needle_checkpoint: Path) -> None:
    with pytest.raises(TypeError, match="config must be a Qwen2Config or a dict, got a str"):
        AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), config="config.json")


def test_a_checkpoint_without_architectures_is_known_by_its_model_type(copied_needle: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(copied_needle(architectures=None)))
    assert type(model) is Qwen2OneMForCausalLM


@pytest.mark.parametrize("load", LOADERS[:2])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_lora_directory_is_said_to_be_one(
    copied_needle: Callable[..., Path], load: Callable[[str], Any], with_config: bool
) -> None:
    directory = copied_needle()
    if not with_config:
        (directory / "config.json").unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct-1M"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises((ValueError, FileNotFoundError), match=r"a LoRA adapter .*for Qwen/Qwen2.5-7B.*merge it into"):
        load(str(directory))
    assert AutoTokenizer.from_pretrained(str(directory))("text")["input_ids"]


@pytest.mark.parametrize("load", LOADERS[:2])
@pytest.mark.parametrize(
    ("filename", "words"),
    [
        ("model-00001-of-00003.safetensors", "one file of a checkpoint: give the directory that holds it"),
        ("model.safetensors.index.json", "one file of a checkpoint: give the directory that holds it"),
        ("config.json", "one file of a checkpoint: give the directory that holds it"),
        ("pytorch_model.bin", "a file of PyTorch's pickled weights, which are not read"),
        ("model.gguf", "a file of GGUF weights, which are not read"),
    ],
)
def test_a_file_in_place_of_a_directory_is_said_to_be_one(
    copied_needle: Callable[..., Path], load: Callable[[str], Any], filename: str, words: str
) -> None:
    directory = copied_needle()
    (directory / filename).touch()
    with pytest.raises(ValueError, match=words) as error:
        load(str(directory / filename))
    assert str(directory) in str(error.value)


@pytest.mark.parametrize("load", LOADERS[:2])
@pytest.mark.parametrize(
    ("filename", "kind"),
    [
        ("pytorch_model-00001-of-00002.bin", "PyTorch's pickled weights"),
        ("model_state.pdparams", "Paddle's pickled weights"),
        ("consolidated.00.pth", "PyTorch's pickled weights"),
        ("model-q4_k_m.gguf", "GGUF weights"),
    ],
)
def test_a_directory_without_safetensors_is_said_to_hold_what_it_holds(
    copied_needle: Callable[..., Path], load: Callable[[str], Any], filename: str, kind: str
) -> None:
    directory = copied_needle(without=("*.safetensors*",))
    (directory / filename).touch()
    (directory / "training_args.bin").touch()
    with pytest.raises(ValueError, match=rf"it holds {kind} \({filename}\), which are not read") as error:
        load(str(directory))
    assert str(directory) in str(error.value)


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
