"""The converter: every form comes back bit-exact, says what stock PaddleNLP expects, and is loaded by this package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
import safetensors
import safetensors.numpy
from checkpoint_files import write_file

from paddle_qwen1m import cli
from paddle_qwen1m.commands.arguments import size as read_size
from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM
from paddle_qwen1m.parallel.split import degrees
from paddle_qwen1m.weights import Checkpoint, CheckpointError, Slot, load_checkpoint
from paddle_qwen1m.weights.convert import ConversionError, convert
from paddle_qwen1m.weights.record import RECORD_NAME
from paddle_qwen1m.weights.sharding import recorded_placement
from paddle_qwen1m.weights.tensors import part_of, published_shapes
from paddle_qwen1m.weights.window import transpose

ROOT = Path(__file__).parents[2]
NEEDLE = ROOT / "checkpoints" / "needle"
REFERENCES = sorted(path.parent for path in (ROOT / "tests" / "data" / "reference").glob("*/config.json"))
PUBLISHED = [NEEDLE, *REFERENCES]


def largest_degree(directory):
    return degrees(ModelConfig.from_dict(json.loads((directory / "config.json").read_text())))[-1]


SPLITTABLE = [path for path in PUBLISHED if largest_degree(path) > 1]


def contents(directory):
    """Every file but the converter's record, by its path."""
    files = (path for path in Path(directory).rglob("*") if path.is_file() and path.name != RECORD_NAME)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def published_contents(directory):
    return {name: data for name, data in contents(directory).items() if not name.endswith(".npz")}


def stored(path):
    """Tensors of one file as they are stored, by the safetensors library; bfloat16 as its bits."""
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    raw = safetensors.deserialize(Path(path).read_bytes())
    types = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    tensors = {name: np.frombuffer(entry["data"], types[entry["dtype"]]).reshape(entry["shape"]) for name, entry in raw}
    return tensors, metadata


def all_stored(directory):
    return {name: array for path in Path(directory).glob("*.safetensors") for name, array in stored(path)[0].items()}


@pytest.fixture(params=PUBLISHED, ids=lambda path: path.name)
def published(request):
    return request.param


def test_paddlenlps_form_and_back_gives_the_same_bytes(published, tmp_path):
    convert(published, tmp_path / "np", "paddlenlp", verify=True)
    convert(tmp_path / "np", tmp_path / "hf", "huggingface", verify=True)
    assert contents(tmp_path / "hf") == published_contents(published)


@pytest.mark.parametrize("published", SPLITTABLE, ids=lambda path: path.name)
def test_a_rank_set_and_back_gives_the_same_bytes(published, tmp_path):
    convert(published, tmp_path / "tp", "tensor-parallel", degree=largest_degree(published), verify=True)
    convert(tmp_path / "tp", tmp_path / "hf", "huggingface")
    assert contents(tmp_path / "hf") == published_contents(published)


def test_every_form_leads_to_every_other(tmp_path):
    convert(NEEDLE, tmp_path / "np", "paddlenlp")
    convert(tmp_path / "np", tmp_path / "tp2", "tensor-parallel", degree=2)
    convert(tmp_path / "tp2", tmp_path / "tp4", "tensor-parallel", degree=4)
    convert(tmp_path / "tp4", tmp_path / "np again", "paddlenlp")
    assert contents(tmp_path / "np again") == contents(tmp_path / "np")
    convert(NEEDLE, tmp_path / "tp4 at once", "tensor-parallel", degree=4)
    assert contents(tmp_path / "tp4 at once") == contents(tmp_path / "tp4")


def test_paddlenlps_form_has_its_names_orientation_and_metadata(published, tmp_path):
    """Stated here once more, independently: all linears are transposed, embeddings, norms and biases are not."""
    convert(published, tmp_path / "np", "paddlenlp")
    original, converted = all_stored(published), all_stored(tmp_path / "np")
    expected = {}
    for name, array in original.items():
        parts = name.split(".")
        linear = parts[-1] == "weight" and parts[-2] in {"q_proj", "k_proj", "v_proj", "o_proj"} | {
            "gate_proj",
            "up_proj",
            "down_proj",
            "lm_head",
        }
        expected[name.replace("model.", "qwen2.", 1)] = array.T if linear else array
    assert expected.keys() == converted.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(converted[name], array)
    for path in (tmp_path / "np").glob("*.safetensors"):
        assert stored(path)[1] == {"format": "np"}


def without_budgets(directory):
    shutil.copytree(NEEDLE, directory, ignore=shutil.ignore_patterns("sparse_attention_config*"))
    return directory


def test_a_rank_holds_its_part_of_every_tensor(tmp_path):
    convert(without_budgets(tmp_path / "model"), tmp_path / "tp", "tensor-parallel", degree=4)
    config = json.loads((tmp_path / "tp" / "config.json").read_text())
    assert (config["tensor_parallel_size"], config["tensor_parallel_heads"]) == (4, ["0-0 1-1 2-2 3-3"] * 4)
    original = all_stored(NEEDLE)
    for rank in range(4):
        held = all_stored(tmp_path / "tp" / f"rank-{rank:05d}-of-00004")
        assert held.keys() == original.keys()
        layer = "model.layers.1."
        share = {name: array.shape[0] // 4 for name, array in original.items()}
        for name in ("self_attn.q_proj.weight", "self_attn.q_proj.bias", "mlp.gate_proj.weight"):
            step = share[layer + name]
            np.testing.assert_array_equal(held[layer + name], original[layer + name][rank * step : (rank + 1) * step])
        key = layer + "self_attn.k_proj.weight"  # two KV heads, each on two ranks
        np.testing.assert_array_equal(held[key], original[key][rank // 2 * 128 : (rank // 2 + 1) * 128])
        down = layer + "mlp.down_proj.weight"
        np.testing.assert_array_equal(held[down], original[down][:, rank * 192 : (rank + 1) * 192])
        np.testing.assert_array_equal(held["model.norm.weight"], original["model.norm.weight"])


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A random model of 8 KV heads with 2 query heads each, and the budgets that make even ranks of 2 of them:
    {0, 3}, {1, 2}, {4, 7}, {5, 6} in its first layer, the other way round in its second.
    """
    directory = tmp_path_factory.mktemp("eight") / "model"
    directory.mkdir()
    config = json.loads((NEEDLE / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 128}
    config |= {"head_dim": 64, "intermediate_size": 64, "vocab_size": 64}
    rng = np.random.default_rng(0)
    shapes = published_shapes(ModelConfig.from_dict(config))
    write_file(
        directory / "model.safetensors",
        {name: rng.integers(0, 2**14, shape).astype(np.uint16) for name, shape in shapes.items()},
    )
    (directory / "config.json").write_text(json.dumps(config))
    sizes = [1100, 700, 800, 1000, 600, 210, 300, 500]  # {4, 7} and {5, 6} are as even as what is left can be
    heads = [{str(head): ["vertical_and_slash", sizes[head // 2], 100, 1.0] for head in range(16)} for _ in range(2)]
    (directory / "sparse_attention_config.json").write_text(json.dumps(heads))
    return directory


def heads_of(words):
    """ "0-1,6-7" as heads."""
    ranges = [tuple(map(int, one.split("-"))) for one in words.split(",")]
    return [head for begin, end in ranges for head in range(begin, end + 1)]


def test_a_rank_set_records_which_heads_its_ranks_have_and_holds_them(eight, tmp_path):
    """As few keys on the busiest rank as can be, by the budgets beside the weights; the way back is bit-exact."""
    convert(eight, tmp_path / "tp", "tensor-parallel", degree=4)
    config = json.loads((tmp_path / "tp" / "config.json").read_text())
    original, placed = all_stored(eight), config["tensor_parallel_heads"]
    sizes = np.repeat([1100, 700, 800, 1000, 600, 210, 300, 500], 2) + 100
    for layer, line in enumerate(placed):
        ranks = [heads_of(words) for words in line.split()]
        assert sorted(head for heads in ranks for head in heads) == list(range(16))
        assert max(int(sizes[heads].sum()) for heads in ranks) == 2 * (1100 + 210 + 200)
        for rank, heads in enumerate(ranks):
            held = all_stored(tmp_path / "tp" / f"rank-{rank:05d}-of-00004")
            rows = np.concatenate([np.arange(64 * head, 64 * head + 64) for head in heads])
            kv_rows = np.concatenate([np.arange(64 * head, 64 * head + 64) for head in sorted({h // 2 for h in heads})])
            own = f"model.layers.{layer}.self_attn."
            for name in (own + "q_proj.weight", own + "q_proj.bias"):
                np.testing.assert_array_equal(held[name], original[name][rows])
            for name in (own + "k_proj.weight", own + "k_proj.bias", own + "v_proj.weight", own + "v_proj.bias"):
                np.testing.assert_array_equal(held[name], original[name][kv_rows])
            np.testing.assert_array_equal(held[own + "o_proj.weight"], original[own + "o_proj.weight"][:, rows])
    assert placed != ["0-3 4-7 8-11 12-15"] * 2
    convert(tmp_path / "tp", tmp_path / "hf", "huggingface")
    assert contents(tmp_path / "hf") == contents(eight)


def test_a_record_of_heads_that_does_not_fit_is_refused(eight, tmp_path):
    convert(eight, tmp_path / "tp", "tensor-parallel", degree=2)
    config = json.loads((tmp_path / "tp" / "config.json").read_text())
    for heads, message in (
        (["0-7 8-15"], "placed for"),
        (["0-7 8-15"] * 2 + ["x"], "2 words"),
        ([0] * 2, "a list of texts"),
    ):
        (tmp_path / "tp" / "config.json").write_text(json.dumps({**config, "tensor_parallel_heads": heads}))
        with pytest.raises(CheckpointError, match=rf"config.json: tensor_parallel_heads.*{message}"):
            convert(tmp_path / "tp", tmp_path / "out", "huggingface")


@pytest.mark.parametrize("name", ["needle", "group1_tied_f32", "group7_d128_tied_bf16", "group5_f16"])
def test_from_pretrained_loads_paddlenlps_form(name, tmp_path):
    directory = next(path for path in PUBLISHED if path.name == name)
    convert(directory, tmp_path / "np", "paddlenlp")
    one, other = (Qwen2OneMForCausalLM.from_pretrained(str(path)).model for path in (directory, tmp_path / "np"))
    for (name, expected), (_, got) in zip(one.named_buffers(), other.named_buffers()):
        assert bool((expected == got).all()), name


def test_blocks_and_panels_of_any_size_give_the_same_files(tmp_path, monkeypatch):
    block_bytes = 10_000
    convert(NEEDLE, tmp_path / "np", "paddlenlp")
    convert(NEEDLE, tmp_path / "tp", "tensor-parallel", degree=4)
    monkeypatch.setattr("paddle_qwen1m.weights.window.BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("paddle_qwen1m.weights.stream.PANEL_BYTES", 3 * block_bytes)
    monkeypatch.setattr("paddle_qwen1m.weights.stream.TRANSPOSED_PANEL_BYTES", 50_000)
    convert(NEEDLE, tmp_path / "np2", "paddlenlp")
    assert contents(tmp_path / "np2") == contents(tmp_path / "np")
    convert(tmp_path / "np", tmp_path / "tp2", "tensor-parallel", degree=4)
    assert contents(tmp_path / "tp2") == contents(tmp_path / "tp")
    convert(tmp_path / "tp", tmp_path / "hf", "huggingface")
    assert contents(tmp_path / "hf") == contents(NEEDLE)


def test_tiles_transpose_any_shape(rng):
    for shape in ((1, 1), (64, 512), (65, 513), (3, 2000), (2000, 3)):
        source, target = rng.integers(0, 1 << 16, shape).astype(np.uint16), np.zeros(shape[::-1], np.uint16)
        transpose(source, target)
        np.testing.assert_array_equal(target, source.T)


def test_a_dtype_widens_exactly_and_comes_back(tmp_path):
    convert(NEEDLE, tmp_path / "f32", "paddlenlp", dtype="float32")
    assert json.loads((tmp_path / "f32" / "config.json").read_text())["torch_dtype"] == "float32"
    wide, bits = all_stored(tmp_path / "f32"), all_stored(NEEDLE)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(wide["qwen2.embed_tokens.weight"].view(np.uint32), bits.astype(np.uint32) << 16)
    convert(tmp_path / "f32", tmp_path / "hf", "huggingface", dtype="bfloat16")
    assert contents(tmp_path / "hf") == contents(NEEDLE)


@pytest.mark.parametrize("dtype, view", [("bfloat16", "uint16"), ("float16", "float16")])
def test_a_dtype_narrows_to_nearest_even(tmp_path, dtype, view):
    """Paddle's own cast says what that is."""
    source = next(path for path in REFERENCES if path.name == "one_kv_head_d128_f32")
    convert(source, tmp_path / "narrow", "huggingface", dtype=dtype)
    narrow = all_stored(tmp_path / "narrow")
    for name, array in all_stored(source).items():
        expected = paddle.to_tensor(array).astype(dtype).numpy().view(view)
        np.testing.assert_array_equal(narrow[name], expected)
    Qwen2OneMForCausalLM.from_pretrained(str(tmp_path / "narrow"))


def test_a_shard_size_distributes_the_tensors_anew(tmp_path):
    convert(NEEDLE, tmp_path / "small", "huggingface", max_shard_bytes=2_000_000)
    shards = sorted(path.name for path in (tmp_path / "small").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 8
    for shard in shards:
        assert sum(array.nbytes for array in stored(tmp_path / "small" / shard)[0].values()) <= 2_000_000
    convert(tmp_path / "small", tmp_path / "one", "huggingface", max_shard_bytes=1 << 30)
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    original, one = all_stored(NEEDLE), all_stored(tmp_path / "one")
    assert original.keys() == one.keys()
    assert all((original[name] == one[name]).all() for name in original)


def test_a_tied_checkpoint_that_also_holds_lm_head_comes_back(tmp_path):
    source = next(path for path in REFERENCES if path.name == "group1_tied_f32")
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    (tmp_path / "src").mkdir()
    shutil.copy(source / "config.json", tmp_path / "src")
    safetensors.numpy.save_file(tensors, tmp_path / "src" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "src", tmp_path / "np", "paddlenlp")
    Qwen2OneMForCausalLM.from_pretrained(str(tmp_path / "np"))
    assert all_stored(tmp_path / "np")["lm_head.weight"].shape == tensors["lm_head.weight"].shape
    convert(tmp_path / "np", tmp_path / "hf", "huggingface")
    assert contents(tmp_path / "hf") == contents(tmp_path / "src")


def run(*arguments):
    return cli.main(["convert", *map(str, arguments)])


def test_the_command_converts_verifies_and_knows_what_is_done(tmp_path, capsys):
    arguments = (NEEDLE, tmp_path / "np", "--format", "paddlenlp", "--verify")
    assert run(*arguments) == 0
    assert "paddlenlp, 3 files of weights" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "np").iterdir()}
    assert run(*arguments) == 0
    assert "3 of them there already, verified" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "np").iterdir()} == before


def test_verification_finds_a_flipped_bit_and_the_next_run_writes_that_file_again(tmp_path, capsys):
    arguments = (NEEDLE, tmp_path / "np", "--format", "paddlenlp", "--verify")
    assert run(*arguments) == 0
    good = contents(tmp_path / "np")
    damaged = tmp_path / "np" / "model-00002-of-00003.safetensors"
    with damaged.open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)[0]
        file.seek(-1000, 2)
        file.write(bytes([byte ^ 1]))
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "np").glob("model-*") if path != damaged}
    assert run(*arguments) == 2
    assert damaged.name in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="interrupted"):
        Checkpoint(tmp_path / "np")
    assert run(*arguments) == 0
    assert contents(tmp_path / "np") == good
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_a_dry_run_writes_nothing_and_names_every_file(tmp_path, capsys):
    assert run(NEEDLE, tmp_path / "tp", "--format", "tensor-parallel", "--tensor-parallel-size", 2, "--dry-run") == 0
    assert not (tmp_path / "tp").exists()
    printed = capsys.readouterr().out
    convert(NEEDLE, tmp_path / "tp", "tensor-parallel", degree=2)
    for name in contents(tmp_path / "tp"):
        assert name in printed
    assert f"{(tmp_path / 'tp/rank-00001-of-00002/model-00002-of-00003.safetensors').stat().st_size:,}" in printed


def test_a_dry_run_of_the_14b_needs_its_index_and_config_alone(tmp_path, capsys):
    config = json.loads((NEEDLE / "config.json").read_text())
    config.update(
        hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=48, vocab_size=152064
    )
    config.update(num_key_value_heads=8, tie_word_embeddings=False)
    names = list(published_shapes(ModelConfig.from_dict(config)))
    weight_map = {
        name: f"model-{1 + number * 8 // len(names):05d}-of-00008.safetensors" for number, name in enumerate(names)
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 29540067328}, "weight_map": weight_map})
    )
    target = tmp_path.with_name("out")
    assert run(tmp_path, target, "--format", "paddlenlp", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "8 of these are not there" in printed
    assert printed.splitlines()[-1].startswith("8 files of weights, 29,540,1")  # the published total, and headers
    assert run(tmp_path, target, "--format", "tensor-parallel", "--tensor-parallel-size", 8, "--dry-run") == 0
    assert "rank-00007-of-00008/model-00008-of-00008.safetensors" in capsys.readouterr().out
    assert run(tmp_path, target, "--format", "paddlenlp") == 1
    assert "is missing" in capsys.readouterr().err and not target.exists()


@pytest.mark.parametrize("metadata", [{"total_size": 1}, {"total_size": "17843200", "made_by": "x"}, None, []])
def test_a_careless_index_is_converted_there_and_back(tmp_path, metadata):
    """The way back has the size that is true, and all else as it was."""
    source = shutil.copytree(NEEDLE, tmp_path / "source")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": metadata}))
    convert(source, tmp_path / "np", "paddlenlp")
    convert(tmp_path / "np", tmp_path / "back", "huggingface")
    back = json.loads((tmp_path / "back" / index.name).read_text())
    true = json.loads((NEEDLE / index.name).read_text())["metadata"]["total_size"]
    assert back["metadata"] == {**(metadata or {}), "total_size": true}
    for shard in NEEDLE.glob("*.safetensors"):
        assert (tmp_path / "back" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--format", "tensor-parallel"), "at least 2"),
        (("--format", "tensor-parallel", "--tensor-parallel-size", 3), "must be one of 1, 2, 4"),
        (("--format", "paddlenlp", "--tensor-parallel-size", 2), "needs the format tensor-parallel"),
    ],
)
def test_a_degree_that_does_not_fit_is_refused(tmp_path, capsys, options, message):
    assert run(NEEDLE, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["0", "5 GB of it", "-1", "GB"])
def test_a_shard_size_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(SystemExit):
        run(NEEDLE, tmp_path / "out", "--format", "paddlenlp", "--max-shard-size", text)


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("512MiB", 512 << 20), ("1000", 1000), ("2 kb", 2000)])
def test_shard_sizes_are_read(text, size):
    assert read_size(text) == size


def test_source_and_destination_lie_apart(tmp_path):
    source = shutil.copytree(NEEDLE, tmp_path / "source")
    before = contents(tmp_path)
    for destination, message in (
        (source, "the source itself"),
        (source / "inside", "inside one another"),
        (tmp_path, "inside one another"),
        (source / "config.json", "inside one another"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(source, destination, "paddlenlp")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="is a file"):
        convert(source, tmp_path / "file", "paddlenlp")
    (tmp_path / "file").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["needle", "group2_sharded_bf16", "group1_tied_f32", "eight"])
def test_a_rank_gets_the_same_from_every_form(name, eight, tmp_path):
    """And asks the files for its part alone, in PaddleNLP's form too; heads of a rank need not be neighbours."""
    directory = next((path for path in PUBLISHED if path.name == name), eight)
    degree = 4 if directory == eight else largest_degree(directory)
    convert(directory, tmp_path / "np", "paddlenlp")
    convert(directory, tmp_path / "tp", "tensor-parallel", degree=degree)
    model = ModelConfig.from_dict(json.loads((directory / "config.json").read_text()))
    shapes = published_shapes(model)
    placement = recorded_placement(json.loads((tmp_path / "tp" / "config.json").read_text()), model)
    for rank in range(degree):

        def slots(rank=rank):
            places = {}
            for tensor, shape in shapes.items():
                part = part_of(model, tensor, placement, rank)
                held = shape if part is None else (*shape[: part.axis], part.size, *shape[part.axis + 1 :])
                places[tensor] = Slot(paddle.zeros(held, model.dtype), 0, shape, part)
            return places

        sliced, from_paddlenlp = slots(), slots()
        asked = load_checkpoint(directory, sliced)
        assert load_checkpoint(tmp_path / "np", from_paddlenlp) == asked
        own = {tensor: slot.without_slicing() for tensor, slot in slots().items()}
        assert load_checkpoint(tmp_path / "tp" / f"rank-{rank:05d}-of-{degree:05d}", own) == asked
        for tensor, slot in sliced.items():
            assert bool((slot.tensor == from_paddlenlp[tensor].tensor).all()), tensor
            assert bool((slot.tensor == own[tensor].tensor).all()), tensor
