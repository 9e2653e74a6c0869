"""The safetensors reader: equal to the safetensors package's files, and one clear error for each way to be corrupt."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import header_of, write_file, write_raw

from paddle_qwen1m.dtypes import STORAGE
from paddle_qwen1m.weights import CheckpointError
from paddle_qwen1m.weights.safetensors import TILE_ELEMENTS, read_header, read_rows

RNG = np.random.default_rng(0)


def bfloat16_reference(values):
    """float32 to bfloat16 by exact comparison with the two neighbours in float64, ties to the even one."""
    down = (values.view(np.uint32) >> 16).astype(np.uint32)
    low = (down << 16).view(np.float32).astype(np.float64)
    high = ((down + 1) << 16).view(np.float32).astype(np.float64)
    exact = values.astype(np.float64)
    high = np.where(np.isinf(high), np.sign(low) * 2.0**128, high)
    nearer_high = np.abs(high - exact) < np.abs(exact - low)
    tie = np.abs(high - exact) == np.abs(exact - low)
    return (down + (nearer_high | (tie & (down % 2 == 1)))).astype(np.uint16)


def load(path, name, dtype, rows=None):
    info = read_header(path)[name]
    first, last = rows or (0, info.shape[0] if info.shape else 1)
    out = np.empty((last - first) * int(np.prod(info.shape[1:])), STORAGE[dtype])
    with path.open("rb", buffering=0) as file:
        read_rows(file, name, info, out, dtype, rows)
    return out.reshape((last - first, *info.shape[1:]))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_reads_what_the_safetensors_package_wrote(path):
    tensors = {
        "a.weight": RNG.standard_normal((5, 7)).astype(np.float32),
        "b.bias": RNG.standard_normal(11).astype(np.float16),
        "empty": np.empty((0, 3), np.float32),
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    assert set(read_header(path)) == set(tensors)
    for name, array in tensors.items():
        dtype = {np.dtype("f4"): "F32", np.dtype("f2"): "F16"}[array.dtype]
        np.testing.assert_array_equal(load(path, name, dtype), array)


def test_reads_bfloat16_that_the_safetensors_package_wrote(path):
    bits = RNG.integers(0, 0x7F80, (9, 4)).astype(np.uint16)
    safetensors.numpy.save_file({"w": bits.view(ml_dtypes.bfloat16)}, path)
    assert read_header(path)["w"].dtype == "BF16"
    np.testing.assert_array_equal(load(path, "w", "BF16"), bits)
    np.testing.assert_array_equal(load(path, "w", "F32"), (bits.astype(np.uint32) << 16).view(np.float32))


def test_narrowing_to_bfloat16_rounds_to_nearest_even(path):
    bits = np.concatenate([RNG.integers(0, 0x7F80_0000, 100_000), RNG.integers(0, 0x7F80, 5_000) << 16 | 0x8000])
    values = np.concatenate([bits, bits | 0x8000_0000]).astype(np.uint32).view(np.float32)
    write_file(path, {"w": values})
    np.testing.assert_array_equal(load(path, "w", "BF16"), bfloat16_reference(values))


def test_infinities_and_nans_survive_every_conversion(path):
    low_bits_only = np.array([0x7F80_0001, 0xFFFF_FFFF], np.uint32).view(np.float32)
    write_file(path, {"w": np.concatenate([np.array([np.inf, -np.inf], np.float32), low_bits_only])})
    for dtype in ("BF16", "F16", "F32"):
        got = load(path, "w", dtype)
        wide = (got.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else got
        assert list(wide[:2]) == [np.inf, -np.inf] and np.isnan(wide[2:]).all()


def test_float16_and_bfloat16_convert_through_float32(path):
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    bits = np.arange(0x3000, 0x4780, dtype=np.uint16)
    write_file(path, {"half": halves, "brain": bits})
    np.testing.assert_array_equal(load(path, "half", "F32"), halves.astype(np.float32))
    np.testing.assert_array_equal(load(path, "half", "BF16"), bfloat16_reference(halves.astype(np.float32)))
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(load(path, "brain", "F16"), wide.astype(np.float16))


def test_a_value_beyond_float16_is_refused(path):
    write_file(path, {"w": np.array([1.0, 1e5], np.float32)})
    with pytest.raises(CheckpointError, match=r"tensor 'w' holds 100000, beyond float16's 65504: load it as bfloat16"):
        load(path, "w", "F16")


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_row_ranges_and_tensors_of_several_tiles(path, dtype):
    array = RNG.standard_normal((TILE_ELEMENTS // 512 + 5, 1031)).astype(np.float32)
    write_file(path, {"first": np.zeros(3, np.float32), "w": array})
    expected = array if dtype == "F32" else bfloat16_reference(array)
    np.testing.assert_array_equal(load(path, "w", dtype), expected)
    np.testing.assert_array_equal(load(path, "w", dtype, rows=(1000, 1777)), expected[1000:1777])
    assert load(path, "w", dtype, rows=(5, 5)).size == 0
    with pytest.raises(ValueError, match=r"rows \[5, 9999\) are not within"):
        load(path, "w", dtype, rows=(5, 9999))


def test_a_file_cut_after_its_header_was_read(path):
    write_file(path, {"w": np.ones((4, 4), np.float32)})
    info = read_header(path)["w"]
    path.write_bytes(path.read_bytes()[:-8])
    with path.open("rb", buffering=0) as file, pytest.raises(CheckpointError, match="'w': the file ended at byte"):
        read_rows(file, "w", info, np.empty(16, np.float32), "F32")


def test_a_dtype_that_is_no_weight_is_named(path):
    write_raw(path, {"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, bytes(4))
    with pytest.raises(CheckpointError, match=r"tensor 'w' is F8_E4M3; this loader reads F32, BF16, F16"):
        load(path, "w", "F32")


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, message",
    [
        (b'{"w": ', "its header is not valid JSON"),
        (b"\xff\xfe{}", "its header is not valid JSON"),
        (b"[" * 100_000, "its header is not valid JSON"),
        (b"[1, 2]", "its header is not a JSON object"),
        (b'{"w": 1, "w": 2}', "'w' appears twice"),
        ({"w": 7}, "tensor 'w': its header entry is 7, not an object"),
        ({"w": entry(0, 16, dtype="F31")}, "tensor 'w': unknown dtype 'F31'"),
        ({"w": entry(0, 16, dtype=["F32"])}, r"tensor 'w': unknown dtype \['F32'\]"),
        ({"w": entry(0, 16, shape=[-4, -1])}, r"tensor 'w': its shape is \[-4, -1\], not a list of sizes"),
        ({"w": entry(0, 16, shape=[4.0])}, r"tensor 'w': its shape is \[4.0\]"),
        ({"w": {"dtype": "F32", "shape": [4]}}, "tensor 'w': its data_offsets are None"),
        ({"w": entry(16, 0, shape=[4])}, r"tensor 'w': its data_offsets are \[16, 0\]"),
        ({"w": entry(0, 16, shape=[3])}, r"tensor 'w': .* hold 16 bytes, but shape \[3\] in F32 needs 12"),
        ({"v": entry(0, 12), "w": entry(8, 16)}, "tensor 'w' overlaps 'v'"),
        ({"v": entry(0, 4), "w": entry(8, 16)}, "tensor 'w' leaves a hole of 4 bytes after 'v'"),
        ({"w": entry(4, 16)}, "tensor 'w' leaves a hole of 4 bytes after 'the header'"),
        ({"v": entry(0, 8), "w": entry(8, 20)}, "is truncated: .* tensor 'w' reaches to byte"),
        ({"w": entry(0, 12)}, "its last tensor 'w' ends at byte"),
        ({"w": entry(2**62, 2**62 + 16)}, "tensor 'w' leaves a hole"),
    ],
)
def test_a_corrupt_header_names_file_and_tensor(path, header, message):
    write_raw(path, header, bytes(16))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "download it again" in str(caught.value)


def test_truncated_files_and_files_of_another_kind(path):
    whole = {"v": np.ones(4, np.float32), "w": np.ones((8, 4), np.float32)}
    write_file(path, whole)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            read_header(path)
    path.write_bytes(b"PK\x03\x04 a zip, not safetensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file or is corrupt: its header would be"):
        read_header(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer, not the weights: fetch them"):
        read_header(path)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read: No such file"):
        read_header(path.with_name("absent.safetensors"))


def test_any_single_byte_of_the_header_may_be_wrong_without_another_exception(path):
    tensors = {"v": np.ones(4, np.float32), "w": np.ones((8, 4), np.float16)}
    write_file(path, tensors)
    content = bytearray(path.read_bytes())
    for position in range(8 + len(json.dumps(header_of(tensors)))):
        for flip in (0x01, 0x10, 0x80):
            content[position] ^= flip
            path.write_bytes(content)
            try:
                read_header(path)
            except CheckpointError as error:
                assert str(path) in str(error)
            content[position] ^= flip
    assert struct.unpack("<Q", content[:8])[0] == len(json.dumps(header_of(tensors)))
