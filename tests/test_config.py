"""A config.json is read in either spelling; other mathematics are refused by file, key and value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddle_qwen1m.config import ModelConfig, SparseBudgets, is_ours, load_json, read_json
from paddle_qwen1m.config_keys import (
    DUAL_CHUNK,
    DUAL_CHUNK_KEYS,
    HARMLESS,
    KEYS,
    Only,
    Read,
    own_quantization,
    remarks,
)

ROOT = Path(__file__).parents[1]
NEEDLE = json.loads((ROOT / "checkpoints" / "needle" / "config.json").read_text())
PUBLISHED = {**NEEDLE, "sliding_window": 1010000, "transformers_version": "4.48.1"}
ABSENT = object()


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**PUBLISHED, **changes}.items() if value is not ABSENT}


def dual_chunk(**changes: Any) -> dict[str, Any]:
    found = {**NEEDLE[DUAL_CHUNK], **changes}
    return changed(**{DUAL_CHUNK: {key: value for key, value in found.items() if value is not ABSENT}})


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dict(values, "/models/mine/config.json")
    assert str(error.value).startswith("/models/mine/config.json: ")
    return str(error.value)


@pytest.mark.parametrize("path", sorted(ROOT.glob("**/reference/*/config.json")), ids=lambda path: path.parent.name)
def test_checkpoints_that_hugging_face_wrote_are_read_without_a_remark(path: Path) -> None:
    values = read_json(path)
    config = ModelConfig.from_dict(values)
    assert config.num_layers == values["num_hidden_layers"]
    assert not remarks(values)


def test_the_published_fields_reach_the_model() -> None:
    config = ModelConfig.from_dict(PUBLISHED)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 2, 128)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (512, 768, 1024)
    assert (config.rms_norm_eps, config.rope_theta, config.dtype) == (1e-6, 1e5, "bfloat16")
    assert (config.dual_chunk.chunk_size, config.dual_chunk.local_size) == (1024, 256)
    assert not remarks(PUBLISHED)


def test_no_key_stands_twice_in_the_table() -> None:
    names = [name for names in HARMLESS.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert all(KEYS[name] is None for name in names)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 100000, "type": "default", "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_theta": 1e5}},
        {"rope_scaling": {"rope_theta": 1e5, "rope_type": "default"}},
        {"rope_theta": 1e5, "rope_parameters": {"rope_theta": 100000, "rope_type": "default"}},
        {"rope_theta": 1e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 1e5, "rope_scaling": None, "rope_parameters": {}},
    ],
)
def test_the_rotary_base_is_read_in_either_spelling(spelling: dict[str, Any]) -> None:
    values = changed(**{"rope_theta": ABSENT, **spelling})
    assert ModelConfig.from_dict(values) == ModelConfig.from_dict(PUBLISHED)
    assert not remarks(values)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e5}, ["yarn"]),
        ({"type": "linear", "factor": 2.0}, ["linear"]),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, ["mrope"]),
        ({"rope_type": "default", "type": "dynamic", "factor": 2.0}, ["dynamic"]),
        ({"rope_type": 3}, ["rope_type", "3"]),
        ({"factor": 4.0}, ["rope_type", "4.0"]),
        ({"rope_type": "default", "rope_theta": 2e5}, ["200000.0", "100000.0"]),
        ({"rope_type": "default", "rope_theta": 0}, ["rope_theta", "0"]),
        ({"rope_type": "default", "rope_theta": None}, ["rope_theta", "None"]),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e5}}, ["full_attention"]),
        ([1, 2], ["[1, 2]"]),
        ("yarn", ["yarn"]),
    ],
)
def test_any_other_rope_is_refused_by_name(name: str, parameters: Any, words: list[str]) -> None:
    message = refusal(changed(**{name: parameters}))
    assert all(word in message for word in [name, *words]), message


@pytest.mark.parametrize("dtypes", [{"torch_dtype": "float16"}, {"dtype": "float16"}, {"dtype": "torch.float16"}])
def test_the_dtype_is_read_in_either_spelling(dtypes: dict[str, str]) -> None:
    assert ModelConfig.from_dict(changed(**{"torch_dtype": ABSENT, **dtypes})).dtype == "float16"


def test_two_dtypes_are_refused_and_none_loses_nothing() -> None:
    assert "float16" in refusal(changed(dtype="float16"))
    assert ModelConfig.from_dict(changed(dtype="bfloat16")).dtype == "bfloat16"
    assert ModelConfig.from_dict(changed(torch_dtype=ABSENT)).dtype == "float32"
    assert "float8_e4m3fn" in refusal(changed(torch_dtype="float8_e4m3fn"))


NOT_WHOLE = [None, "512", 512.0, True, [], {}, -1, 10**12, float("nan")]
WHOLE = ["num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size"]


@pytest.mark.parametrize("value", [0, *NOT_WHOLE], ids=repr)
@pytest.mark.parametrize("key", [*WHOLE, "max_position_embeddings"])
def test_a_size_is_a_whole_number_of_at_least_1(key: str, value: Any) -> None:
    message = refusal(changed(**{key: value}))
    assert f"{key} must be a whole number of at least 1" in message
    assert message.endswith(f"got {value!r}")


@pytest.mark.parametrize("value", [0, *NOT_WHOLE[1:]], ids=repr)
@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
def test_a_size_that_may_be_left_out_is_null_or_right(key: str, value: Any) -> None:
    assert f"{key} must be" in refusal(changed(**{key: value}))
    assert f"got {value!r}" in refusal(changed(**{key: value}))
    assert ModelConfig.from_dict(changed(**{key: None, "num_attention_heads": 4})).head_dim == 128


@pytest.mark.parametrize("value", [None, "1e-6", True, [], float("nan"), float("inf"), -1.0, 10**400], ids=repr)
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "initializer_range"])
def test_a_number_is_finite_and_in_range(key: str, value: Any) -> None:
    assert f"{key} must be a number" in refusal(changed(**{key: value}))


@pytest.mark.parametrize(("key", "value"), [("rope_theta", 0), ("rope_theta", 1), ("rms_norm_eps", 0.0)])
def test_numbers_at_the_edge_of_nonsense_are_refused(key: str, value: float) -> None:
    assert f"{key} must be a number above" in refusal(changed(**{key: value}))


@pytest.mark.parametrize("value", ["false", "true", 0, 1, None, []], ids=repr)
def test_tied_embeddings_are_true_or_false(value: Any) -> None:
    assert f"tie_word_embeddings must be true or false, got {value!r}" in refusal(changed(tie_word_embeddings=value))


def test_head_dim_is_what_the_heads_leave_of_the_hidden_size() -> None:
    assert "hidden_size 512 must be a multiple of num_attention_heads 3" in refusal(changed(num_attention_heads=3))
    assert ModelConfig.from_dict(changed(head_dim=64)).head_dim == 64
    assert "head_dim must be 64 or 128, got 32" in refusal(changed(num_attention_heads=16))
    assert "multiple of num_key_value_heads" in refusal(changed(num_key_value_heads=3))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("attention_bias", False),
        ("qkv_bias", False),
        ("mlp_bias", True),
        ("use_sliding_window", True),
        ("use_sliding_window", "true"),
        ("use_sliding_window", 1),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "sliding_attention"),
        ("attention_chunk_size", 8192),
        ("is_causal", False),
        ("use_bidirectional_attention", True),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("use_qk_norm", True),
        ("partial_rotary_factor", 0.5),
        ("rope_interleave", True),
        ("rope_scaling_type", "yarn"),
        ("model_type", "qwen3"),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("tensor_parallel_size", 1),
        ("tensor_parallel_size", "2"),
        ("tensor_parallel_heads", "0-3 4-7"),
    ],
)
def test_what_would_change_the_mathematics_is_refused(key: str, value: Any) -> None:
    message = refusal(changed(**{key: value}))
    assert f"{key} must be" in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "swish"),
        ("attention_bias", True),
        ("mlp_bias", False),
        ("use_sliding_window", None),
        ("layer_types", ["full_attention"] * 4),
        ("layer_types", None),
        ("is_causal", True),
        ("partial_rotary_factor", 1),
        ("rope_scaling", None),
        ("quantization_config", None),
        ("attention_dropout", 0.1),
        ("max_window_layers", 2),
        ("_attn_implementation", "flash_attention_2"),
    ],
)
def test_what_says_what_is_computed_anyway_is_accepted_without_a_word(key: str, value: Any) -> None:
    assert ModelConfig.from_dict(changed(**{key: value})) == ModelConfig.from_dict(PUBLISHED)
    assert not remarks(changed(**{key: value}))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors, int-quantized"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"weight_quantize_algo": "weight_only_int8"}, "weight_only_int8"),
        ({"quant_algo": "FP8"}, "FP8"),
        ({"something": "else"}, "{'something': 'else'}"),
        ("int8", "'int8'"),
    ],
)
def test_quantised_weights_are_refused_by_name(key: str, value: Any, name: str) -> None:
    own = " or fp8 or int8 by paddle-qwen1m" if key == "quantization_config" else ""
    assert f"{key} must be null{own}, got {name}: " in refusal(changed(**{key: value}))


def test_quantised_weights_of_this_package_are_taken_and_strange_ones_refused() -> None:
    for kind in ("fp8", "int8"):
        own = changed(quantization_config={"quant_method": "paddle-qwen1m", "format": kind})
        assert ModelConfig.from_dict(own) == ModelConfig.from_dict(PUBLISHED)
        assert own_quantization(own) == kind
    assert own_quantization(PUBLISHED) is None
    strange = changed(quantization_config={"quant_method": "paddle-qwen1m", "format": "int4"})
    assert "got paddle-qwen1m, int4: weights that others quantised are not read" in refusal(strange)


@pytest.mark.parametrize("key", ["chunk_size", "local_size", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [None, "256", 256.0, True, -1, [], 10**12], ids=repr)
def test_dual_chunk_sizes_are_whole_numbers(key: str, value: Any) -> None:
    message = refusal(dual_chunk(**{key: value}))
    assert f"{DUAL_CHUNK}: {key} must be a whole number of at least" in message
    assert message.endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sparse_attention_enabled", "false"),
        ("sparse_attention_enabled", None),
        ("sparse_attention_threshold", -1),
        ("sparse_attention_threshold", 32768.0),
        ("sparse_attention_threshold", None),
        ("sparse_attention_last_q", 128),
        ("sparse_attention_config", {}),
    ],
)
def test_settings_of_sparse_attention_have_a_type_and_a_range(key: str, value: Any) -> None:
    assert f"{DUAL_CHUNK}: {key} must be" in refusal(dual_chunk(**{key: value}))
    assert f"got {value!r}" in refusal(dual_chunk(**{key: value}))


@pytest.mark.parametrize("value", [[], [262144, 8192], "on", True, 1], ids=repr)
def test_dual_chunk_attention_is_an_object(value: Any) -> None:
    assert f"{DUAL_CHUNK} must be an object, got {value!r}" in refusal(changed(**{DUAL_CHUNK: value}))
    assert is_ours(changed(**{DUAL_CHUNK: value}))


def test_what_is_missing_is_named() -> None:
    missing = dict.fromkeys(["vocab_size", "hidden_size", DUAL_CHUNK], ABSENT)
    assert f"config.json: lacks hidden_size, vocab_size, {DUAL_CHUNK}" in refusal(changed(**missing))
    assert f"{DUAL_CHUNK}: lacks chunk_size, local_size" in refusal(changed(**{DUAL_CHUNK: {}}))


def test_what_is_not_known_is_remarked() -> None:
    values = {**dual_chunk(sparse_attention_last_k=64), "rope_theta_x": 1, "auto_map": {"AutoModel": "mine.Model"}}
    values["rope_scaling"] = {"rope_type": "default", "factor": 4.0}
    assert remarks(values) == [
        "not known here and not used: rope_theta_x, auto_map",
        f"not known here and not used in {DUAL_CHUNK}: sparse_attention_last_k",
        "not known here and not used in rope_scaling: factor",
    ]


def test_a_rotary_base_that_nobody_gave_is_remarked() -> None:
    values = changed(rope_theta=ABSENT)
    assert ModelConfig.from_dict(values).rope_theta == 1e4
    assert remarks(values) == ["no rope_theta: the rotary base is 10,000, as in Hugging Face transformers"]


def test_written_out_it_reads_as_it_was() -> None:
    values = changed(rope_theta=ABSENT, rope_parameters={"rope_theta": 1e5}, num_key_value_heads=None, head_dim=None)
    config = ModelConfig.from_dict(values)
    again = {**config.to_dict(), DUAL_CHUNK: values[DUAL_CHUNK]}
    assert ModelConfig.from_dict(again) == config


def test_every_key_that_is_read_can_be_wrong() -> None:
    for keys, change in ((KEYS, changed), (DUAL_CHUNK_KEYS, dual_chunk)):
        for name, key in keys.items():
            if isinstance(key, (Read, Only)):
                assert name in refusal(change(**{name: [object()]}))


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({}, True),
        ({"architectures": ["Qwen2OneMForCausalLM"]}, True),
        ({"architectures": "Qwen2ForCausalLM"}, True),
        ({"architectures": ABSENT}, True),
        ({"architectures": None}, True),
        ({"architectures": []}, True),
        ({"architectures": ABSENT, "model_type": "llama"}, False),
        ({"architectures": ["LlamaForCausalLM"]}, False),
        ({"architectures": {"a": 1}}, False),
        ({DUAL_CHUNK: None}, False),
        ({DUAL_CHUNK: {}}, True),
    ],
)
def test_whose_config_it_is(changes: dict[str, Any], ours: bool) -> None:
    assert is_ours(changed(**changes)) is ours


ENTRY = ["vertical_and_slash", 1000, 6096, 0.9]


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        (["vertical_and_slash", 1000.5, 6096, 0.9], "vertical_and_slash 1000.5 6096"),
        (["vertical_and_slash", 1000.0, 6096, 0.9], "vertical_and_slash 1000.0 6096"),
        (["vertical_and_slash", "1000", 6096, 0.9], "vertical_and_slash '1000' 6096"),
        (["vertical_and_slash", 1000, None, 0.9], "vertical_and_slash 1000 None"),
        (["vertical_and_slash", True, 6096, 0.9], "vertical_and_slash True 6096"),
        (["vertical_and_slash", float("nan"), 6096, 0.9], "vertical_and_slash nan 6096"),
        (["vertical_and_slash", 1000, 2**31, 0.9], "vertical_and_slash 1000 2147483648"),
        (["vertical_and_slash", 1000, -6096, 0.9], "vertical_and_slash 1000 -6096"),
        (["vertical_and_slash", 0, 6096, 0.9], "vertical_and_slash 0 6096"),
        (["vertical_and_slash", 1000, 99, 0.9], "vertical_and_slash 1000 99"),
        (["stream_llm", 1000, 6096, 0.9], "stream_llm 1000 6096"),
        (["vertical_and_slash", 1000], "['vertical_and_slash', 1000]"),
        ([], "[]"),
        (None, "None"),
        ("vertical_and_slash", "'vertical_and_slash'"),
        ({"slash": 6096, "vertical": 1000}, "{'slash': 6096, 'vertical': 1000}"),
        ([*ENTRY, 1], "['vertical_and_slash', 1000, 6096, 0.9, 1]"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_named_by_file_layer_head_and_value(
    tmp_path: Path, entry: Any, shown: str
) -> None:
    path = tmp_path / "sparse_attention_config.json"
    path.write_text(json.dumps([{"0": ENTRY, "1": ENTRY}, {"0": ENTRY, "1": entry}]))
    with pytest.raises(ValueError, match=r"layer 1 head 1 must be") as error:
        SparseBudgets.from_file(path, 2, 2)
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith(f"got {shown}")


@pytest.mark.parametrize("layers", [{}, [], [[]], "x", [{"0": ENTRY}, {"1": ENTRY}], [{"0": ENTRY}, {}]], ids=repr)
def test_budgets_of_another_form_are_named(tmp_path: Path, layers: Any) -> None:
    path = tmp_path / "sparse_attention_config.json"
    path.write_text(json.dumps(layers))
    with pytest.raises(ValueError, match="sparse budgets") as error:
        SparseBudgets.from_file(path, 2, 1)
    assert str(error.value).startswith(str(path))


def test_budgets_within_the_config_are_read_and_must_fit() -> None:
    layer = {str(head): ENTRY for head in range(4)}
    config = ModelConfig.from_dict(dual_chunk(sparse_attention_config=[layer] * 4))
    assert config.dual_chunk.sparse_budgets is not None
    assert config.dual_chunk.sparse_budgets.slash.tolist() == [[6096] * 4] * 4
    assert "(3, 4) (layers, heads)" in refusal(dual_chunk(sparse_attention_config=[layer] * 3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_json(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        load_json(tmp_path / "none.json")
