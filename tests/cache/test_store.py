"""The folder of a store: what is found in it, who may enter, what goes when it is full, what interruptions leave."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddle_qwen1m.cache import M2Range, MadeUnder, PrefixStore, SparseRule, segment_file, store
from paddle_qwen1m.cache.segment_file import DATA_OFFSET, SegmentError, SegmentReader
from paddle_qwen1m.cache.store import m2_of, prepare, prune, segment_name, stored_files, token_digests

ONE = M2Range(1.0, 1.0)
DATA, BLOCK = 3000, 1000
BYTES = DATA_OFFSET + DATA + 8 * 4
"""Of a segment's file."""
MADE = MadeUnder("weights", "bfloat16", "bfloat16", 1, "all")


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(store.logger, "propagate", True)
    caplog.set_level(logging.WARNING)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def name(number: int = 0, m2: M2Range = ONE) -> str:
    """Each in another subfolder."""
    return segment_name(f"{number:02x}{secrets.token_hex(15)}", secrets.token_hex(16), m2)


def header(made: MadeUnder = MADE) -> dict[str, Any]:
    return {"made_under": made.name, "begin": 0, "end": 8, "data_bytes": DATA, "block_bytes": BLOCK}


def put(kept: PrefixStore, segment: str, used: float, made: MadeUnder = MADE) -> bool:
    """Whether a segment is written."""
    writer = kept.create(segment, header(made), used)
    if writer is None:
        return False
    with writer:
        for number in range(DATA // BLOCK):
            writer.write(np.full(BLOCK, number, np.uint8))
        writer.publish()
    kept.touch([segment], used)
    return True


def names(folder: Path) -> set[str]:
    """Of the segments that are there."""
    return {path.name.partition(".")[0] for path in folder.glob("*/*.kv")}


def check(path: Path) -> None:
    with SegmentReader(path) as reader:
        for number in range(reader.num_blocks):
            reader.read(number, np.empty(BLOCK, np.uint8))


# --- names ---


@pytest.mark.parametrize("m2", [ONE, M2Range(1.0, math.nextafter(1.0, 2)), M2Range(5e-324, 1.7976931348623157e308)])
def test_m2_is_in_the_name_exactly(m2: M2Range) -> None:
    segment = name(m2=m2)
    assert m2_of(segment) == m2
    assert store.FILE.fullmatch(f"{segment}.0of1.kv")


def test_a_digest_is_of_all_tokens_up_to_the_border_and_of_the_salt(rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 1 << 17, 100)
    all_borders = list(token_digests(tokens, [10, 40, 100], ""))
    assert all_borders == [next(token_digests(tokens, [border], "")) for border in (10, 40, 100)]
    assert list(token_digests(tokens[:40], [10, 40], "")) == all_borders[:2]
    other = tokens.copy()
    other[9] ^= 1
    assert not set(token_digests(other, [10, 40, 100], "")) & set(all_borders)
    assert not set(token_digests(tokens, [10, 40, 100], "salt")) & set(all_borders)


# --- the folder ---


def test_folder_and_files_are_the_users_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        kept = PrefixStore(folder / "in a new one")
        assert put(kept, name(), 1.0)
    finally:
        os.umask(before)
    (path,) = folder.glob("*/*/*")
    modes = [one.stat().st_mode & 0o777 for one in (kept.directory, path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_can_enter_is_refused_unless_it_is_empty(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    prepare(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "x").touch()
    folder.chmod(mode)
    with pytest.raises(ValueError, match=f"mode {mode:04o}: keys and values reveal .*: chmod 700 {folder}"):
        prepare(folder)
    assert folder.stat().st_mode & 0o777 == mode


def test_another_users_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(ValueError, match=f"belongs to user {me} and has mode 0700"):
        prepare(folder)


def test_what_is_no_folder_is_refused(folder: Path) -> None:
    folder.write_text("mine")
    with pytest.raises(ValueError, match=f"prefix_store: {folder} is no folder"):
        prepare(folder)
    with pytest.raises(ValueError, match="cannot be used: Not a directory"):
        prepare(folder / "below")
    assert folder.read_text() == "mine"


def test_what_is_not_of_the_store_is_left_alone_and_told_in_one_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = PrefixStore(folder, size=2 * BYTES)
    segment = name(0xAB)
    put(kept, segment, 1.0)
    (own,) = folder.glob("*/*")
    (folder / "notes.txt").write_text("mine")
    (folder / "ab" / "x.part").write_text("mine")
    (folder / "ab" / own.name.upper()).write_text("mine")
    (folder / "ab" / own.name.replace(".0of1", ".1of2")).mkdir()
    (folder / "ac").symlink_to(tmp_path)
    foreign = {path for path in (*folder.iterdir(), *folder.glob("ab/*"))} - {own, folder / "ab"}
    assert len(foreign) == 5
    PrefixStore(folder)
    assert [f"5 files or folders in {folder} are not of a store" in one.message for one in caplog.records] == [True]
    assert [file.path for file in stored_files(folder)] == [own]
    prune(folder, 0)
    assert not own.exists() and all(path.is_symlink() or path.exists() for path in foreign)


def test_a_subfolder_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    kept = PrefixStore(folder)
    segment = name(0xAB)
    put(kept, segment, 1.0)
    (folder / "ab").rename(tmp_path / "elsewhere")
    (folder / "ab").symlink_to(tmp_path / "elsewhere")
    tokens, chain = segment.split("-")[:2]
    assert kept.find(tokens, chain) == [] and kept.why_not(tokens, MADE.name) is None
    with pytest.raises(SegmentError, match="behind a link"):
        kept.open(segment, {})
    assert not put(kept, name(0xAB), 1.0)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


# --- what is found ---


def test_a_segment_is_found_by_its_tokens_and_how_it_was_made(folder: Path) -> None:
    kept, wide = PrefixStore(folder), M2Range(1.0, 1.5)
    segment = name()
    tokens, chain = segment.split("-")[:2]
    both = {segment, segment_name(tokens, chain, wide)}
    for one in both:
        put(kept, one, 1.0)
    put(kept, segment_name(tokens, secrets.token_hex(16), ONE), 1.0)
    again = PrefixStore(folder)
    assert set(again.find(tokens, chain)) == both
    assert again.find(secrets.token_hex(16), chain) == again.find(tokens, tokens) == []
    assert PrefixStore(folder, rank=1, degree=2).find(tokens, chain) == []
    with again.open(segment, header()) as reader:
        assert reader.header["name"] == segment


def test_a_file_under_another_name_is_not_used(folder: Path) -> None:
    kept, other = PrefixStore(folder), name(1)
    put(kept, name(), 1.0)
    (path,) = folder.glob("*/*")
    kept.path(other).parent.mkdir()
    path.rename(kept.path(other))
    with pytest.raises(SegmentError, match="its name is"):
        kept.open(other, header())


RULE = SparseRule("budgets", 4096, 512)
OTHERS = {
    "degree": (MadeUnder("weights", "bfloat16", "bfloat16", 2, "halves"), "tensor parallel ranks 1, here 2"),
    "placement": (MadeUnder("weights", "bfloat16", "bfloat16", 1, "other"), "placement of heads all, here other"),
    "dtype": (MadeUnder("weights", "bfloat16", "float32", 1, "all"), "cache_dtype bfloat16, here float32"),
    "weights": (MadeUnder("others", "bfloat16", "bfloat16", 1, "all"), "weights weights, here others"),
    "mode": (MadeUnder("weights", "bfloat16", "bfloat16", 1, "all", sparse=RULE), "prefill dense, here sparse"),
    "temperature": (MADE, "other cuts, or another m^2"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_why_not_says_what_differs(folder: Path, kind: str) -> None:
    kept, segment = PrefixStore(folder), name()
    put(kept, segment, 1.0)
    made, told = OTHERS[kind]
    assert kept.why_not(segment.split("-")[0], made.name) == told
    assert kept.why_not(name().split("-")[0], made.name) is None


def test_why_not_names_other_budgets(folder: Path) -> None:
    kept, segment = PrefixStore(folder), name()
    one, other = (MadeUnder("w", "f", "f", 1, "all", sparse=SparseRule(text, 8, 4)) for text in ("few", "many"))
    put(kept, segment, 1.0, one)
    assert kept.why_not(segment.split("-")[0], other.name) == "sparsebudgets few, here many"


@pytest.mark.parametrize("made", [7, ["x"], "no JSON", "[" * 30_000, "[1]", json.dumps({"ranks": []})])
def test_a_header_with_anything_in_it_does_no_harm(folder: Path, made: Any) -> None:
    kept, segment = PrefixStore(folder), name()
    with kept.create(segment, {**header(), "made_under": made}, 1.0) as writer:
        for _ in range(DATA // BLOCK):
            writer.write(np.zeros(BLOCK, np.uint8))
        writer.publish()
    assert isinstance(kept.why_not(segment.split("-")[0], MADE.name), (str, type(None)))
    store.documents(folder)
    with pytest.raises(SegmentError, match="its made_under is"):
        kept.open(segment, header())


def test_what_is_damaged_goes_and_what_is_foreign_stays(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept, segment = PrefixStore(folder), name()
    put(kept, segment, 1.0)
    path = kept.path(segment)
    path.chmod(0o644)
    for _ in range(2):
        with pytest.raises(SegmentError) as raised:
            kept.open(segment, header())
        kept.ignore(segment, raised.value)
    assert path.exists() and [f"{path} is ignored: it belongs" in one.message for one in caplog.records] == [True]
    path.chmod(0o600)
    os.truncate(path, BYTES - 1)
    with pytest.raises(SegmentError) as raised:
        kept.open(segment, header())
    kept.ignore(segment, raised.value)
    assert not path.exists() and f"{path} is removed: it has" in caplog.text
    assert put(kept, segment, 1.0)


# --- the limit ---


def test_the_least_recently_used_segments_go_with_all_their_files(folder: Path) -> None:
    ranks = [PrefixStore(folder, 6 * BYTES, rank, 2) for rank in range(2)]
    old, older, new = name(1), name(2), name(3)
    for used, segment in ((2.0, old), (1.0, older), (3.0, new)):
        for kept in ranks:
            assert put(kept, segment, used)
    ranks[1].touch([older], 5.0)  # its other file was used least recently
    assert put(ranks[0], name(4), 9.0)
    assert names(folder) >= {older, new} and old not in names(folder)
    assert len(list(folder.glob("*/*"))) == 5


def test_the_end_of_a_prefix_goes_before_its_beginning(folder: Path) -> None:
    kept = PrefixStore(folder, 4 * BYTES)
    prefix = [name(number) for number in range(4)]
    for number, segment in enumerate(prefix):
        put(kept, segment, 10.0 - number)
    kept.touch(reversed(prefix), 50.0)
    kept.touch(prefix)  # used now
    for number in range(3):
        assert put(kept, name(10 + number), 1e11)
        assert [segment in names(folder) for segment in prefix] == [place < 3 - number for place in range(4)]


def test_a_prefix_that_reaches_the_limit_keeps_its_beginning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = PrefixStore(folder, 3 * BYTES + 10)
    other = name(100)
    put(kept, other, 1.0)
    prefix = [name(number) for number in range(6)]
    written = [put(kept, segment, 10.0 - 1e-3 * number) for number, segment in enumerate(prefix)]
    assert written == [True] * 3 + [False] * 3 and names(folder) == set(prefix[:3])
    assert [f"prefix_store_size, {3 * BYTES + 10:,} bytes" in one.message for one in caplog.records] == [True]


def test_nothing_goes_for_what_finds_no_room_all_the_same(folder: Path) -> None:
    kept = PrefixStore(folder, 2 * BYTES)
    writers = [kept.create(name(number), header(), 5.0) for number in (1, 2)]
    assert None not in writers
    assert not put(kept, name(3), 9.0), "what is being written stays"
    assert len(list(folder.glob("*/*.part"))) == 2
    for writer in writers:
        writer.__exit__(None, None, None)
    assert put(kept, name(4), 1.0) and put(kept, name(5), 8.0)
    assert not put(PrefixStore(folder, 2 * BYTES - 1), name(6), 8.0), "the older one alone is not enough"
    assert len(names(folder)) == 2


def test_what_gets_its_name_while_others_count_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is listed as unfinished, and is no longer there by that name when its size is asked for."""
    kept, segment = PrefixStore(folder, BYTES), name(1)
    writer = kept.create(segment, header(), 5.0)
    assert writer is not None
    for number in range(DATA // BLOCK):
        writer.write(np.full(BLOCK, number, np.uint8))
    publishing = threading.Thread(target=writer.publish)
    entries = store._entries

    def listed_then_published(directory: Path) -> list[os.DirEntry[str]]:
        found = entries(directory)
        if directory != folder:
            publishing.start()
            publishing.join(0.5)
        return found

    monkeypatch.setattr(store, "_entries", listed_then_published)
    assert kept.create(name(2), header(), 4.0) is None, "one segment is all that there is room for"
    monkeypatch.undo()
    publishing.join()
    assert [file.path for file in stored_files(folder)] == [kept.path(segment)]


@pytest.mark.parametrize(("degree", "size"), [(1, BYTES - 1), (2, 2 * BYTES - 1)])
def test_a_segment_beyond_the_limit_is_refused(
    folder: Path, degree: int, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    kept, before = PrefixStore(folder), name()
    put(kept, before, 1.0)
    assert not put(PrefixStore(folder, size, 0, degree), name(), 9.0)
    assert names(folder) == {before} and f"{degree * BYTES:,} bytes is more than prefix_store_size" in caplog.text
    assert put(PrefixStore(folder, size + 1, 0, degree), name(), 9.0)


def test_prune_says_what_went(folder: Path) -> None:
    kept = PrefixStore(folder)
    segments = [name(number) for number in range(4)]
    for number, segment in enumerate(segments):
        put(kept, segment, float(number))
    assert prune(folder, 4 * BYTES) == (0, 0)
    assert prune(folder, 2 * BYTES + 5) == (2, 2 * BYTES)
    assert names(folder) == set(segments[2:])
    with kept.create(name(), header(), 1.0):
        assert prune(folder, 0) == (2, 2 * BYTES)
        assert [file.is_unfinished for file in stored_files(folder)] == [True]


# --- disks ---


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Of 512 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mount of a tmpfs is not permitted here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_takes_nothing(disk: Path) -> None:
    kept = PrefixStore(disk)
    written: list[str] = []
    with pytest.raises(OSError, match="No space left"):
        while True:
            segment = name(len(written))
            put(kept, segment, 1.0)
            written.append(segment)
    assert len(written) > 3 and names(disk) == set(written)
    assert len(list(disk.glob("*/*"))) == len(written)
    for path in disk.glob("*/*"):
        check(path)


def test_a_folder_that_cannot_be_written_to_can_be_read(disk: Path) -> None:
    kept, segment = PrefixStore(disk, 5 * BYTES), name()
    put(kept, segment, 1.0)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    again = PrefixStore(disk, 5 * BYTES)
    with pytest.raises(OSError) as raised:
        put(again, name(1), 9.0)
    assert raised.value.errno == errno.EROFS
    again.touch([segment])
    with again.open(segment, header()) as reader:
        reader.read(0, np.empty(BLOCK, np.uint8))
    again.ignore(segment, segment_file.DamagedSegment("it is damaged"))
    assert names(disk) == {segment}
    assert not put(PrefixStore(disk, BYTES), name(1), 9.0), "nothing can go"


def test_a_file_that_is_too_large_for_the_system_leaves_nothing(folder: Path) -> None:
    kept = PrefixStore(folder)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES - 1, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            put(kept, name(), 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG and list(folder.glob("*/*")) == []


# --- several processes ---

# Loads the modules of the store alone: forty times faster than the package with Paddle.
LOADED = """
import importlib.util, os, pathlib, signal, sys, types
import numpy as np
root = pathlib.Path(sys.argv[1])
for package in ("paddle_qwen1m", "paddle_qwen1m.cache", "paddle_qwen1m.fileio"):
    module = sys.modules[package] = types.ModuleType(package)
    module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
prefix = sys.modules["paddle_qwen1m.cache.prefix"] = types.ModuleType("paddle_qwen1m.cache.prefix")
prefix.M2Range = tuple
from paddle_qwen1m.cache import segment_file
from paddle_qwen1m.cache.store import PrefixStore

def write(kept, name, header):
    writer = kept.create(name, header, 5.0)
    if writer is None:
        return
    with writer:
        for number in range(3):
            writer.write(np.full(1000, number, np.uint8))
        writer.publish()
    kept.touch([name], 5.0)
"""
HEADER = {"made_under": "{}", "begin": 0, "end": 8, "data_bytes": DATA, "block_bytes": BLOCK}
# Writes the segments, and dies by SIGKILL in the middle of that call of the system, once with its work half done.
KILLED = f"""{LOADED}
import json
folder, limit, names = sys.argv[2], int(sys.argv[3]), sys.argv[4:]
seen = 0

def counted(module, function):
    original = getattr(module, function)
    def call(*arguments, **keywords):
        global seen
        seen += 1
        if seen > limit:
            if function == "pwrite":
                original(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)
    setattr(module, function, call)

for function in ("open", "posix_fallocate", "pwrite", "fdatasync", "rename", "close", "fsync", "mkdir", "utime"):
    counted(os, function)
counted(segment_file.fcntl, "flock")
kept = PrefixStore(folder, {3 * BYTES})
for name in names:
    write(kept, name, {HEADER!r})
"""


def start(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", script, str(Path(store.__file__).parents[1]), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def test_a_process_that_is_killed_anywhere_leaves_nothing_that_is_half_written_or_uncounted(tmp_path: Path) -> None:
    """Four segments, of which three have room: those after the first make room for themselves or are refused."""
    segments = [name(number) for number in (1, 1, 2, 3)]
    others = name(9)
    states, points, batch = set(), 0, 2
    while True:
        folders = [tmp_path / str(limit) for limit in range(points, points + batch)]
        for folder in folders:
            put(PrefixStore(folder), others, 1.0)
        children = [start(KILLED, folder, points + number, *segments) for number, folder in enumerate(folders)]
        codes = []
        for child in children:
            _, error = child.communicate(timeout=60)
            codes.append(child.returncode)
            assert child.returncode in (0, -9), error.decode()[-2000:]
        for folder in folders:
            for path in folder.glob("*/*.kv"):
                check(path)
            left = len(list(folder.glob("*/*.part")))
            prepare(folder)
            everything = [path for path in folder.rglob("*") if path.is_file()]
            assert sorted(everything) == sorted(file.path for file in stored_files(folder))
            assert not any(path.name.endswith(".part") for path in everything)
            assert sum(path.stat().st_size for path in everything) <= 3 * BYTES
            # it goes on
            again = PrefixStore(folder, 3 * BYTES)
            for segment in segments:
                put(again, segment, 5.0)
            assert names(folder) == set(segments[:3])
            states.add((left, len(everything)))
        points += batch
        if 0 in codes:
            break
    assert points >= 50, f"{points} points are too few"
    assert {left for left, _ in states} == {0, 1}, "some were killed while they wrote"


def test_what_a_living_process_writes_stays(folder: Path) -> None:
    script = f"""{LOADED}
writer = PrefixStore(sys.argv[2]).create(sys.argv[3], {HEADER!r}, 5.0)
sys.stdout.write("x")
sys.stdout.flush()
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(Path(store.__file__).parents[1]), str(folder), name()]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    try:
        assert child.stdout.read(1) == b"x"
        prepare(folder)
        assert [file.is_unfinished for file in stored_files(folder)] == [True]
    finally:
        child.kill()
        child.communicate()
    prepare(folder)
    assert stored_files(folder) == [] and list(folder.glob("*/*")) == []


def test_processes_that_write_the_same_segments_at_once_get_in_nobodys_way(folder: Path) -> None:
    """Three processes, forty segments, room for twenty: the limit is kept at every moment, what is there is whole."""
    segments = [name(number) for number in range(40)]
    script = f"""{LOADED}
kept = PrefixStore(sys.argv[2], {20 * BYTES})
for number, name in enumerate(sys.argv[3:]):
    write(kept, name, {HEADER!r})
    kept.touch([name], 100.0 - number)
"""
    prepare(folder)
    children = [start(script, folder, *segments) for _ in range(3)]
    most = 0
    while any(child.poll() is None for child in children):
        with store._locked(folder):  # or a file that goes and one that comes were counted both
            most = max(most, sum(file.nbytes for file in stored_files(folder)))
    for child in children:
        _, error = child.communicate(timeout=60)
        assert child.returncode == 0, error.decode()[-2000:]
    assert most <= 20 * BYTES
    assert list(folder.glob("*/*.part")) == []
    for path in folder.glob("*/*"):
        check(path)
    assert len(names(folder)) == 20
