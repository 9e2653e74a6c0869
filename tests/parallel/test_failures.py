"""What cannot work is refused, and a rank that fails ends all of them in time, with its name and the reason."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from parallel_ranks import (
    COMMAND,
    NEEDLE,
    Process,
    cut,
    is_running,
    launch,
    launcher,
    rank_environment,
    write_checkpoint,
)

from paddle_qwen1m import Qwen2OneMForCausalLM, cli
from paddle_qwen1m.parallel.job import free_port

GENERATE = [COMMAND, "generate"]
FAILING = Path(__file__).with_name("failing_rank.py")
HOST = socket.gethostname()
START = 150.0
"""Seconds for processes to start on a busy machine."""
END = 30.0
"""Seconds in which the end of one rank must be that of all."""


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text("The code of the green door is 4711. What is the code?", encoding="utf-8")
    return file


def options(prompt: Path, model: Path = NEEDLE) -> list[str | Path]:
    return ["--model", model, "--prompt-file", prompt, "--greedy", "--max-new-tokens", "8"]


# --- what is refused ---


def test_several_ranks_need_a_launcher() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_degree=2 needs 2 processes and this is one: .*launch --dev"):
        Qwen2OneMForCausalLM.from_pretrained(str(NEEDLE), tensor_parallel_degree=2)


def test_a_degree_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = json.loads((NEEDLE / "config.json").read_text(encoding="utf-8"))
    config.update(num_attention_heads=28, num_key_value_heads=4, hidden_size=3584, intermediate_size=18944)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"one of 1, 2, 4, 8 .*got 16: for 16 devices use 8 and two replicas"):
        Qwen2OneMForCausalLM.from_pretrained(str(tmp_path), tensor_parallel_degree=16)


@pytest.mark.slow
def test_the_command_refuses_a_degree_too(tmp_path: Path, prompt: Path) -> None:
    status, output = launch(3, tmp_path / "logs", [*GENERATE, *options(prompt)], START)
    assert status == 2
    assert "tensor_parallel_degree must be one of 1, 2, 4, 8" in output and "got 3: use 2" in output
    assert any(f"rank {rank} on {HOST}" in output for rank in range(3)), "whichever refuses first ends the others"


def test_files_cut_for_another_degree_are_refused_by_name(tmp_path: Path) -> None:
    ranks = cut(NEEDLE, tmp_path / "cut-for-two", 2)
    with pytest.raises(ValueError, match=r"cut-for-two is a set of weights for 2 tensor parallel ranks: .*got 1"):
        Qwen2OneMForCausalLM.from_pretrained(str(ranks))


def test_a_wrong_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="this process is rank 0 of 1, got tensor_parallel_rank 3"):
        Qwen2OneMForCausalLM.from_pretrained(str(NEEDLE), tensor_parallel_rank=3)


# --- ranks that do not come ---


def test_ranks_that_do_not_come_are_named(prompt: Path) -> None:
    """Rank 0 and 2 of 3 start, and rank 1 of another job alone."""
    port, other = free_port("127.0.0.1"), free_port("127.0.0.1")
    limit = {"PADDLE_QWEN1M_START_SECONDS": "5"}
    script = [*GENERATE, *options(prompt)]
    first, third = (Process(script, **rank_environment(rank, 3, port), **limit) for rank in (0, 2))
    alone = Process(script, **rank_environment(1, 2, other), **limit)
    for process in (first, third):
        status, output = process.finish(START)
        assert status == 1, output
        assert f"rank 0 on {HOST} waited 5 s at 127.0.0.1:{port}, missing of 3 ranks: 1;" in output
    status, output = alone.finish(START)
    assert status == 1, output
    assert f"rank 1 on {HOST} waited 5 s for rank 0 at 127.0.0.1:{other}" in output


# --- ranks that fail ---


@pytest.mark.parametrize(
    ("degree", "rank", "when", "how"),
    [
        (2, 1, "prefill", "kill"),
        pytest.param(2, 0, "decode", "kill", marks=pytest.mark.slow),
        pytest.param(3, 2, "decode", "kill", marks=pytest.mark.slow),
        (2, 1, "decode", "raise"),
        pytest.param(2, 1, "decode", "exit", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_ends_all(tmp_path: Path, degree: int, rank: int, when: str, how: str) -> None:
    """Without a launcher that would end them: as on machines of their own."""
    port = free_port("127.0.0.1")
    model = NEEDLE if degree == 2 else _three_heads(tmp_path)
    command = [FAILING, model, tmp_path, rank, when, how]
    processes = [Process(command, **rank_environment(number, degree, port)) for number in range(degree)]
    processes[rank].finish(START)
    died = time.monotonic()
    reason = {
        "kill": "killed or crashed",
        "raise": "LookupError: the dog ate it",
        "exit": "ended with exit status 1",
    }[how]
    for number, process in enumerate(processes):
        if number != rank:
            status, output = process.finish(END)
            assert status == 1, output
            assert f"error: rank {rank} on {HOST}: {reason}" in output
    assert time.monotonic() - died < END


def _three_heads(folder: Path) -> Path:
    return write_checkpoint(
        folder / "three", num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, head_dim=64,
        hidden_size=192, intermediate_size=192, vocab_size=1024,
    )  # fmt: skip


# --- two machines ---


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True], ids=["answers", "rank killed"])
def test_two_launchers_make_one_job(
    tmp_path: Path, prompt: Path, fails: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two launchers on this machine, as on two: rank 0's prints the answer; a killed rank ends both, and no process
    stays."""
    master = f"127.0.0.1:{free_port('127.0.0.1')}"
    script: list[Any] = [FAILING, NEEDLE, tmp_path, 1, "decode", "kill"] if fails else [*GENERATE, *options(prompt)]
    launchers = [
        Process(launcher(1, tmp_path / f"logs-{number}", script, "--nnodes", "2", "--master", master))
        for number in range(2)
    ]
    results = [process.finish(START + END) for process in launchers]
    if fails:
        assert all(status != 0 for status, _ in results), results
        assert any(f"rank 1 on {HOST}: killed or crashed" in output for _, output in results)
        pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
        assert not any(map(is_running, pids))
    else:
        assert all(status == 0 for status, _ in results), results
        assert cli.main(["generate", *map(str, options(prompt))]) == 0
        answer = capsys.readouterr().out.strip()
        assert sum(answer in output for _, output in results) == 1


def test_a_killed_launcher_leaves_no_rank_behind(tmp_path: Path) -> None:
    process = Process(launcher(2, tmp_path / "logs", [FAILING, NEEDLE, tmp_path, 9, "never", "kill"]))
    deadline = time.monotonic() + START
    while len(list(tmp_path.glob("[01]"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    time.sleep(4)
    process.kill()
    deadline = time.monotonic() + END
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))


def test_the_help_is_printed_once(tmp_path: Path) -> None:
    status, output = Process(launcher(2, tmp_path / "logs", [*GENERATE, "--help"])).finish(START)
    assert status == 0 and "--prompt-file" in output
    assert os.path.getsize(tmp_path / "logs" / "workerlog.1") < 1000
