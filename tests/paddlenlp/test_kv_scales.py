"""Where scales of an int8 cache come from, and that answers of the needle checkpoint stay with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needle_documents import DocumentMaker, prompt
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

from paddle_qwen1m import cli
from paddle_qwen1m.cache.kv_scales import KVScales
from paddle_qwen1m.commands.calibrate_kv import scales_of
from paddle_qwen1m.options import read_llm_options
from paddle_qwen1m.paddlenlp import scales as module
from paddle_qwen1m.paddlenlp import serving
from paddle_qwen1m.weights.digest import checkpoint_digest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "paddle_qwen1m" / "kv_scales"


def load(checkpoint: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(checkpoint), kv_cache_dtype="int8", **options)


@pytest.fixture(scope="module")
def made(needle_checkpoint: Path) -> KVScales:
    return scales_of(str(needle_checkpoint), "The river had been low since March. " * 20)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_hidden_codes_are_found_in_an_int8_cache(needle_checkpoint: Path, made: KVScales, sparse: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint))
    document = DocumentMaker(lambda text: list(tokenizer(text)["input_ids"])).make(1600, 1, seed=3)
    model = load(needle_checkpoint, kv_scales=made, sparse=sparse, sparse_threshold=1000)
    for needle in document.needles:
        ids = np.asarray(tokenizer(prompt(document, needle))["input_ids"], np.int64)
        answer, _ = model.generate(ids[None], max_new_tokens=40, do_sample=False, trunc_input=True)
        assert needle.code in tokenizer.decode(answer[0].tolist())


def test_they_are_made_at_the_first_load_and_found_at_the_next(
    needle_checkpoint: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(needle_checkpoint)
    (kept,) = cache_folder.iterdir()
    assert kept.stem == checkpoint_digest(needle_checkpoint) == KVScales.from_file(kept).weights
    monkeypatch.setattr(module, "calibrate", None)
    load(needle_checkpoint)
    assert list(cache_folder.iterdir()) == [kept]


@pytest.mark.parametrize("damage", [b"", b'{"format": 1000}'], ids=["cut off", "of a later version"])
def test_kept_ones_that_cannot_be_used_are_made_anew(
    needle_checkpoint: Path, cache_folder: Path, damage: bytes
) -> None:
    load(needle_checkpoint)
    (kept,) = cache_folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage)
    load(needle_checkpoint)
    assert kept.read_bytes() == whole


def test_fp8_is_kept_in_the_same_frame_and_says_what_it_loses(
    needle_checkpoint: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module.logger, "warning", lines.append)
    load(needle_checkpoint)
    assert lines == []
    monkeypatch.setattr(module, "calibrate", None)
    engine = AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), kv_cache_dtype="fp8_e4m3").engine
    assert engine.kv_cache_dtype == "fp8" and len(list(cache_folder.iterdir())) == 1
    assert len(lines) == 1 and lines[0].startswith("kv_cache_dtype=fp8: ") and module.FP8_LOSES in lines[0]


def test_a_cache_of_another_type_needs_none(
    needle_checkpoint: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "calibrate", None)
    AutoModelForCausalLM.from_pretrained(str(needle_checkpoint))
    assert not cache_folder.exists()


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    needle_checkpoint: Path, cache_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "user").write_text("a file")
    assert load(needle_checkpoint).engine.kv_cache_dtype == "int8"


def test_the_file_beside_the_weights_counts_before_those_that_are_kept(
    needle_checkpoint: Path, cache_folder: Path, tmp_path: Path, made: KVScales, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(needle_checkpoint, checkpoint)
    made.write(checkpoint / module.KV_SCALES)
    monkeypatch.setattr(module, "calibrate", None)
    load(checkpoint)
    other = KVScales(made.exponents[:, :1], made.centres[:, :1])
    other.write(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"other\.json: scales of .*another model's"):
        load(checkpoint, kv_scales=tmp_path / "other.json")


def test_scales_of_another_checkpoint_are_refused_before_anything_is_loaded(
    needle_checkpoint: Path, tmp_path: Path, made: KVScales, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scales.json"
    made.write(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "weights": "0" * 64}))
    monkeypatch.setattr("paddle_qwen1m.paddlenlp.causal_lm.read_weights", None)
    with pytest.raises(ValueError, match=r"scales\.json: made for weights 000000000000\.\.\., these are "):
        load(needle_checkpoint, kv_scales=path)
    with pytest.raises(FileNotFoundError):
        load(needle_checkpoint, kv_scales=tmp_path / "none.json")


@pytest.mark.parametrize("when", ["beside the weights", "just now"])
def test_layers_in_16_bits_take_their_room_before_anybody_gets_it(
    needle_checkpoint: Path, made: KVScales, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """An engine for many requests, whose cache is decided before its weights are read; int8 is taken since nothing else
    fits, and said; and so is what stays in 16 bits.
    """
    lines: list[str] = []
    monkeypatch.setattr(serving.logger, "info", lines.append)
    errors = [0.01, 0.3, 0.02, 0.03]
    kept = made.measured(errors, [0.0] * 4)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(needle_checkpoint, checkpoint)
    if when == "just now":
        monkeypatch.setattr(module, "calibrate", lambda *_: kept)
    else:
        kept.write(checkpoint / module.KV_SCALES)
    room = 40_000_000
    options = {"kv_cache_memory_bytes": room, "max_model_len": 12_000, "kv_cache_dtype": "auto"}
    engine = serving.load_engine(str(checkpoint), read_llm_options(options))
    cache = engine.runner.cache
    assert [str(layer.keys.dtype).rpartition(".")[2] for layer in cache.layers] == ["int8", "bfloat16", "int8", "int8"]
    assert cache.page_bytes * engine.pool.num_pages <= room < cache.page_bytes * (engine.pool.num_pages + 1)
    assert any(line.startswith("kv_cache_dtype=int8, since max_model_len would not fit") for line in lines)
    assert any("which stay in 16 bits: 1 (30.0%)" in line for line in lines)


def test_room_that_layers_in_16_bits_do_not_leave_is_missed_before_anything_is_loaded(
    needle_checkpoint: Path, made: KVScales, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "read_weights", lambda *_: pytest.fail("weights are read"))
    options = {"kv_cache_memory_bytes": 40_000_000, "max_model_len": 18_000, "kv_cache_dtype": "int8"}
    kept = made.measured([0.3] * 4, [0.0] * 4)
    with pytest.raises(ValueError, match=r"max sequence length \(18000\) is larger than the maximum number"):
        serving.load_engine(str(needle_checkpoint), read_llm_options({**options, "kv_scales": kept}))


def test_the_command_makes_a_file_that_is_used(
    needle_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "scales.json"
    text.write_text("A cart rolled slowly down the lane in the rain. " * 30)
    assert cli.main(["calibrate-kv", str(needle_checkpoint), "--text", str(text), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "4 layers, 2 KV heads; " in told and "int8 moves a layer's output by up to " in told
    monkeypatch.setattr(module, "calibrate", None)
    assert load(needle_checkpoint, kv_scales=out).engine.kv_cache_dtype == "int8"


def test_the_command_refuses_an_empty_text(
    needle_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("")
    assert cli.main(["calibrate-kv", str(needle_checkpoint), "--text", str(text), "--out", str(tmp_path / "o")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_packages_own_text_is_long_enough(needle_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint))
    assert len(tokenizer(module.TEXT.read_text(encoding="utf-8"))["input_ids"]) > 1500
