"""The frame of int8 keys: what it makes of outlying keys, and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from small_model import CONFIG

from paddle_qwen1m.cache.kv_scales import KVScales, centre_of, exponents_of

CHUNK_LEN, HEAD_DIM = 8192, 64
HALF = HEAD_DIM // 2
FREQUENCIES = oracle.inverse_frequencies(HEAD_DIM, 1e6).astype(np.float32)


def rotated(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys [tokens, G, D] as they are cached at those positions."""
    return oracle.rotate(keys, oracle.rotary_table(positions[None], FREQUENCIES)[0][:, None])


def steps(cached: np.ndarray, scales: KVScales) -> np.ndarray:
    """What rounding moves each dim of keys [tokens, G, D] by at most, in units of the model's keys."""
    power, centre = scales.frame(0)
    return np.abs(cached / power - centre).max(axis=-1, keepdims=True) / 254 * power


def made(keys: np.ndarray) -> KVScales:
    centre = centre_of(keys, FREQUENCIES, CHUNK_LEN)
    return KVScales.of_layers([exponents_of(keys, centre, FREQUENCIES, CHUNK_LEN)], [centre])


@pytest.fixture
def keys(rng: np.random.Generator) -> np.ndarray:
    """Unrotated keys [300, 2, D] of ordinary size."""
    return rng.standard_normal((300, 2, HEAD_DIM))


def test_ordinary_keys_stay_as_they_are(keys: np.ndarray) -> None:
    scales = made(keys)
    assert np.abs(scales.exponents).max() <= 1
    assert np.abs(scales.centres).max() < 0.3


def test_large_pairs_are_brought_to_the_size_of_others(keys: np.ndarray) -> None:
    """Both dims of a pair share its power of two, and the other dims keep their steps."""
    before = steps(rotated(keys, np.arange(300)), made(keys))
    for pair, factor in ((3, 256), (20, 32)):
        keys[:, 1, [pair, pair + HALF]] *= factor
    scales = made(keys)
    assert scales.exponents[0, 1, [3, 20]] == pytest.approx([8, 5], abs=1)
    others = np.setdiff1d(np.arange(HEAD_DIM), [3, 3 + HALF, 20, 20 + HALF])
    after = steps(rotated(keys, np.arange(300)), scales)
    assert np.median(after[..., others] / before[..., others]) < 1.5


@pytest.mark.parametrize("at", [0, CHUNK_LEN - 300])
def test_a_bias_on_slow_pairs_is_taken_off_wherever_in_a_chunk_a_key_stands(keys: np.ndarray, at: int) -> None:
    """The text stands at a chunk's beginning; what a bias becomes at its end follows from the rotation."""
    here = np.arange(at, at + 300)
    before = steps(rotated(keys, here), made(keys))
    keys[..., [HALF - 1, HALF - 2]] += 100.0
    plain = steps(rotated(keys, here), KVScales.none(replace(CONFIG, head_dim=HEAD_DIM)))
    after = steps(rotated(keys, here), made(keys))
    assert np.median(plain / before) > 20
    assert np.median(after[..., :20] / before[..., :20]) < 1.5


def test_heads_of_a_rank_are_those_of_the_model(keys: np.ndarray) -> None:
    keys[:, 1] *= 3
    keys[:, 1, 5] += 50
    scales = made(keys)
    own = scales.of_heads([[1]])
    np.testing.assert_array_equal(own.frame(0)[:, 0], scales.frame(0)[:, 1])
    two = KVScales(np.concatenate([scales.exponents] * 2), np.concatenate([scales.centres, 2 * scales.centres]))
    crossed = two.of_heads([[1, 0], [0, 1]])
    np.testing.assert_array_equal(crossed.frame(0), two.frame(0)[:, ::-1])
    np.testing.assert_array_equal(crossed.frame(1), two.frame(1))


def test_a_file_gives_back_the_same_scales(keys: np.ndarray, tmp_path: Path) -> None:
    keys[..., 7] *= 1000.0
    scales = replace(made(keys), weights="abc")
    scales.write(tmp_path / "scales.json")
    read = KVScales.from_file(tmp_path / "scales.json")
    assert (read.digest, read.weights) == (scales.digest, "abc")
    np.testing.assert_array_equal(read.centres, scales.centres)
    assert replace(read, centres=read.centres + np.float32(1e-3)).digest != scales.digest


def test_layers_that_int8_moves_too_far_stay_in_16_bits_where_these_are_nearer(tmp_path: Path) -> None:
    none = KVScales.none(replace(CONFIG, num_layers=4))
    scales = none.measured([0.01, 0.2, 0.051, 0.3], [0.0, 0.0, 0.002, 0.4])
    assert scales.in_16_bits == (1, 2), "in the last one 16 bits round as coarsely"
    assert scales.summary().endswith("16 bits: 1 (20.0%), 2 (5.1%)")
    assert scales.digest != none.digest == none.measured([0.01] * 4, [0.0] * 4).digest
    scales.write(tmp_path / "scales.json")
    read = KVScales.from_file(tmp_path / "scales.json")
    assert (read.in_16_bits, read.errors, read.digest) == ((1, 2), (0.01, 0.2, 0.051, 0.3), scales.digest)
    assert read.of_heads([[0]] * len(read.exponents)).in_16_bits == (1, 2)


def test_a_file_of_the_first_format_is_read(tmp_path: Path, keys: np.ndarray) -> None:
    path, scales = tmp_path / "scales.json", made(keys)
    content = {key: scales.as_json()[key] for key in ("weights", "exponents", "centres")}
    path.write_text(json.dumps({"format": 1, **content}))
    read = KVScales.from_file(path)
    assert (read.digest, read.in_16_bits, read.errors) == (scales.digest, (), ())


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"format": 0},
        {"in_16_bits": [2]},
        {"in_16_bits": [1, 0]},
        {"in_16_bits": 1},
        {"errors": [0.1]},
        {"errors": [0.1, None]},
        {"exponents": [[[1000]]]},
        {"exponents": [[[0.5]]]},
        {"centres": [[[1.0]]]},
        {"centres": None},
        {"weights": ...},
    ],
    ids=str,
)
def test_what_is_no_file_of_scales_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "scales.json"
    KVScales.none(CONFIG).write(path)
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    with pytest.raises(ValueError, match=r"scales\.json holds no scales of an 8-bit cache: "):
        KVScales.from_file(path)


def test_scales_of_another_model_are_refused() -> None:
    scales = replace(KVScales.none(CONFIG), weights="a" * 64)
    scales.check_fit(CONFIG, "a" * 64, "file")
    scales.check_fit(CONFIG, "", "file")
    with pytest.raises(ValueError, match=r"file: made for weights aaaaaaaaaaaa\.\.\., these are bbbb.*calibrate-kv"):
        scales.check_fit(CONFIG, "b" * 64, "file")
    with pytest.raises(ValueError, match=r"file: scales of .*layers, KV heads.*another model's"):
        scales.check_fit(replace(CONFIG, num_layers=CONFIG.num_layers + 1), "a" * 64, "file")
