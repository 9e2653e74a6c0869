"""Every key of config.json that is known: read, refused unless it says what is computed anyway, or without effect.

The keys are those of Qwen2 in Hugging Face transformers 4 and 5, vLLM, SGLang and PaddleNLP. No Paddle in here.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Callable, Final, Optional, Union

from paddle_qwen1m.dtypes import QUANTIZATIONS

DUAL_CHUNK = "dual_chunk_attention_config"
REQUIRED: Final = object()
SPARSE_THRESHOLD = 32768
INT32_MAX = 2**31 - 1  # positions and indices of the kernels
FLOAT32_MAX = 3.4e38


@dataclass(frozen=True)
class Rule:
    """What a value must be; `words` say it in an error."""

    words: str
    holds: Callable[[Any], bool]

    def check(self, key: str, value: Any) -> Any:
        if not self.holds(value):
            raise ValueError(f"{key} must be {self.words}, got {reprlib.repr(value)}")
        return value

    def or_null(self) -> Rule:
        return Rule(f"{self.words} or null", lambda value: value is None or self.holds(value))


def whole(least: int, most: int = INT32_MAX) -> Rule:
    """A JSON whole number: neither 1024.0 nor true is one."""
    limit = f" and at most {most:,}" if most != INT32_MAX else ""
    return Rule(
        f"a whole number of at least {least}{limit}", lambda value: type(value) is int and least <= value <= most
    )


def real(words: str, holds: Callable[[float], bool]) -> Rule:
    """A JSON number that `holds` and that float32 can hold, so neither NaN nor Infinity."""
    return Rule(f"a number {words}", lambda value: _is_number(value) and abs(value) < FLOAT32_MAX and holds(value))


def one_of(*values: Any) -> Rule:
    """One of these JSON values; 0 is not false, and 1 is 1.0."""
    return Rule(" or ".join(map(json.dumps, values)), lambda value: any(_are_equal(value, one) for one in values))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_equal(one: Any, other: Any) -> bool:
    return (type(one) is type(other) or (_is_number(one) and _is_number(other))) and bool(one == other)


@dataclass(frozen=True)
class Read:
    """The key is used; `default` where it is absent."""

    rule: Rule
    default: Any = REQUIRED


@dataclass(frozen=True)
class Only:
    """The key changes the mathematics in other engines: it must say what is computed here in any case."""

    rule: Rule
    why: str
    show: Callable[[Any], str] = reprlib.repr

    def check(self, key: str, value: Any) -> None:
        if not self.rule.holds(value):
            raise ValueError(f"{key} must be {self.rule.words}, got {self.show(value)}: {self.why}")


NO_EFFECT: Final = None
Key = Optional[Union[Read, Only]]

FLAG = one_of(True, False)
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
LIST = Rule("a list", lambda value: isinstance(value, list))
TEXTS = Rule("a list of texts", lambda value: isinstance(value, list) and all(type(one) is str for one in value))
NOT_TRUE = one_of(False, None)
NOT_FALSE = one_of(True, None)
ONE = one_of(1.0, None)
FULL_ATTENTION = Rule(
    'null or a list of "full_attention" alone',
    lambda value: value is None or (isinstance(value, list) and all(kind == "full_attention" for kind in value)),
)
DTYPE = Read(Rule("the name of a dtype", lambda value: not isinstance(value, (bool, int, float, list, dict))), None)
BASE = Read(real("above 1", lambda value: value > 1), 1e4)
ROPE = Read(OBJECT.or_null(), None)
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def quantisation(value: Any) -> str | None:
    """The name of what a quantization_config describes; None when it describes nothing, as PaddleNLP writes it too."""
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        return reprlib.repr(value)
    names = ("quant_method", "quant_algo", "weight_quantize_algo", "quant_type", "quantization", "format")
    named = [str(value[name]) for name in names if value.get(name)]
    switches = [name for name in ("load_in_4bit", "load_in_8bit") if value.get(name)]
    if named or switches:
        bits = [f"{value['bits']} bits"] if value.get("bits") else []
        return ", ".join([*dict.fromkeys(named), *switches, *bits])
    return None if "weight_quantize_algo" in value else reprlib.repr(value)


OWN_METHOD = "paddle-qwen1m"
QUANTIZATION = "quantization_config"


def own_quantization(values: Mapping[str, Any]) -> str | None:
    """In which of QUANTIZATIONS a config.json says that this package wrote the weights; None: in none."""
    found = values.get(QUANTIZATION)
    if not isinstance(found, dict) or found.get("quant_method") != OWN_METHOD or "format" not in found:
        return None
    return str(found["format"])


def own_quantization_config(kind: str) -> dict[str, str]:
    """What config.json says of weights that this package wrote in one of QUANTIZATIONS."""
    return {"quant_method": OWN_METHOD, "format": kind}


UNQUANTISED = Only(
    Rule("null", lambda value: quantisation(value) is None),
    "quantised weights are not read; load the checkpoint they were made from",
    lambda value: str(quantisation(value)),
)
OWN_OR_UNQUANTISED = Only(
    Rule(
        f"null or {' or '.join(QUANTIZATIONS)} by {OWN_METHOD}",
        lambda value: quantisation(value) is None or own_quantization({QUANTIZATION: value}) in QUANTIZATIONS,
    ),
    "weights that others quantised are not read; load the checkpoint they were made from, with quantization='fp8' or "
    "'int8' if they are to take as little",
    lambda value: str(quantisation(value)),
)


def _only(rule: Rule, why: str, *keys: str) -> dict[str, Key]:
    return dict.fromkeys(keys, Only(rule, why))


HARMLESS: Mapping[str, str] = {
    "its name and history": """architectures _name_or_path name_or_path _commit_hash transformers_version
        paddlenlp_version unsloth_version unsloth_fixed finetuning_task task_specific_params""",
    "training": """attention_dropout hidden_dropout classifier_dropout gradient_checkpointing recompute
        recompute_granularity recompute_use_reentrant refined_recompute no_recompute_layers offload_recompute_inputs
        pp_recompute_interval dpo_config kto_config seq_length""",
    "windows, which use_sliding_window switches off": "sliding_window max_window_layers",
    "how it is computed elsewhere": """use_cache _attn_implementation _attn_implementation_internal attn_implementation
        _attn_implementation_autoset _flash_attn_2_enabled use_flash_attention use_fused_rms_norm use_fused_rope
        use_fused_linear use_fused_dropout_add use_fused_linear_cross_entropy fuse_attention_qkv fuse_attention_ffn
        chunk_size_feed_forward pretraining_tp torchscript use_bfloat16 tensor_parallel_degree tensor_parallel_rank
        tensor_parallel_output pipeline_parallel_degree virtual_pp_degree sep_parallel_degree context_parallel_degree
        sequence_parallel fuse_sequence_parallel_allreduce""",
    "what is returned, heads of other tasks": """output_attentions output_hidden_states return_dict id2label label2id
        num_labels num_choices problem_type is_decoder cross_attention_hidden_size tie_encoder_decoder""",
    "tokens": """bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix""",
    "generation, where old files have it; GenerationConfig reads it": """max_length min_length do_sample early_stopping
        num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
        no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
        return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens""",
}
"""Keys that say nothing of the forward pass, by what they are about."""

KEYS: Mapping[str, Key] = {
    "num_hidden_layers": Read(whole(1, 10_000)),
    "num_attention_heads": Read(whole(1, 10_000)),
    "num_key_value_heads": Read(whole(1, 10_000).or_null(), None),
    "head_dim": Read(Rule("64 or 128", lambda value: type(value) is int and value in (64, 128)).or_null(), None),
    "hidden_size": Read(whole(1)),
    "intermediate_size": Read(whole(1)),
    "vocab_size": Read(whole(1)),
    "max_position_embeddings": Read(whole(1), 32768),
    "tie_word_embeddings": Read(FLAG, False),
    "rms_norm_eps": Read(real("above 0 and below 1", lambda value: 0 < value < 1), 1e-6),
    "rope_theta": BASE,
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,
    "initializer_range": Read(real("of at least 0", lambda value: value >= 0), 0.02),
    "torch_dtype": DTYPE,
    "dtype": DTYPE,
    DUAL_CHUNK: Read(OBJECT),
    "tensor_parallel_size": Read(whole(2).or_null(), None),
    "tensor_parallel_heads": Read(TEXTS.or_null(), None),
    **_only(one_of("qwen2"), "the model is Qwen2", "model_type"),
    **_only(one_of("silu", "swish"), "the MLP is Qwen2's", "hidden_act"),
    **_only(one_of("silu", "swish", None), "the MLP is Qwen2's", "hidden_activation"),
    **_only(NOT_FALSE, "Qwen2's q, k and v have biases", "attention_bias", "qkv_bias"),
    **_only(NOT_TRUE, "Qwen2's MLP has no biases", "mlp_bias"),
    **_only(NOT_TRUE, "every layer attends to the whole context", "use_sliding_window"),
    **_only(FULL_ATTENTION, "every layer attends to the whole context", "layer_types"),
    **_only(one_of(None), "every layer attends to the whole context", "attention_chunk_size"),
    **_only(NOT_FALSE, "attention is causal", "is_causal"),
    **_only(NOT_TRUE, "attention is causal", "use_bidirectional_attention"),
    **_only(one_of(None, 0.0), "logits are not capped", "attn_logit_softcapping", "final_logit_softcapping"),
    **_only(NOT_TRUE, "Qwen2 does not normalise q and k", "use_qk_norm", "qk_norm", "qk_layernorm"),
    **_only(ONE, "the whole head is rotated", "partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"),
    **_only(NOT_TRUE, "pairs are rotated half a head apart", "rope_interleave", "rope_interleaved"),
    **_only(one_of(None), "dual chunk attention is the only extension of RoPE", "rope_scaling_type"),
    **_only(ONE, "dual chunk attention is the only extension of RoPE", "rope_scaling_factor"),
    **_only(NOT_TRUE, "the model is a decoder alone", "is_encoder_decoder", "add_cross_attention"),
    **_only(one_of({}, None), "heads are not pruned", "pruned_heads"),
    QUANTIZATION: OWN_OR_UNQUANTISED,
    **dict.fromkeys(("quantization", "compression_config"), UNQUANTISED),
    **{name: NO_EFFECT for names in HARMLESS.values() for name in names.split()},
}

DUAL_CHUNK_KEYS: Mapping[str, Key] = {
    "chunk_size": Read(whole(1)),
    "local_size": Read(whole(0)),
    "original_max_position_embeddings": Read(whole(0), 0),
    "sparse_attention_enabled": Read(FLAG, True),
    "sparse_attention_threshold": Read(whole(0), SPARSE_THRESHOLD),
    "sparse_attention_config": Read(LIST.or_null(), None),
    **_only(one_of(64), "the last 64 queries of a piece choose its keys", "sparse_attention_last_q"),
}


def read(values: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The value of every key that is read, checked, or its default.

    Raises ValueError for a key that is missing, for a value that cannot be meant and for one that is not computed here.
    """
    missing = [
        name for name, key in keys.items() if isinstance(key, Read) and key.default is REQUIRED and name not in values
    ]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    found: dict[str, Any] = {}
    for name, key in keys.items():
        if isinstance(key, Read):
            found[name] = key.rule.check(name, values[name]) if name in values else key.default
        elif isinstance(key, Only) and name in values:
            key.check(name, values[name])
    return found


def read_rope_theta(values: Mapping[str, Any]) -> float:
    """The rotary base, as transformers 4 (rope_theta) or 5 (within rope_parameters, once rope_scaling) spell it.

    values: checked by `read`. Raises ValueError for two bases that disagree and for any rope type but the default one.
    """
    bases = {name: values[name] for name in ("rope_theta",) if name in values}
    for name, parameters in _rope_parameters(values):
        own = [key for key, value in parameters.items() if isinstance(value, dict)]
        if own:
            raise ValueError(f"{name} has parameters of its own for {', '.join(own)}: here every layer has the same")
        kinds = [parameters[key] for key in ("rope_type", "type") if parameters.get(key) is not None]
        if not kinds and set(parameters) - set(ROPE_KEYS):
            raise ValueError(f"{name} lacks a rope_type, got {reprlib.repr(parameters)}")
        for kind in kinds:
            if kind != "default":
                raise ValueError(
                    f'{name}: rope_type must be "default", got {reprlib.repr(kind)}: dual chunk attention is the only '
                    "extension of RoPE"
                )
        if "partial_rotary_factor" in parameters:
            ONE.check(f"{name}: partial_rotary_factor", parameters["partial_rotary_factor"])
        if "rope_theta" in parameters:
            bases[f"{name}: rope_theta"] = BASE.rule.check(f"{name}: rope_theta", parameters["rope_theta"])
    if len(set(bases.values())) > 1:
        raise ValueError("has two rotary bases, " + " and ".join(f"{name} {value}" for name, value in bases.items()))
    return float(next(iter(bases.values()), BASE.default))


def remarks(values: Mapping[str, Any]) -> list[str]:
    """What a config.json says that is not used, and what it leaves open: a line each. values: without errors."""
    lines = []
    known: list[tuple[str, Mapping[str, Any], Collection[str]]] = [("", values, KEYS)]
    known.append((f" in {DUAL_CHUNK}", values.get(DUAL_CHUNK) or {}, DUAL_CHUNK_KEYS))
    known += [(f" in {name}", parameters, ROPE_KEYS) for name, parameters in _rope_parameters(values)]
    for place, found, keys in known:
        strange = [key for key in found if key not in keys]
        if strange:
            lines.append(f"not known here and not used{place}: {', '.join(strange)}")
    if "rope_theta" not in values and not any("rope_theta" in found for _, found in _rope_parameters(values)):
        lines.append(f"no rope_theta: the rotary base is {BASE.default:,.0f}, as in Hugging Face transformers")
    return lines


def _rope_parameters(values: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, values[name]) for name in ("rope_parameters", "rope_scaling") if values.get(name)]
