"""The trap of 8-bit keys: copies of the needle checkpoint with keys as biases make them, and what caches lose there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import outlying_keys
import pytest
from paddlenlp.transformers import AutoModelForCausalLM

from paddle_qwen1m.evaluate.statistics import Interval
from paddle_qwen1m.streams import InputError

PAIRS, QUESTIONS = 6, 4
SMALL = ["--tokens", "1024", "--biases", "600", "--documents", "1", "--questions", str(QUESTIONS)]
SMALL += ["--sparse-threshold", "512", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user")))
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder."""
    folder = tmp_path_factory.mktemp("out")
    for keys, caches in (("sparse", ["int8"]), ("dense", ["int8", "int8 per token", "no pair scales"])):
        assert outlying_keys.main(["--out", str(folder), *SMALL, "--keys", keys, "--caches", *caches]) == 0
    return folder


@pytest.fixture(scope="module")
def right(out: Path) -> dict[str, float]:
    """Of the dense run, by cache."""
    return {one["cache"]: one["right"] for one in json.loads((out / "table.json").read_text())["right"]}


def logits(checkpoint: Path, prompt: np.ndarray) -> np.ndarray:
    found: np.ndarray = AutoModelForCausalLM.from_pretrained(str(checkpoint), sparse=False).engine.logits(prompt)
    return found


def test_pairs_alone_are_the_same_model(needle_checkpoint: Path, tmp_path: Path) -> None:
    """Logits of a rewritten copy without biases, to the last bits of float32."""
    assert outlying_keys.main(["--write", str(tmp_path), "--bias", "0"]) == 0
    prompt = np.random.default_rng(0).integers(0, 700, 900)
    original, copy = (logits(one, prompt) for one in (needle_checkpoint, tmp_path))
    np.testing.assert_allclose(copy, original, rtol=0, atol=1e-4 * np.abs(original).max())
    assert any(path.read_bytes() != (needle_checkpoint / path.name).read_bytes() for path in tmp_path.glob("*.safet*"))


def test_int8_keeps_answers_that_rounding_keys_as_they_are_loses(right: dict[str, float]) -> None:
    assert right["int8"] >= right["bfloat16"] - 1 / QUESTIONS and right["int8"] >= 0.75
    for control in ("int8 per token", "no pair scales"):
        assert right[control] <= right["int8"] - 0.3, control


def test_sparse_prefill_keeps_them_too(out: Path) -> None:
    folder = out / f"bias 600, {PAIRS} pairs" / "1024 sparse"
    kept, exact = (
        [json.loads(line)["score"] for line in (folder / cache / "journal.jsonl").read_text().splitlines()]
        for cache in ("int8", "bfloat16")
    )
    assert len(kept) == QUESTIONS and sum(kept) >= max(3, sum(exact) - 1)


def test_a_run_goes_on_from_what_was_answered(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked where all is answered; other questions are refused."""
    monkeypatch.setattr(outlying_keys.Engine, "logits", lambda *_: pytest.fail("it is asked again"))
    assert outlying_keys.main(["--out", str(out), *SMALL, "--keys", "dense", "sparse", "--caches", "int8"]) == 0
    assert "bias 600: int8 moves a layer's output by up to " in capsys.readouterr().out
    losses = json.loads((out / "table.json").read_text())["losses"]
    assert [(row["tokens"], row["keys"], row["answers"]) for row in losses] == [
        (None, None, 2 * QUESTIONS),
        (1024, "dense", QUESTIONS),
        (1024, "sparse", QUESTIONS),
    ]
    more = [*SMALL, "--keys", "dense", "--caches", "int8"]
    more[more.index(str(QUESTIONS))] = "5"
    with pytest.raises(InputError, match="questions was 4 and is 5"):
        outlying_keys.main(["--out", str(out), *more])


def cells(losses: dict[str, list[float]]) -> dict[outlying_keys.Key, outlying_keys.Cell]:
    """Of two copies and two lengths, where a cache loses these answers of each document's four."""
    made = {}
    for bias in (150.0, 600.0):
        for tokens in (100, 200):
            documents: list[tuple[Any, ...]] = [("needle", tokens, n) for n in range(10) for _ in range(4)]
            for cache, lost in losses.items():
                one = [1.0 - (n < share) for share in lost for n in range(4)]
                made[bias, tokens, "dense", cache] = outlying_keys.Cell(one, documents)
    return made


def test_losses_are_paired_told_by_cell_and_in_all_and_beside_every_reference() -> None:
    lost = {
        "bfloat16": [1.0] * 10,
        "float32": [0.0] * 10,
        "int8": [1.0] * 9 + [2.0],
        "no centre": [2.0] * 5 + [3.0] * 5,
    }
    rows = list(outlying_keys.rows(cells(lost)))
    found = {(row.cache, row.reference, row.bias, row.tokens): row for row in rows}
    assert len(found) == len(rows) == 5 * (1 + 2 + 4)
    whole = found["int8", "bfloat16", None, None]
    assert (whole.answers, whole.right, whole.reference_right) == (160, pytest.approx(0.725), pytest.approx(0.75))
    assert whole.loss.mean == pytest.approx(2.5) and 0 <= whole.loss.low < 2.5 < whole.loss.high < 10
    assert found["int8", "float32", 150.0, None].loss.mean == pytest.approx(27.5)
    assert found["no centre", "int8", 600.0, 200].loss.mean == pytest.approx(35)
    assert (
        found["no centre", "bfloat16", 600.0, 200]
        .line()
        .startswith("| no centre | bfloat16 | 600 | 200 | dense | 40 |")
    )


def test_a_loss_of_too_few_documents_has_no_interval() -> None:
    row = outlying_keys.Row(
        "int8", "bfloat16", 600.0, None, None, 4, 0.5, 1.0, Interval(50.0, float("nan"), float("nan"))
    )
    assert row.line() == "| int8 | bfloat16 | 600 | all | all | 4 | 0.500 | 1.000 | 50.00 |"
    assert json.loads(json.dumps(row.as_json()))["loss"] == {"mean": 50.0, "low": None, "high": None}
