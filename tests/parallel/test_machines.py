"""Two machines, as two network namespaces with a cable between them: README's line on both, and a cable that is cut."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from parallel_ranks import COMMAND, NEEDLE, environment, is_running, rank_environment

from paddle_qwen1m import cli

pytestmark = pytest.mark.slow

FAILING = Path(__file__).with_name("failing_rank.py")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29612
START = 150.0
STALL = 5.0
NUMBERS = itertools.count()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Machine:
    """A network namespace in which the host's name is its own address."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address = f"qwen1m-{os.getpid()}-{next(NUMBERS)}", ADDRESSES[number]
        self.end = f"q{os.getpid() % 100000}e{number}"
        self.hosts = folder / f"hosts-{number}"
        self.hosts.write_text(f"127.0.0.1 localhost\n{self.address} {socket.gethostname()}\n", encoding="utf-8")
        ip("netns", "add", self.name)

    def plug_in(self) -> None:
        ip("link", "set", self.end, "netns", self.name)
        for link in ("lo", self.end):
            ip("-n", self.name, "link", "set", link, "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", self.end)

    def pull_out(self) -> None:
        ip("-n", self.name, "link", "set", self.end, "down")

    def start(self, command: list[str | Path], log: Path, **changes: str) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", self.name, "sh", "-c", 'mount --bind "$0" /etc/hosts; exec "$@"', self.hosts]
        with log.open("wb") as output:
            return subprocess.Popen(
                [*map(str, inside), *map(str, command)],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env=environment(PATH=f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}", **changes),
            )  # fmt: skip


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    if shutil.which("ip") is None:
        pytest.skip("two network namespaces need ip (iproute2)")
    made: list[Machine] = []
    try:
        try:
            made += [Machine(number, tmp_path) for number in range(2)]
            ip("link", "add", made[0].end, "type", "veth", "peer", "name", made[1].end)
        except (subprocess.CalledProcessError, PermissionError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        for machine in made:
            machine.plug_in()
        yield made
    finally:
        for machine in made:
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True)


def wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise


def test_the_same_line_on_both_machines_is_one_job(
    machines: list[Machine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The code of the green door is 4711. What is the code?", encoding="utf-8")
    asked = ["--model", NEEDLE, "--prompt-file", prompt, "--greedy", "--max-new-tokens", "8"]
    launch = ["python", "-m", "paddle.distributed.launch", "--nnodes", "2", "--master", f"{ADDRESSES[0]}:{PORT}"]
    launch += ["--nproc_per_node", "1", "--log_dir"]
    logs = [tmp_path / f"log-{number}" for number in range(2)]
    running = [
        machine.start([*launch, tmp_path / f"ranks-{number}", "paddle-qwen1m", "generate", *asked], log)
        for number, (machine, log) in enumerate(zip(machines, logs))
    ]
    assert [wait(process, START) for process in running] == [0, 0], [log.read_text()[-2000:] for log in logs]
    assert cli.main(["generate", *map(str, asked)]) == 0
    answer = capsys.readouterr().out.strip()
    assert [answer in log.read_text() for log in logs] == [True, False], "rank 0 alone prints"


def test_a_cable_that_is_cut_ends_both_ranks(machines: list[Machine], tmp_path: Path) -> None:
    """Each says that the other has given no sign of life, within twice the limit."""
    logs = [tmp_path / f"log-{number}" for number in range(2)]
    for number, (machine, log) in enumerate(zip(machines, logs)):
        ranks = rank_environment(number, 2, PORT)
        ranks["PADDLE_TRAINER_ENDPOINTS"] = ",".join(f"{address}:{PORT}" for address in ADDRESSES)
        limit = {"PADDLE_QWEN1M_STALL_SECONDS": str(STALL)}
        machine.start(
            [COMMAND.with_name("python"), FAILING, NEEDLE, tmp_path, "9", "never", "kill"], log, **ranks, **limit
        )
    deadline = time.monotonic() + START
    while not all((tmp_path / str(rank)).exists() for rank in range(2)):
        assert time.monotonic() < deadline, [log.read_text()[-2000:] for log in logs]
        time.sleep(0.1)
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    time.sleep(10)  # they have met and decode: an answer of 20,000 tokens takes minutes
    assert all(map(is_running, pids)), [log.read_text()[-2000:] for log in logs]
    machines[1].pull_out()
    deadline = time.monotonic() + 2 * STALL + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, 9)
    assert not left, [log.read_text()[-2000:] for log in logs]
    for rank, log in enumerate(logs):
        assert f"rank {1 - rank} on {socket.gethostname()}: stopped, or cut off" in log.read_text(), log.read_text()
