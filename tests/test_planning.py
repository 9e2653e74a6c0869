"""What fits on which GPUs is what the engine admits, and every way out is what it says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paddle_qwen1m import cli
from paddle_qwen1m.cache.kv_scales import KVScales
from paddle_qwen1m.config import ModelConfig, published_budgets
from paddle_qwen1m.engine.admission import Allowance, Need, choose_capacity
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.planning import GPUS, MEMORIES, PUBLISHED, Plan, plan, published, usable

NEEDLE = Path(__file__).parents[1] / "checkpoints" / "needle"
WHOLE = 1_010_000
SIXTEEN_BITS = EngineOptions(max_num_batched_tokens=32_768, kv_cache_dtype="bfloat16")


def planned(name: str, memory: int, **given: Any) -> Plan:
    config = PUBLISHED[name]
    return plan(config, memory, budgets=published_budgets(config), **given)


def admitted(name: str, memory: int, ranks: int, options: EngineOptions, length: int) -> bool:
    """Whether an engine with so much memory would start."""
    config = PUBLISHED[name]
    budgets = published_budgets(config)
    need = Need.of(config, ranks, options, budgets, kept="bfloat16", computed="bfloat16", on_gpu=True)
    try:
        return choose_capacity(need, Allowance(memory), length).max_model_len == length
    except (MemoryError, ValueError):
        return False


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("memory", [memory * 10**9 for memory in MEMORIES])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_the_longest_that_fits_is_what_an_engine_would_take_and_no_page_more(
    name: str, memory: int, ranks: int, kept: str
) -> None:
    options = EngineOptions(max_num_batched_tokens=32_768, kv_cache_dtype=kept)
    made = planned(name, memory, ranks=ranks, options=options)
    if made.longest is None:
        assert not admitted(name, memory, ranks, options, 1)
        return
    assert admitted(name, memory, ranks, options, made.longest)
    assert made.longest == WHOLE or not admitted(name, memory, ranks, options, made.longest + 256)


def test_bytes_add_up_and_what_is_missing_is_less_than_nothing_left() -> None:
    made = planned("14B", 149 * 10**9, options=SIXTEEN_BITS)
    assert (made.weights, made.cache) == (2 * 14_770_033_664, -(-WHOLE // 256) * 256 * 196_608)
    assert made.left == made.allowed - made.weights - made.cache - made.workspace < 0 and not made.fits
    fitting = planned("14B", 149 * 10**9, ranks=2)
    assert fitting.fits and fitting.left > 0 and fitting.ways == ()
    assert fitting.weights < 0.51 * made.weights and fitting.cache == made.cache // 2


def test_ranks_are_as_even_as_their_heads_can_be_placed() -> None:
    made = planned("14B", 149 * 10**9, ranks=2)
    assert made.imbalance == pytest.approx((1.007, 1.104), abs=5e-4)
    (line,) = (line for line in made.lines() if "visits" in line)
    assert "1.007 times the mean of keys, with heads in published order 1.104 times" in line
    alone, without = planned("14B", 149 * 10**9), plan(PUBLISHED["14B"], 149 * 10**9, ranks=2)
    assert alone.imbalance is None and without.imbalance is None
    assert not [line for one in (alone, without) for line in one.lines() if "visits" in line]


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
@pytest.mark.parametrize(("name", "memory"), [("7B", 24), ("7B", 40), ("14B", 40), ("14B", 130)])
def test_every_way_out_lets_as_much_fit_as_it_says(name: str, memory: int, kept: str) -> None:
    options = {"max_num_batched_tokens": 32_768, "kv_cache_dtype": kept}
    made = planned(name, memory * 10**9, options=EngineOptions(**options))
    assert not made.fits and made.ways
    for way in made.ways:
        flag, number = way.option.split()
        changed: dict[str, Any] = dict(options)
        ranks, length = 1, way.length
        if flag == "--tensor-parallel-size":
            ranks = int(number)
        elif flag == "--max-model-len":
            length = int(number)
        elif flag in ("--kv-cache-dtype", "--quantization"):
            changed[flag[2:].replace("-", "_")] = number
        else:
            changed[flag[2:].replace("-", "_")] = int(number)
        assert length is None or admitted(name, memory * 10**9, ranks, EngineOptions(**changed), length), way
    assert [way.option.split()[0] for way in made.ways] == sorted(
        (way.option.split()[0] for way in made.ways),
        key=[
            "--max-num-seqs",
            "--max-num-batched-tokens",
            "--kv-cache-dtype",
            "--quantization",
            "--tensor-parallel-size",
            "--max-model-len",
        ].index,
    )


def test_int8_is_chosen_where_a_context_fits_no_other_way_and_nobody_chose() -> None:
    memory, small = 141 * 10**9, {"max_num_batched_tokens": 32_768, "max_num_seqs": 1}
    chosen = planned("14B", memory, options=EngineOptions(max_num_seqs=1))
    assert chosen.chunk == 32_768, "of a default chunk, where it fits"
    for less, chunk in ((3_400_000_000, 24_576), (3_700_000_000, 16_384)):  # else of three quarters, or of half
        assert planned("14B", memory - less, options=EngineOptions(max_num_seqs=1)).chunk == chunk
    assert chosen.weights + chosen.cache + chosen.scales + chosen.workspace < 140e9
    asked = planned("14B", memory, options=EngineOptions(**small, kv_cache_dtype="bfloat16"))
    assert (chosen.cache_dtype, chosen.fits) == ("int8", True) and (asked.cache_dtype, asked.fits) == (
        "bfloat16",
        False,
    )
    tokens = -(-WHOLE // 256) * 256
    assert (asked.cache, chosen.cache, chosen.scales) == (tokens * 196_608, tokens * 98_304, tokens * 2 * 48 * 8 * 2)
    assert "their scales" in "\n".join(chosen.lines()) and "their scales" not in "\n".join(asked.lines())
    copied = 2 * WHOLE * 8 * 128 * 2
    assert chosen.workspace - asked.workspace == copied, "one layer's keys and values in 16 bits"
    assert planned("7B", memory).cache_dtype == "bfloat16", "what fits stays as it is computed"


def test_layers_in_16_bits_take_twice_the_bytes_and_no_scales() -> None:
    options = EngineOptions(max_num_batched_tokens=16_384, kv_cache_dtype="int8")
    none, three = (planned("14B", 141 * 10**9, options=options, in_16_bits=layers) for layers in (0, 3))
    assert three.cache * 48 == none.cache * 51 and three.scales * 48 == none.scales * 45
    assert three.longest is not None and none.longest is not None and three.longest < none.longest
    assert "keys and values   105.51 GB, int8, 3 layers in 16 bits" in list(three.lines())
    sixteen, same = (planned("14B", 141 * 10**9, options=SIXTEEN_BITS, in_16_bits=layers) for layers in (0, 3))
    assert (same.cache, same.longest) == (sixteen.cache, sixteen.longest)
    ways = {way.option: way.length for way in same.ways}
    with_int8 = replace(SIXTEEN_BITS, kv_cache_dtype="int8")
    assert ways["--kv-cache-dtype int8"] == planned("14B", 141 * 10**9, options=with_int8, in_16_bits=3).longest


def test_the_command_counts_the_layers_of_a_file_of_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig.from_dict(json.loads((NEEDLE / "config.json").read_text()), "config.json")
    path = tmp_path / "scales.json"
    replace(KVScales.none(config), in_16_bits=(0, 3)).write(path)
    command = ["plan", "--gpu-memory", "40GB", "--kv-cache-dtype", "int8", "--kv-scales", str(path)]
    assert cli.main([*command, "--model", str(NEEDLE)]) == 0
    assert "int8, 2 layers in 16 bits\n" in capsys.readouterr().out
    assert cli.main([*command, "--model", "7B"]) == 2
    assert "another model's" in capsys.readouterr().err


def test_fp8_takes_what_int8_does() -> None:
    int8, fp8 = (planned("14B", 141 * 10**9, options=EngineOptions(kv_cache_dtype=kept)) for kept in ("int8", "fp8"))
    assert replace(fp8, cache_dtype="int8") == int8


def test_a_published_model_is_known_by_its_size_and_its_name() -> None:
    for name in ("7b", "Qwen/Qwen2.5-7B-Instruct-1M", "qwen2.5-7b-instruct-1m"):
        assert published(name) is PUBLISHED["7B"]
    assert published("Qwen/Qwen2.5-7B-Instruct") is None and published("checkpoints/needle") is None


@pytest.mark.parametrize(("ranks", "free"), [(1, 142_630), (2, 141_758), (4, 141_758)])
def test_of_a_card_may_be_used_what_an_engine_finds_on_it(ranks: int, free: int) -> None:
    """MiB that were free of an H200 at an engine's start (docs/performance.md, "Several GPUs")."""
    found = Allowance.of_gpu(free << 20, GPUS["H200"], None, None).total
    assert usable("H200", ranks) == pytest.approx(found, rel=1e-3)


def test_the_command_says_what_it_says_in_json_and_by_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "14B", "--gpu", "h200", "--max-num-batched-tokens", "16384"]
    command += ["--kv-cache-dtype", "bfloat16"]
    assert cli.main([*command, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    options = EngineOptions(max_num_batched_tokens=16_384, kv_cache_dtype="bfloat16")
    made = planned("14B", usable("H200", 1), options=options)
    assert told == json.loads(json.dumps(made.as_json()))
    assert cli.main([*command, "--tensor-parallel-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "may be used       147.14 GB of each of 2 GPUs"
    assert lines[-1] == "1,010,000 tokens fit; the longest that fits: 1,010,000 tokens"
    assert cli.main(["plan", "--model", "7B", "--gpu-memory", "24GB", "--max-model-len", "20000"]) == 0
    assert "may be used        24.00 GB\n" in capsys.readouterr().out


def test_a_directory_is_planned_by_its_own_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", str(NEEDLE), "--gpu-memory", "40GB", "--max-model-len", "auto", "--json"]) == 0
    config = ModelConfig.from_dict(json.loads((NEEDLE / "config.json").read_text()), "config.json")
    assert json.loads(capsys.readouterr().out)["length"] == config.max_position_embeddings


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "7B"], "plan needs --model and --gpu or --gpu-memory, or --table"),
        (["--model", "7B", "--gpu", "GTX-970"], "--gpu GTX-970: give its --gpu-memory, or one of RTX-3090, "),
        (["--model", "7B", "--gpu", "H200", "--tensor-parallel-size", "3"], "tensor_parallel_size"),
        (["--model", "7B", "--gpu", "H200", "--max-model-len", "2000000"], "max_model_len must be 1 to .*1010000"),
    ],
)
def test_wrong_use_is_refused_in_one_line(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert re.search(reason, captured.err)
