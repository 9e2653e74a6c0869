"""The model against others: Hugging Face transformers within the trained length, a float64 pairwise oracle beyond it.

tests/data/reference is made by tools/make_reference_checkpoints.py, tests/data/needle_oracle by transformers from the
checkpoint of the demo.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
import safetensors.numpy
from oracle.model import OracleModel
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

import paddle_qwen1m  # noqa: F401  registers the model
from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

DATA = Path(__file__).parent / "data"
REFERENCES = sorted(path.parent for path in (DATA / "reference").glob("*/config.json"))
TOLERANCE = 2e-4
WHOLE_PROMPT = 1 << 20


def load(directory, **options):
    model = AutoModelForCausalLM.from_pretrained(str(directory), **options)
    assert type(model) is Qwen2OneMForCausalLM
    return model


def logits(model, ids, positions):
    got = model(paddle.to_tensor(np.asarray(ids, np.int64)[None]), positions=[int(p) for p in positions])
    return got.numpy()[0]


def greedy(model, ids, count, **options):
    ids = paddle.to_tensor(np.asarray(ids, np.int64)[None])
    options = {"do_sample": False, "eos_token_id": [], "trunc_input": True, **options}
    new, _ = model.generate(ids, max_new_tokens=count, **options)
    return new.numpy()[0].tolist()


def with_dual_chunk(directory, target, dual_chunk):
    """A copy of the checkpoint that differs in its dual_chunk_attention_config alone."""
    shutil.copytree(directory, target)
    config = json.loads((directory / "config.json").read_text())
    config["dual_chunk_attention_config"] = dual_chunk
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module", params=REFERENCES, ids=lambda path: path.name)
def reference(request):
    return request.param, dict(np.load(request.param / "reference.npz"))


def test_the_references_cover_the_shapes_that_matter():
    configs = [json.loads((path / "config.json").read_text()) for path in REFERENCES]
    for path, config in zip(REFERENCES, configs):
        dual_chunk = config["dual_chunk_attention_config"]
        tokens = len(np.load(path / "reference.npz")["input_ids"])
        assert dual_chunk["chunk_size"] - dual_chunk["local_size"] < tokens < dual_chunk["chunk_size"]
    assert {c["num_attention_heads"] // c["num_key_value_heads"] for c in configs} >= {1, 2, 5, 7}
    assert {c["tie_word_embeddings"] for c in configs} == {True, False}
    assert {c.get("head_dim", c["hidden_size"] // c["num_attention_heads"]) for c in configs} == {64, 128}
    assert {c["torch_dtype"] for c in configs} == {"float32", "float16", "bfloat16"}
    assert any(c["num_key_value_heads"] == 1 for c in configs)
    assert any((path / "model.safetensors.index.json").exists() for path in REFERENCES)


def test_logits_equal_those_of_transformers(reference):
    directory, expected = reference
    got = logits(load(directory), expected["input_ids"], expected["positions"])
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["group1_tied_f32", "group2_sharded_bf16", "one_kv_head_d128_f32"])
def test_the_oracle_model_equals_transformers(name):
    directory = DATA / "reference" / name
    expected = np.load(directory / "reference.npz")
    got = OracleModel(directory).logits(expected["input_ids"])[expected["positions"]]
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=TOLERANCE / 2)


def test_greedy_continuations_equal_those_of_transformers(reference):
    directory, expected = reference
    model, count = load(directory), len(expected["greedy_ids"])
    assert greedy(model, expected["input_ids"], count) == expected["greedy_ids"].tolist()
    penalised = greedy(model, expected["input_ids"], count, repetition_penalty=1.3)
    assert penalised == expected["penalised_ids"].tolist()


def test_weights_widened_at_load_give_the_same_logits():
    directory = DATA / "reference" / "group7_bf16"
    expected = np.load(directory / "reference.npz")
    got = logits(load(directory, dtype="float32"), expected["input_ids"], expected["positions"])
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=TOLERANCE)


def test_a_tied_checkpoint_that_also_holds_lm_head_is_loaded(tmp_path):
    source = DATA / "reference" / "group1_tied_f32"
    expected = np.load(source / "reference.npz")
    shutil.copy(source / "config.json", tmp_path)
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    got = logits(load(tmp_path), expected["input_ids"], expected["positions"])
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("original_length", [4096, 64], ids=["m=1", "m>1"])
@pytest.mark.parametrize("chunk_size, local_size", [(80, 16), (127, 63)])
@pytest.mark.parametrize("tokens", [64, 65, 128, 170, 250, 317])
def test_logits_beyond_the_trained_length_equal_the_pairwise_oracle(
    tmp_path, tokens, chunk_size, local_size, original_length
):
    """L = 64 both times: 1 to 5 DCA chunks, ending before, on and after their boundaries."""
    dual_chunk = {
        "chunk_size": chunk_size,
        "local_size": local_size,
        "original_max_position_embeddings": original_length,
    }
    directory = with_dual_chunk(DATA / "reference" / "one_kv_head_d128_f32", tmp_path / "checkpoint", dual_chunk)
    ids = np.random.default_rng(tokens).integers(0, 100, tokens)
    got = logits(load(directory), ids, range(tokens))
    np.testing.assert_allclose(got, OracleModel(directory).logits(ids), rtol=0, atol=TOLERANCE)


def test_grouped_heads_beyond_the_trained_length_in_prefill_chunks(tmp_path):
    dual_chunk = {"chunk_size": 80, "local_size": 16, "original_max_position_embeddings": 64}
    directory = with_dual_chunk(DATA / "reference" / "group7_bf16", tmp_path / "checkpoint", dual_chunk)
    ids = np.random.default_rng(0).integers(0, 127, 317)
    got = logits(load(directory, max_num_batched_tokens=100), ids, range(317))
    np.testing.assert_allclose(got, OracleModel(directory).logits(ids), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def needle_oracle():
    text = json.loads((DATA / "needle_oracle" / "oracle.json").read_text())["text"]
    return text, dict(np.load(DATA / "needle_oracle" / "oracle.npz"))


def test_the_needle_checkpoint_equals_exact_logits(needle_checkpoint, needle_oracle):
    """Row 2 of oracle.npz is itself 1.8e-3 off, by its float32 rotary angles at positions that L = 768 never uses."""
    _, expected = needle_oracle
    model, count = load(needle_checkpoint), len(expected["input_ids"])
    got = logits(model, expected["input_ids"], range(count - 8, count))
    exact = np.load(DATA / "needle_oracle" / "exact.npz")["logits_last8"]
    np.testing.assert_allclose(got, exact, rtol=0, atol=TOLERANCE)
    rounded = np.abs(expected["logits_last8"] - exact).max(axis=1) > TOLERANCE
    assert rounded.tolist() == [False, False, True, False, False, False, False, False]
    np.testing.assert_allclose(got[~rounded], expected["logits_last8"][~rounded], rtol=0, atol=TOLERANCE)
    answer = expected["greedy_ids"].tolist()
    assert greedy(model, expected["input_ids"], len(answer), repetition_penalty=1.0) == answer


def test_the_needle_checkpoint_in_one_chunk_equals_transformers(needle_checkpoint, needle_oracle, tmp_path):
    """With L = 960 positions are those of plain RoPE, and float32 angles are rounded as transformers rounds them."""
    _, expected = needle_oracle
    dual_chunk = {"chunk_size": 1024, "local_size": 64, "original_max_position_embeddings": 1024}
    model = load(with_dual_chunk(needle_checkpoint, tmp_path / "checkpoint", dual_chunk))
    count = len(expected["input_ids"])
    got = logits(model, expected["input_ids"], range(count - 8, count))
    np.testing.assert_allclose(got, expected["logits_last8"], rtol=0, atol=TOLERANCE)


def test_the_needle_tokenizer_equals_hugging_faces(needle_checkpoint, needle_oracle):
    text, expected = needle_oracle
    tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint))
    assert tokenizer(text)["input_ids"] == expected["input_ids"].tolist()


def test_prefill_chunk_sizes_give_the_same_greedy_tokens(needle_checkpoint, needle_oracle):
    """928 tokens and, beyond the trained length, 2,784 over four DCA chunks, in steps of 64, of 1,000 and in one."""
    _, expected = needle_oracle
    models = [load(needle_checkpoint, max_num_batched_tokens=size) for size in (64, 1000, WHOLE_PROMPT)]
    for prompt in (expected["input_ids"], np.tile(expected["input_ids"], 3)):
        small, middle, whole = (greedy(model, prompt, 16, repetition_penalty=1.0) for model in models)
        assert small == middle == whole
