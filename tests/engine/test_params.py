"""SamplingParams: names, defaults and limits are those that users of vLLM know."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from paddle_qwen1m import SamplingParams, StructuredOutputsParams

DEFAULTS = {
    "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "temperature": 1, "top_p": 1,
    "top_k": 0, "min_p": 0, "seed": None, "stop": (), "stop_token_ids": (), "ignore_eos": False, "max_tokens": 16,
    "min_tokens": 0, "include_stop_str_in_output": False, "bad_words": (), "logit_bias": None,
    "allowed_token_ids": None, "logprobs": None, "prompt_logprobs": None, "detokenize": True,
    "skip_special_tokens": True, "structured_outputs": None, "skip_reading_prefix_cache": False,
}  # fmt: skip


def test_names_and_defaults_are_the_known_ones() -> None:
    assert asdict(SamplingParams()) == DEFAULTS


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"temperature": 9e-6, "top_k": -1}, {"temperature": 0, "top_k": 0}),
        ({"temperature": 0.005}, {"temperature": 0.01}),
        ({"stop": "end", "bad_words": ["a"]}, {"stop": ("end",), "bad_words": ("a",)}),
        ({"stop": None, "stop_token_ids": None, "bad_words": None}, {}),
        ({"logit_bias": {"5": 1000, 6: -2}}, {"logit_bias": {5: 100.0, 6: -2.0}}),
        ({"max_tokens": None, "min_tokens": 5}, {"max_tokens": None, "min_tokens": 5}),
        ({"top_k": 2**70}, {"top_k": 2**31 - 1}),
        ({"repetition_penalty": 1e308}, {"repetition_penalty": 1e6}),
        ({"repetition_penalty": 5e-324}, {"repetition_penalty": 1e-6}),
    ],
)
def test_values_are_read(given: dict[str, Any], read: dict[str, Any]) -> None:
    assert asdict(SamplingParams(**given)) == {**DEFAULTS, **read}


def test_log_probabilities_are_counted() -> None:
    assert [SamplingParams(logprobs=k).num_logprobs for k in (None, 0, 5, -1)] == [None, 0, 5, 20]
    assert SamplingParams(prompt_logprobs=-1).num_prompt_logprobs == 20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty must be -2 to 2, got 2.1"),
        ({"frequency_penalty": -3}, "frequency_penalty must be -2 to 2, got -3"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
        ({"temperature": 2.5}, "temperature must be 0 to 2, got 2.5"),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"temperature": True}, "temperature must be a finite number, got True"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"min_p": 1.5}, "min_p must be 0 to 1, got 1.5"),
        ({"top_k": -2}, "top_k must be at least -1, got -2"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"temperature": 10**400}, "temperature must be a finite number, got 10000"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 16385}, "n must be at most 16384, got 16385"),
        ({"n": 2, "temperature": 0}, "n must be 1 at temperature 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": 3, "min_tokens": 4}, r"min_tokens must be 0 to max_tokens \(3\), got 4"),
        ({"seed": 2**63}, "seed must be in"),
        ({"logprobs": 21}, "logprobs must be 0 to 20, or -1 for 20, got 21"),
        ({"prompt_logprobs": -2}, "prompt_logprobs must be 0 to 20"),
        ({"stop": ""}, "stop must be texts that are not empty"),
        ({"stop": ["a"] * 17}, "stop must be at most 16 texts of at most 1024 bytes"),
        ({"stop": ["a"], "detokenize": False}, "stop needs detokenize=True"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must hold token ids, got -1"),
        ({"stop_token_ids": "12"}, "stop_token_ids must be a list of token ids, got '12'"),
        ({"bad_words": ["a", ""]}, "bad_words must be texts that are not empty"),
        ({"allowed_token_ids": []}, "allowed_token_ids must not be empty: leave it out to allow all"),
        ({"allowed_token_ids": list(range(4097))}, "allowed_token_ids must have at most 4096 entries, got 4097"),
        ({"logit_bias": {"a": 1}}, "logit_bias must hold token ids, got 'a'"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must be a finite number, got inf"),
    ],
)
def test_what_cannot_be_used_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)


def test_what_was_changed_is_checked_again() -> None:
    params = SamplingParams()
    params.top_p = 2.0
    with pytest.raises(ValueError, match="top_p must be"):
        replace(params)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"json": {}, "regex": "a"}, "exactly one of .*, got json and regex"),
        ({"choice": []}, "choice must not be empty, nor any of its texts"),
        ({"choice": ["a", ""]}, "choice must not be empty, nor any of its texts"),
        ({"choice": "yes"}, "choice must be a list of texts, got 'yes'"),
        ({"regex": 5}, "regex must be a text, got 5"),
        ({"json": 5}, "json must be a schema, a text or a dict, got 5"),
    ],
)
def test_an_answer_looks_like_one_thing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"structured_outputs.*{message}"):
        StructuredOutputsParams(**given)
