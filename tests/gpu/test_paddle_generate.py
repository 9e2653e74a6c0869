"""The needle checkpoint inside Paddle on a GPU: it answers what the CPU answered, with and without a CUDA graph.

tests/data/needle_cpu_tokens.json holds the CPU's greedy tokens and margins (tools/record_needle_tokens.py).
"""

from __future__ import annotations

import gc
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="Paddle is not installed")

if not paddle.device.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
    pytest.skip("this Paddle has no GPU", allow_module_level=True)

from paddle_qwen1m import ops  # noqa: E402

if ops.gpu_obstacle() is not None:
    pytest.skip(str(ops.gpu_obstacle()), allow_module_level=True)

from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from record_needle_tokens import ANSWER_TOKENS, END_TOKENS, LENGTHS, prompt_ids  # noqa: E402

from paddle_qwen1m.engine import Completion, Engine, SamplingParams  # noqa: E402

RECORD = json.loads((Path(__file__).parents[1] / "data" / "needle_cpu_tokens.json").read_text(encoding="utf-8"))
SURE = 0.5
"""Logits by which the CPU's token must lead for 16-bit arithmetic to be held to it."""
GREEDY = SamplingParams(max_tokens=ANSWER_TOKENS, stop_token_ids=END_TOKENS, temperature=0.0)


def load(checkpoint: Path, device: str, **options: Any) -> Engine:
    """The checkpoint's engine on a device; the GPU is Paddle's device afterwards."""
    paddle.device.set_device(device)
    try:
        return AutoModelForCausalLM.from_pretrained(str(checkpoint), **options).engine
    finally:
        paddle.device.set_device("gpu")


@contextmanager
def without_graph(engine: Engine) -> Iterator[None]:
    options = engine.options
    engine.configure(replace(options, cuda_graph=False), engine.budgets)
    try:
        yield
    finally:
        engine.configure(options, engine.budgets)


@pytest.fixture(scope="module")
def engine(needle_checkpoint: Path) -> Engine:
    return load(needle_checkpoint, "gpu", sparse=False)


@pytest.fixture(scope="module")
def prompt(needle_checkpoint: Path) -> Any:
    """prompt(tokens, seed): token ids int64 [n]."""
    tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint))
    return lambda tokens, seed=0: prompt_ids(lambda text: list(tokenizer(text)["input_ids"]), tokens, seed)[0]


def close(one: Completion, other: Completion) -> bool:
    return one.token_ids == other.token_ids and np.allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


def test_weights_and_cache_are_of_16_bits_on_the_gpu(engine: Engine) -> None:
    assert engine.model.on_gpu
    assert (engine.model.dtype, engine.kv_cache_dtype, engine.max_num_batched_tokens) == ("bfloat16", "bfloat16", 32768)
    assert all(buffer.place.is_gpu_place() for _, buffer in engine.model.named_buffers())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_questions_are_read_by_graphs_as_without(needle_checkpoint: Path, prompt: Any, sparse: bool) -> None:
    """Logits of every row of questions of several lengths, in turn, behind one cached document: as close as those of
    other kernels are, in test_logits_are_those_of_the_cpu.
    """
    engine = load(needle_checkpoint, "gpu", sparse=sparse, sparse_threshold=1000)
    # The temperature follows from a prompt's length: with any other, the document is reused all the same.
    options = replace(engine.options, cache_tokens=65536, prefix_temperature_tolerance=1.0)
    engine.configure(options, engine.budgets)
    ids = prompt(16384 + 64)
    document = ids[:16384]
    rounds = [(length, ids[-64:][start : start + length]) for start in (0, 5, 0) for length in (1, 8, 9, 33, 58)]

    def answers() -> list[np.ndarray]:
        engine.reset_prefix_cache()
        engine.logits(document)
        asked = [np.concatenate([document, question]) for _, question in rounds]
        return [engine.logits(whole, range(len(document), len(whole))) for whole in asked]

    with without_graph(engine):
        expected = answers()
    got = answers()
    assert engine.runner._questions is not None and len(engine.runner._questions._steps) == 2
    assert [one.shape for one in got] == [other.shape for other in expected]
    rows, exact = np.concatenate(got), np.concatenate(expected)
    errors = np.linalg.norm(rows - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.median(errors) < 1e-2 and errors.max() < 0.3


def test_a_float32_model_is_kept_as_bfloat16(needle_checkpoint: Path) -> None:
    assert load(needle_checkpoint, "gpu", dtype="float32").model.dtype == "bfloat16"


def test_another_cache_type_is_refused(needle_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype on a GPU must be that of the computation, bfloat16"):
        load(needle_checkpoint, "gpu", kv_cache_dtype="float16")


def test_logits_are_those_of_the_cpu(engine: Engine, needle_checkpoint: Path, prompt: Any) -> None:
    """The last 64 rows of a 1,024-token prompt: the same arg-max where the CPU is sure, and close.

    Rounding every activation of the CPU to bfloat16 gives a median error of 0.0035 and a largest one of 0.12.
    """
    ids = prompt(1024)
    wanted = range(len(ids) - 64, len(ids))
    exact = load(needle_checkpoint, "cpu", sparse=False)
    paddle.device.set_device("cpu")
    expected = exact.logits(ids, wanted)
    paddle.device.set_device("gpu")
    got = engine.logits(ids, wanted)
    errors = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    print(f"relative errors of 64 rows of logits: median {np.median(errors):.4f}, largest {errors.max():.4f}")
    assert np.median(errors) < 1e-2 and errors.max() < 0.3
    top = np.sort(expected, axis=-1)
    sure = top[:, -1] - top[:, -2] >= SURE
    assert sure.any()
    np.testing.assert_array_equal(got.argmax(-1)[sure], expected.argmax(-1)[sure])


def test_float16_logits_are_those_of_the_cpu(needle_checkpoint: Path, prompt: Any) -> None:
    ids = prompt(1024)
    exact = load(needle_checkpoint, "cpu", sparse=False)
    paddle.device.set_device("cpu")
    expected = exact.logits(ids)
    paddle.device.set_device("gpu")
    got = load(needle_checkpoint, "gpu", dtype="float16", sparse=False).logits(ids)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-2


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_an_8_bit_cache_gives_the_logits_and_the_answer_of_a_16_bit_one(
    needle_checkpoint: Path, prompt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: bool, kind: str
) -> None:
    """A prompt of several chunks, so that prefill reads copies of pages that are written meanwhile; then decode."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    record, options = RECORD["16384"], {"sparse": sparse, "sparse_threshold": 1000, "max_num_batched_tokens": 2048}
    ids = prompt(16384, record["seed"])
    wide, narrow = (load(needle_checkpoint, "gpu", kv_cache_dtype=kept, **options) for kept in ("bfloat16", kind))
    expected, got = wide.logits(ids), narrow.logits(ids)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 3e-2
    assert narrow.generate([ids], GREEDY)[0].token_ids == wide.generate([ids], GREEDY)[0].token_ids


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_of_8_bits_give_the_logits_and_the_answer_of_16(
    engine: Engine, needle_checkpoint: Path, prompt: Any, kind: str
) -> None:
    """Read by few rows and by many, in decode by a graph; the mean KL divergence of the logits to those of bfloat16."""
    record = RECORD["16384"]
    ids = prompt(16384, record["seed"])
    narrow = load(needle_checkpoint, "gpu", sparse=False, quantization=kind)
    assert narrow.model.in_fp8 == (kind == "fp8" and paddle.device.cuda.get_device_capability() == (9, 0))
    wanted = range(len(ids) - 64, len(ids))
    exact, got = (one.logits(ids, wanted).astype(np.float64) for one in (engine, narrow))
    exact, got = (one - np.logaddexp.reduce(one, axis=-1, keepdims=True) for one in (exact, got))
    assert (np.exp(exact) * (exact - got)).sum(-1).mean() < 1e-2
    assert narrow.generate([ids], GREEDY)[0].token_ids == engine.generate([ids], GREEDY)[0].token_ids


@pytest.mark.parametrize("kind", [None, "int8"])
def test_many_rows_are_multiplied_without_a_library_on_a_hopper(
    monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    """By a weight of 16 bits or one that is widened, with SiLU or without: what the library and SiLU behind it make."""
    if paddle.device.cuda.get_device_capability() != (9, 0):
        pytest.skip("other cards multiply many rows by cuBLAS")
    rng = np.random.default_rng(0)
    rows, depth, width = 12_672, 256, 256
    weight = rng.standard_normal((2 * width, depth)).astype(np.float32) / 16
    held = ops.cast(paddle.to_tensor(weight), "bfloat16")
    if kind is not None:
        numbers, scales = np.zeros(weight.shape, np.uint8), np.zeros((2 * width, 2), np.float32)
        assert ops.round_weight(weight, "F32", kind, numbers, scales)
        held = ops.Weight8(paddle.to_tensor(numbers), paddle.to_tensor(scales), kind)
    x = ops.cast(paddle.to_tensor(rng.standard_normal((rows, depth)).astype(np.float32)), "bfloat16")
    wide = held.widened("bfloat16") if isinstance(held, ops.Weight8) else held
    product = paddle.matmul(x, wide, transpose_y=True)
    apart = ops.cast(ops.silu_mul(product), "float32").numpy()
    monkeypatch.setattr(paddle, "matmul", None)  # as it is not called
    np.testing.assert_allclose(
        ops.cast(ops.linear(x, held), "float32").numpy(), ops.cast(product, "float32").numpy(), rtol=2**-7, atol=1e-2
    )
    at_once = ops.cast(ops.gated_linear(x, held), "float32").numpy()
    np.testing.assert_allclose(at_once, apart, rtol=2**-6, atol=1e-2)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_answer_is_the_cpus(engine: Engine, prompt: Any, tokens: int) -> None:
    """Greedy, dense: the same tokens up to the first of which the CPU was not sure; up to 65,536, the whole answer."""
    record = RECORD[str(tokens)]
    ids = prompt(tokens, record["seed"])
    assert zlib.crc32(ids.tobytes()) == record["prompt_crc32"], "the prompt is not the one that was recorded"
    unsure = [step for step, margin in enumerate(record["margins"]) if margin < SURE]
    compared = min(unsure, default=len(record["token_ids"]))
    got = engine.generate([ids], GREEDY)[0].token_ids
    print(
        f"{tokens:,} tokens: {compared} of {len(record['token_ids'])} tokens compared; the CPU said {record['text']!r}"
    )
    assert got[:compared] == record["token_ids"][:compared]
    if tokens <= 65536:
        assert compared == len(record["token_ids"])


def test_a_chunked_prefill_gives_the_same_answer(engine: Engine, prompt: Any) -> None:
    options = engine.options
    whole = engine.generate([prompt(16384)], GREEDY)[0]
    engine.configure(replace(options, max_num_batched_tokens=1000), engine.budgets)
    try:
        assert engine.generate([prompt(16384)], GREEDY)[0].token_ids == whole.token_ids
    finally:
        engine.configure(options, engine.budgets)


SAMPLED = SamplingParams(max_tokens=40, temperature=2.0, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=5)


@pytest.mark.parametrize("params", [replace(GREEDY, min_tokens=24), SAMPLED], ids=["greedy", "sampled"])
def test_a_replayed_graph_gives_what_eager_steps_give(engine: Engine, prompt: Any, params: SamplingParams) -> None:
    """40 steps over page borders, DCA chunks and min_tokens, as a batch whose rows end apart."""
    prompts = [prompt(1024), prompt(1024, 1)[-740:], prompt(4096, 2)]
    choices = [params, replace(params, max_tokens=30, min_tokens=0), params]
    replayed = engine.generate(prompts, choices)
    with without_graph(engine):
        eager = engine.generate(prompts, choices)
    assert all(map(close, replayed, eager))


@pytest.mark.parametrize("graph", [True, False], ids=["replayed", "eager"])
def test_short_tables_give_the_answers_of_long_ones(engine: Engine, prompt: Any, graph: bool) -> None:
    """On Hopper decode has kernels of its own where no sequence may be longer than 8,192 tokens: one, three at once."""
    prompts = [prompt(1024), prompt(4096, 1), prompt(6000, 2)]
    long_options = engine.options
    expected = engine.generate(prompts, GREEDY)
    engine.configure(replace(long_options, max_model_len=8192, cuda_graph=graph), engine.budgets)
    try:
        together, alone = engine.generate(prompts, GREEDY), engine.generate(prompts[1:2], GREEDY)
    finally:
        engine.configure(long_options, engine.budgets)
    assert [one.token_ids for one in together] == [one.token_ids for one in expected]
    assert alone[0].token_ids == expected[1].token_ids


@pytest.mark.parametrize("rows", [3, ops.FEW_ROWS + 1])
def test_rows_of_a_batch_answer_as_they_do_alone(engine: Engine, prompt: Any, rows: int) -> None:
    """Prompts of different lengths; above FEW_ROWS of them the linears of a decode step are cuBLAS's."""
    prompts = [prompt(1024 + 300 * number, number) for number in range(rows)]
    together = engine.generate(prompts, GREEDY)
    alone = [engine.generate([ids], GREEDY)[0] for ids in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_an_interrupt_leaves_no_memory_behind(engine: Engine, prompt: Any) -> None:
    ids = prompt(16384)
    before_answer = engine.generate([ids], GREEDY)[0].token_ids
    gc.collect()
    before = paddle.device.cuda.memory_allocated()
    seen: list[int] = []

    def interrupt(_index: int, token: int) -> None:
        seen.append(token)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([ids], GREEDY, on_token=interrupt)
    gc.collect()
    assert paddle.device.cuda.memory_allocated() == before
    assert engine.generate([ids], GREEDY)[0].token_ids == before_answer
