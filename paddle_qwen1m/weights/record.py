"""The record in a converted directory: the journal while it is written, and what the published files were like.

It is written before the first shard, after each one, and is complete only once everything else is in place. It stays:
checksums are compared with it, and the way back to the published form takes names, order and headers from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paddle_qwen1m.fileio.durable import write_whole

from .safetensors import CheckpointError, read_header_text

RECORD_NAME = "paddle_qwen1m_conversion.json"


@dataclass(frozen=True)
class PublishedFiles:
    """The published form as it was, apart from the data: config.json, the index (None: one file), shards' headers."""

    config: str
    index: str | None
    headers: Mapping[str, str]

    @classmethod
    def of(cls, directory: Path, config: str, index: str, files: Sequence[str]) -> PublishedFiles:
        """Of a directory in that form; `config` and `index` are names of files in it."""
        path = directory / index
        return cls(
            (directory / config).read_text(encoding="utf-8"),
            path.read_text(encoding="utf-8") if path.exists() else None,
            {file: read_header_text(directory / file) for file in files},
        )

    def entries(self, file: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors of a shard, in the order of their data."""
        header: dict[str, Any] = json.loads(self.headers[file])
        header.pop("__metadata__", None)
        ordered = sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"]))
        return [(name, entry["dtype"], tuple(entry["shape"])) for name, entry in ordered]

    def metadata(self, file: str) -> dict[str, str]:
        found = json.loads(self.headers[file]).get("__metadata__")
        return found if isinstance(found, dict) else {}


@dataclass
class Record:
    """`files`: size and SHA-256 of every finished shard, by its path within the directory. `plan`: see Plan.digest."""

    form: str
    plan: str
    published: PublishedFiles | None
    complete: bool = False
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Record | None:
        """None where there is none; CheckpointError when it is not what this package wrote."""
        path = directory / RECORD_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            published = values["published"]
            return cls(
                values["form"],
                values["plan"],
                None if published is None else PublishedFiles(**published),
                bool(values["complete"]),
                dict(values["files"]),
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except (KeyError, TypeError, ValueError, RecursionError):
            raise CheckpointError(f"{path} is not the record of a conversion by this package: remove it") from None

    def write(self, directory: Path) -> None:
        published = None if self.published is None else vars(self.published)
        files = dict(sorted(self.files.items()))  # the same text whichever was finished first
        values = {"form": self.form, "complete": self.complete, "plan": self.plan, "files": files}
        text = json.dumps({**values, "published": published}, indent=1)
        write_whole(directory / RECORD_NAME, text.encode("utf-8"))


def refuse_unfinished(directory: Path) -> None:
    """CheckpointError when a conversion into the directory has not ended."""
    record = Record.read(directory)
    if record is not None and not record.complete:
        raise CheckpointError(
            f"{directory} holds a conversion that was interrupted after {len(record.files)} files: "
            "run the same `paddle-qwen1m convert` again, it goes on where it stopped"
        )
