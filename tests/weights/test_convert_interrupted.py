"""The converter when things go wrong: killed anywhere it goes on; what it refuses leaves nothing that looks whole."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from synthetic_checkpoint import write_checkpoint

from paddle_qwen1m import cli
from paddle_qwen1m.weights import Checkpoint, CheckpointError
from paddle_qwen1m.weights import convert as converting
from paddle_qwen1m.weights.convert import ConversionError, convert
from paddle_qwen1m.weights.record import RECORD_NAME, Record

NEEDLE = Path(__file__).parents[2] / "checkpoints" / "needle"
FORMS = {
    "huggingface": {"form": "huggingface"},
    "paddlenlp": {"form": "paddlenlp"},
    "tensor-parallel": {"form": "tensor-parallel", "degree": 2},
}

# Dies by SIGKILL after exactly that many bytes of weights, when so many shards are finished (a disk may be slow to sync
# them), or before that call of a function that makes things durable.
KILLED = """
import json, os, signal, sys, threading
from paddle_qwen1m.weights import convert, writer

source, destination, options, point, limit, shards = sys.argv[1:]
limit, seen, finished = int(limit), 0, threading.Semaphore(0)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def counted(function):
    def call(*arguments, **keywords):
        global seen
        seen += 1
        if seen > limit:
            die()
        return function(*arguments, **keywords)

    return call


if point == "bytes":
    write, replace = writer.OutputFile.write, os.replace

    def write_until(file, data):
        global seen
        if seen + len(data) > limit:
            write(file, data[: limit - seen])
            for _ in range(int(shards)):
                finished.acquire()
            die()
        seen += len(data)
        write(file, data)

    def replace_and_count(source, destination):
        replace(source, destination)
        if str(destination).endswith(".safetensors"):
            finished.release()

    writer.OutputFile.write, os.replace = write_until, replace_and_count
else:
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
options = json.loads(options)
convert.convert(source, destination, options.pop("form"), progress=False, **options)
"""


def killed(source, destination, options, point, limit, shards=0):
    """Whether the conversion was killed before its end."""
    arguments = [str(source), str(destination), json.dumps(options), point, str(limit), str(shards)]
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, *arguments], capture_output=True, timeout=120)
    assert run.returncode in (0, -9), run.stderr.decode()[-2000:]
    return run.returncode == -9


def identical(one, other):
    names = [{path.relative_to(root) for path in root.rglob("*")} for root in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if (one / name).is_file():
            assert filecmp.cmp(one / name, other / name, shallow=False), name


def state(directory):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.rglob("*.safetensors")}


def kill_and_resume(source, destination, options, point, limit, expected, shards=0):
    """Returns the number of shards that were finished when the conversion was killed, None when it was not."""
    if not killed(source, destination, options, point, limit, shards):
        identical(destination, expected)
        return None
    finished = state(destination) if destination.exists() else {}
    if destination.exists() and (destination / RECORD_NAME).exists() and not Record.read(destination).complete:
        for directory in (destination, *destination.glob("rank-*")):
            with pytest.raises(CheckpointError, match="interrupted"):
                Checkpoint(directory)
    for path in finished:
        assert filecmp.cmp(path, expected / path.relative_to(destination), shallow=False)
    options = dict(options)
    convert(source, destination, options.pop("form"), progress=False, **options)
    after = state(destination)
    assert {path: after[path] for path in finished} == finished
    identical(destination, expected)
    return len(finished)


def converted(source, destination, options):
    options = dict(options)
    convert(source, destination, options.pop("form"), progress=False, **options)
    return destination


@pytest.fixture
def small(tmp_path):
    """About 1 MB in 3 shards."""
    shapes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    return write_checkpoint(tmp_path / "source", 3, num_hidden_layers=2, vocab_size=512, **shapes)


@pytest.mark.parametrize("form", FORMS)
def test_killed_at_every_sync_and_rename_it_goes_on(small, tmp_path, form):
    expected = converted(small, tmp_path / "expected", FORMS[form])
    calls, step = 0, 2 if form == "paddlenlp" else 7
    while kill_and_resume(small, tmp_path / f"at {calls}", FORMS[form], "calls", calls, expected) is not None:
        calls += step
    assert calls > 20


@pytest.mark.parametrize("form", FORMS)
def test_killed_while_it_writes_it_goes_on(small, tmp_path, form):
    expected = converted(small, tmp_path / "expected", FORMS[form])
    total = sum(path.stat().st_size for path in expected.rglob("*.safetensors"))
    finished = [
        kill_and_resume(small, tmp_path / f"at {limit}", FORMS[form], "bytes", limit, expected)
        for limit in (1, total // 2, total - 1)
    ]
    assert finished[0] == 0 and None not in finished


@pytest.mark.slow
def test_half_a_gigabyte_in_nine_shards_is_killed_27_times(tmp_path):
    shapes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = write_checkpoint(tmp_path / "source", 9, num_hidden_layers=16, vocab_size=8192, **shapes)
    for form, options in FORMS.items():
        expected = converted(source, tmp_path / "expected", options)
        total = sum(path.stat().st_size for path in expected.rglob("*.safetensors"))
        assert total >= 500_000_000
        for kill in range(9):
            # from beyond the second shard to the last bytes, at no round place
            limit = total * 3 // 9 + kill * (total * 6 // 9) // 9 + 12_345 * kill
            finished = kill_and_resume(source, tmp_path / "out", options, "bytes", limit, expected, shards=1)
            print(f"{form}: killed after {limit:,} of {total:,} bytes with {finished} shards finished")
            assert finished is not None and finished >= 1
            shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "expected")


def snapshot(directory):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


def truncate(source):
    path = source / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_header(source):
    path = source / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[8] ^= 0xFF
    path.write_bytes(data)


def swap(source):
    one, other = (source / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    one.rename(source / "aside")
    other.rename(one)
    (source / "aside").rename(other)


def lose_a_shard(source):
    (source / "model-00003-of-00003.safetensors").unlink()


def change_the_config(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_size": 256}))


def lose_the_config(source):
    (source / "config.json").unlink()


DAMAGES = {
    truncate: "truncated",
    corrupt_header: "corrupt",
    swap: "is in the index, not in the file",
    lose_a_shard: "missing",
    change_the_config: "config.json asks for",
    lose_the_config: "config.json cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_source_is_refused_before_anything_is_written(small, tmp_path, capsys, damage):
    damage(small)
    before = snapshot(small)
    assert cli.main(["convert", str(small), str(tmp_path / "out"), "--format", "paddlenlp"]) == 1
    error = capsys.readouterr().err
    assert DAMAGES[damage] in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and snapshot(small) == before


def test_a_rank_set_with_a_missing_or_foreign_rank_is_refused(small, tmp_path):
    convert(small, tmp_path / "tp", "tensor-parallel", degree=2)
    second = tmp_path / "tp" / "rank-00001-of-00002"
    second.rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match="rank-00001-of-00002"):
        convert(tmp_path / "tp", tmp_path / "hf", "huggingface")
    shutil.copytree(small, second, ignore=shutil.ignore_patterns("config.json"))
    with pytest.raises(CheckpointError, match=r"rank 1: tensor .* has shape"):
        convert(tmp_path / "tp", tmp_path / "hf", "huggingface")
    assert not (tmp_path / "hf").exists()


def test_a_source_that_shrinks_while_it_is_read_leaves_nothing_that_looks_whole(small, tmp_path, monkeypatch):
    write_shards = converting.write_shards

    def shrink_first(*arguments):
        truncate(small)
        write_shards(*arguments)

    monkeypatch.setattr(converting, "write_shards", shrink_first)
    with pytest.raises(CheckpointError, match="ended at byte"):
        convert(small, tmp_path / "out", "huggingface")
    assert not list((tmp_path / "out").rglob("*.part")) and not list((tmp_path / "out").glob("*.index.json"))
    with pytest.raises(CheckpointError, match="interrupted"):
        Checkpoint(tmp_path / "out")


def test_a_destination_that_holds_something_else_is_left_alone(small, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"not empty: it holds notes\.txt"):
        convert(small, other, "paddlenlp")
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    convert(small, tmp_path / "done", "paddlenlp")
    before = snapshot(tmp_path / "done")
    for options in ({"form": "huggingface"}, {"form": "paddlenlp", "dtype": "float32"}):
        with pytest.raises(ConversionError, match="a finished conversion from another source or with other options"):
            converted(small, tmp_path / "done", options)
    assert snapshot(tmp_path / "done") == before


def test_an_interrupted_conversion_of_a_source_that_has_changed_is_not_continued(small, tmp_path):
    assert killed(small, tmp_path / "out", FORMS["huggingface"], "bytes", 600_000)
    path = small / "model-00003-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="an unfinished conversion from another source"):
        convert(small, tmp_path / "out", "huggingface")


def test_two_conversions_do_not_write_into_one_directory(small, tmp_path):
    with converting._alone_in(tmp_path / "out"), pytest.raises(ConversionError, match="another conversion"):
        convert(small, tmp_path / "out", "paddlenlp")


@contextmanager
def mounted(directory, size):
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount of a tmpfs is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def remount(directory, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(directory)], check=True)


def test_a_disk_without_room_is_refused_before_any_weight_is_written(tmp_path, capsys):
    with mounted(tmp_path / "disk", "10m"):
        assert cli.main(["convert", str(NEEDLE), str(tmp_path / "disk" / "out"), "--format", "paddlenlp"]) == 2
        assert "bytes free" in capsys.readouterr().err
        assert not list((tmp_path / "disk").rglob("*.safetensors*"))


def test_a_disk_that_fills_up_ends_it_and_with_more_room_it_goes_on(tmp_path, monkeypatch, capsys):
    expected = converted(NEEDLE, tmp_path / "expected", FORMS["paddlenlp"])
    before = snapshot(NEEDLE)
    with mounted(tmp_path / "disk", "10m"):
        out = tmp_path / "disk" / "out"
        command = ["convert", str(NEEDLE), str(out), "--format", "paddlenlp"]
        with monkeypatch.context() as patch:
            patch.setattr(converting, "_check_space", lambda *_: None)
            assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert "No space left on device" in error and "1 of 3 files" in error and "run the same command again" in error
        assert not list(out.rglob("*.part")) and not (out / "model.safetensors.index.json").exists()
        finished = state(out)
        assert len(finished) == 1
        with pytest.raises(CheckpointError, match="interrupted"):
            Checkpoint(out)
        remount(tmp_path / "disk", "size=60m")
        assert cli.main(command) == 0
        assert {path: state(out)[path] for path in finished} == finished
        identical(out, expected)
    assert snapshot(NEEDLE) == before


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_a_read_only_mount_is_refused(small, tmp_path, exists):
    with mounted(tmp_path / "disk", "10m"):
        if exists:
            (tmp_path / "disk" / "out").mkdir()
        remount(tmp_path / "disk", "ro")
        with pytest.raises(ConversionError, match="out cannot be written: Read-only file system"):
            convert(small, tmp_path / "disk" / "out", "paddlenlp")
        assert not list((tmp_path / "disk").rglob("*.safetensors*"))
