"""Retrieval beyond the trained length on the needle checkpoint: sparse prefill loses nothing that dense finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from needle_documents import Document, DocumentMaker, Encode, Needle, messages, prompt, prompt_head, prompt_tail
from needle_reading import READS_ONCE, Answer, Visits, visited_pairs
from needle_reading import read as read_answers
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
from retrieval import BUDGETS

from paddle_qwen1m import ops
from paddle_qwen1m.config import LOCAL_DIAGONALS, SparseBudgets

TOKENS = 16384
NEEDLES = 16
THRESHOLD = 4096
VISITED_AT_MOST = 0.15
FIRST_SEED = 5
"""The checkpoint's budgets were chosen on documents 0 to 4."""
LONG_COLUMNS = 2500
"""Of every head at 65,536 tokens; the checkpoint's budgets were chosen for `TOKENS`."""
FORCED_ALONE = (31, 100)
"""Vertical and slash size of the negative control: exactly 30 columns would be raised to 130."""


@pytest.fixture(scope="module")
def encode(needle_checkpoint: Path) -> Encode:
    tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint))
    return lambda text: list(tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def config(needle_checkpoint: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((needle_checkpoint / "config.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def engine(needle_checkpoint: Path) -> Callable[..., Any]:
    """engine(**options): the checkpoint's engine, sparse from `THRESHOLD` tokens on unless told otherwise."""

    def make(**options: Any) -> Any:
        options = {"sparse_threshold": THRESHOLD, **READS_ONCE, **options}
        return AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), dtype="float32", **options).engine

    return make


@dataclass(frozen=True)
class Reading:
    """What one engine made of a set of documents."""

    answers: list[Answer]
    document: Visits
    question: Visits

    @property
    def score(self) -> float:
        return sum(one.right for one in self.answers) / len(self.answers)


Read = Callable[..., Reading]


@pytest.fixture(scope="module")
def read(engine: Callable[..., Any], encode: Encode, config: dict[str, Any]) -> Read:
    """read(documents, **options): asks an engine with these options for every needle of every document."""

    def ask(documents: list[Document], **options: Any) -> Reading:
        document, question = Visits(config), Visits(config)
        return Reading(read_answers(engine(**options), documents, encode, document, question), document, question)

    return ask


def budget_file(folder: Path, vertical: int, slash: int, config: dict[str, Any]) -> Path:
    """A budget file that gives every head the same."""
    heads = {str(head): ["vertical_and_slash", vertical, slash, 1.0] for head in range(config["num_attention_heads"])}
    path = folder / f"budgets_{vertical}_{slash}.json"
    path.write_text(json.dumps([heads] * config["num_hidden_layers"]), encoding="utf-8")
    return path


def test_the_chat_template_makes_the_prompt_of_the_training(needle_checkpoint: Path, encode: Encode) -> None:
    document = DocumentMaker(encode).make(1000, 3, seed=0)
    needle = document.needles[2]
    tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint))
    text = tokenizer.apply_chat_template(messages(document, needle), tokenize=False, add_generation_prompt=True)
    assert text == prompt(document, needle)


def test_document_question_and_answer_encode_apart_as_together(encode: Encode) -> None:
    document = DocumentMaker(encode).make(1000, 3, seed=0)
    needle = document.needles[0]
    parts = (prompt_head() + document.text, prompt_tail(needle), needle.sentence)
    assert [token for part in parts for token in encode(part)] == encode("".join(parts))
    assert encode(prompt_head()) + DocumentMaker(encode).ids(document) == encode(parts[0])


@pytest.mark.parametrize("tokens", [1024, 4096])
@pytest.mark.parametrize("seed", [0, 1])
def test_prompt_and_answer_fill_the_length_asked_for(encode: Encode, tokens: int, seed: int) -> None:
    document = DocumentMaker(encode).make(tokens, 4, seed, depth=0.5)
    longest = max(len(encode(prompt(document, needle) + needle.sentence + "<|im_end|>")) for needle in document.needles)
    assert tokens - 24 < longest <= tokens
    place = document.sentences.index(document.needles[0].sentence) / len(document.sentences)
    assert place == pytest.approx(0.5, abs=0.06)


def test_visited_pairs_counts_every_unmasked_cell_once() -> None:
    import paddle

    # one head, one row block: rows 200 to 255 of the second chunk, L = 128
    blocks = np.array([[[0, 100, 180]]], np.int32)
    columns = np.array([[[70, 150, 250]]], np.int32)
    counts = np.array([[[1, 2, 0, 2, 1, 0]]], np.int32)
    tables = oracle.index_tables(oracle.SparseIndex(blocks, columns, counts))
    index = ops.SparseIndex(*map(paddle.to_tensor, tables))
    cells = 0
    for row in range(200, 256):
        succ = set(range(0, 64)) | {key for key in range(100, 164) if key < 128} | {70}
        intra = {key for key in range(180, 244) if key <= row} | {key for key in (150, 250) if key <= row}
        cells += len(succ) + len(intra)
    assert visited_pairs(index, 200, 56, 128) == cells


@pytest.fixture(scope="module", params=[1, pytest.param(13, marks=pytest.mark.soak)], ids=["16 answers", "208 answers"])
def documents(request: pytest.FixtureRequest, encode: Encode) -> Iterator[list[Document]]:
    maker = DocumentMaker(encode)
    yield [maker.make(TOKENS, NEEDLES, FIRST_SEED + number) for number in range(request.param)]


@pytest.fixture(scope="module")
def dense(documents: list[Document], read: Read) -> Reading:
    return read(documents, sparse=False)


def test_sparse_prefill_answers_what_dense_answers(
    documents: list[Document],
    dense: Reading,
    read: Read,
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sparse = read(documents)
    control = read(documents, sparse_budgets=str(budget_file(tmp_path, *FORCED_ALONE, config)))
    with capsys.disabled():
        asked = f"{len(dense.answers)} answers at {TOKENS:,} tokens"
        print(f"\n{asked}: dense {dense.score:.3f}, sparse {sparse.score:.3f}")
        print(f"  document: {sparse.document}; question's rows: {sparse.question}")
        print(f"  forced set alone {control.score:.3f}; document: {control.document}")
    layers = list(range(config["num_hidden_layers"]))
    for visits in (sparse.document, control.document):
        assert sorted(visits.rows) == layers[:-1], "every layer but the last, whose rows nobody asks"
    assert sorted(sparse.question.rows) == layers, "every layer was prefilled sparsely"
    assert all(one.sparse for one in sparse.answers), "every question's rows chose their keys"
    assert not dense.document.rows, "the dense engine never went the sparse way"
    assert dense.score >= 0.9
    assert sparse.score >= dense.score - 0.01
    assert sparse.document.visited <= VISITED_AT_MOST * sparse.document.causal
    assert sparse.question.visited <= VISITED_AT_MOST * sparse.question.causal
    assert control.score < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("documents", [1], indirect=True, ids=["16 answers"])
def test_the_temperature_keeps_answers_that_dual_chunk_attention_alone_loses(
    documents: list[Document], dense: Reading, read: Read, config: dict[str, Any]
) -> None:
    dual_chunk = {**config["dual_chunk_attention_config"], "original_max_position_embeddings": 0}
    without = read(documents, sparse=False, config={**config, "dual_chunk_attention_config": dual_chunk})
    assert dense.score >= 0.8
    assert without.score <= dense.score - 0.2


@pytest.mark.parametrize("file", BUDGETS.values())
def test_budgets_beside_the_checkpoint_are_for_its_shape(
    needle_checkpoint: Path, config: dict[str, Any], file: str
) -> None:
    budgets = SparseBudgets.from_file(
        needle_checkpoint / file, config["num_hidden_layers"], config["num_attention_heads"]
    )
    assert budgets.slash.min() >= LOCAL_DIAGONALS


@pytest.mark.slow
def test_sparse_logits_of_a_64k_prompt_point_where_dense_ones_do(
    engine: Callable[..., Any], encode: Encode, config: dict[str, Any], tmp_path: Path
) -> None:
    """Property 34, with as many columns as 10 % of the pairs of such a prompt leave room for."""
    document = DocumentMaker(encode).make(65536, 4, seed=0, depth=0.5)
    ids = np.asarray(encode(prompt(document, document.needles[0])), np.int64)
    budgets = budget_file(tmp_path, LONG_COLUMNS, LOCAL_DIAGONALS, config)
    dense = engine(sparse=False).logits(ids)[0].astype(np.float64)
    sparse = engine(sparse_budgets=str(budgets)).logits(ids)[0].astype(np.float64)
    assert dense @ sparse / np.linalg.norm(dense) / np.linalg.norm(sparse) > 0.99
    assert dense.argmax() == sparse.argmax()


@pytest.mark.slow
def test_one_answer_of_a_64k_prompt_is_found_sparsely(read: Read, encode: Encode) -> None:
    document = DocumentMaker(encode).make(65536, 4, seed=1, depth=0.5)
    asked = Document(document.sentences, document.needles[:1])
    assert isinstance(asked.needles[0], Needle)
    assert read([asked]).score == 1.0
