"""load_checkpoint: parameters hold the published values, whatever the dtypes; names and shapes are checked first."""

from __future__ import annotations

import os
import stat

import numpy as np
import paddle
import pytest
from checkpoint_files import write_file, write_sharded

from paddle_qwen1m.parallel.split import Part
from paddle_qwen1m.weights import CheckpointError, LoadingBar, Slot, load_checkpoint

RNG = np.random.default_rng(1)


def parameter(shape, dtype="float32"):
    return paddle.full(shape, 7.0, "float32").astype(dtype)


def whole(tensor):
    return Slot(tensor, 0, tuple(tensor.shape))


def values(tensor):
    return tensor.astype("float32").numpy()


@pytest.fixture
def checkpoint(tmp_path):
    """q, k and v of one layer over two shards, in three dtypes, and a norm."""
    tensors = {
        "q": RNG.standard_normal((6, 4)).astype(np.float32),
        "k": RNG.standard_normal((2, 4)).astype(np.float16),
        "v": (RNG.standard_normal((2, 4)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
        "norm": RNG.standard_normal(4).astype(np.float32),
    }
    write_sharded(
        tmp_path, [{name: tensors[name] for name in ("v", "q")}, {name: tensors[name] for name in ("norm", "k")}]
    )
    wide = dict(tensors, v=(tensors["v"].astype(np.uint32) << 16).view(np.float32))
    return tmp_path, {name: array.astype(np.float32) for name, array in wide.items()}


def fused_slots(dtype="float32"):
    qkv, norm = parameter([10, 4], dtype), parameter([4], dtype)
    slots = {"q": Slot(qkv, 0, (6, 4)), "k": Slot(qkv, 6, (2, 4)), "v": Slot(qkv, 8, (2, 4)), "norm": whole(norm)}
    return qkv, norm, slots


@pytest.mark.parametrize("staging_bytes", [None, 1, 40, 1 << 20])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.0), ("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_fused_parameters_are_filled_row_range_by_row_range(checkpoint, monkeypatch, dtype, tolerance, staging_bytes):
    """In host memory, or, as a GPU's are, through a buffer, whether it holds one row, some or a whole tensor."""
    if staging_bytes is not None:
        monkeypatch.setattr("paddle_qwen1m.weights.loader._is_in_host_memory", lambda _: False)
        monkeypatch.setattr("paddle_qwen1m.weights.loader.UNIT_BYTES", staging_bytes)
    directory, expected = checkpoint
    qkv, norm, slots = fused_slots(dtype)
    load_checkpoint(directory, slots)
    fused = np.concatenate([expected["q"], expected["k"], expected["v"]])
    np.testing.assert_allclose(values(qkv), fused, rtol=tolerance, atol=tolerance * 2.0**-10)
    np.testing.assert_allclose(values(norm), expected["norm"], rtol=tolerance, atol=tolerance * 2.0**-10)


PARTS = {
    "rows": Part(0, ((2, 5),)),
    "columns": Part(1, ((1, 3),)),
    "nothing": Part(0, ((4, 4),)),
    "rows apart": Part(0, ((0, 1), (2, 4), (5, 6))),
    "columns apart": Part(1, ((0, 1), (2, 4))),
}


@pytest.mark.parametrize("on_gpu", [False, True], ids=["host", "staged"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_is_read_and_nothing_else(checkpoint, monkeypatch, part, dtype, on_gpu):
    """Only its bytes are asked of the file, and only its place is written."""
    if on_gpu:
        monkeypatch.setattr("paddle_qwen1m.weights.loader._is_in_host_memory", lambda _: False)
        monkeypatch.setattr("paddle_qwen1m.weights.loader.UNIT_BYTES", 16)
    directory, expected = checkpoint
    held = expected["q"].take([number for one in part.ranges for number in range(*one)], part.axis)
    table = parameter([8, held.shape[1]], dtype)
    asked = load_checkpoint(directory, {"q": Slot(table, 1, (6, 4), part)}, ignore={"k", "v", "norm"})
    assert asked == 4 * held.size
    np.testing.assert_allclose(values(table)[1 : 1 + len(held)], held, rtol=2.0**-8 if dtype == "bfloat16" else 0)
    assert (np.delete(values(table), slice(1, 1 + len(held)), axis=0) == 7.0).all()


def test_a_tensor_that_is_cut_already_is_read_whole(tmp_path):
    piece = RNG.standard_normal((6, 2)).astype(np.float32)
    write_file(tmp_path / "model.safetensors", {"w": piece})
    weight = parameter([6, 2])
    slot = Slot(weight, 0, (6, 4), Part(1, ((2, 4),)))
    with pytest.raises(CheckpointError, match=r"has shape \[6, 2\], the model's config.json asks for \[6, 4\]"):
        load_checkpoint(tmp_path, {"w": slot})
    load_checkpoint(tmp_path, {"w": slot.without_slicing()})
    np.testing.assert_array_equal(values(weight), piece)


def test_only_the_slots_rows_of_a_parameter_are_written(checkpoint):
    directory, expected = checkpoint
    table = parameter([20, 4])
    load_checkpoint(directory, {"q": Slot(table, 5, (6, 4))}, ignore={"k", "v", "norm"})
    np.testing.assert_array_equal(values(table)[5:11], expected["q"])
    assert (np.delete(values(table), slice(5, 11), axis=0) == 7.0).all()


def test_a_layers_parameters_and_views_of_them_are_destinations(tmp_path):
    write_file(tmp_path / "model.safetensors", {"w": RNG.standard_normal((3, 4)).astype(np.float32)})
    weight = paddle.nn.Layer().create_parameter([9, 4])
    load_checkpoint(tmp_path, {"w": Slot(weight[2:8], 1, (3, 4))})
    expected = np.frombuffer((tmp_path / "model.safetensors").read_bytes()[-48:], np.float32).reshape(3, 4)
    np.testing.assert_array_equal(values(weight)[3:6], expected)


def test_missing_extra_and_misshapen_tensors_are_one_error_before_any_read(checkpoint):
    directory, _ = checkpoint
    qkv, _norm, slots = fused_slots()
    slots["k"] = Slot(qkv, 6, (1, 4))
    slots["o"] = whole(parameter([4, 4]))
    del slots["norm"]
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(directory, slots)
    message = str(caught.value)
    assert "missing: tensor 'o' is in none of the files" in message
    assert "model-00002-of-00002.safetensors: tensor 'norm' has no place in the model" in message
    assert "tensor 'k' has shape [2, 4], the model's config.json asks for [1, 4]" in message
    assert str(directory) in message
    assert (values(qkv) == 7.0).all()


def test_a_quantised_tensor_is_refused_before_any_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(
        (63).to_bytes(8, "little") + b'{"w": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}   ' + bytes(4)
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'w' is I8, not one of F32, BF16, F16"):
        load_checkpoint(tmp_path, {"w": whole(parameter([4]))})


def test_rotary_tables_and_ignored_tensors_may_be_there_or_not(tmp_path):
    tensors = {
        "w": np.full((2, 2), 3.0, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(64, np.float32),
        "lm_head.weight": np.ones((2, 2), np.float32),
    }
    write_file(tmp_path / "model.safetensors", tensors)
    weight = parameter([2, 2])
    load_checkpoint(tmp_path, {"w": whole(weight)}, ignore={"lm_head.weight", "absent"})
    assert (values(weight) == 3.0).all()
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.weight' has no place in the model"):
        load_checkpoint(tmp_path, {"w": whole(weight)})


@pytest.mark.parametrize("prefix", ["model.", "qwen2."], ids=["published", "paddlenlp"])
@pytest.mark.parametrize("part", [None, Part(0, ((0, 500),)), Part(0, ((500, 997),))], ids=["whole", "first", "last"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["same type", "narrower"])
@pytest.mark.parametrize("row", [None, 0, 499, 996])
def test_another_head_than_the_tied_embedding_is_spoken_of(tmp_path, caplog, monkeypatch, prefix, part, dtype, row):
    """By the ranks that hold where they differ; the embedding is used."""
    monkeypatch.setattr("paddle_qwen1m.weights.loader.COMPARED_BYTES", 1000)
    embedding = RNG.integers(-9, 9, (997, 8)).astype(np.float32)
    head = embedding.astype(dtype)
    if row is not None:
        head[row, -1] += 1
    write_sharded(tmp_path, [{f"{prefix}embed_tokens.weight": embedding}, {"lm_head.weight": head}])
    begin, end = (0, 997) if part is None else part.ranges[0]
    table = parameter([end - begin, 8])
    slots = {"model.embed_tokens.weight": Slot(table, 0, (997, 8), part)}
    load_checkpoint(tmp_path, slots, ignore={"lm_head.weight"})
    np.testing.assert_array_equal(values(table), embedding[begin:end])
    if row is None or not begin <= row < end:
        assert not caplog.messages
    else:
        (message,) = caplog.messages
        assert (
            "'lm_head.weight' in model-00002-of-00002.safetensors differs from 'model.embed_tokens.weight'" in message
        )
        assert "tie_word_embeddings" in message and str(tmp_path) in message


def test_a_tied_head_of_another_shape_is_spoken_of(tmp_path, caplog):
    tensors = {"model.embed_tokens.weight": np.ones((6, 2), np.float32), "lm_head.weight": np.ones((5, 2), np.float32)}
    write_file(tmp_path / "model.safetensors", tensors)
    load_checkpoint(tmp_path, {"model.embed_tokens.weight": whole(parameter([6, 2]))}, ignore={"lm_head.weight"})
    assert "differs from 'model.embed_tokens.weight'" in caplog.messages[0]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.o_proj.bias", "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.k_norm.weight", "model.layers.0.mlp.down_proj.bias", "model.norm.bias",
        "lm_head.bias", "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.gate.weight",
    ],
)  # fmt: skip
def test_a_tensor_that_would_change_the_mathematics_is_refused_by_name(tmp_path, name):
    write_file(tmp_path / "model.safetensors", {"w": np.ones((2, 2), np.float32), name: np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}' has no place in the model"):
        load_checkpoint(tmp_path, {"w": whole(parameter([2, 2]))}, ignore={"lm_head.weight"})


def test_the_checkpoint_directory_is_only_read(checkpoint):
    directory, _ = checkpoint

    def listing():
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()}

    before = listing()
    for path in directory.iterdir():
        path.chmod(stat.S_IRUSR)
    directory.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        load_checkpoint(directory, fused_slots()[2])
    finally:
        directory.chmod(stat.S_IRWXU)
    assert listing() == before


@pytest.mark.parametrize("terminal, progress, shown", [(True, True, True), (True, False, False), (False, True, False)])
def test_the_progress_bar_is_for_terminals(checkpoint, monkeypatch, capsys, terminal, progress, shown):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with LoadingBar(visible=progress) as bar:
        load_checkpoint(checkpoint[0], fused_slots()[2], bar=bar)
    captured = capsys.readouterr()
    assert ("Loading weights: 100%" in captured.err) == shown
    assert captured.out == ""


@pytest.mark.parametrize(
    "tensor, row, shape, message",
    [
        (lambda: parameter([4, 3]), 2, (3, 3), r"a tensor of shape \(3, 3\) does not fit at row 2"),
        (lambda: parameter([4, 3]), -1, (3, 3), "does not fit at row -1"),
        (lambda: parameter([4, 3]), 0, (4, 2), "does not fit at row 0"),
        (lambda: parameter([4, 3]), 0, (), "does not fit at row 0"),
        (lambda: paddle.zeros([4], "int64"), 0, (4,), "one of float32, bfloat16, float16, got paddle.int64"),
    ],
)
def test_a_slot_that_cannot_hold_its_tensor_is_refused(tensor, row, shape, message):
    with pytest.raises(ValueError, match=message):
        Slot(tensor(), row, shape)


def test_a_slot_in_a_strided_view_is_refused():
    view = parameter([4, 6])[:, ::2]
    if view.is_contiguous():
        pytest.skip("this Paddle copies column slices: no strided view to refuse")
    with pytest.raises(ValueError, match="is not contiguous: what is read into it would be lost"):
        Slot(view, 0, (4, 3))


def test_no_file_stays_open(checkpoint):
    before = len(os.listdir("/proc/self/fd"))
    load_checkpoint(checkpoint[0], fused_slots()[2])
    assert len(os.listdir("/proc/self/fd")) == before
