"""An int8 cache under an engine: what is read in copies of its pages, in whatever order, and what prefixes it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from runner_setup import head, rows
from small_model import BUDGETS, CONFIG, random_model

from paddle_qwen1m import ops
from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.cache.kv_scales import LARGEST_ERROR, KVScales
from paddle_qwen1m.engine import Engine, Finished, PrefillProgress, Request, SamplingParams
from paddle_qwen1m.engine.calibration import _of_all_ranks, calibrate
from paddle_qwen1m.engine.orders import Advance, Prefill
from paddle_qwen1m.engine.runner import Runner
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.parallel.placement import Placement

PAGE, PAGES = 32, 64
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def model() -> Qwen2OneM:
    return random_model(np.random.default_rng(0))


TEXT = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 120)


@pytest.fixture(scope="module")
def rounded(model: Qwen2OneM) -> KVScales:
    return calibrate(model, TEXT)


@pytest.fixture(params=[(), (0,), (1,)], ids=lambda layers: f"16 bits in {layers or 'none'}")
def scales(request: pytest.FixtureRequest, rounded: KVScales) -> KVScales:
    return replace(rounded, in_16_bits=request.param)


def runner_of(model: Qwen2OneM, scales: KVScales, copied: int | None, dtype: str = "int8") -> Runner:
    """Over an 8-bit cache that is read as it is, or in copies of so many pages, as on a GPU."""
    runner = Runner(model, BUDGETS, 0, replay=False)
    widened = None if copied is None else (copied, "float32")
    cache = PagedCache(model.local, PAGES, PAGE, dtype, scales, widened)
    for layer in cache.layers:
        if layer.quantised is None:
            continue
        ops.upload(layer.quantised.scales, np.full(layer.quantised.scales.shape, np.nan, np.float16))
    runner.use(cache, max_num_seqs=4, max_model_len=2048)
    return runner


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_copies_are_made_anew_where_others_were_read_in_a_pause(
    model: Qwen2OneM, scales: KVScales, rng: np.random.Generator, sparse: bool
) -> None:
    """A prompt of four DCA chunks is read in two; at each point of the second another prompt is read, whose pages are
    copied to the same place.
    """
    prompt, other = (rng.integers(0, CONFIG.vocab_size, length) for length in (450, 90))
    chunk = rows(prompt, range(15), begin=70, sparse=sparse, wanted=(0, 379))
    logits = []
    for copied in (None, 15):
        runner = runner_of(model, scales, copied)
        runner.run(Prefill((rows(prompt[:70], range(15), sparse=sparse),), points=0))
        post = runner.run(Prefill((chunk,), row_blocks=2))
        while post is not None and not post.done:
            runner.run(Prefill((rows(other, range(20, 23)),), points=0))
            post = runner.run(Advance())
        logits.append(head(runner, 0, 2))
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4 * np.abs(logits[0]).max())


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_prompts_of_one_order_are_copied_in_turns(
    model: Qwen2OneM, scales: KVScales, rng: np.random.Generator, dtype: str
) -> None:
    """Four prompts of 2, 1, 5 and 2 pages, one of them sparse, through copies of 5 pages at most."""
    prompts = [rng.integers(0, CONFIG.vocab_size, length) for length in (40, 3, 130, 64)]
    together = tuple(
        rows(prompt, range(8 * number, 8 * number + 8), sparse=number == 2, wanted=(len(prompt) - 1,))
        for number, prompt in enumerate(prompts)
    )
    logits = []
    for copied in (None, 5):
        runner = runner_of(model, scales, copied, dtype)
        runner.run(Prefill(together, points=0))
        logits.append(head(runner, 0, 4))
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4 * np.abs(logits[0]).max())


def engine(model: Qwen2OneM, folder: Path | None = None, **options: Any) -> Engine:
    chosen: dict[str, Any] = {
        "max_num_batched_tokens": 64,
        "page_size": PAGE,
        "cache_tokens": 2048,
        "enable_prefix_caching": True,
        "kv_cache_dtype": "int8",
        **options,
    }
    if folder is not None:
        chosen.update(prefix_store=str(folder), prefix_store_min_tokens=64)
    return Engine(model, EngineOptions(**chosen), weights="w")


def test_rounded_keys_move_logits_little(model: Qwen2OneM, scales: KVScales, rng: np.random.Generator) -> None:
    """Beside a float32 cache, over a prompt of three DCA chunks, and nearer with scales than without."""
    prompt = rng.integers(0, CONFIG.vocab_size, 300)
    exact = engine(model, kv_cache_dtype="float32").logits(prompt)
    one = engine(model)
    one.use_scales(scales)
    error = np.abs(one.logits(prompt) - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.1


def test_fp8_moves_them_more_from_the_same_frame(model: Qwen2OneM, rounded: KVScales, rng: np.random.Generator) -> None:
    prompt = rng.integers(0, CONFIG.vocab_size, 300)
    exact = engine(model, kv_cache_dtype="float32").logits(prompt)
    errors = {}
    for dtype in ("int8", "fp8"):
        one = engine(model, kv_cache_dtype=dtype)
        one.use_scales(rounded)
        errors[dtype] = np.linalg.norm(one.logits(prompt) - exact) / np.linalg.norm(exact)
    assert errors["int8"] < errors["fp8"] < 0.3


def ask(one: Engine, prompt: np.ndarray) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt came out of the store."""
    seen: list[PrefillProgress] = []
    (completion,) = one.generate([prompt], GREEDY, on_prefill=seen.append)
    return list(completion.token_ids), seen[-1].restored_tokens


def test_a_stored_prefix_comes_back_with_its_scales_and_to_these_alone(
    model: Qwen2OneM, scales: KVScales, rng: np.random.Generator, tmp_path: Path
) -> None:
    document, folder = rng.integers(0, CONFIG.vocab_size, 330), tmp_path / "store"
    first, second = (np.concatenate([document, rng.integers(0, 90, 70)]) for _ in range(2))
    cold = engine(model)
    cold.use_scales(scales)
    expected = ask(cold, second)[0]
    writer = engine(model, folder)
    writer.use_scales(scales)
    ask(writer, first)
    writer.close()
    reader = engine(model, folder)
    reader.use_scales(scales)
    assert ask(reader, second) == (expected, 320)
    reader.close()
    assert ask(engine(model, folder), second)[1] == 0, "kept under other scales"
    others = engine(model, folder)
    others.use_scales(replace(scales, in_16_bits=(0, 1)))
    assert ask(others, second)[1] == 0, "kept with other layers in 16 bits"
    floating = engine(model, folder, kv_cache_dtype="fp8")
    floating.use_scales(scales)
    assert ask(floating, second)[1] == 0, "kept as int8"


def test_a_layer_that_int8_moves_too_far_stays_in_16_bits(rng: np.random.Generator) -> None:
    """A channel of the values of layer 1 is far larger than the others, and its output projection hardly reads it: what
    it does read is lost in the rounding. Behind the projection alone can that be seen.
    """
    model = random_model(np.random.default_rng(0))
    layer, dim = model.layers[1], CONFIG.head_dim
    values = slice((CONFIG.num_heads + CONFIG.num_kv_heads) * dim, None, dim)
    layer.qkv_bias[values] = 3000.0
    layer.output_weight[:, ::dim] = 0.0
    made = calibrate(model, TEXT)
    assert made.in_16_bits == (1,)
    assert made.errors[0] < LARGEST_ERROR < made.errors[1]
    prompt = rng.integers(0, CONFIG.vocab_size, 300)
    exact = engine(model, kv_cache_dtype="float32").logits(prompt)
    errors = {}
    for kept in ((), (1,)):
        one = engine(model)
        one.use_scales(replace(made, in_16_bits=kept))
        errors[kept] = np.abs(one.logits(prompt) - exact).max() / np.abs(exact).max()
    assert errors[1,] < 0.1 < errors[()]


def test_no_layer_of_ordinary_keys_and_values_does(rounded: KVScales) -> None:
    assert rounded.in_16_bits == () and max(rounded.errors) < 0.02


def test_a_page_takes_what_its_layers_do(model: Qwen2OneM, scales: KVScales) -> None:
    one = engine(model)
    one.use_scales(scales)
    one.reserve()
    numbers, wide = PAGE * CONFIG.num_kv_heads * CONFIG.head_dim, len(scales.in_16_bits)
    int8 = 2 * (numbers + PAGE * CONFIG.num_kv_heads * 2)
    assert one.runner.cache.page_bytes == one._page_bytes == (2 - wide) * int8 + wide * 4 * numbers


def test_a_fork_of_a_sequence_copies_scales(model: Qwen2OneM, scales: KVScales, rng: np.random.Generator) -> None:
    """Two samples of one prompt that ends within a page are those of a prompt alone."""
    prompt = rng.integers(0, CONFIG.vocab_size, 45)
    one = engine(model)
    one.use_scales(scales)
    alone = [one.generate([prompt], SamplingParams(max_tokens=6, seed=seed))[0].token_ids for seed in (3, 4)]
    one.add(Request("r", prompt, SamplingParams(max_tokens=6, seed=3, n=2)))
    events = [event for _ in range(99) if not one.is_idle for event in one.step()]
    (finished,) = (event for event in events if isinstance(event, Finished))
    assert [completion.token_ids for completion in finished.completions] == alone


def test_scales_of_another_shape_are_refused(model: Qwen2OneM, scales: KVScales) -> None:
    one = engine(model)
    with pytest.raises(ValueError, match=r"scales of an 8-bit cache: scales of .*the model has"):
        one.use_scales(KVScales(scales.exponents[:1], scales.centres[:1]))
    one.add(Request("r", np.arange(10), GREEDY))


@pytest.mark.parametrize("degree", [2, 4])
def test_ranks_add_up_their_heads_to_the_whole_models_scales(
    model: Qwen2OneM, scales: KVScales, degree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two KV heads on two ranks, in one layer the other way round, and on four, where two have the same one."""
    order = (tuple(range(4)), (2, 3, 0, 1))
    placement = Placement(degree, CONFIG.num_kv_heads, order)
    monkeypatch.setattr(model, "placement", placement)
    summed: list[np.ndarray] = []
    for rank in range(degree):
        parts: list[np.ndarray] = []

        def keep(values: paddle.Tensor, parts: list[np.ndarray] = parts) -> paddle.Tensor:
            parts.append(values.numpy())
            return values

        monkeypatch.setattr(model, "group", SimpleNamespace(rank=rank, degree=degree, all_reduce=keep))
        _of_all_ranks(model, scales.of_heads([placement.kv_heads(layer, rank) for layer in range(2)]))
        summed = [a + b for a, b in zip(summed, parts)] if summed else parts
    np.testing.assert_array_equal(summed[0], scales.exponents)
    np.testing.assert_array_equal(summed[1], scales.centres)


@pytest.mark.parametrize("length", [1, 129])
def test_a_text_that_is_no_chunk_is_refused(model: Qwen2OneM, length: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 128 tokens, got {length}"):
        calibrate(model, np.zeros(length, np.int64))
