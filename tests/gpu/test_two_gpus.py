"""Two ranks on two GPUs, one of which fails: all end in time, the rank is named, and the GPUs' memory is free again.

What they send each other; and what ranks answer, on four GPUs where there are as many.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

paddle = pytest.importorskip("paddle", reason="Paddle is not installed")

if not paddle.device.is_compiled_with_cuda() or paddle.device.cuda.device_count() < 2:
    pytest.skip("this Paddle has no two GPUs", allow_module_level=True)

sys.path.append(str(Path(__file__).parents[1] / "parallel"))

from parallel_ranks import NEEDLE, Process, is_running  # noqa: E402
from short_prompts import wrong_answers  # noqa: E402

FAILING = Path(__file__).parents[1] / "parallel" / "failing_rank.py"
START = 120.0
"""Seconds for processes to start and to come to where one fails."""
STALL = 15.0
END = {"kill": 10.0, "raise": 10.0, "memory": 20.0, "stop": STALL + 10.0}
"""Seconds from the failure to the end of all processes; Paddle asks for memory again for ten before it gives up."""
LEFT = 64 << 20
"""Bytes of a GPU that others may have taken meanwhile."""
FREED = 20.0
"""Seconds that the driver may take to free the memory of processes that have ended."""


def used_memory() -> list[int]:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(line) << 20 for line in told.split()][:2]


def begin(folder: Path, rank: int, how: str) -> Process:
    launch = ["-m", "paddle.distributed.launch", "--devices", "0,1", "--log_dir", folder / "logs"]
    limit = {"PADDLE_QWEN1M_STALL_SECONDS": str(STALL)}
    return Process([*launch, FAILING, NEEDLE, folder, str(rank), "decode" if how else "never", how], **limit)


def wait_for(folder: Path, *names: str) -> list[str]:
    """What stands in these files once they are all there."""
    deadline = time.monotonic() + START
    while not all((folder / name).exists() and (folder / name).read_text() for name in names):
        assert time.monotonic() < deadline, f"{names} are not all in {folder} after {START:g} s"
        time.sleep(0.02)
    return [(folder / name).read_text() for name in names]


def wait_for_ends(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"after {seconds:g} s some of {pids} still run"
        time.sleep(0.02)


def wait_for_memory(before: list[int]) -> list[int]:
    """What is in use once that is as much as before, or after FREED seconds."""
    deadline = time.monotonic() + FREED
    while not is_free(after := used_memory(), before) and time.monotonic() < deadline:
        time.sleep(0.1)
    return after


def is_free(after: list[int], before: list[int]) -> bool:
    return all(now <= then + LEFT for now, then in zip(after, before))


@pytest.mark.parametrize(
    ("rank", "how"), [(0, "kill"), (1, "kill"), (0, "stop"), (1, "stop"), (1, "raise"), (1, "memory")]
)
def test_a_rank_that_fails_ends_the_other_and_frees_both_gpus(
    tmp_path: Path, rank: int, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = used_memory()
    launched = begin(tmp_path, rank, how)
    *pids, failed = wait_for(tmp_path, "0", "1", "failed")
    status, output = launched.finish(END[how] + START)
    wait_for_ends([int(pid) for pid in pids], END[how])
    seconds = time.time() - float(failed)
    logs = output + "".join(log.read_text() for log in sorted((tmp_path / "logs").glob("workerlog.*")))
    after = wait_for_memory(before)
    freed = time.time() - float(failed)
    with capsys.disabled():
        print(f"\nrank {rank}, {how}: ended after {seconds:.1f} s, in use after {freed:.1f} s {after} of {before}")
    reason = {"kill": "killed or crashed", "stop": "stopped, or cut off", "raise": "the dog ate it", "memory": "emory"}
    assert status != 0 and f"rank {rank} on " in logs and reason[how] in logs, logs[-4000:]
    assert seconds < END[how]
    assert is_free(after, before)


def test_a_launcher_that_is_killed_leaves_no_rank_and_no_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = used_memory()
    launched = begin(tmp_path, 9, "")
    pids = [int(pid) for pid in wait_for(tmp_path, "0", "1")]
    time.sleep(5)
    launched.kill()
    began = time.monotonic()
    try:
        wait_for_ends(pids, 10.0)
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)
    seconds = time.monotonic() - began
    after = wait_for_memory(before)
    freed = time.monotonic() - began
    with capsys.disabled():
        print(f"\nlauncher killed: ended after {seconds:.1f} s, in use after {freed:.1f} s {after} of {before}")
    assert is_free(after, before)


def found_by_both(tmp_path: Path, script: str, **environment: str) -> list[Any]:
    """What a script, launched on two GPUs, leaves as JSON in the file that its argument and its rank name."""
    file = tmp_path / "script.py"
    file.write_text(script, encoding="utf-8")
    command = ["-m", "paddle.distributed.launch", "--devices", "0,1", "--log_dir", tmp_path / "logs", file]
    status, output = Process([*command, tmp_path / "found"], **environment).finish(START)
    assert status == 0, output
    return [json.loads((tmp_path / f"found{rank}").read_text()) for rank in range(2)]


SUMS = """
import json, sys
import numpy as np
from benchmark_sums import Rows, all_reduced
import paddle
from paddle_qwen1m.parallel.group import start

paddle.device.set_device("gpu")
group = start(2)
found = []
for number in range(100):
    rows = 1 + number % 70
    sums = [Rows(group.rank, rows, 512).sums(norm) for norm in (group.add_rms_norm, all_reduced(group))]
    found.append([float(np.abs(sums[0] - sums[1]).max()), float(np.abs(sums[1]).max())])
open(sys.argv[1] + str(group.rank), "w").write(json.dumps([group._mailboxes is not None, found]))
"""


@pytest.mark.parametrize("mailboxes", ["1", "0"])
def test_sums_of_few_rows_go_through_mailboxes_where_that_is_not_switched_off(tmp_path: Path, mailboxes: str) -> None:
    """They are those of NCCL, which rounds to bfloat16; more rows than a mailbox takes are NCCL's."""
    for opened, found in found_by_both(tmp_path, SUMS, PADDLE_QWEN1M_MAILBOXES=mailboxes):
        assert opened == (mailboxes == "1")
        assert all(off <= 2.0**-8 * largest for off, largest in found)


@pytest.mark.parametrize("degree", [2, 4])
def test_short_prompts_are_answered_together_alone_and_beside_a_long_one(
    monkeypatch: pytest.MonkeyPatch, degree: int
) -> None:
    if paddle.device.cuda.device_count() < degree:
        pytest.skip(f"this machine has no {degree} GPUs")
    monkeypatch.setenv("PADDLE_QWEN1M_STALL_SECONDS", str(STALL))
    assert wrong_answers(degree, long_tokens=60_000) == []


CONTEXTS = """
import ctypes, json, sys, time
import numpy as np
import paddle
from paddle_qwen1m import ops
from paddle_qwen1m.parallel.group import start

paddle.device.set_device("gpu")
group = start(2)
values = ops.tensor(np.zeros(1, np.float32))
end = time.monotonic() + 3  # some beats, which ask whether marks are reached
while time.monotonic() < end:
    group.mark(values)
    time.sleep(0.01)
driver, found = ctypes.CDLL("libcuda.so.1"), []
for number in range(2):
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDeviceGet(ctypes.byref(device), number) == 0
    assert driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
    found.append(active.value)
open(sys.argv[1] + str(group.rank), "w").write(json.dumps(found))
"""


def test_a_rank_makes_a_context_on_its_own_gpu_alone(tmp_path: Path) -> None:
    """Each takes some 0.5 GB, which nobody has planned for on the first GPU."""
    assert found_by_both(tmp_path, CONTEXTS) == [[1, 0], [0, 1]]


LANES = """
import json, sys
from benchmark_lanes import compared
import paddle
from paddle_qwen1m.parallel.group import start
from paddle_qwen1m.planning import PUBLISHED

paddle.device.set_device("gpu")
group = start(2)
copied, _milliseconds, off, largest = compared(group, PUBLISHED["7B"], 8192)
open(sys.argv[1] + str(group.rank), "w").write(json.dumps([copied, off, largest]))
"""


@pytest.mark.parametrize("copies", ["", "0"])
def test_lanes_that_the_cards_copy_give_what_collectives_give(tmp_path: Path, copies: str) -> None:
    """But for NCCL's sums in bfloat16."""
    for copied, off, largest in found_by_both(tmp_path, LANES, PADDLE_QWEN1M_COPIES=copies):
        assert copied == (copies != "0") and off <= 2.0**-5 * largest
