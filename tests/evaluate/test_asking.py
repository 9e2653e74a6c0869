"""A run keeps what it has, asks nothing twice, and scores what is right as 1 and what is wrong as 0."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from answerers import Answerer

from paddle_qwen1m import progress
from paddle_qwen1m.evaluate import needle, perplexity, report, ruler
from paddle_qwen1m.evaluate.asking import Job, about_reading, about_sample, about_window, ask
from paddle_qwen1m.evaluate.results import JOURNAL, Journal, Record, grouped, mean, tables, write_harness_files
from paddle_qwen1m.evaluate.samples import Prompter
from paddle_qwen1m.evaluate.subject import SubjectError
from paddle_qwen1m.streams import InputError

GIVEN = {"kind": "needle", "lengths": [512, 1024]}
LENGTHS, DEPTHS = (512, 1024), 3


@pytest.fixture
def jobs(prompter: Prompter) -> list[Job]:
    return [
        about_sample("needle", length, 0, DEPTHS, partial(needle.make, length, 0, prompter, DEPTHS), prompter)
        for length in LENGTHS
    ]


def read(prompt: str) -> str:
    """The right answer, by reading."""
    name = re.search(r"What is the access code for (\w+)\?", prompt)
    assert name is not None
    code = re.search(rf"The access code for {name[1]} is (\d+)", prompt)
    assert code is not None
    return f"It is {code[1]}."


def wrong(_prompt: str) -> str:
    return "It is 1."


def run(folder: Path, jobs: list[Job], subject: Answerer, given: dict[str, Any] | None = None) -> list[Record]:
    with Journal(folder, given or GIVEN) as journal:
        ask(jobs, journal, lambda: subject)
        return list(journal.records.values())


@pytest.mark.parametrize(("say", "share"), [(read, 1.0), (wrong, 0.0)])
def test_right_answers_score_1_and_wrong_ones_0(
    say: Any, share: float, tmp_path: Path, jobs: list[Job], tokenizer: Any
) -> None:
    records = run(tmp_path, jobs, Answerer(tokenizer, say))
    assert [record.score for record in records] == [share] * DEPTHS * len(LENGTHS)


@pytest.mark.parametrize(("say", "share"), [(read, 1.0), (lambda _prompt: "", 0.0)])
def test_an_answer_in_the_prompt_counts_where_each_of_its_tokens_is_the_likeliest(
    say: Any, share: float, tmp_path: Path, prompter: Prompter, tokenizer: Any
) -> None:
    sample = needle.make(512, 0, prompter, DEPTHS)
    subject = Answerer(tokenizer, say)
    records = run(tmp_path, [about_reading("needle", 512, 0, DEPTHS, lambda: sample, prompter)], subject)
    assert [record.score for record in records] == [share] * DEPTHS
    for record, question, asked in zip(records, sample.questions, subject.asked):
        assert asked == prompter.text(question) + question.facts["needle"], "question and answer, and nothing else"
        assert record.max_tokens == len(tokenizer(question.facts["needle"])["input_ids"])
        assert (record.response == question.facts["needle"]) == bool(share)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_right_answers_in_the_prompt_score_1_in_every_task_of_ruler(
    task: str, tmp_path: Path, prompter: Prompter, tokenizer: Any
) -> None:
    sample = ruler.make(task, 6144, 0, prompter)
    right, wrong = (
        run(tmp_path / word, [about_reading(task, 6144, 0, 1, lambda: sample, prompter)], Answerer(tokenizer, say))
        for word, say in (("right", lambda _prompt: "yes"), ("wrong", lambda _prompt: ""))
    )
    texts = len(sample.questions[0].expected)
    assert [record.score for record in right] == [1.0]
    # its last token is another one, a full stop or the end of a text
    assert wrong[0].score in ([0.0] if not sample.questions[0].any_order else [1.0, pytest.approx(1 - 1 / texts)])


@pytest.mark.parametrize("task", ruler.TASKS)
def test_whoever_knows_the_expected_texts_scores_1_in_every_task_of_ruler(
    task: str, tmp_path: Path, prompter: Prompter, tokenizer: Any
) -> None:
    sample = ruler.make(task, 6144, 0, prompter)
    job = about_sample(task, 6144, 0, 1, lambda: sample, prompter)
    told = " ".join(sample.questions[0].expected).upper()
    (right,) = run(tmp_path / "right", [job], Answerer(tokenizer, lambda _prompt: told))
    (half,) = run(tmp_path / "half", [job], Answerer(tokenizer, lambda _prompt: told.rpartition(" ")[0]))
    count = len(sample.questions[0].expected)
    assert (right.score, half.score) == (1.0, (count - 1) / count)


def test_a_run_that_died_goes_on_and_asks_nothing_twice(tmp_path: Path, jobs: list[Job], tokenizer: Any) -> None:
    mortal, second, third = (Answerer(tokenizer, read, dies_after) for dies_after in (4, None, None))
    with pytest.raises(SubjectError):
        run(tmp_path, jobs, mortal)
    assert mortal.closed
    with open(tmp_path / JOURNAL, "a") as file:
        file.write('{"task": "needle", "len')  # killed while it wrote
    records = run(tmp_path, jobs, second)
    assert (len(mortal.asked), len(second.asked)) == (4, 2)
    assert len({*mortal.asked, *second.asked}) == len(records) == 6
    assert run(tmp_path, jobs, third) == records
    assert third.asked == []
    assert not third.closed, "it was not even opened"


def test_a_run_tells_how_long_it_will_take_yet(
    tmp_path: Path, jobs: list[Job], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(prompt: str) -> str:
        time.sleep(0.4)
        return read(prompt)

    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.1)
    run(tmp_path, jobs, Answerer(tokenizer, slowly))
    line = r"answerer, 2 documents: 512 of 1,536 tokens \(33%\), (\d+) s, [\d,]+ tokens/s, about (\d+) s left"
    lines = re.findall(line, told.getvalue())
    assert lines
    for seconds, left in lines:
        assert abs(int(left) - 2 * int(seconds)) <= 2, "two thirds are left"


def test_whole_is_what_an_interrupted_run_has_kept(tmp_path: Path, jobs: list[Job], tokenizer: Any) -> None:
    with pytest.raises(SubjectError):
        run(tmp_path / "one", jobs, Answerer(tokenizer, read, 4))
    assert run(tmp_path / "one", jobs, Answerer(tokenizer, read)) == run(
        tmp_path / "other", jobs, Answerer(tokenizer, read)
    )


def test_other_options_are_not_a_resumption(tmp_path: Path, jobs: list[Job], tokenizer: Any) -> None:
    run(tmp_path, jobs, Answerer(tokenizer, read))
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(InputError, match=r"other options \(lengths was \[512, 1024\] and is \[512\]\): give the same"):
        run(tmp_path, jobs, Answerer(tokenizer, read), {**GIVEN, "lengths": [512]})
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_a_damaged_journal_is_not_taken_for_answers(tmp_path: Path, jobs: list[Job], tokenizer: Any) -> None:
    run(tmp_path, jobs, Answerer(tokenizer, read))
    (tmp_path / JOURNAL).write_text("{}\n", encoding="utf-8")
    with pytest.raises(InputError, match="is damaged"):
        run(tmp_path, jobs, Answerer(tokenizer, read))


def test_files_are_laid_out_as_lm_evaluation_harness_does(tmp_path: Path, jobs: list[Job], tokenizer: Any) -> None:
    records = run(tmp_path, jobs, Answerer(tokenizer, read))
    path = write_harness_files(tmp_path, "needle", GIVEN, records, "2026-01-02T03-04-05")
    assert path.name == "results_2026-01-02T03-04-05.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["results"]["needle"]["512,none"] == results["results"]["needle"]["1024,none"] == 1.0
    assert results["n-samples"] == {"needle": {"original": 6, "effective": 6}}
    lines = (tmp_path / "samples_needle_2026-01-02T03-04-05.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["doc_id"] for sample in samples] == list(range(6))
    first = samples[0]
    assert first[first["metrics"][0]] == 1.0
    assert first["target"][0] in first["resps"][0][0] == first["filtered_resps"][0]
    assert first["doc"]["depth_percent"] == 0.0
    assert {"arguments", "filter", "doc_hash", "prompt_hash", "target_hash"} < set(first)
    assert first["arguments"]["gen_args_0"]["arg_0"].endswith("<|im_start|>assistant\n")
    assert len({sample["prompt_hash"] for sample in samples}) == 6
    write_harness_files(tmp_path, "needle", GIVEN, records, "2026-01-02T03-04-06")
    assert len(list(tmp_path.glob("results_*"))) == len(list(tmp_path.glob("samples_*"))) == 1


def test_tables_have_scores_and_paired_differences(tmp_path: Path, prompter: Prompter, tokenizer: Any) -> None:
    jobs = [
        about_sample("needle", 256, number, 1, partial(needle.make, 256, number, prompter, 1), prompter)
        for number in range(10)
    ]
    right = run(tmp_path / "dense", jobs, Answerer(tokenizer, read))
    half = run(tmp_path / "sparse", jobs, Answerer(tokenizer, lambda prompt: read(prompt) if len(prompt) % 2 else ""))
    share = mean(half)
    assert 0 < share < 1, "otherwise this shows nothing"
    text = tables({"dense": right, "sparse": half})
    assert "### dense: score, of 100\n\n| task | 256 |\n| --- | --- |\n| needle | 100.0 |" in text
    assert f"| needle | {100 * share:.1f} |" in text
    difference = re.search(r"### sparse less dense: .*\n\n.*\n.*\n\| needle \| (\S+) \[(\S+), (\S+)\] \|", text)
    assert difference is not None
    found, low, high = map(float, difference.groups())
    assert found == pytest.approx(100 * share - 100, abs=0.05)
    assert low < found < high <= 0


def test_perplexity_is_kept_by_position(tmp_path: Path, tokenizer: Any) -> None:
    ids = list(tokenizer("The river bends past the old mill. " * 200)["input_ids"])
    jobs = [about_window(one, "a text") for one in perplexity.windows(ids, 600, 2)]
    records = run(tmp_path, jobs, Answerer(tokenizer, read))
    assert [record.score for record in records] == [300.0, 300.0], "the mean of 1 to 599"
    path = write_harness_files(tmp_path, "needle", GIVEN, records, "2026-01-02T03-04-05")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]["perplexity"]
    assert results["600_by_position"][0] == {
        "begin": 1, "end": 256, "perplexity": pytest.approx(perplexity.perplexity(128, 1))
    }  # fmt: skip
    assert "| 1 to 255 | 3.888e+55 |" in tables({"dense": records})


def test_pictures_are_one_a_configuration_or_task_and_lie_within_the_page(
    tmp_path: Path, jobs: list[Job], tokenizer: Any
) -> None:
    pytest.importorskip("matplotlib")
    records = run(tmp_path, jobs, Answerer(tokenizer, read))
    images = report.pictures({"dense": records, "sparse": records})
    assert sorted(images) == ["needle_dense.png", "needle_sparse.png"]
    assert all(image.startswith(b"\x89PNG") for image in images.values())
    page = report.page("<needle>", GIVEN, tables({"dense": records, "sparse": records}), images)
    assert "<h1>&lt;needle&gt;</h1>" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page), "nothing is fetched"
    assert page.count("<table>") == 3


def test_results_are_grouped_in_the_order_of_the_run(tmp_path: Path, jobs: list[Job], tokenizer: Any) -> None:
    records = run(tmp_path, jobs, Answerer(tokenizer, read))
    assert {task: list(lengths) for task, lengths in grouped(records).items()} == {"needle": [512, 1024]}
