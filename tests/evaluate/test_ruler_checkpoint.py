"""The second small checkpoint: what it is trained on; its training runs, goes on and writes what can be loaded."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ruler_documents
from ruler_documents import (
    ANSWER_WEIGHT,
    FIRST_WEIGHTS,
    KINDS,
    LEVELS,
    NO_ANSWER,
    NO_CHOICE,
    TEXT_WEIGHT,
    Batch,
    Documents,
)
from small_checkpoint import END_OF_TURN, ChatTokenizer, Shape, write_configuration
from tokenizers import Tokenizer

from paddle_qwen1m.evaluate import ruler
from paddle_qwen1m.evaluate.samples import Prompter

ROOT = Path(__file__).parents[2]
LAST = [LEVELS - 1] * len(KINDS)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return ruler_documents.ruler_tokenizer(1536)


@pytest.fixture(scope="module")
def easy(trained: Tokenizer) -> Batch:
    return Documents(trained, 8192).batch(0, 0, [0] * len(KINDS))


@pytest.fixture(scope="module")
def whole(trained: Tokenizer) -> Batch:
    documents = Documents(trained, 32768)
    batches = (documents.batch(0, step, LAST) for step in range(40))
    return next(batch for batch in batches if batch.ids.shape[1] == 4096 and len(set(batch.kinds)) == len(KINDS))


def conversations(batch: Batch, trained: Tokenizer) -> list[tuple[str, str, str]]:
    """Of each answer its kind, the text before it and the answer."""
    found = []
    for number, kind in enumerate(batch.kinds):
        rows, places = np.nonzero(batch.answers == number)
        assert len(set(rows.tolist())) == 1 and np.ptp(places) == len(places) - 1, "an answer is in one piece"
        ids = batch.ids[rows[0]].tolist()
        before, answer = ids[: places[0]], ids[places[0] : places[-1] + 1]
        assert ids[places[-1] + 1] == trained.token_to_id(END_OF_TURN)
        found.append((KINDS[kind], trained.decode(before, skip_special_tokens=False), trained.decode(answer)))
    return found


@pytest.mark.parametrize("level", ["easy", "whole"])
def test_answers_are_what_a_careful_reader_finds(
    level: str, trained: Tokenizer, request: pytest.FixtureRequest
) -> None:
    asked = conversations(request.getfixturevalue(level), trained)
    assert {kind for kind, _, _ in asked} == set(KINDS)
    for kind, before, answer in asked:
        question = before.rpartition("<|im_start|>user\n")[2].rpartition("\n\n\n")[2]  # behind the example
        if kind == "needles":
            key = re.search(r"secret (?:number|uuid) of (\S+) is$", before)
            assert key is not None
            assert answer == f" {dict(ruler_documents.FACT.findall(before))[key[1]]}."
        elif kind == "variables":
            values: dict[str, str] = {}
            for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", question, re.MULTILINE):
                values[name] = values.get(source, source)
            wanted = re.search(r"have the value (\d{5}) at", question)
            assert wanted is not None
            assert answer == f" {', '.join(name for name, value in values.items() if value == wanted[1])}"
        else:
            counts = Counter(re.findall(r"\d+\. (\S+)", question)).most_common()
            often = {word for word, count in counts if count == counts[0][1]}
            assert set(answer.strip().split(", ")) == often


def test_a_level_says_how_long_documents_are_and_how_much_they_hide(
    easy: Batch, whole: Batch, trained: Tokenizer
) -> None:
    assert easy.ids.shape[1] == 512
    most = {
        kind: Counter(answer.count(",") for one, _, answer in conversations(easy, trained) if one == kind)
        for kind in KINDS
    }
    assert max(most["variables"]) == 1 and max(most["words"]) == 2
    asked = conversations(whole, trained)
    assert max(answer.count(",") for kind, _, answer in asked if kind == "variables") == 4
    assert max(answer.count(",") for kind, _, answer in asked if kind == "words") == 9
    filled = (whole.weights > 0).sum(1)
    assert filled.max() > 0.95 * 4096


def test_a_few_documents_of_each_level_have_one_or_two_needles(trained: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for level in range(LEVELS):
        few = [ruler_documents._task(rng, "needles", level)[1] for _ in range(1000)]
        assert 0.25 < np.mean(few) < 0.35


def test_a_batch_is_the_same_each_time(trained: Tokenizer) -> None:
    def ids(seed: int, step: int) -> np.ndarray:
        return Documents(trained, 2048).batch(seed, step, [1, 1, 0]).ids

    assert (ids(1, 2) == ids(1, 2)).all()
    for other in (ids(1, 3), ids(2, 2)):
        assert other.shape != ids(1, 2).shape or (other != ids(1, 2)).any()


def test_answers_weigh_most_and_padding_nothing(easy: Batch) -> None:
    part = easy.answers != NO_ANSWER
    assert (easy.weights[part] >= np.float32(ANSWER_WEIGHT)).all()
    for number, kind in enumerate(easy.kinds):
        weights = easy.weights[easy.answers == number]
        first = FIRST_WEIGHTS if KINDS[kind] == "needles" else ()
        assert weights[: len(first)].tolist() == list(first)
        assert (weights[len(first) :] == np.float32(ANSWER_WEIGHT)).all()
    assert set(np.unique(easy.weights[~part])) == {np.float32(0), np.float32(TEXT_WEIGHT)}
    assert (easy.weights[:, 0] == 0).all(), "nothing comes before the first token"


def test_common_words_may_come_in_any_order(whole: Batch, trained: Tokenizer) -> None:
    """Where a word begins, each that is still to come is right."""
    for number in np.flatnonzero(whole.kinds == KINDS.index("words")):
        rows, places = np.nonzero(whole.answers == number)
        words = trained.decode(whole.ids[rows[0], places].tolist()).strip().split(", ")
        here = [one for one in whole.choices if one[0] == rows[0] and places[0] <= one[1] <= places[-1]]
        assert len(here) == len(words)
        for place, (_, at, *right) in enumerate(here):
            said = {trained.decode([token]).strip() for token in right if token != NO_CHOICE}
            assert said == {word.split("-")[0] for word in words[place:]}
            assert whole.ids[rows[0], at] == right[0]


def test_every_variable_takes_as_many_tokens(trained: Tokenizer, rng: np.random.Generator) -> None:
    for _ in range(200):
        name = "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 5))
        assert len(trained.encode(f" {name}").ids) == 5


def test_the_loss_is_that_of_all_right_tokens_together() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch, which trains it, is not installed")
    import train_ruler

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, 8)).astype(np.float32)
    ids = rng.integers(8, size=(2, 6))
    weights = rng.random((2, 6)).astype(np.float32)
    answers = np.full((2, 6), NO_ANSWER)
    answers[0, 2:4], answers[1, 5] = 0, 1
    choices = np.full((1, 2 + ruler_documents.MOST_CHOICES), NO_CHOICE)
    choices[0, :4] = 1, 5, ids[1, 5], (ids[1, 5] + 1) % 8
    logits[1, 4, choices[0, 3]] = 9.0
    logits[0, 1, ids[0, 2]], logits[0, 2, (ids[0, 3] + 1) % 8] = 9.0, 9.0
    arrays = {"ids": ids, "weights": weights, "answers": answers, "kinds": np.array([0, 2]), "choices": choices}
    batch = {name: torch.tensor(value) for name, value in arrays.items()}
    loss, shares, tokens = train_ruler.loss_and_right(torch.tensor(logits), batch)
    chances = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    of_targets = np.take_along_axis(chances[:, :-1], ids[:, 1:, None], -1)[..., 0]
    of_targets[1, 4] = chances[1, 4, choices[0, 2:4]].sum()
    expected = -(np.log(of_targets) * weights[:, 1:]).sum() / weights[:, 1:].sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (shares.tolist(), tokens.tolist()) == ([0.5, 1.0], [2.0, 1.0])


def test_prompts_are_those_of_eval_on_the_files_that_are_written(trained: Tokenizer, tmp_path: Path) -> None:
    from paddle_qwen1m.paddlenlp import serving

    shape = Shape(1536, 512, 768, 5, 4, 2, 1e5, 4096, 1024)
    write_configuration(tmp_path, shape, trained, (1000, 400))
    here, there = Prompter(ChatTokenizer(trained)), Prompter(serving.load_tokenizer(str(tmp_path), {}))
    for task in ruler_documents.MEASURED:
        (question,) = ruler.make(task, 4096, 0, here).questions
        assert (question,) == ruler.make(task, 4096, 0, there).questions
        assert here.ids(question) == there.ids(question)


@pytest.mark.slow
def test_training_goes_on_and_writes_what_the_package_loads(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch, which trains it, is not installed")
    import train_ruler
    from oracle.model import OracleModel

    def run(steps: int) -> str:
        options = ["--steps", str(steps), "--tokens", "512", "--length", "512", "--workers", "0", "--documents", "1"]
        command = [sys.executable, str(ROOT / "tools" / "train_ruler.py"), "--output", str(tmp_path), *options]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert "step 1, " in run(1)
    told = run(2)
    assert "goes on from step 1, " in told and "step 2, " in told
    assert re.search(r"\| task \| 512 \|\n\| --- \| --- \|\n\| niah_single_1 \| 0\.0 \|", told)
    weights = list(tmp_path.glob("*.safetensors"))
    assert 10_000_000 < sum(file.stat().st_size for file in weights) < 24_000_000
    shape = replace(train_ruler.SHAPE, trained_length=512, local_size=128)
    training = train_ruler.Training(train_ruler.Qwen2(shape), torch.device("cpu"))
    training.restore(tmp_path / train_ruler.STATE)
    model = training.model.to(torch.bfloat16).float()
    ids = np.random.default_rng(0).integers(1536, size=200)
    with torch.no_grad():
        found = model(torch.tensor(ids[None]))[0].numpy()
    chunks = {"chunk_size": 512, "local_size": 128, "original_max_position_embeddings": 512}
    np.testing.assert_allclose(found, OracleModel(tmp_path, chunks).logits(ids.tolist()), atol=1e-3)
    training.model.shape = train_ruler.SHAPE
    with pytest.raises(ValueError, match="is of a model of another shape"):
        training.restore(tmp_path / train_ruler.STATE)
