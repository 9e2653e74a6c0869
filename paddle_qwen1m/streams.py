"""Text on its way in and out of a command: arguments, files and standard streams, under any locale.

What comes in is UTF-8. The answer goes to standard output in that stream's own encoding, to a file in UTF-8.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

SURROGATE = re.compile("[\ud800-\udfff]")
BYTE_ORDER_MARK = "\ufeff"


class InputError(Exception):
    """What the user gave cannot be used; the message says what and why."""


class OutputError(Exception):
    """The answer cannot be written; the message says where and why."""


def open_standard_streams() -> None:
    """Makes the three standard streams usable where the caller closed them; what they cannot encode is escaped.

    A closed descriptor would be given to the next file that is opened, and messages would be written into that.
    `sys.stdin` and `sys.stdout` stay None, which says that they were closed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (it stays open to the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def text_argument(option: str, value: str) -> str:
    """`value` as text, without a byte order mark: what the locale could not decode is read as UTF-8.

    Raises InputError, naming `option`, when it is not UTF-8 either.
    """
    text = value
    if SURROGATE.search(value):
        try:
            text = os.fsencode(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{option} {_not_utf8(error)}") from None
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            raise InputError(f"{option} is no text: it holds the lone surrogate {code}") from None
    return text.removeprefix(BYTE_ORDER_MARK)


def name_argument(option: str, value: str) -> str:
    """A directory or a hub name that libraries open by its text. InputError where it has none in this locale."""
    file_argument(option, value)
    if SURROGATE.search(value):
        encoding = sys.getfilesystemencoding()
        remedy = "rename it" if encoding == "utf-8" else "set PYTHONUTF8=1, or rename it"
        raise InputError(f"{option}: the name {shown(value)} is no text in the locale's encoding, {encoding}: {remedy}")
    return value


def file_argument(option: str, value: str) -> str:
    """A path, whose bytes may be any but 0. InputError for what cannot be a path."""
    if not value:
        raise InputError(f"{option} is empty")
    if "\0" in value:
        raise InputError(f"{option}: a name cannot hold the character NUL, got {value!r}")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise InputError(
            f"{option}: {value!r} cannot be a file name where the locale's encoding is {sys.getfilesystemencoding()}"
        ) from None
    return value


def directory_argument(option: str, value: str) -> str:
    """The path of a directory that is there. Raises InputError."""
    if not os.path.isdir(file_argument(option, value)):
        state = "is a file" if os.path.exists(value) else "is not there"
        raise InputError(f"{option}: {shown(value)} {state}: give a directory")
    return value


def json_file(option: str, value: str) -> str:
    """The path of a file that holds JSON. Raises InputError."""
    raw = _read(option, file_argument(option, value), shown(value))
    try:
        json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{option}: {shown(value)} {_not_utf8(error)}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{option}: {shown(value)} is not JSON: {error}") from error
    return value


def shown(name: str) -> str:
    """A file name for a message: UTF-8 where its bytes are that, whatever the locale."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_document(name: str, option: str = "--prompt-file") -> str:
    """Text of a UTF-8 file, or of standard input for `-`, without a byte order mark, otherwise as it is.

    Raises InputError when it cannot be read, is empty or not UTF-8.
    """
    title = "standard input" if name == "-" else shown(file_argument(option, name))
    raw = _read(option, name, title)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{option}: {title} {_not_utf8(error)}") from error
    if not text.strip():
        raise InputError(f"{option}: {title} is empty")
    return text


class Output:
    """Where answers go: a file, opened at once as a shell's `>` does, or standard output for None."""

    def __init__(self, name: str | None, option: str = "--output") -> None:
        self._title = "standard output" if name is None else shown(file_argument(option, name))
        if name is None:
            if sys.stdout is None:
                raise InputError(f"standard output is closed: give {option} FILE")
            self._file = sys.stdout
            return
        try:
            self._file = open(name, "w", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise InputError(f"{option}: cannot write {self._title}: {error.strerror or error}") from error

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._file is not sys.stdout:
            self._file.close()

    def write(self, text: str) -> None:
        """Writes at once. Raises OutputError."""
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self._give_up()
            raise OutputError(f"cannot write {self._title}: {error.strerror or error}") from error

    def _give_up(self) -> None:
        """What the file still holds goes nowhere, so that closing it, or the interpreter's end, does not try again."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._file.fileno())
        os.close(nowhere)


def say(line: str) -> None:
    """A line on standard output, where that is open. Raises OutputError."""
    if sys.stdout is not None:
        Output(None).write(f"{line}\n")


def note(line: str) -> None:
    """A line on stderr; that nobody can read it is no failure."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _read(option: str, name: str, title: str) -> bytes:
    """What a file holds, or standard input for `-`."""
    try:
        if name != "-":
            return Path(name).read_bytes()
        if sys.stdin is None:
            raise InputError(f"{option}: standard input is closed")
        if sys.stdin.isatty():
            note("reading the document from the terminal, to its end (Ctrl-D)")
        return sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"{option}: cannot read {title}: {error.strerror or error}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
