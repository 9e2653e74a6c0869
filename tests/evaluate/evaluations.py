"""What tests of `paddle-qwen1m eval` share: its command line, checkpoints with one file changed, a server to ask."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from paddle_qwen1m import cli


def run(kind: str, model: Path, out: Path, *more: object) -> int:
    return cli.main(["eval", kind, str(model), "--out", str(out), *map(str, more)])


def altered(checkpoint: Path, folder: Path, name: str) -> Path:
    """The checkpoint in `folder`, by links but for a copy of one file; its path."""
    folder.mkdir(exist_ok=True)
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    copy = folder / name
    copy.unlink()
    copy.write_bytes((checkpoint / name).read_bytes())
    return copy


def serve(checkpoint: Path, tokenizer: Any, **options: Any) -> AbstractContextManager[Any]:
    """A server of the needle checkpoint. options: LLM's."""
    from serving import serve_needle

    from paddle_qwen1m.server.texts import Texts

    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    return serve_needle(Texts(tokenizer, config), **options)
