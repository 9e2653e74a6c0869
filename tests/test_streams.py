"""Text on its way in and out, whatever the locale and whatever is closed: arguments, files, standard streams."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paddle_qwen1m import streams
from paddle_qwen1m.streams import InputError

ROOT = Path(__file__).resolve().parent.parent
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SAY = r"""
import sys
from paddle_qwen1m import streams
streams.open_standard_streams()
with streams.Output(sys.argv[1] if len(sys.argv) > 1 else None) as output:
    output.write("na\xefve \u6771\u4eac\n")
"""


def python(
    code: str, *arguments: str | bytes, shell: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """A fresh interpreter, with the redirections of `shell`."""
    words = [sys.executable, "-c", code, *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    environment = {**kept, "PYTHONPATH": str(ROOT), **environment}
    if shell:
        words = ["sh", "-c", f'exec "$@" {shell}', "sh", *words]
    return subprocess.run(words, env=environment, capture_output=True, timeout=120)


# --- arguments ---


def undecoded(raw: bytes) -> str:
    """What Python makes of argument bytes that the locale does not decode."""
    return raw.decode("ascii", "surrogateescape")


def test_an_argument_is_utf8_where_the_locale_did_not_decode_it() -> None:
    assert streams.text_argument("--question", undecoded("Où est 東京?".encode())) == "Où est 東京?"
    assert streams.text_argument("--question", "Où est 東京?") == "Où est 東京?"


def test_a_byte_order_mark_is_no_part_of_an_argument() -> None:
    assert streams.text_argument("--question", "\ufeffWhy?") == "Why?"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (undecoded(b"What \xff is it?"), "--question is not UTF-8: byte 0xff at offset 5"),
        (undecoded(b"\xed\xa0\x80"), "--question is not UTF-8: byte 0xed at offset 0"),
        ("high \ud800 alone", "--question is no text: it holds the lone surrogate U+D800"),
    ],
)
def test_an_argument_that_is_no_text_is_refused_by_its_option(value: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(reason)}$"):
        streams.text_argument("--question", value)


@pytest.mark.parametrize("read", [streams.file_argument, streams.name_argument, streams.json_file])
@pytest.mark.parametrize(
    ("value", "reason"),
    [("", "is empty"), ("a\0b", "cannot hold the character NUL"), ("a\ud800", "cannot be a file name")],
)
def test_what_cannot_be_a_path_is_refused_by_its_option(
    read: Callable[[str, str], str], value: str, reason: str
) -> None:
    with pytest.raises(InputError, match=rf"^--model\b.*{reason}"):
        read("--model", value)


def test_a_name_that_libraries_open_as_text_must_be_text() -> None:
    assert streams.name_argument("--model", "/tmp/modèle") == "/tmp/modèle"
    with pytest.raises(InputError, match=r"^--model: the name /tmp/mod\\xe8le is no text in the locale's encoding"):
        streams.name_argument("--model", os.fsdecode(b"/tmp/mod\xe8le"))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xff\xfe[", "is not UTF-8: byte 0xff at offset 0"),
        (b"[1,", "is not JSON: Expecting value"),
        (b"[" * 200_000, "is not JSON: maximum recursion depth"),
    ],
)
def test_a_file_that_holds_no_json_is_refused_by_its_option(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "budgets.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=f"^--sparse-budgets: {re.escape(str(path))} {reason}"):
        streams.json_file("--sparse-budgets", str(path))


# --- documents ---


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\xef\xbb\xbfplain", "plain"),
        (b"one\r\ntwo\r", "one\r\ntwo\r"),
        (b"a\0b", "a\0b"),
        ("東京".encode(), "東京"),
    ],
    ids=["byte order mark", "CRLF", "NUL", "wide"],
)
def test_a_document_is_its_text_and_nothing_is_changed(tmp_path: Path, raw: bytes, text: str) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))  # its name is not UTF-8
    path.write_bytes(raw)
    assert streams.read_document(str(path)) == text


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"caf\xe9 au lait", "is not UTF-8: byte 0xe9 at offset 3"),
        ("a b".encode("utf-16"), "is not UTF-8: byte 0xff at offset 0"),
        (b"a \xed\xa0\x80", "is not UTF-8: byte 0xed at offset 2"),
    ],
    ids=["nothing", "blanks", "latin-1", "utf-16", "surrogate"],
)
def test_an_unusable_document_is_refused_by_its_name(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=f"^--prompt-file: {re.escape(str(path))} {reason}$"):
        streams.read_document(str(path))


def test_a_missing_document_and_a_directory_are_refused(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "none.txt", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(InputError, match=f"^--prompt-file: cannot read {re.escape(str(path))}: {reason}$"):
            streams.read_document(str(path))


def test_a_closed_standard_input_is_refused() -> None:
    code = "from paddle_qwen1m import streams; streams.open_standard_streams(); streams.read_document('-')"
    done = python(code, shell="<&-")
    assert done.stderr.decode().strip().endswith("InputError: --prompt-file: standard input is closed")


# --- standard streams ---


def test_a_file_that_is_opened_does_not_become_a_closed_stream() -> None:
    code = """
import os
from paddle_qwen1m import streams
streams.open_standard_streams()
print(open("/dev/null").fileno() > 2, file=open(3, "w"))
"""
    done = python(f"import os; os.dup2(1, 3); [os.close(n) for n in range(3)]\n{code}")
    assert done.stdout == b"True\n"


@pytest.mark.parametrize(
    ("environment", "written"),
    [
        ({"PYTHONIOENCODING": "utf-8"}, "naïve 東京\n".encode()),
        ({"PYTHONIOENCODING": "ascii"}, b"na\\xefve \\u6771\\u4eac\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"na\xefve \\u6771\\u4eac\n"),
        (ASCII, b"na\\xefve \\u6771\\u4eac\n"),
    ],
    ids=["utf-8", "ascii", "latin-1", "C"],
)
def test_what_standard_output_cannot_encode_is_escaped(environment: dict[str, str], written: bytes) -> None:
    done = python(SAY, **environment)
    assert (done.returncode, done.stdout) == (0, written), done.stderr


def test_a_file_is_utf8_under_every_locale(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    done = python(SAY, path, shell=">&-", **ASCII)
    assert done.returncode == 0, done.stderr
    assert Path(os.fsdecode(path)).read_text(encoding="utf-8") == "naïve 東京\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "is empty"),
        (".", r": cannot write \.: Is a directory"),
        ("no/such", ": cannot write no/such: No such file"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_at_once(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"^--output *{reason}"):
        streams.Output(name)


@pytest.mark.parametrize(
    ("shell", "reason"),
    [
        (">&-", "InputError: standard output is closed: give --output FILE"),
        (">/dev/full", "OutputError: cannot write standard output: No space left on device"),
        ("| true", "OutputError: cannot write standard output: Broken pipe"),
    ],
)
def test_an_answer_that_nobody_gets_is_an_error_said_once(shell: str, reason: str) -> None:
    done = python(SAY, shell=shell)
    assert done.stderr.decode().strip().splitlines()[-1].endswith(reason)
    assert b"Exception ignored" not in done.stderr
