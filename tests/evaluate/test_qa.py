"""RULER's question-answering tasks, from files in the published forms of SQuAD and HotpotQA."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from answerers import Answerer
from evaluations import run

from paddle_qwen1m.evaluate import qa, ruler
from paddle_qwen1m.evaluate.asking import about_sample, ask
from paddle_qwen1m.evaluate.results import Journal
from paddle_qwen1m.evaluate.samples import Prompter, Question, TooLong, TooShort

TOWNS = ("Aldby", "Borvik", "Cranfel", "Dunmere", "Eskrig", "Falholt", "Garsund", "Hollin", "Ivelow", "Jorvale")


def sight(town: str, number: int) -> str:
    return f"{town} has a sight, number {number}, which is {10 * number + len(town)} years old."


def squad(articles: int = len(TOWNS), paragraphs: int = 4) -> dict[str, Any]:
    """Of each town a few paragraphs, and of each of these a question; and one that has no answer."""

    def asked(town: str, number: int) -> list[dict[str, Any]]:
        age = str(10 * number + len(town))
        answers = [{"text": age, "answer_start": 0}, {"text": f"{age} years", "answer_start": 0}]
        nobody = {"question": "Who?", "id": "1", "answers": [], "is_impossible": True}
        return [{"question": f"How old is sight {number} of {town}?", "id": "0", "answers": answers}, nobody]

    data = [
        {
            "title": town,
            "paragraphs": [
                {"context": sight(town, number), "qas": asked(town, number)} for number in range(paragraphs)
            ],
        }
        for town in TOWNS[:articles]
    ]
    return {"version": "v2.0", "data": data}


def hotpot() -> list[dict[str, Any]]:
    """Of ten passages two are needed."""
    return [
        {
            "_id": str(number),
            "question": f"Is {town} older than {TOWNS[number - 1]}?",
            "answer": "no",
            "supporting_facts": [[town, 0], [TOWNS[number - 1], 0]],
            "context": [[f"{other} {number}", [f"{other} is a town.", f" It is of year {number}."]] for other in TOWNS],
            "type": "comparison",
            "level": "easy",
        }
        for number, town in enumerate(TOWNS)
    ]


def question(collection: qa.Collection, prompter: Prompter, length: int, number: int = 0, seed: int = 0) -> Question:
    kind = collection.about(number, seed)
    return ruler.make(collection.task, length, number, prompter, seed=seed, kind=kind).questions[0]


def documents(made: Question) -> list[str]:
    return re.findall(r"^Document \d+:\n((?:.+\n?)+)\n", made.prompt, re.MULTILINE)


@pytest.fixture(scope="module")
def of_squad() -> qa.Collection:
    return qa.read(json.dumps(squad()))


@pytest.fixture(scope="module")
def of_hotpot() -> qa.Collection:
    return qa.read(json.dumps(hotpot()))


def test_a_file_says_by_its_form_which_task_it_is_for(of_squad: qa.Collection, of_hotpot: qa.Collection) -> None:
    assert (of_squad.task, of_hotpot.task) == ("qa_1", "qa_2")
    assert (len(of_squad.passages), len(of_squad.asked)) == (40, 40), "what has no answer is not asked"
    assert (len(of_hotpot.passages), len(of_hotpot.asked)) == (100, 10)
    assert of_hotpot.passages[0] == "Aldby 0\nAldby is a town. It is of year 0."


def test_the_first_version_of_squad_says_nothing_of_questions_without_an_answer() -> None:
    content = squad()
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [
                {key: one[key] for key in ("question", "id", "answers")} for one in paragraph["qas"][:1]
            ]
    assert len(qa.read(json.dumps(content)).asked) == 40


@pytest.mark.parametrize("name", ["of_squad", "of_hotpot"])
@pytest.mark.parametrize("length", [1024, 1500])
def test_passages_fill_the_length_and_those_needed_are_among_them(
    name: str, length: int, prompter: Prompter, request: pytest.FixtureRequest
) -> None:
    collection = request.getfixturevalue(name)
    for number in range(4):
        made = question(collection, prompter, length, number)
        asked = next(one for one in collection.asked if one.question == made.facts["question"])
        shown = [text.strip() for text in documents(made)]
        assert len(set(shown)) == len(shown) and set(shown) <= set(collection.passages)
        assert {collection.passages[one] for one in asked.own} <= set(shown)
        assert len(asked.own) == {"qa_1": 1, "qa_2": 10}[collection.task]
        longest = max(len(prompter.encode(f"Document 99:\n{text}\n\n")) for text in collection.passages)
        assert length - longest < prompter.tokens(made) <= length
        assert made.max_tokens == 32
        assert prompter.text(made).endswith("<|im_start|>assistant\nAnswer:")


def test_the_rest_of_an_article_comes_before_others(of_squad: qa.Collection, prompter: Prompter) -> None:
    made = question(of_squad, prompter, 700)
    town = made.facts["question"].split()[-1].rstrip("?")
    shown = documents(made)
    assert 4 < len(shown) < 40
    assert sum(town in text for text in shown) == 4
    places = set()
    for number in range(12):
        own = of_squad.passages[of_squad.asked[of_squad.about(number, 0).place].own[0]]
        shown = documents(question(of_squad, prompter, 700, number))
        places.add([text.strip() for text in shown].index(own))
    assert len(places) > 2, "the passage that has the answer may stand anywhere"


def test_each_question_is_asked_once_in_an_order_that_the_seed_makes(of_squad: qa.Collection) -> None:
    first, other = ([of_squad.about(number, seed).place for number in range(40)] for seed in (0, 1))
    assert sorted(first) == sorted(other) == list(range(40))
    assert first != other
    with pytest.raises(ValueError, match="qa_1: the data have 40 questions, fewer than --samples"):
        of_squad.about(40, 0)


@pytest.mark.parametrize(
    ("said", "score"), [("It is 15 YEARS old", 1.0), ("16 years, no: 15", 1.0), ("16", 0.0), ("", 0.0)]
)
def test_any_one_of_the_answers_is_enough(
    said: str, score: float, tmp_path: Path, prompter: Prompter, tokenizer: Any
) -> None:
    collection = qa.read(json.dumps({"data": [{"title": "", "paragraphs": squad()["data"][0]["paragraphs"][1:2]}]}))
    kind = dataclasses.replace(collection, passages=[*collection.passages, "Nothing here."] * 9).about(0, 0)
    sample = ruler.make("qa_1", 300, 0, prompter, kind=kind)
    assert sample.questions[0].expected == ("15", "15 years")
    job = about_sample("qa_1", 300, 0, 1, lambda: sample, prompter)
    with Journal(tmp_path, {}) as journal:
        ask([job], journal, lambda: Answerer(tokenizer, lambda _prompt: said))
        assert [one.score for one in journal.records.values()] == [score]


def test_what_the_data_cannot_fill_and_what_they_do_not_fit_is_refused(
    of_squad: qa.Collection, of_hotpot: qa.Collection, prompter: Prompter
) -> None:
    with pytest.raises(TooLong, match=r"qa_1: the data do not fill a length of 8,192 tokens, the largest sample takes"):
        question(of_squad, prompter, 8192)
    with pytest.raises(TooShort, match=r"qa_2: a length of 300 tokens is too short, the smallest sample takes"):
        question(of_hotpot, prompter, 300)


def test_the_command_asks_them_when_it_is_given_the_files(needle_checkpoint: Path, tmp_path: Path) -> None:
    files = tmp_path / "dev-v2.0.json", tmp_path / "hotpot_dev_distractor_v1.json"
    for file, content in zip(files, (squad(), hotpot())):
        file.write_text(json.dumps(content), encoding="utf-8")
    options = ("--samples", 2, "--lengths", 1024, "--tasks", "qa_1", "qa_2", "--qa-data", *files)
    assert run("ruler", needle_checkpoint, tmp_path / "out", *options) == 0
    lines = (tmp_path / "out" / "sparse" / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line) for line in lines]
    assert [one["task"] for one in asked] == ["qa_1", "qa_1", "qa_2", "qa_2"]
    assert all(one["tokens"] + one["max_tokens"] <= 1024 for one in asked)
    files[0].write_text(json.dumps(squad(articles=9)), encoding="utf-8")
    assert run("ruler", needle_checkpoint, tmp_path / "out", *options) == 2, "answers about other data"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tasks", "qa_1"], "--tasks: qa_1 needs a file of SQuAD: give --qa-data FILE"),
        (["--tasks", "vt", "--qa-data", "squad"], "a file of SQuAD is for qa_1, which is not in --tasks"),
        (["--tasks", "qa_1", "--qa-data", "squad", "squad"], "is the second file of SQuAD: give one"),
        (["--tasks", "qa_1", "--qa-data", "nowhere"], "--qa-data: cannot read"),
        (["--tasks", "qa_1", "--qa-data", "table"], "is neither SQuAD's nor HotpotQA's JSON: there is no 'data'"),
        (["--tasks", "qa_1", "--qa-data", "text"], "is neither SQuAD's nor HotpotQA's JSON: Expecting value"),
        (["--tasks", "qa_1", "--qa-data", "none"], "there is no question in it that has an answer"),
        (["--tasks", "qa_1", "--qa-data", "squad", "--samples", "41"], "40 questions, fewer than --samples"),
        (["--tasks", "qa_1", "--qa-data", "squad", "--lengths", "9000"], "the data do not fill a length of 9,000"),
    ],
)
def test_data_that_cannot_be_used_are_refused_before_any_work(
    options: list[str], reason: str, needle_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    contents = {"squad": squad(), "table": {"rows": []}, "none": {"data": []}}
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "text").write_text("Once upon a time", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run("ruler", needle_checkpoint, tmp_path / "out", "--samples", 2, "--lengths", 1024, *options) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
