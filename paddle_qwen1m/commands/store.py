"""`paddle-qwen1m store`: shows, checks or cuts down the prefixes that are kept in a folder."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from paddle_qwen1m.commands import FAILED
from paddle_qwen1m.commands.arguments import add_debug, as_input, size
from paddle_qwen1m.streams import InputError, file_argument, say, shown

if TYPE_CHECKING:
    from paddle_qwen1m.cache.store import StoredDocument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list", "verify", "prune"], help="what to do")
    parser.add_argument("directory", metavar="DIR", help="folder that --prefix-store named")
    parser.add_argument("--size", type=size, help="prune: most bytes that stay, such as 100GB; the least used go")
    add_debug(parser)


def run(arguments: argparse.Namespace) -> int:
    from paddle_qwen1m.cache import store

    if (arguments.action == "prune") != (arguments.size is not None):
        raise InputError("--size says how many bytes may stay: prune needs it, list and verify have no use for it")
    folder, name = Path(file_argument("DIR", arguments.directory)), shown(arguments.directory)
    if not folder.is_dir():
        raise InputError(f"{name} is no folder")
    with as_input():
        store.prepare(folder)
    if arguments.action == "prune":
        removed, nbytes = store.prune(folder, arguments.size)
        say(f"{name}: {removed} files removed, {nbytes:,} bytes")
        return 0
    if arguments.action == "verify":
        files = list(store.verify(folder))
        damaged = [(file.path, reason) for file, reason in files if reason is not None]
        for path, reason in damaged:
            say(f"{path}: {reason}")
        nbytes = sum(file.nbytes for file, _ in files)
        say(f"{name}: {len(files)} files, {nbytes:,} bytes, {len(damaged)} cannot be used")
        return FAILED if damaged else 0
    documents, unreadable = store.documents(folder)
    for one in documents:
        say(_described(one))
    for path, reason in unreadable:
        say(f"{path}: {reason}")
    say(f"{name}: {len(documents)} documents, {sum(one.nbytes for one in documents):,} bytes")
    return 0


def _described(document: StoredDocument) -> str:
    made = document.made_under
    return "  ".join(
        (
            f"{document.name[:12]}  {document.tokens:>9,} tokens",
            "dense" if made.get("sparse") is None else "sparse",
            f"{made.get('cache_dtype')}",
            f"weights {str(made.get('weights'))[:12]}",
            f"ranks {document.ranks}",
            f"{document.files} files",
            f"{document.nbytes:,} bytes",
            time.strftime("used %Y-%m-%d %H:%M", time.localtime(document.used)),
        )
    )
