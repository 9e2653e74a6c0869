"""`paddle-qwen1m` under paddle.distributed.launch, as an installed package has it: no file of tools/ is needed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from parallel_ranks import COMMAND, NEEDLE, Process, launch, launcher

from paddle_qwen1m import cli

SENTENCE = "The access code for jade is 64931."
ASK = ["--greedy", "--question", "What is the access code for jade?", "--question", "What is the access code for ruby?"]
OBSERVED = """
import os, signal, subprocess, sys
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["PADDLE_TRAINER_ID"]
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
process = subprocess.Popen(sys.argv[2:])
(folder / f"pid.{rank}").write_text(str(process.pid))
(folder / f"status.{rank}").write_text(str(process.wait()))
"""
"""A rank that writes down how the command ended."""
SLOW_RANK_0 = """
import os, sys, time

time.sleep(5 if os.environ["PADDLE_TRAINER_ID"] == "0" else 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
START, END = 150.0, 30.0
"""Seconds for processes to start on a busy machine, and to end."""


def test_the_command_answers_under_the_launcher_as_it_does_alone(tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text(f"The grass is green. {SENTENCE} The sky is blue. " * 8, encoding="utf-8")
    options = ["generate", "--model", str(NEEDLE), "--prompt-file", str(document), *ASK, "--json", "--output"]
    status, output = launch(2, tmp_path / "logs", [COMMAND, *options, tmp_path / "two"], START)
    assert status == 0, output
    assert cli.main([*options, str(tmp_path / "one")]) == 0
    one, two = (
        [json.loads(line)["text"] for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        for name in ("one", "two")
    )
    assert one == two and len(one) == 2 and one[0] == SENTENCE


def test_rank_0_alone_prints_what_is_wrong_with_the_arguments(tmp_path: Path) -> None:
    status, _ = launch(2, tmp_path / "logs", [COMMAND, "generate", "--model", NEEDLE], START)
    assert status == 2
    assert "one of the arguments --prompt-file --prompt is required" in (tmp_path / "logs" / "workerlog.0").read_text()
    assert "is required" not in (tmp_path / "logs" / "workerlog.1").read_text()


def test_a_rank_0_that_is_slow_says_it_all_the_same(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(SLOW_RANK_0, encoding="utf-8")
    status, output = launch(2, tmp_path / "logs", [script, COMMAND, "generate", "--model", NEEDLE], START)
    assert status == 2, output
    assert "one of the arguments --prompt-file --prompt is required" in (tmp_path / "logs" / "workerlog.0").read_text()


def test_other_commands_are_rank_0s_alone(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    command = [COMMAND, "convert", NEEDLE, copy, "--format", "paddlenlp"]
    status, output = launch(2, tmp_path / "logs", command, START)
    assert status == 0, output
    assert (copy / "model.safetensors.index.json").exists() and output.count(f"{copy}: paddlenlp") >= 1
    assert (tmp_path / "logs" / "workerlog.1").read_text() == ""


@pytest.mark.parametrize("whom", ["launcher", pytest.param("rank", marks=pytest.mark.slow)])
def test_ctrl_c_ends_every_rank_with_130(tmp_path: Path, whom: str) -> None:
    """The launcher passes Ctrl-C on as SIGTERM and ends with its number; ranks are told by it, or by a user."""
    document, logs = tmp_path / "long.txt", tmp_path / "logs"
    document.write_text("The sky is blue and the lamp is lit. " * 6000, encoding="utf-8")
    script = tmp_path / "rank.py"
    script.write_text(OBSERVED, encoding="utf-8")
    options = ["--model", NEEDLE, "--prompt-file", document, "--no-sparse", "--max-num-batched-tokens", "512"]
    process = Process(launcher(2, logs, [script, tmp_path, COMMAND, "generate", *options]))
    deadline = time.monotonic() + START
    while not (shown := prefill_lines(logs)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert shown, "plain lines tell how far the prefill is"
    if whom == "launcher":
        process.signal(signal.SIGINT)
    else:
        os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGINT)
    process.finish(END)
    deadline = time.monotonic() + END
    statuses = [tmp_path / f"status.{rank}" for rank in range(2)]
    while not all(status.exists() and status.read_text() for status in statuses) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [status.read_text().strip() for status in statuses] == ["130", "130"]
    for rank in range(2):
        log = (logs / f"workerlog.{rank}").read_text()
        assert "interrupted" in log and "Traceback" not in log and "killed or crashed" not in log


def prefill_lines(logs: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [line for line in (logs / "workerlog.0").read_text().splitlines() if line.startswith("Prefill: ")]
    return []
