"""A model whose linears have 8 bits, through from_pretrained, LLM and the commands: what it loses, what it says."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
from needle_documents import END_OF_TURN, DocumentMaker, is_answer, prompt
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

from paddle_qwen1m import LLM, SamplingParams, ops
from paddle_qwen1m.cli import main
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.paddlenlp import loading
from paddle_qwen1m.plan import widened_weight_bytes

each_kind = pytest.mark.parametrize("kind", ["int8", "fp8"])
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
LARGEST_KL = 0.01
"""Mean over tokens, of the logits of 8-bit weights to those of bfloat16."""


@pytest.fixture(scope="module")
def load(needle_checkpoint: Path) -> Callable[..., Any]:
    return lambda **options: AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), **options)


@pytest.fixture(scope="module")
def texts(needle_checkpoint: Path) -> Iterator[list[np.ndarray]]:
    """Ids of documents with questions and answers, as the checkpoint was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint))
    maker = DocumentMaker(lambda text: list(tokenizer(text)["input_ids"]))
    documents = [maker.make(600, 3, seed) for seed in range(2)]
    yield [
        np.asarray(tokenizer(f"{prompt(document, needle)}{needle.sentence}{END_OF_TURN}")["input_ids"], np.int64)
        for document in documents
        for needle in document.needles[:2]
    ]


@pytest.fixture(scope="module")
def exact(load: Callable[..., Any], texts: list[np.ndarray]) -> np.ndarray:
    return log_probabilities(load(), texts)


def log_probabilities(model: Any, texts: list[np.ndarray]) -> np.ndarray:
    """Of every token of the vocabulary behind every token, float64 [tokens, vocab]."""
    logits = np.concatenate([model.engine.logits(ids, range(len(ids))) for ids in texts])
    return oracle.log_softmax(logits.astype(np.float64))


def test_what_many_rows_widen_is_there_for_one_product_or_the_mlp(
    load: Callable[..., Any], texts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, in several lanes, of which each has one copy: never more than the plan counts, none in attention."""
    model, held, attended = load(quantization="int8"), list[int](), list[int]()

    def widened_bytes() -> int:
        kept = [one._widened for one in gc.get_objects() if isinstance(one, ops.WidenedOnce)]
        return sum(2 * copy.size for copy in kept if copy is not None)

    def note(name: str, noted: list[int]) -> None:
        op = getattr(ops, name)

        def noting(*given: Any, **options: Any) -> Any:
            found = op(*given, **options)
            noted.append(widened_bytes())
            return found

        monkeypatch.setattr(ops, name, noting)

    expected = load(quantization="int8").engine.logits(texts[0])
    monkeypatch.setattr("paddle_qwen1m.ops.step.reads_bytes", lambda _rows: False)
    monkeypatch.setattr("paddle_qwen1m.model.LANE_ROWS", len(texts[0]) // 3)
    for name, noted in (("linear", held), ("gated_linear", held), ("dca_prefill", attended)):
        note(name, noted)
    logits = model.engine.logits(texts[0])
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
    assert max(held) == widened_weight_bytes(model.model.config, "int8", "float16") > 0
    assert attended and max(attended) == 0


@each_kind
def test_logits_stay_near_those_of_bfloat16(
    load: Callable[..., Any], texts: list[np.ndarray], exact: np.ndarray, kind: str
) -> None:
    """Mean KL divergence over all tokens of the texts, and the likeliest token of nearly all of them."""
    found = log_probabilities(load(quantization=kind), texts)
    divergence = (np.exp(exact) * (exact - found)).sum(-1)
    assert 0 < divergence.mean() < LARGEST_KL
    assert (found.argmax(-1) == exact.argmax(-1)).mean() > 0.99


def test_logits_stay_near_those_of_bfloat16_where_rows_are_in_fp8_too(
    load: Callable[..., Any], texts: list[np.ndarray], exact: np.ndarray
) -> None:
    """As Hopper multiplies many rows: a CPU does the same arithmetic where it is told to."""
    model = load(quantization="fp8")
    for layer in model.model.layers:
        layer.in_fp8 = True
    found = log_probabilities(model, texts)
    assert np.abs(found - log_probabilities(load(quantization="fp8"), texts)).max() > 1e-3
    divergence = (np.exp(exact) * (exact - found)).sum(-1)
    assert divergence.mean() < LARGEST_KL
    assert (found.argmax(-1) == exact.argmax(-1)).mean() > 0.99


@each_kind
def test_answers_are_found(needle_checkpoint: Path, kind: str) -> None:
    """By LLM, which decodes what is asked of documents with needles, several at once."""
    with LLM(needle_checkpoint, quantization=kind, max_model_len=2048, kv_cache_memory_bytes=200_000_000) as llm:
        tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint))
        document = DocumentMaker(lambda text: list(tokenizer(text)["input_ids"])).make(1500, 4, seed=7)
        prompts = [prompt(document, needle) for needle in document.needles]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for needle, output in zip(document.needles, outputs):
        assert is_answer(output.outputs[0].text, needle)


def test_the_engine_keeps_to_what_was_loaded(load: Callable[..., Any]) -> None:
    """Neither is a prefix of other weights its own, nor can options change what is there."""
    model = load(quantization="fp8", prefix_store=None)
    assert model.engine.options.quantization == model.model.quantization == "fp8"
    with pytest.raises(ValueError, match="weights, which are kept as fp8, got None: it is chosen when they are loaded"):
        model.engine.configure(EngineOptions())


def test_prefixes_are_named_by_how_weights_are_kept(load: Callable[..., Any], tmp_path: Path) -> None:
    """What one wrote into a store the other does not find."""
    ids = [np.arange(40, 640)]
    for number, kind in enumerate(("int8", "int8", None)):
        model = load(
            quantization=kind,
            prefix_store=str(tmp_path / "store"),
            prefix_store_min_tokens=64,
            max_num_batched_tokens=64,
        )
        found: list[Any] = []
        model.engine.generate(
            ids, GREEDY, on_prefill=lambda progress, found=found: found.append(progress.restored_tokens)
        )
        model.release_cache()
        assert (max(found) > 0) == (number == 1), kind


@each_kind
def test_a_converted_checkpoint_is_what_rounding_at_load_gives(
    load: Callable[..., Any], needle_checkpoint: Path, texts: list[np.ndarray], tmp_path: Path, kind: str
) -> None:
    """Without an option, and refused with another one."""
    command = ["convert", str(needle_checkpoint), str(tmp_path / "model"), "--format", "huggingface"]
    assert main([*command, "--quantization", kind]) == 0
    stored = AutoModelForCausalLM.from_pretrained(str(tmp_path / "model"))
    assert stored.model.quantization == kind
    ids = texts[0][:300]
    np.testing.assert_array_equal(stored.engine.logits(ids), load(quantization=kind).engine.logits(ids))
    other = {"int8": "fp8", "fp8": "int8"}[kind]
    with pytest.raises(ValueError, match=rf"holds weights in {kind}, got quantization={other!r}"):
        LLM(tmp_path / "model", quantization=other)
    assert main(["check", str(tmp_path / "model")]) == 0


@pytest.mark.parametrize("value", ["awq", "gptq", "compressed-tensors", "bitsandbytes", "fp4", 8])
def test_other_formats_are_refused_by_name(needle_checkpoint: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"quantization must be fp8 or int8, got {value!r}.*others quantised"):
        LLM(needle_checkpoint, quantization=value)


def test_the_command_answers_and_plans(needle_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, made = str(needle_checkpoint), []
    assert main(["generate", "--model", name, "--prompt", "a b", "--raw", "--quantization", "fp8", "--greedy"]) == 0
    for more in ([], ["--quantization", "fp8"], ["--quantization", "int8"]):
        capsys.readouterr()
        assert main(["plan", "--model", "14B", "--gpu", "H200", "--max-model-len", "100000", "--json", *more]) == 0
        made.append(json.loads(capsys.readouterr().out))
    assert [one["quantization"] for one in made] == [None, "fp8", "int8"]
    assert made[0]["weights"] == 29_540_067_328
    assert made[1]["weights"] < made[2]["weights"] < 0.6 * made[0]["weights"]
    assert made[1]["workspace"] - made[0]["workspace"] == 3 * 2 * 13_824 * 5_120
    assert main(["check", name, "--quantization", "int8"]) == 0


@pytest.mark.parametrize(
    ("kind", "in_fp8", "words"),
    [
        ("fp8", True, "kept in fp8; many rows are multiplied in FP8"),
        ("fp8", False, "kept in fp8; widened to bfloat16 as they are multiplied"),
        ("int8", False, "kept in int8; widened to bfloat16 as they are multiplied"),
        (None, False, ""),
    ],
)
def test_the_log_says_how_rows_are_multiplied(
    kind: str | None, in_fp8: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(loading.logger, "info", lines.append)
    loading.tell_weights(SimpleNamespace(quantization=kind, in_fp8=in_fp8, compute_dtype="bfloat16"))
    assert len(lines) == (kind is not None) and words in "".join(lines)
