"""How keywords and generation_config.json become sampling parameters, and what is refused before any work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest
from paddlenlp.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from paddle_qwen1m.paddlenlp.batch import read_batch, read_positions
from paddle_qwen1m.paddlenlp.generation import Defaults, Request, read_request
from paddle_qwen1m.paddlenlp.generation_keys import HONOURED, MISSING

OF_TOKENS = ("bad_words_ids", "suppress_tokens", "stop_strings")
PUBLISHED = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "eos_token_id": [7, 5],
    "pad_token_id": 5,
}


def from_file(**values: Any) -> Defaults:
    return Defaults.from_file(values, "DIR/generation_config.json")


def request(base: GenerationConfig | None = None, defaults: Defaults | None = None, **keywords: Any) -> Request:
    """A call's, with a caller's own GenerationConfig or the defaults of a file, by default those published."""
    defaults = defaults or from_file(**PUBLISHED)
    return read_request(defaults, base or defaults.config, keywords, eos_token_id=9, pad_token_id=None, vocab_size=100)


def new_tokens(asked: Request, prompt: int, limit: int = 1000) -> tuple[int, int]:
    """The least and most new tokens after a prompt of so many tokens."""
    params = asked.params_for(prompt, limit)
    return params.min_tokens, params.max_tokens


def test_the_published_defaults_are_followed() -> None:
    params = request().params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert params.stop_token_ids == (7, 5)
    assert (params.max_tokens, params.min_tokens, params.seed) == (20, 0, None)
    assert request().pad_token_id == 5
    assert request().trunc_input is False


@pytest.mark.parametrize("keywords", [{"do_sample": False}, {"decode_strategy": "greedy_search"}, {"temperature": 0}])
def test_greedy_is_greedy(keywords: dict[str, Any]) -> None:
    assert request(**keywords).params.temperature == 0


@pytest.mark.parametrize("keywords", [{"do_sample": True}, {"decode_strategy": "sampling"}])
def test_sampling_is_sampling(keywords: dict[str, Any]) -> None:
    greedy = GenerationConfig(decode_strategy="greedy_search")
    assert request(greedy, **keywords).params.temperature == 1.0


@pytest.mark.parametrize(
    ("name", "value", "temperature"), [("do_sample", False, 0.0), ("decode_strategy", "greedy_search", 0.0)]
)
def test_a_changed_generation_config_holds(name: str, value: Any, temperature: float) -> None:
    defaults = from_file(**PUBLISHED)
    setattr(defaults.config, name, value)
    assert request(defaults=defaults).params.temperature == temperature


def test_contradicting_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match="contradict"):
        request(do_sample=True, decode_strategy="greedy_search")


def test_max_length_counts_new_tokens_as_in_paddlenlp() -> None:
    assert request(max_length=33).params.max_tokens == 33
    assert request(GenerationConfig(max_length=44)).params.max_tokens == 44
    assert request(GenerationConfig(max_length=44), max_new_tokens=5).params.max_tokens == 5
    assert request(max_new_tokens=9, min_length=4).params.min_tokens == 4
    assert request(max_new_tokens=9, min_new_tokens=3).params.min_tokens == 3
    with pytest.raises(ValueError, match="max_new_tokens=3 and max_length=4"):
        request(max_new_tokens=3, max_length=4)


@pytest.mark.parametrize(
    ("eos", "expected"),
    [(3, (3,)), ([3, 4], (3, 4)), ([], ()), (None, (7, 5)), (-1, ()), ([-1, 3], (3,)), (np.array([3]), (3,))],
)
def test_one_or_several_end_tokens(eos: Any, expected: tuple[int, ...]) -> None:
    assert request(eos_token_id=eos).params.stop_token_ids == expected


def test_the_models_own_tokens_stand_in_for_missing_ones() -> None:
    answer = request(GenerationConfig())
    assert answer.params.stop_token_ids == (9,)
    assert answer.pad_token_id == 9


def test_a_default_end_token_outside_the_vocabulary_counts_as_none() -> None:
    answer = request(GenerationConfig(eos_token_id=[151643, 3], pad_token_id=151643))
    assert answer.params.stop_token_ids == (3,)
    assert answer.pad_token_id == 3


@pytest.mark.parametrize(
    "keywords",
    [
        {"use_cache": True},
        {"bos_token_id": 1},
        {"num_beams": 1},
        {"num_return_sequences": 1},
        {"early_stopping": False},
        {"top_k": 20, "min_p": 0.0, "typical_p": 1.0, "stop_strings": None, "bad_words_ids": [], "logit_bias": {}},
        {"stopping_criteria": StoppingCriteriaList(), "logits_processors": LogitsProcessorList()},
        {"stopping_criteria": [], "logits_processors": []},
    ],
)
def test_options_without_effect_are_accepted(keywords: dict[str, Any]) -> None:
    assert request(**keywords).params == request().params


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"num_beams": 4},
            "num_beams=4 is not implemented: answers are chosen greedily or .*; leave num_beams",
        ),
        ({"num_return_sequences": 2, "do_sample": False}, "num_return_sequences=2 needs do_sample=True"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1, got 0"),
        ({"diversity_rate": 0.5}, "diversity_rate=0.5"),
        ({"decode_strategy": "beam_search"}, "decode_strategy='beam_search': this model has 'greedy_search'"),
        ({"stopping_criteria": [1]}, "stopping_criteria"),
        ({"logits_processors": LogitsProcessorList([print])}, "logits_processors=.* is not implemented"),
        ({"begin_suppress_tokens": [1]}, r"begin_suppress_tokens=\[1\] is not implemented"),
        ({"typical_p": float("nan")}, "typical_p=nan is not implemented"),
        ({"do_sample": "no"}, "do_sample must be true or false, got 'no'"),
        ({"trunc_input": "no"}, "trunc_input must be true or false, got 'no'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"min_new_tokens": 21}, r"min_new_tokens must be between 0 and max_new_tokens \(20\), got 21"),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"temperature": 10**400}, "temperature must be a finite number, got 10000"),
        ({"temperature": -1.0}, "temperature must be 0 .* got -1.0"),
        ({"temperature": "hot"}, "temperature must be a finite number, got 'hot'"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": -2}, "top_k must be 0 or -1 .* got -2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be greater than 0"),
        ({"eos_token_id": 100}, r"eos_token_id must be in \[0, 100\), got 100"),
        ({"eos_token_id": "747"}, "eos_token_id must be a whole number or a list of them, got '747'"),
        ({"eos_token_id": [[7]]}, r"eos_token_id must be a whole number or a list of them, got \[\[7\]\]"),
        ({"eos_token_id": True}, "eos_token_id must be a whole number or a list of them, got True"),
        ({"pad_token_id": -1}, r"pad_token_id must be in \[0, 100\), got -1"),
        ({"seed": -3}, r"seed must be in \[0, 2\*\*63\), got -3"),
        ({"seed": True}, "seed must be a whole number, got True"),
    ],
)
def test_values_that_cannot_be_used_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**keywords)


def test_unknown_options_are_refused_with_the_list_of_those_that_exist() -> None:
    with pytest.raises(TypeError, match=r"no option tempreature; it has: max_new_tokens, max_length.*, streamer"):
        request(tempreature=0.7)


@pytest.mark.parametrize("name", MISSING)
def test_what_the_engine_does_not_have_is_refused_by_name_in_a_call_and_in_an_object(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0.35 is not implemented"):
        request(**{name: 0.35})
    own = GenerationConfig(max_new_tokens=3)
    setattr(own, name, 0.35)
    with pytest.raises(ValueError, match=f"{name}=0.35 is not implemented"):
        request(own)
    for value in MISSING[name]:
        assert request(**{name: value}) == request()


@pytest.mark.parametrize("name", MISSING)
def test_what_the_engine_does_not_have_is_named_in_the_log_when_a_file_says_it(name: str, logged: list[str]) -> None:
    plain = request()
    for value in (None, [], *MISSING[name]):
        assert request(defaults=from_file(**PUBLISHED, **{name: value})) == plain
    assert logged == []
    assert request(defaults=from_file(**PUBLISHED, **{name: 0.35})) == plain
    (line,) = logged
    assert line.startswith(f"DIR/generation_config.json: {name}=0.35 has no effect")


def test_what_nobody_knows_is_named_in_the_log(logged: list[str]) -> None:
    assert request(defaults=from_file(**PUBLISHED, tempreature=3, transformers_version="5.1.0")) == request()
    assert logged == ["DIR/generation_config.json: tempreature is unknown here and has no effect"]
    assert request(GenerationConfig(tempreature=3)).params.temperature == 0
    assert logged[1:] == ["generation_config: tempreature is unknown here and has no effect"]


@pytest.mark.parametrize("value", [True, 3, [1], float("nan")])
def test_a_strategy_of_the_file_that_is_no_text_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"DIR/generation_config.json: decode_strategy="):
        from_file(decode_strategy=value)


@pytest.mark.parametrize("strategy", ["beam_search", "contrastive_search"])
def test_a_strategy_of_the_file_that_does_not_exist_is_named_in_the_log(strategy: str, logged: list[str]) -> None:
    values = {**PUBLISHED, "decode_strategy": strategy}
    assert request(defaults=from_file(**values)) == request()
    assert f"decode_strategy='{strategy}' has no effect" in logged[0]


UNUSABLE = ["0.5", "", True, float("nan"), float("inf"), [1], {}, [[1]]]
USABLE = {
    "do_sample": [True],
    "trunc_input": [True],
    "eos_token_id": [[1]],
    "pad_token_id": [[1]],
    "logit_bias": [{}],
    "sequence_bias": [{}],
    "bad_words_ids": [[[1]]],
    "suppress_tokens": [[1]],
    "stop_strings": ["0.5"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in HONOURED
        for value in UNUSABLE
        if name != "decode_strategy" and value not in USABLE.get(name, [])
    ],
)
def test_a_value_of_the_file_that_cannot_be_used_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        from_file(**{name: value})
    assert str(error.value).startswith(f"DIR/generation_config.json: {name} must be ")
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name", HONOURED)
def test_null_is_off(name: str) -> None:
    plain = request(defaults=from_file())
    assert request(defaults=from_file(**{name: None})).params == {
        "eos_token_id": replace(plain.params, stop_token_ids=()),
        "top_k": replace(plain.params, top_k=0),
    }.get(name, plain.params)


def test_the_file_may_say_off_and_never_stop_as_other_engines_do() -> None:
    params = request(defaults=from_file(**{**PUBLISHED, "top_k": -1, "eos_token_id": -1})).params
    assert (params.top_k, params.stop_token_ids) == (0, ())
    assert request(defaults=from_file(eos_token_id=[])).params.stop_token_ids == ()
    assert request(defaults=from_file()).params.stop_token_ids == (9,)
    assert request(top_k=-1).params.top_k == 0


def test_strategies_that_contradict_each_other_in_the_file_are_refused() -> None:
    with pytest.raises(ValueError, match=r"DIR/generation_config.json: do_sample and decode_strategy contradict"):
        from_file(do_sample=True, decode_strategy="greedy_search")


@pytest.mark.parametrize("chosen", [1, 19, 20, 21])
def test_max_new_tokens_of_the_file_wins_over_its_max_length(chosen: int) -> None:
    asked = request(defaults=from_file(max_new_tokens=chosen, max_length=200))
    assert new_tokens(asked, prompt=40) == (0, chosen)


def test_max_length_of_a_file_counts_the_prompt_too() -> None:
    defaults = from_file(max_length=200, min_length=50)
    assert new_tokens(request(defaults=defaults), prompt=40) == (10, 160)
    assert new_tokens(request(defaults=defaults), prompt=60) == (0, 140)
    with pytest.raises(ValueError, match=r"prompt has 200 tokens .* allows 200 for prompt and answer .*max_new_tokens"):
        request(defaults=defaults).params_for(200, 1000)
    assert new_tokens(request(defaults=defaults, max_new_tokens=7, min_new_tokens=2), prompt=300) == (2, 7)
    assert new_tokens(request(defaults=defaults, max_length=7, min_length=2), prompt=300) == (2, 7)
    assert new_tokens(request(defaults=from_file(max_length=200, min_new_tokens=3)), prompt=40) == (3, 160)


def test_max_length_of_a_file_that_paddlenlp_wrote_counts_new_tokens() -> None:
    defaults = from_file(max_length=200, min_length=50, paddlenlp_version="3.0.0b4")
    assert new_tokens(request(defaults=defaults), prompt=300) == (50, 200)


@pytest.mark.parametrize(
    ("name", "value", "expected"), [("max_new_tokens", 20, 20), ("max_new_tokens", 7, 7), ("max_length", 33, 33)]
)
def test_a_length_that_a_caller_sets_on_the_defaults_counts_new_tokens(name: str, value: int, expected: int) -> None:
    defaults = from_file(max_length=200)
    setattr(defaults.config, name, value)
    assert new_tokens(request(defaults=defaults), prompt=40) == (0, expected)


def test_a_length_that_nobody_chose_is_cut_to_what_the_prompt_leaves() -> None:
    for defaults in (from_file(), from_file(max_new_tokens=30, min_new_tokens=12), from_file(max_length=5000)):
        least, most = new_tokens(request(defaults=defaults), prompt=990)
        assert most == 10
        assert least <= 10
        assert new_tokens(request(defaults=defaults), prompt=1000) == (min(least, 1), 1)
        assert new_tokens(request(defaults=defaults, max_new_tokens=30), prompt=990)[1] == 30
        defaults.config.max_new_tokens = 31
        assert new_tokens(request(defaults=defaults), prompt=990)[1] == 31
    assert new_tokens(request(GenerationConfig(max_new_tokens=30)), prompt=990) == (0, 30)
    assert new_tokens(request(GenerationConfig()), prompt=990) == (0, 10)


@pytest.mark.parametrize(
    ("values", "keywords", "padding"),
    [
        ({"pad_token_id": 5, "eos_token_id": 7}, {}, (5, False)),
        ({"pad_token_id": 5, "eos_token_id": [7, 5]}, {}, (5, False)),
        ({"pad_token_id": 5, "eos_token_id": 5}, {}, (5, True)),
        ({"pad_token_id": 9}, {}, (9, True)),
        ({"eos_token_id": 7}, {}, (None, False)),
        ({"eos_token_id": 7}, {"pad_token_id": 3}, (3, False)),
        ({"pad_token_id": 5, "eos_token_id": 7}, {"eos_token_id": 5}, (5, True)),
    ],
)
def test_the_padding_token_is_known_as_in_paddlenlp(
    values: dict[str, Any], keywords: dict[str, Any], padding: tuple[int | None, bool]
) -> None:
    asked = request(defaults=from_file(**values), **keywords)
    assert (asked.padding, asked.pad_is_end) == padding


def test_what_only_samples_is_said_to_be_idle_on_a_greedy_answer(logged: list[str]) -> None:
    request(defaults=from_file(), temperature=0.7, top_p=0.9)
    request(do_sample=False, top_k=5)
    request(do_sample=False, top_k=0, top_p=1.0)
    request(temperature=0)
    request(temperature=0.7)
    assert logged == [
        "temperature, top_p has no effect on a greedy answer: give do_sample=True to sample",
        "top_k has no effect on a greedy answer: give do_sample=True to sample",
    ]


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


def test_without_a_mask_the_padding_token_at_the_start_of_a_row_is_padding(logged: list[str]) -> None:
    batch = read_batch([[0, 0, 3], [1, 2, 3]], None, 10, pad_token_id=0)
    assert [prompt.tolist() for prompt in batch.prompts] == [[3], [1, 2, 3]]
    assert [prompt.tolist() for prompt in read_batch([[0, 0, 3]], None, 10).prompts] == [[0, 0, 3]]
    assert [prompt.tolist() for prompt in read_batch([[0, 3]], [[1, 1]], 10, pad_token_id=0).prompts] == [[0, 3]]
    assert logged == []


def test_the_padding_token_inside_a_prompt_is_a_token_and_said_to_be_one(logged: list[str]) -> None:
    batch = read_batch([[0, 3, 0, 4, 0]], None, 10, pad_token_id=0)
    assert batch.prompts[0].tolist() == [3, 0, 4, 0]
    assert logged == [
        "input_ids[0, 2] is pad_token_id 0 behind the row's first token and is taken as a token; an attention_mask "
        "says which it is"
    ]


def test_a_padding_token_that_also_ends_answers_is_a_token_and_said_to_be_one(logged: list[str]) -> None:
    batch = read_batch([[0, 3], [1, 2]], None, 10, pad_token_id=0, pad_is_end=True)
    assert [prompt.tolist() for prompt in batch.prompts] == [[0, 3], [1, 2]]
    assert logged == [
        "input_ids has rows that start or end with 0, pad_token_id and eos_token_id in one, and no attention_mask: all "
        "of them are taken as tokens"
    ]
    read_batch([[1, 0, 3], [1, 2, 3]], None, 10, pad_token_id=0, pad_is_end=True)
    read_batch([[0, 3]], None, 10, pad_token_id=0, pad_is_end=True)
    assert len(logged) == 1


def test_padding_on_the_right_is_refused_without_a_mask_too() -> None:
    with pytest.raises(ValueError, match=r'row 1 of input_ids ends with pad_token_id 0.*padding_side = "left"'):
        read_batch([[1, 2, 3], [1, 0, 0]], None, 10, pad_token_id=0)
    with pytest.raises(ValueError, match="row 0 of input_ids is an empty prompt: all of it is pad_token_id 0"):
        read_batch([[0, 0]], None, 10, pad_token_id=0)


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


def test_penalties_and_biases_are_the_engines() -> None:
    asked = request(
        do_sample=True,
        min_p=0.1,
        presence_penalty=-0.5,
        frequency_penalty=1.5,
        sequence_bias={(3,): -2.0, (4,): 1.0},
        logit_bias={4: 5},
    ).params
    assert (asked.min_p, asked.presence_penalty, asked.frequency_penalty) == (0.1, -0.5, 1.5)
    assert asked.logit_bias == {3: -2.0, 4: 5.0}
    assert request(sequence_bias=[[[3], -2.0]]).params.logit_bias == {3: -2.0}
    assert request(logit_bias={}).params.logit_bias is None
    assert request(defaults=from_file(min_p=0.25, do_sample=True)).params.min_p == 0.25


def test_words_that_no_answer_has_and_texts_that_end_one() -> None:
    asked = request(bad_words_ids=[[3, 4], [7], [5, 7]], suppress_tokens=[6, 7], stop_strings="END")
    assert asked.bad_words == ((3, 4), (5, 7), (6,), (7,)), "of the words alone an end of answers is left out"
    assert asked.stop_strings == ("END",)
    assert request(stop_strings=["a", "b"], bad_words_ids=[], suppress_tokens=[]).bad_words == ()
    own = GenerationConfig(bad_words_ids=[[8]], suppress_tokens=[1, 100], stop_strings=["."])
    for asked in (request(own), request(defaults=from_file(**{name: getattr(own, name) for name in OF_TOKENS}))):
        assert (asked.bad_words, asked.stop_strings) == (((8,), (1,)), (".",))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"bad_words_ids": [3]}, r"bad_words_ids must be a list of lists of token ids, got \[3\]"),
        ({"bad_words_ids": [[3], []]}, "must be a list of lists of token ids"),
        ({"bad_words_ids": [[3, 100]]}, r"bad_words_ids must be in \[0, 100\), got 100"),
        ({"suppress_tokens": [-1]}, r"suppress_tokens must be in \[0, 100\), got -1"),
        ({"stop_strings": ["a", ""]}, "stop_strings must be a text or a list of texts, none of them empty"),
        ({"min_p": 1.5}, "min_p must be 0 to 1, got 1.5"),
        ({"presence_penalty": 3}, "presence_penalty must be -2 to 2, got 3"),
        (
            {"sequence_bias": {(3, 4): 1.0}},
            r"must be of single tokens, got \(3, 4\): sequences of them are not implemented",
        ),
        ({"logit_bias": {3: 101}}, "logit_bias must be -100 to 100, got 101"),
        ({"logit_bias": 3}, "logit_bias must be a dict of token ids and numbers, got 3"),
    ],
)
def test_penalties_biases_and_words_that_cannot_be_used_are_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**keywords)
