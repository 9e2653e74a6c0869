"""tools/truth.py on both small checkpoints: what its table holds, and that a run goes on from its answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import truth

pytestmark = pytest.mark.slow

ROUNDS, ANSWERS = 2, 3
CHOICES = [truth.DENSE, truth.CALIBRATED, truth.FORCED]
SMALL = [
    "--needle", "1500", "--ruler", "1400", "--sparse-threshold", "1000", "--rounds", str(ROUNDS), "--answers",
    str(ANSWERS), "--texts", "1", "--tasks", "niah_single_1", "niah_multikey_3", "--cost", "0.4", "--choices", *CHOICES,
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    assert truth.main(["--out", str(folder), *SMALL]) == 0
    return folder


def test_every_choice_is_asked_the_same_of_both_checkpoints(out: Path) -> None:
    state = json.loads((out / "truth.json").read_text(encoding="utf-8"))
    assert set(state["answers"]) == {"needle, 1,500 tokens", "ruler, 1,400 tokens"}
    for of_cell in state["answers"].values():
        assert set(of_cell) == set(CHOICES)
        for rounds in of_cell.values():
            assert list(rounds) == ["0", "1"] and all(len(right) == ANSWERS for right in rounds.values())
    right = {
        choice: sum(sum(right) for of_cell in state["answers"].values() for right in of_cell[choice].values())
        for choice in CHOICES
    }
    of_all = 2 * ROUNDS * ANSWERS
    assert right[truth.DENSE] >= 0.8 * of_all and right[truth.CALIBRATED] >= 0.7 * of_all
    assert right[truth.FORCED] <= 0.4 * of_all, "the control finds little"
    for visited in state["visited"].values():
        shares = {choice: float(share.rstrip("%")) for choice, share in visited.items() if share != "all"}
        assert set(shares) == {truth.CALIBRATED, truth.FORCED}
        assert 0 < shares[truth.FORCED] < shares[truth.CALIBRATED] < 100


def test_the_table_has_a_row_a_cell_and_those_of_several(out: Path) -> None:
    lines = (out / "truth.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[:2] for row in rows[1:3]] == [["needle, 1,500 tokens", "6"], ["ruler, 1,400 tokens", "6"]]
    strong = sum(float(row[2]) >= 90 for row in rows[1:3])
    together = [[truth.WHERE_STRONG, str(6 * strong)]] if strong else []
    assert [row[:2] for row in rows[3:]] == [*together, ["all", "12"]]
    assert all(len(row) == 3 + 3 * 2 for row in rows)


def test_budgets_are_found_on_a_text_of_each_task(out: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(out.glob("text_ruler_1400_*.txt"))]
    uuids = [len(re.findall(r"[0-9a-f]{8}-[0-9a-f]{4}-", text)) for text in texts]
    assert uuids[0] == 0 and uuids[1] > 2 and len(texts) == 2
    budgets = [out / f"budgets_{name}.json" for name in ("needle_1500", "ruler_1400")]
    assert [len(json.loads(path.read_text(encoding="utf-8"))) for path in budgets] == [4, 5]
    said = (out / "truth.md").read_text(encoding="utf-8").splitlines()
    commands = [line.split() for line in said if line.startswith("    paddle-qwen1m calibrate ")]
    assert [command[command.index("--out") + 1] for command in commands] == list(map(str, budgets))
    assert [len(command) - command.index("--text") - 1 for command in commands] == [1, 2]
    assert all(Path(file).exists() for command in commands for file in command[command.index("--text") + 1 :])


def test_a_run_goes_on_from_its_answers(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(truth.Subject, "read", lambda *_: pytest.fail("it is asked again"))
    assert truth.main(["--out", str(out), *SMALL]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| all | 12 |")


def test_a_run_with_other_options_does_not_go_on(out: Path) -> None:
    with pytest.raises(SystemExit, match="give another --out"):
        truth.main(["--out", str(out), *SMALL, "--cost", "0.3"])
