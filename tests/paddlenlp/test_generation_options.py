"""How keywords and generation_config.json become sampling parameters, and what is refused before any work."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from paddlenlp.generation import GenerationConfig

from paddle_qwen1m.paddlenlp.generation import Request, read_batch, read_positions, read_request

PUBLISHED = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "eos_token_id": [7, 5],
    "pad_token_id": 5,
}


def request(base: GenerationConfig | None = None, usual: str | None = "sampling", **keywords: Any) -> Request:
    return read_request(
        base or GenerationConfig(**PUBLISHED),
        keywords,
        usual_strategy=usual,
        trunc_input=False,
        eos_token_id=9,
        pad_token_id=None,
        vocab_size=100,
    )


def test_the_published_defaults_are_followed() -> None:
    params = request().params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert params.eos_token_ids == (7, 5)
    assert (params.max_new_tokens, params.min_new_tokens, params.seed) == (20, 0, None)
    assert request().pad_token_id == 5
    assert request().trunc_input is False


@pytest.mark.parametrize("keywords", [{"do_sample": False}, {"decode_strategy": "greedy_search"}, {"temperature": 0}])
def test_greedy_is_greedy(keywords: dict[str, Any]) -> None:
    assert request(**keywords).params.temperature == 0


@pytest.mark.parametrize("keywords", [{"do_sample": True}, {"decode_strategy": "sampling"}])
def test_sampling_is_sampling(keywords: dict[str, Any]) -> None:
    greedy = GenerationConfig(decode_strategy="greedy_search")
    assert request(greedy, usual="greedy_search", **keywords).params.temperature == 1.0


@pytest.mark.parametrize(
    ("name", "value", "temperature"), [("do_sample", False, 0.0), ("decode_strategy", "greedy_search", 0.0)]
)
def test_a_changed_generation_config_holds(name: str, value: Any, temperature: float) -> None:
    base = GenerationConfig(**PUBLISHED)
    setattr(base, name, value)
    assert request(base).params.temperature == temperature


def test_contradicting_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match="contradict"):
        request(do_sample=True, decode_strategy="greedy_search")


def test_max_length_counts_new_tokens_as_in_paddlenlp() -> None:
    assert request(max_length=33).params.max_new_tokens == 33
    assert request(GenerationConfig(max_length=44)).params.max_new_tokens == 44
    assert request(GenerationConfig(max_length=44), max_new_tokens=5).params.max_new_tokens == 5
    assert request(max_new_tokens=9, min_length=4).params.min_new_tokens == 4
    assert request(max_new_tokens=9, min_new_tokens=3).params.min_new_tokens == 3
    with pytest.raises(ValueError, match="max_new_tokens=3 and max_length=4"):
        request(max_new_tokens=3, max_length=4)


@pytest.mark.parametrize(("eos", "expected"), [(3, (3,)), ([3, 4], (3, 4)), ([], ()), (None, (7, 5))])
def test_one_or_several_end_tokens(eos: Any, expected: tuple[int, ...]) -> None:
    assert request(eos_token_id=eos).params.eos_token_ids == expected


def test_the_models_own_tokens_stand_in_for_missing_ones() -> None:
    answer = request(GenerationConfig())
    assert answer.params.eos_token_ids == (9,)
    assert answer.pad_token_id == 9


def test_a_default_end_token_outside_the_vocabulary_counts_as_none() -> None:
    answer = request(GenerationConfig(eos_token_id=[151643, 3], pad_token_id=151643))
    assert answer.params.eos_token_ids == (3,)
    assert answer.pad_token_id == 3


@pytest.mark.parametrize(
    "keywords",
    [
        {"use_cache": True},
        {"bos_token_id": 1},
        {"num_beams": 1},
        {"num_return_sequences": 1},
        {"early_stopping": False},
    ],
)
def test_options_without_effect_are_accepted(keywords: dict[str, Any]) -> None:
    assert request(**keywords).params == request().params


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_beams": 4}, "num_beams=4: this model decodes one answer a prompt"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"diversity_rate": 0.5}, "diversity_rate=0.5"),
        ({"decode_strategy": "beam_search"}, "decode_strategy='beam_search': this model has 'greedy_search'"),
        ({"stopping_criteria": [1]}, "stopping_criteria"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"min_new_tokens": 21}, r"min_new_tokens must be between 0 and max_new_tokens \(20\), got 21"),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"temperature": -1.0}, "temperature must be 0 .* got -1.0"),
        ({"temperature": "hot"}, "temperature must be a finite number, got 'hot'"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": -1}, "top_k must be 0 .* got -1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be greater than 0"),
        ({"eos_token_id": 100}, r"eos_token_id must be in \[0, 100\), got 100"),
        ({"pad_token_id": -1}, r"pad_token_id must be in \[0, 100\), got -1"),
        ({"seed": -3}, r"seed must be in \[0, 2\*\*63\), got -3"),
        ({"seed": True}, "seed must be a whole number, got True"),
    ],
)
def test_values_that_cannot_be_used_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**keywords)


def test_unknown_options_are_refused_with_the_list_of_those_that_exist() -> None:
    with pytest.raises(TypeError, match="no option tempreature; it has: max_new_tokens, max_length"):
        request(tempreature=0.7)


@pytest.mark.parametrize(
    "ids", [[3, 4, 5], [[3, 4, 5]], np.array([3, 4, 5], np.int32), paddle.to_tensor([[3, 4, 5]], dtype="int64")]
)
def test_one_prompt_in_every_form(ids: Any) -> None:
    (prompt,) = read_batch(ids, None, 10).prompts
    assert prompt.dtype == np.int64
    assert prompt.tolist() == [3, 4, 5]


def test_left_padding_is_cut_off() -> None:
    batch = read_batch([[0, 0, 3], [1, 2, 3]], [[0, 0, 1], [1, 1, 1]], 10)
    assert [prompt.tolist() for prompt in batch.prompts] == [[3], [1, 2, 3]]
    assert read_positions(None, batch) == [2]
    with pytest.raises(ValueError, match=r"positions must be columns of input_ids in \[2, 3\).*got \[1\]"):
        read_positions([1], batch)


def test_padding_may_hold_any_id() -> None:
    assert read_batch([[-100, 3]], [[0, 1]], 10).prompts[0].tolist() == [3]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([], None, "an empty prompt"),
        ([[]], None, "an empty prompt"),
        ([[1, 2]], [[0, 0]], "row 0 of input_ids is an empty prompt"),
        ([[1, 2], [3, 4]], [[1, 1], [1, 0]], 'row 1 of attention_mask .* tokenizer.padding_side = "left"'),
        ([[1, 2, 3]], [[1, 0, 1]], "row 0 of attention_mask has a 0 right of a 1"),
        ([[1, 10]], None, r"input_ids\[0, 1\] is 10, outside the vocabulary \[0, 10\)"),
        ([[-1]], None, r"input_ids\[0, 0\] is -1"),
        ([[1.5]], None, "input_ids must be integers .* got float64"),
        ([[True]], None, "input_ids must be integers .* got bool"),
        (["text"], None, "input_ids must be integers"),
        ([[1, 2], [3]], None, "rows of equal length"),
        (np.zeros((1, 1, 1), np.int64), None, r"\[batch, length\], got shape \[1, 1, 1\]"),
        (np.int64(3), None, r"got shape \[\]"),
        ([[1, 2]], [[1]], r"shape of input_ids, \[1, 2\], got \[1, 1\]"),
        ([[1, 2]], [[1, 2]], "1 for tokens and 0 for padding"),
    ],
)
def test_input_that_cannot_be_used_is_refused(ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_batch(ids, mask, 10)
