"""A process that has computed can be forked: its children compute too, as those of gunicorn and multiprocessing do."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import Callable

import numpy as np
import pytest

from paddle_qwen1m import Qwen2OneMForCausalLM, ops
from paddle_qwen1m.engine import SamplingParams

IDS = np.arange(1, 601)[None] % 745
SECONDS = 60.0


@pytest.fixture(scope="module")
def answer(needle_checkpoint: Path) -> Callable[[], list[list[int]]]:
    """Asks a model that has answered once, with a team of at least two threads."""
    model = Qwen2OneMForCausalLM.from_pretrained(str(needle_checkpoint))
    ops.set_num_threads(max(2, len(os.sched_getaffinity(0))))

    def ask() -> list[list[int]]:
        return model.generate(IDS, max_new_tokens=4, do_sample=False)[0].numpy().tolist()

    ask()
    return ask


def in_child(work: Callable[[], bool]) -> bool:
    """What `work` says in a forked child; a failure when it does not end."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail(f"the child still computed after {SECONDS:g} s")


def test_a_child_answers_as_its_parent_does(answer: Callable[[], list[list[int]]]) -> None:
    expected = answer()
    assert in_child(lambda: answer() == expected)
    assert answer() == expected, "and the parent goes on"


def test_a_grandchild_does_too(answer: Callable[[], list[list[int]]]) -> None:
    expected = answer()
    assert in_child(lambda: answer() == expected and in_child(lambda: answer() == expected))


def test_children_of_multiprocessing(answer: Callable[[], list[list[int]]]) -> None:
    expected = answer()
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=lambda: sys.exit(answer() != expected)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(SECONDS)
        child.kill()
        assert child.exitcode == 0


def test_children_that_are_forked_while_another_thread_generates(needle_checkpoint: Path) -> None:
    """What that thread was in the middle of is the parent's: the child does not go on with it, nor wait for it."""
    engine = Qwen2OneMForCausalLM.from_pretrained(str(needle_checkpoint)).engine
    short, long, params = IDS[0], np.tile(IDS[0], 3), SamplingParams(max_tokens=4, temperature=0.0)

    def ask(prompt: np.ndarray) -> list[int]:
        tokens: list[int] = []
        engine.generate([prompt], params, on_token=lambda _, token: tokens.append(token))
        return tokens

    expected, expected_long = ask(short), ask(long)
    engine.release_cache()
    answers: list[list[int]] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answers.append(ask(short))

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        for pause in range(4):
            time.sleep(0.05 * pause)
            assert in_child(lambda: ask(long) == expected_long)
    finally:
        stop.set()
        thread.join()
    assert len(answers) > 0 and all(one == expected for one in answers)


def test_a_child_of_the_thread_that_generates_can_go_on_with_it(needle_checkpoint: Path) -> None:
    engine = Qwen2OneMForCausalLM.from_pretrained(str(needle_checkpoint)).engine
    prompt, params = IDS[0], SamplingParams(max_tokens=4, temperature=0.0)
    expected = engine.generate([prompt], params)[0].token_ids
    children: list[int] = []

    def fork_once(_index: int, _token: int) -> None:
        if not children:
            children.append(os.fork())

    try:
        found = engine.generate([prompt], params, on_token=fork_once)[0].token_ids
        status = int(found != expected)
    except BaseException:
        status = 2
    if children[0] == 0:
        os._exit(status)
    assert status == 0 and os.waitpid(children[0], 0)[1] == 0
