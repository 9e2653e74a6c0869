"""The keys of generation_config.json and keywords of generate(): what is honoured, harmless, or not there and off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, Callable

import numpy as np
from paddlenlp.generation import LogitsProcessorList
from paddlenlp.utils.log import logger

from paddle_qwen1m.engine import params
from paddle_qwen1m.engine.params import MAX_BIAS

GREEDY, SAMPLING = "greedy_search", "sampling"


def whole(name: str, value: Any) -> int:
    return params.whole(name, _plain(value))


def number(name: str, value: Any) -> float:
    return params.number(name, _plain(value))


def _plain(value: Any) -> Any:
    """Python's number in place of numpy's."""
    return value.item() if isinstance(value, np.generic) else value


def switch(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, int) and value in (0, 1)):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return bool(value)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One id or several; none for an empty list."""
    listed = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    if any(isinstance(one, bool) or not isinstance(one, (int, np.integer)) for one in listed):
        raise ValueError(f"{name} must be a whole number or a list of them, got {value!r}")
    return tuple(int(one) for one in listed)


def _end_tokens(name: str, value: Any) -> tuple[int, ...]:
    """-1 is how other engines write that no token ends an answer."""
    return tuple(token for token in token_ids(name, value) if token != -1)


def _at_least(lowest: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        if whole(name, value) < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")
        return int(value)

    return read


def _strategy(name: str, value: Any) -> str:
    if value not in (GREEDY, SAMPLING):
        raise ValueError(f"{name}={value!r}: this model has {GREEDY!r} and {SAMPLING!r}")
    return str(value)


def _temperature(name: str, value: Any) -> float:
    if number(name, value) < 0:
        raise ValueError(f"{name} must be 0 (greedy) or greater, got {value}")
    return float(value)


def _top_k(name: str, value: Any) -> int:
    """-1 is how other engines write that every token counts."""
    if whole(name, value) < -1:
        raise ValueError(f"{name} must be 0 or -1 (off) or greater, got {value}")
    return max(0, int(value))


def _top_p(name: str, value: Any) -> float:
    if not 0 < number(name, value) <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
    return float(value)


def _penalty(name: str, value: Any) -> float:
    if number(name, value) <= 0:
        raise ValueError(f"{name} must be greater than 0 (1 is off), got {value}")
    return float(value)


def _between(low: float, high: float) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        if not low <= number(name, value) <= high:
            raise ValueError(f"{name} must be {low:g} to {high:g}, got {value}")
        return float(value)

    return read


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    """{id: bias}, or Hugging Face's sequence_bias, {(id,): bias} or [[[id], bias], ...], of single tokens."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    is_listed = isinstance(pairs, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
    if not is_listed or (not pairs and not isinstance(value, Mapping)):
        raise ValueError(f"{name} must be a dict of token ids and numbers, got {value!r}")
    listed = [(token_ids(name, key), bias) for key, bias in pairs]
    longer = [tokens for tokens, _ in listed if len(tokens) != 1]
    if longer:
        raise ValueError(f"{name} must be of single tokens, got {longer[0]}: sequences of them are not implemented")
    return {tokens[0]: _between(-MAX_BIAS, MAX_BIAS)(name, bias) for tokens, bias in listed}


def _bad_words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    """[[id, ...], ...]: sequences of token ids."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, (list, tuple)) and one for one in value):
        raise ValueError(f"{name} must be a list of lists of token ids, got {value!r}")
    return tuple(token_ids(name, one) for one in value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(one, str) and one for one in listed):
        raise ValueError(f"{name} must be a text or a list of texts, none of them empty, got {value!r}")
    return tuple(listed)


def _seed(name: str, value: Any) -> int:
    if not 0 <= whole(name, value) < 2**63:
        raise ValueError(f"{name} must be in [0, 2**63), got {value}")
    return int(value)


# what the engine has, and how a value is read: ValueError names the key and a value that cannot be used
HONOURED: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": _at_least(1),
    "max_length": _at_least(0),
    "min_new_tokens": _at_least(0),
    "min_length": _at_least(0),
    "do_sample": switch,
    "decode_strategy": _strategy,
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _between(0, 1),
    "repetition_penalty": _penalty,
    "presence_penalty": _between(-2, 2),
    "frequency_penalty": _between(-2, 2),
    "logit_bias": _logit_bias,
    "sequence_bias": _logit_bias,
    "bad_words_ids": _bad_words,
    "suppress_tokens": token_ids,
    "stop_strings": _texts,
    "eos_token_id": _end_tokens,
    "pad_token_id": token_ids,
    "num_return_sequences": _at_least(1),
    "seed": _seed,
    "trunc_input": switch,
}

# whatever they say, the tokens are the same here: the cache is always used, the prompt brings its own first token
HARMLESS = {
    "use_cache",
    "bos_token_id",
    "use_fast",
    "use_fp16_decoding",
    "fast_ptq_sampling",
    "synced_gpus",
    "token_type_ids",
    "return_legacy_cache",
    "prefill_chunk_size",
    "low_memory",
    "compile_config",
    "disable_compile",
    "renormalize_logits",
    "remove_invalid_values",
    "is_assistant",
    "transformers_version",
    "paddlenlp_version",
    "_from_model_config",
    "_commit_hash",
    "_original_object_hash",
}

# what the engine does not have, with the values that ask for nothing; so do None and whatever is empty
MISSING: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "constraints": (),
    "begin_suppress_tokens": (),
    "forced_decoder_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "prefix_allowed_tokens_fn": (),
    "logits_processor": (),
    "logits_processors": (),
    "stopping_criteria": (),
    "max_time": (),
    "guidance_scale": (1,),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_rate": (0,),
    "diversity_penalty": (0,),
    "length_penalty": (0, 1),
    "early_stopping": (False,),
    "dola_layers": (),
    "assistant_model": (),
    "assistant_tokenizer": (),
    "assistant_early_exit": (),
    "assistant_confidence_threshold": (0.4,),
    "assistant_lookbehind": (10,),
    "target_lookbehind": (10,),
    "num_assistant_tokens": (5, 20),
    "num_assistant_tokens_schedule": ("constant", "heuristic"),
    "prompt_lookup_num_tokens": (),
    "max_matching_ngram_size": (2,),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static"),
    "cache_config": (),
    "decoder_start_token_id": (),
    "inputs_embeds": (),
    "position_ids": (),
    "past_key_values": (),
    "custom_generate": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "return_dict_in_generate": (False,),
}
INSTEAD = (
    "answers are chosen greedily or by temperature, top_k, top_p, min_p, the penalties, logit_bias, bad_words_ids and "
    "suppress_tokens, and end at eos_token_id or stop_strings"
)


def is_known(name: str) -> bool:
    return name in HONOURED or name in HARMLESS or name in MISSING


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether an option that the engine does not have is off."""
    if isinstance(value, LogitsProcessorList):
        return not value._processors
    if isinstance(value, (Sequence, Mapping, Set)) and not isinstance(value, str):
        return len(value) == 0
    return value is None or value in MISSING[name]


def refuse_missing(values: Mapping[str, Any]) -> None:
    """ValueError naming an option that the engine does not have and that is not off."""
    for name, value in values.items():
        if name in MISSING and not asks_for_nothing(name, value):
            raise ValueError(f"{name}={_shown(value)} is not implemented: {INSTEAD}; leave {name} out")


def read_file(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the engine honours of a checkpoint's file, checked; null stays None.

    What the engine does not have, and what nobody knows, is left out with a line in the log: whoever runs a checkpoint
    did not write its file, so it must not keep them from running it, and must not go unsaid.
    ValueError names source, key and value of what cannot be used.
    """
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in values.items():
        if name == "decode_strategy" and isinstance(value, str) and value not in (GREEDY, SAMPLING):
            left_out.append(f"{name}={_shown(value)}")
        elif name in HONOURED:
            try:
                kept[name] = None if value is None else HONOURED[name](name, value)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
        elif name in MISSING and not asks_for_nothing(name, value):
            left_out.append(f"{name}={_shown(value)}")
    if left_out:
        logger.warning(f"{source}: {', '.join(left_out)} has no effect, it is not implemented: {INSTEAD}")
    unknown = [name for name in values if not is_known(name)]
    if unknown:
        logger.warning(f"{source}: {', '.join(unknown)} is unknown here and has no effect")
    return kept


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
