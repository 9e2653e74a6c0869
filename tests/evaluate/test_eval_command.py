"""`paddle-qwen1m eval` on the needle checkpoint: in process, over HTTP, interrupted, and misused."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import altered, run, serve

from paddle_qwen1m.evaluate import needle, subject
from paddle_qwen1m.evaluate.samples import Prompter
from paddle_qwen1m.options import read_llm_options

SPARSE_FROM = ("--sparse-threshold", "700")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_needle_map_dense_and_sparse(
    needle_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--lengths", 1024, "--depths", 3, "--compare", "dense,sparse", *SPARSE_FROM)
    assert run("needle", needle_checkpoint, tmp_path, *options) == 0
    told = capsys.readouterr().out
    assert told.count("| needle | 100.0 |") == 2
    for name in ("dense", "sparse"):
        asked = records(tmp_path / name)
        assert [one["score"] for one in asked] == [1.0] * 3
        assert asked[0]["cached_tokens"] == 0
        assert all(one["cached_tokens"] > 500 for one in asked[1:]), "the document is read once for all its questions"
        assert all(one["tokens"] + one["max_tokens"] <= 1024 for one in asked)
    assert (tmp_path / "report.html").exists()


def test_the_prompts_own_logits_can_be_the_score(
    needle_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--lengths", 1024, "--depths", 3, "--score", "logits", *SPARSE_FROM)
    assert run("needle", needle_checkpoint, tmp_path, *options) == 0
    for one in records(tmp_path / "sparse"):
        assert one["score"] == 1.0
        assert one["response"] == one["expected"][0] == one["facts"]["needle"]


def test_a_text_may_come_from_standard_input(
    needle_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The grass is green. The sky is blue. " * 40
    (tmp_path / "text").write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    for name, source in (("file", tmp_path / "text"), ("stdin", "-")):
        assert run("perplexity", needle_checkpoint, tmp_path / name, "--lengths", 128, "--text", source) == 0
    assert records(tmp_path / "stdin" / "sparse") == records(tmp_path / "file" / "sparse")


def test_likeliest_tokens_are_those_of_the_whole_prompt_read_at_once(
    needle_checkpoint: Path, prompter: Prompter
) -> None:
    from paddlenlp.transformers import AutoModelForCausalLM

    sample = needle.make(900, 1, prompter, 2)
    asked = [prompter.encode(prompter.text(one) + str(one.facts["needle"])) for one in sample.questions]
    engine = AutoModelForCausalLM.from_pretrained(str(needle_checkpoint)).engine
    here = subject.InProcess(str(needle_checkpoint), "dense", {"max_model_len": 1024})
    for ids in asked:
        logits = engine.logits(np.asarray(ids, np.int64), range(len(ids) - 41, len(ids) - 1))
        assert here.likeliest(subject.Reading(ids, 40)).tolist() == logits.argmax(-1).tolist()
    here.close()


def test_an_endpoint_says_what_the_model_says_in_process(
    needle_checkpoint: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river bends past the old mill and on toward the sea. " * 60, encoding="utf-8")
    kinds = {
        "needle": ("--lengths", 800, "--depths", 2),
        "ruler": ("--lengths", 800, "--samples", 1, "--tasks", "niah_multikey_2", "vt"),
        "perplexity": ("--lengths", 800, "--text", text),
    }
    with serve(needle_checkpoint, tokenizer, sparse_threshold=700, max_model_len=1024) as server:
        for kind, options in kinds.items():
            assert run(kind, needle_checkpoint, tmp_path / kind, *options, "--base-url", f"{server.url}/v1") == 0
    for kind, options in kinds.items():
        assert run(kind, needle_checkpoint, tmp_path / kind, *options, *SPARSE_FROM) == 0
        there, here = records(tmp_path / kind / "endpoint"), records(tmp_path / kind / "sparse")
        assert len(there) == len(here) > 0
        for one, other in zip(there, here):
            assert one["response"] == other["response"]
            assert one["score"] == pytest.approx(other["score"], rel=1e-5)
            assert one["prompt_hash"] == other["prompt_hash"]


def test_an_endpoint_that_is_not_there_is_named(
    needle_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--lengths", 512, "--depths", 3, "--base-url", "http://127.0.0.1:9/v1")
    assert run("needle", needle_checkpoint, tmp_path, *options) == 1
    assert "error: http://127.0.0.1:9/v1 does not answer: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("needle", ["--lengths", "100"], "needle: a length of 100 tokens is too short for 10 needles"),
        ("needle", ["--lengths", "512", "--depths", "31"], "at 1 to 30 depths, got 31"),
        ("needle", ["--lengths", "512", "--compare", "dense,int4"], "--compare: there is no 'int4', but dense, sparse"),
        ("needle", ["--lengths", "512", "--compare", "dense+forced"], "dense and forced exclude each other"),
        ("needle", ["--lengths", "512", "--compare", "w8+fp8"], "w8 and fp8 exclude each other"),
        ("needle", ["--lengths", "512", "--compare", "int8+kvfp8"], "int8 and kvfp8 exclude each other"),
        ("needle", ["--lengths", "512", "--samples", "0"], "--samples must be at least 1, got 0"),
        ("needle", ["--lengths", "512", "--max-model-len", "256"], "512 tokens are more than --max-model-len, 256"),
        ("needle", ["--lengths", "2M"], "2,097,152 tokens are more than"),
        ("ruler", ["--lengths", "512", "--tasks", "qa_3"], "--tasks: there is no 'qa_3', but niah_single_1, "),
        ("needle", ["--lengths", "512", "--score", "logits", "--base-url", "http://127.0.0.1:9"], "a model in process"),
        ("ruler", ["--lengths", "512", "--haystack", "nowhere.txt"], "--haystack: cannot read nowhere.txt"),
        ("perplexity", ["--lengths", "512", "--text", "nowhere.txt"], "--text: cannot read nowhere.txt"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_before_any_work(
    kind: str, options: list[str], reason: str, needle_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(kind, needle_checkpoint, tmp_path / "out", *options) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_lengths_at_which_sparse_is_dense_are_told(
    needle_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--lengths", 512, 768, "--depths", 1, "--sparse-threshold", 512, "--text", __file__)
    assert run("perplexity", needle_checkpoint, tmp_path, *options[:3], *options[5:]) == 0
    assert "note: `sparse` is dense at 512 tokens: it begins above --sparse-threshold, 512\n" in capsys.readouterr().err


def test_rope_is_the_model_without_dual_chunks(needle_checkpoint: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Against float64, with all keys in one chunk and a temperature of 1, on a model whose own chunks are short."""
    import oracle
    from oracle.model import OracleModel

    file = altered(needle_checkpoint, tmp_path, "config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dual_chunk_attention_config"] = {
        "chunk_size": 160, "local_size": 32, "original_max_position_embeddings": 160,
    }  # fmt: skip
    file.write_text(json.dumps(config), encoding="utf-8")
    ids = tokenizer("The access code for jade is 64931. The river bends past the old mill. " * 12)["input_ids"][:300]
    plain = {"chunk_size": 4096, "local_size": 0, "original_max_position_embeddings": 0}
    logits = OracleModel(needle_checkpoint, plain).logits(ids)[:-1]
    expected = np.array([oracle.log_softmax(row)[token] for row, token in zip(logits, ids[1:])])
    found = {}
    for name in ("rope", "dense"):
        here = subject.InProcess(str(tmp_path), name, {"max_model_len": 512})
        found[name] = here.logprobs(ids)
        here.close()
    np.testing.assert_allclose(found["rope"], expected, atol=1e-2)
    assert np.abs(found["dense"] - expected).max() > 0.1


@pytest.mark.parametrize("name", subject.CONFIGURATIONS)
def test_a_configuration_is_what_llm_makes_of_its_options(name: str) -> None:
    assert subject.configuration(name) == read_llm_options(subject.CONFIGURATIONS[name])


def test_configurations_side_by_side(needle_checkpoint: Path, tmp_path: Path) -> None:
    names = ["dense", "sparse", "forced", "sparse+int8", "w8+int8", "fp8"]
    options = ("--lengths", 3000, "--depths", 3, "--score", "logits", "--sparse-threshold", 1000)
    assert run("needle", needle_checkpoint, tmp_path, *options, "--compare", ",".join(names)) == 0
    scores = {name: [one["score"] for one in records(tmp_path / name)] for name in names}
    assert {len(ones) for ones in scores.values()} == {3}
    assert all(scores[name] == [1.0] * 3 for name in names if name != "forced")
    assert scores["forced"][1] == 0.0, "what is neither among the first keys nor the last"


def test_the_report_opens_in_a_browser(needle_checkpoint: Path, tmp_path: Path) -> None:
    from browser import find_browser

    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium on the PATH")
    pytest.importorskip("matplotlib")
    assert run("needle", needle_checkpoint, tmp_path, "--lengths", 512, "--depths", 2) == 0
    page = (tmp_path / "report.html").as_uri()
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--dump-dom",
        page,
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "<h1>needle: needle</h1>" in shown
    assert "<td>needle</td><td>100.0</td>" in shown
