"""Which room may import which: docs/architecture.md as a table, held against the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "paddle_qwen1m"

# From the lowest to the highest: a room imports rooms above its line alone, and of them those named.
TABLE = """
dtypes
memory
progress
streams
text
threads
config_keys        dtypes
config             config_keys dtypes
options            config dtypes
ops                config threads
fileio             ops
parallel           config ops
weights            config config_keys dtypes fileio ops parallel progress
plan               config dtypes parallel weights
cache              config dtypes fileio ops
attention          cache config ops
model              attention cache config dtypes ops parallel weights
engine             attention cache config dtypes memory model ops options parallel plan
planning           config dtypes engine options parallel plan
parallel.wire      engine
parallel.failure   cache engine parallel weights
parallel.workers   parallel parallel.failure parallel.wire
parallel.remote    engine parallel.failure parallel.workers threads
outputs            engine text
paddlenlp          cache config config_keys dtypes engine memory model ops options parallel plan text weights
parallel.worker    ops paddlenlp parallel parallel.failure parallel.wire
server             engine options outputs streams text
llm                engine options outputs paddlenlp parallel.remote progress text
check              config config_keys dtypes memory model ops options paddlenlp parallel plan weights
server.command     config llm options paddlenlp server streams
evaluate           config config_keys engine llm options paddlenlp progress server streams text
calibrate          attention cache config fileio model ops options paddlenlp parallel progress server streams weights
commands           cache calibrate check config dtypes engine evaluate ops options paddlenlp parallel planning progress server server.command streams text weights
cli                commands parallel server streams
__main__           cli
__init__           engine llm paddlenlp threads
"""  # noqa: E501
ROOMS = {room: tuple(allowed) for room, *allowed in map(str.split, TABLE.strip().splitlines())}
PADDLENLP = {"paddlenlp", "server.command", "check", "commands", "cli"}
"""Rooms that may import PaddleNLP."""


def room_of(module: str) -> str:
    """Of "paddle_qwen1m.engine.core": "engine". A line of its own in the table makes a module a room of its own."""
    inside = module.partition(".")[2]
    return next((name for name in (inside, inside.partition(".")[0]) if name in ROOMS), "__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that a source file imports, wherever it does so."""
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            of_a_package = (PACKAGE.parent / base.replace(".", "/")).is_dir() and base.startswith("paddle_qwen1m")
            yield from (f"{base}.{alias.name}" for alias in node.names) if of_a_package else (base,)


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_import_points_where_the_table_says(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).replace(".__init__", "")
    room = room_of(module)
    for imported in imports(path):
        if imported.partition(".")[0] == "paddlenlp":
            assert room in PADDLENLP, f"{module} imports PaddleNLP"
        if imported.partition(".")[0] != "paddle_qwen1m":
            continue
        target = room_of(imported)
        allowed = (room, "__init__", *ROOMS[room])
        assert target in allowed, f"{module} imports {imported}: {room} may not import {target}"


def test_the_table_has_no_circle_and_no_room_that_is_gone() -> None:
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        assert all(order.index(below) < order.index(room) for below in allowed), room
    rooms = {path.relative_to(PACKAGE).parts[0].replace(".py", "") for path in SOURCES}
    assert {room.partition(".")[0] for room in ROOMS} == rooms


def test_kernels_know_no_framework() -> None:
    sources = PACKAGE.parent / "custom_ops"
    for folder in ("include", "cpu", "cuda"):
        for path in (sources / folder).rglob("*.[ch]*"):
            assert "paddle/" not in path.read_text(encoding="utf-8"), path
