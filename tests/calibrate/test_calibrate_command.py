"""`paddle-qwen1m calibrate` on the needle checkpoint: what it writes, interrupted, and misused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from paddle_qwen1m import cli, progress
from paddle_qwen1m.calibrate import results
from paddle_qwen1m.calibrate.reading import Layer
from paddle_qwen1m.config import SparseBudgets

TOKENS = 1600


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The river bends past the old mill. The access code for jade is 64931. " * 80, encoding="utf-8")
    return path


def run(model: Path, out: Path, text: Path, *more: object) -> int:
    options = ("--sparse-threshold", 1000, "--tokens", TOKENS)
    return cli.main(["calibrate", str(model), "--text", str(text), "--out", str(out), *map(str, (*options, *more))])


@pytest.mark.parametrize("strategy", ["least", "published", "output"])
def test_budgets_are_written_with_their_report(
    needle_checkpoint: Path,
    tmp_path: Path,
    text: Path,
    strategy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    out = tmp_path / "sparse_attention_config.json"
    assert run(needle_checkpoint, out, text, "--strategy", strategy) == 0
    budgets = SparseBudgets.from_file(out, 4, 4)
    report = json.loads((tmp_path / f"{out.name}.report.json").read_text(encoding="utf-8"))
    assert report["texts"][0]["tokens"] == TOKENS
    for number, layer in enumerate(report["layers"]):
        for head in range(4):
            recall = min(layer["after"]["mean"][head], layer["after"]["last"][head])
            entry = json.loads(out.read_text(encoding="utf-8"))[number][str(head)]
            assert entry == ["vertical_and_slash", layer["columns"][head], layer["diagonals"][head], entry[3]]
            if strategy in ("least", "output"):
                assert entry[3] == recall
            assert budgets.slash[number, head] == entry[2]
    table = (tmp_path / f"{out.name}.report.md").read_text(encoding="utf-8")
    assert "| 3.3 |" in table
    told = capsys.readouterr()
    assert "| all |" in told.out and re.search(r", layer \d, \d+ pairs measured\n", told.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        out.name, f"{out.name}.report.json", f"{out.name}.report.md",
    ]  # fmt: skip


def test_an_interrupted_run_goes_on_behind_its_last_layer(
    needle_checkpoint: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    options = ("--strategy", "published")
    assert run(needle_checkpoint, whole, text, *options) == 0
    advance, advanced = Layer.advance, []

    def interrupted(layer: Layer):  # type: ignore[no-untyped-def]
        advanced.append(1)
        if len(advanced) == 3:
            raise KeyboardInterrupt
        return advance(layer)

    monkeypatch.setattr(Layer, "advance", interrupted)
    assert run(needle_checkpoint, cut, text, *options) == 130
    assert not cut.exists()
    assert run(needle_checkpoint, cut, text, *options) == 0
    assert len(advanced) == 3 + 2, "the first two layers are not read again"
    assert cut.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")


def test_a_run_with_other_options_does_not_go_on(
    needle_checkpoint: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupted(_layer: Layer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Layer, "advance", interrupted)
    out = tmp_path / "budgets.json"
    assert run(needle_checkpoint, out, text, "--strategy", "published") == 130
    assert run(needle_checkpoint, out, text, "--strategy", "published", "--recall", 0.8) == 2
    assert "a run with other options (recall was 0.9 and is 0.8): give the same ones" in capsys.readouterr().err
    (tmp_path / f"{out.name}{results.PROGRESS_SUFFIX}" / results.GIVEN).write_text("[", encoding="utf-8")
    assert run(needle_checkpoint, out, text, "--strategy", "published") == 2
    assert "is not what a run has left there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tokens", "1000"], "1,000 tokens of"),
        (["--tokens", "1M"], "tokens, fewer than --tokens 1,048,576"),
        (["--recall", "90"], "--recall must be above 0 and at most 1, got 90"),
        (["--sparse-budgets", "nowhere.json"], "nowhere.json"),
        (["--text", "nowhere.txt"], "--text: cannot read nowhere.txt"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(
    options: list[str], reason: str, needle_checkpoint: Path, tmp_path: Path, text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(needle_checkpoint, tmp_path / "budgets.json", text, *options) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_not_overwritten(
    needle_checkpoint: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "budgets.json"
    out.write_text("mine", encoding="utf-8")
    assert run(needle_checkpoint, out, text) == 2
    assert "is there already: move it away, or give another name" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "mine"
