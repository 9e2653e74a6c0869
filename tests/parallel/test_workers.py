"""An engine whose ranks are other processes answers as one here, fails as its ranks do, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from parallel_ranks import Process, is_running
from stub_worker import LIMITS, ORDERS, StubEngine

from paddle_qwen1m.engine import (
    Event,
    Finished,
    NotEnoughMemory,
    Request,
    SamplingParams,
    StructuredOutputsParams,
    TokenChosen,
)
from paddle_qwen1m.parallel.group import ALONE
from paddle_qwen1m.parallel.job import JobEnded
from paddle_qwen1m.parallel.remote import RemoteEngine, start_engine

CALLING = Path(__file__).with_name("calling_script.py")
HOST = socket.gethostname()
END = 5.0
"""Seconds in which the end of one process must be that of all."""


def start(model: str = "fine") -> RemoteEngine:
    return start_engine(model, {"tensor_parallel_size": 2}, worker="stub_worker")


def request(name: str, *ids: int, tokens: int = 3) -> Request:
    return Request(name, np.array(ids, np.int64), SamplingParams(max_tokens=tokens))


def run(engine: RemoteEngine | StubEngine, *requests: Request) -> list[Event]:
    """Everything that becomes of the requests."""
    events = []
    for one in requests:
        engine.add(one)
    while not engine.is_idle:
        events += engine.step()
    return events


def children() -> set[int]:
    """The processes that this one has started, dead ones included that nobody has waited for."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def state() -> tuple[set[int], int, int]:
    """Processes, descriptors and threads, none of which may stay."""
    gc.collect()
    return children(), len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.fixture(scope="module")
def engine() -> Iterator[RemoteEngine]:
    before = state()
    engine = start()
    yield engine
    engine.close()
    engine.close()
    assert state() == before
    with pytest.raises(RuntimeError, match="the workers were ended"):
        engine.reset_prefix_cache()


# --- it answers as an engine in this process ---


def test_events_come_as_the_engine_made_them(engine: RemoteEngine) -> None:
    requests = [request("a", 1, 2, 3), request("b", 9, tokens=5), request("c", 4)]
    expected = run(StubEngine(ALONE), *requests)
    assert sorted(run(engine, *requests), key=lambda event: event.id) == sorted(expected, key=lambda event: event.id)
    assert engine.limits == LIMITS


def test_a_prompt_of_a_million_tokens_arrives_whole(engine: RemoteEngine) -> None:
    ids = np.arange(1_000_000) % 4999
    events = run(engine, Request("long", ids, SamplingParams(max_tokens=1)))
    assert [event.token for event in events if isinstance(event, TokenChosen)] == [int(ids.sum()) % 1000]


def test_what_cannot_be_served_is_refused_and_the_rest_goes_on(engine: RemoteEngine) -> None:
    engine.add(request("a", 1, tokens=LIMITS.max_model_len - 1))
    with pytest.raises(ValueError, match="there is a request with the id 'a' already"):
        engine.add(request("a", 1))
    with pytest.raises(ValueError, match=r"Input prompt \(2 tokens\)"):
        engine.add(request("b", 1, 2, tokens=LIMITS.max_model_len))
    with pytest.raises(ValueError, match=r"^structured_outputs: no such grammar$"):
        engine.add(request("c", ORDERS["refuse"]))
    assert engine.abort("a") and not engine.abort("a") and not engine.abort("b")
    assert engine.is_idle and len(run(engine, request("c", 1))) == 5


def test_nothing_comes_of_an_aborted_request_and_its_id_is_free(engine: RemoteEngine) -> None:
    engine.add(request("a", 1, tokens=100_000))
    while not engine.step():
        pass
    time.sleep(0.1)  # more is on its way
    assert engine.abort("a") and engine.is_idle and engine.step() == []
    tokens = [event.token for event in run(engine, request("a", 500)) if isinstance(event, TokenChosen)]
    assert tokens == [500, 501, 502]


def test_an_answer_can_be_stopped(engine: RemoteEngine) -> None:
    engine.add(request("a", 1, tokens=100_000))
    assert engine.stop("a", 0, "enough") and not engine.stop("b", 0, "enough")
    finished = run(engine)[-1]
    (completion,) = finished.completions
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "enough")
    assert completion.token_ids == [(1 + k) % 1000 for k in range(len(completion.token_ids))]


def test_what_takes_long_to_prepare_stops_nobody(engine: RemoteEngine) -> None:
    def structured(regex: str) -> SamplingParams:
        return SamplingParams(structured_outputs=StructuredOutputsParams(regex=regex))

    engine.add(request("a", 1, tokens=1_000_000))
    with ThreadPoolExecutor(1) as other:
        prepared = other.submit(engine.prepare, structured("0.5"))
        while not engine.step():
            pass
        tokens = 0
        while not prepared.done():
            tokens += len(engine.step())
        assert prepared.result() is None and tokens > 20
        assert engine.metrics.running == 1 and engine.metrics.generated_tokens >= tokens
    with pytest.raises(ValueError, match=r"^structured_outputs: no such grammar$"):
        engine.prepare(structured("0"))
    engine.prepare(SamplingParams())
    assert engine.abort("a") and engine.metrics.running == 0


def test_the_collector_leaves_what_a_rank_has_loaded_alone(engine: RemoteEngine) -> None:
    (*_, finished) = run(engine, request("a", ORDERS["frozen"], tokens=1))
    assert isinstance(finished, Finished) and finished.completions[0].token_ids == [999]


def test_the_prefix_cache_is_asked_for_in_turn(engine: RemoteEngine) -> None:
    engine.add(request("a", ORDERS["slow"], tokens=100))
    assert not engine.reset_prefix_cache()
    engine.abort("a")
    assert engine.reset_prefix_cache()


def test_ctrl_c_is_for_the_caller_alone(engine: RemoteEngine) -> None:
    for pid in children():
        os.kill(pid, signal.SIGINT)
    engine.add(request("a", ORDERS["slow"], tokens=100_000))
    pressed = time.monotonic() + 0.3
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            engine.step()
    assert time.monotonic() - pressed < 1.0
    assert engine.abort("a") and len(run(engine, request("a", 1))) == 5


def test_ctrl_c_at_the_start_leaves_nothing() -> None:
    before = state()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        start()
    timer.join()
    assert state() == before


def test_a_forked_child_is_told_that_it_has_none(engine: RemoteEngine) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            engine.add(request("a", 1))
        except RuntimeError as error:
            status = 0 if "this process was forked" in str(error) else 2
        engine.close()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    engine.abort("a")
    assert len(run(engine, request("b", 1))) == 5


# --- it fails as its ranks do, and leaves nothing behind ---


@pytest.mark.parametrize(
    ("loading", "error", "text"),
    [
        ("1 NotEnoughMemory", NotEnoughMemory, "there is no such thing"),
        pytest.param("0 ValueError", ValueError, "there is no such thing", marks=pytest.mark.slow),
        pytest.param(
            "1 KeyError", RuntimeError, f"rank 1 on {HOST}: KeyError: 'there is no such thing'", marks=pytest.mark.slow
        ),
        pytest.param("1 exit", JobEnded, f"rank 1 on {HOST}: ended with exit status 3", marks=pytest.mark.slow),
    ],
)
def test_what_goes_wrong_at_the_start_is_raised_here(
    engine: RemoteEngine, capfd: pytest.CaptureFixture[str], loading: str, error: type[Exception], text: str
) -> None:
    before = state()
    with pytest.raises(error) as raised:
        start(loading)
    assert type(raised.value) is error and str(raised.value) == text
    assert state() == before
    assert len(run(engine, request("a", 1))) == 5, "the other engine goes on"
    shown = "rank 1: this is rank 1, about to fail" in capfd.readouterr().err
    assert shown == (error in (RuntimeError, JobEnded)), "where the error does not say what is wrong, its log may"


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("kill 0", "rank 0 on {}: killed by SIGKILL"),
        pytest.param("kill 1", "rank 1 on {}: killed by SIGKILL", marks=pytest.mark.slow),
        pytest.param("stop 1", "rank 1 on {}: stopped, or cut off: no sign of life for 2 s", marks=pytest.mark.slow),
        pytest.param("stop 0", "rank 0 on {}: stopped, or cut off: no sign of life for 2 s", marks=pytest.mark.slow),
        pytest.param("raise", "rank 0 on {}: LookupError: the dog ate it", marks=pytest.mark.slow),
        ("raise in 1", "rank 1 on {}: LookupError: the dog ate it"),
        pytest.param("exit", "rank 1 on {}: ended with exit status 3", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_is_named_and_ends_all(monkeypatch: pytest.MonkeyPatch, how: str, text: str) -> None:
    monkeypatch.setenv("PADDLE_QWEN1M_STALL_SECONDS", "2")
    before = state()
    engine = start()
    ranks = sorted(children() - before[0])
    if how in ORDERS:
        engine.add(request("a", ORDERS[how], tokens=100_000))
    else:
        what, rank = how.split()
        engine.add(request("a", 1, tokens=1_000_000))
        os.kill(ranks[int(rank)], {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])
    began = time.monotonic()
    with pytest.raises(JobEnded, match=text.format(HOST)):
        while True:
            engine.step()
    assert time.monotonic() - began < 2 + END
    assert state() == before
    for call in (engine.step, engine.reset_prefix_cache, lambda: engine.metrics, lambda: engine.add(request("b", 1))):
        with pytest.raises(JobEnded, match=text.format(HOST)):
            call()
    engine.close()


def test_an_engine_that_nobody_holds_ends() -> None:
    before = state()
    engine = start()
    engine.add(request("a", ORDERS["slow"], tokens=100_000))
    del engine
    assert state() == before


@pytest.mark.parametrize("end", ["kill", pytest.param("return", marks=pytest.mark.slow)])
def test_a_script_without_a_main_guard(tmp_path: Path, end: str) -> None:
    """Its standard input is closed, a thread that ends makes the engine, and the script ends without a word."""
    status, output = Process([CALLING, end]).finish(60)
    died = time.monotonic()
    assert status == (-signal.SIGKILL if end == "kill" else 0), output
    assert output.count("this script begins") == 1 and "tokens: [1, 2, 3]" in output, output
    pids = [int(pid) for pid in output.partition("pids: ")[2].splitlines()[0].split()]
    assert len(pids) == 2
    while any(map(is_running, pids)):
        assert time.monotonic() - died < END
        time.sleep(0.02)
