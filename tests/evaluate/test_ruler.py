"""RULER's tasks: each sample is as long as was asked, and its answer is what a careful reader finds in it."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest

from paddle_qwen1m.evaluate import ruler
from paddle_qwen1m.evaluate.samples import Prompter, Question, TooShort, score
from paddle_qwen1m.evaluate.words import ADJECTIVES, NAMES, NOUNS, names

LENGTH = 6144
WIDEST_UNIT = 130
"""Tokens of the needle checkpoint's tokenizer: a line with two UUIDs."""


def question(task: str, prompter: Prompter, sample: int = 0, **options: Any) -> Question:
    return ruler.make(task, options.pop("length", LENGTH), sample, prompter, **options).questions[0]


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("length", [LENGTH, 7000])
def test_prompt_and_answer_fill_the_length_and_no_more(
    task: str, length: int, prompter: Prompter, tokenizer: Any
) -> None:
    made = question(task, prompter, length=length)
    tokens = len(tokenizer(prompter.text(made))["input_ids"]) + made.max_tokens
    assert length - WIDEST_UNIT < tokens <= length


@pytest.mark.parametrize("task", ruler.TASKS)
def test_samples_come_from_their_seed_and_number(task: str, prompter: Prompter) -> None:
    first = question(task, prompter)
    assert question(task, prompter) == first
    others = [question(task, prompter, 1), question(task, prompter, seed=1)]
    assert all(other.expected != first.expected for other in others)


@pytest.mark.parametrize(
    ("task", "tokens", "expected"),
    [("niah_single_1", 128, 1), ("niah_multivalue", 128, 4), ("niah_multiquery", 128, 4), ("vt", 30, 5),
     ("cwe", 120, 10), ("fwe", 50, 3)],
)  # fmt: skip
def test_answers_have_the_tokens_and_texts_of_ruler(task: str, tokens: int, expected: int, prompter: Prompter) -> None:
    made = question(task, prompter)
    assert (made.max_tokens, len(set(made.expected))) == (tokens, expected)


@pytest.mark.parametrize("task", [task for task in ruler.TASKS if task.startswith("niah")])
def test_the_needles_asked_for_are_in_the_document_once(task: str, prompter: Prompter) -> None:
    made = question(task, prompter)
    document, asked = made.prompt.split("\n\n")[1:]
    facts = re.findall(r"A secret (?:number|uuid) of (\S+) is (\S+)\.", document)
    keys = re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)+", asked)
    found = {value for name, value in facts if name in keys}
    assert found == set(made.expected)
    kinds = {"niah_single_3": 36, "niah_multikey_3": 36}
    assert {len(value) for value in found} == {kinds.get(task, 7)}
    hidden = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    if task in ("niah_multikey_2", "niah_multikey_3"):
        assert len(facts) == document.count("A secret ") > 20, "nothing but needles"
        assert len({name for name, _ in facts}) == len(facts)
    else:
        assert len(facts) == hidden.get(task, 1)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_right_answer_is_written_out_where_there_is_one_way_to_write_it(
    task: str, prompter: Prompter, tokenizer: Any
) -> None:
    made = question(task, prompter)
    assert made.any_order == (task in ("niah_multivalue", "vt", "cwe", "fwe"))
    assert score(made.answer, made.expected) == 1.0


def test_single_1_hides_in_noise_and_the_others_in_text(prompter: Prompter) -> None:
    def sentences(task: str) -> Counter[str]:
        return Counter(re.findall(r"[A-Z][^.]*\.", question(task, prompter).prompt.split("\n\n")[1]))

    assert len(sentences("niah_single_1")) == 5 + 1
    assert sentences("niah_single_2").most_common(1)[0][1] <= 2


def test_own_text_can_be_the_haystack(prompter: Prompter) -> None:
    made = question("niah_single_2", prompter, haystack=lambda _rng: iter(["Own words."] * 9999))
    assert set(made.prompt.split("\n\n")[1].replace("Own words.", "").split(" A ")[0].split()) == set()


def test_depths_tell_where_needles_are(prompter: Prompter) -> None:
    for sample in range(4):
        made = question("niah_single_1", prompter, sample)
        document = made.prompt.split("\n\n")[1]
        assert abs(100 * document.index("A secret") / len(document) - made.facts["depths"][0]) < 2


def test_variables_are_followed_to_the_value(prompter: Prompter) -> None:
    made = question("vt", prompter)
    example, asked = made.prompt.split("\n\n\n")
    for text, expected in ((example, None), (asked, made.expected)):
        values: dict[str, str] = {}
        for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", text, re.MULTILINE):
            values[name] = values.get(source, source)
        wanted = re.search(r"have the value (\d{5}) at", text)
        assert wanted is not None
        holding = [name for name, value in values.items() if value == wanted[1]]
        assert len(holding) == 5
        assert expected is None or holding == list(expected)
        assert text is asked or text.endswith(", ".join(holding)), "the example is answered"


def test_common_words_are_there_ten_times_as_often(prompter: Prompter) -> None:
    example, asked = question("cwe", prompter).prompt.split("\n\n\n")
    counts = Counter(re.findall(r"\d+\. (\S+)", asked))
    assert {word for word, count in counts.items() if count == 30} == set(question("cwe", prompter).expected)
    assert Counter(counts.values()) == {30: 10, 3: len(counts) - 10}
    shown = Counter(re.findall(r"\d+\. (\S+)", example))
    assert not set(shown) & set(counts), "the example gives nothing away"
    assert all(word in example.split("list are:")[1] for word, count in shown.items() if count == 4)


def test_coded_words_are_asked_for_in_order_of_frequency_without_the_dots(prompter: Prompter) -> None:
    made = question("fwe", prompter)
    counts = Counter(made.prompt.split("\n\n")[1].split())
    (dots, most), *words = counts.most_common(5)
    assert dots == "..."
    assert [word for word, _ in words[:3]] == list(made.expected)
    assert len({count for _, count in words}) == 4, "the fourth is told from the third"
    assert most / words[0][1] == pytest.approx(4, rel=0.05), "a share of 1/k^2"


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_length_too_short_is_refused_by_name(task: str, prompter: Prompter) -> None:
    with pytest.raises(TooShort, match=rf"^{task}: a length of 200 tokens is too short, the smallest sample takes"):
        ruler.make(task, 200, 0, prompter)


@pytest.mark.parametrize("at_most", [5000, 20_000])
def test_no_name_is_part_of_another(at_most: int) -> None:
    for words in (ADJECTIVES, NOUNS, NAMES):
        assert len(set(words)) == len(words)
    assert not [one for one in ADJECTIVES for other in ADJECTIVES if one != other and other.endswith(one)]
    assert not [one for one in NOUNS for other in NOUNS if one != other and other.startswith(one)]
    drawn = list(islice(names(np.random.default_rng(0), at_most), at_most))
    assert len(set(drawn)) == at_most
    assert len({name.count("-") for name in drawn}) == 1
