"""Posts and uploads of a GPU: nothing waits but who asks to, and what is queued later changes nothing of a post."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from cuda_library import CudaLibrary, read_structs  # noqa: E402

NOT_READY = 600
LONG = 400_000_000
"""Cycles of a kernel that keeps the GPU busy: about 0.2 s."""
PARCEL = read_structs()["parcel"]


class Parcels:
    """The C functions of parcels; those that a test takes are given back at its end."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._take, self._give = library.qwen1m_cuda_take_parcel, library.qwen1m_cuda_give_parcel
        self._take.argtypes, self._take.restype = (ctypes.c_int64,), ctypes.POINTER(PARCEL)
        self._give.argtypes, self._give.restype = (ctypes.POINTER(PARCEL),), None
        self._await = library.qwen1m_cuda_await_parcel
        self._await.argtypes = ctypes.POINTER(PARCEL), ctypes.c_double
        self._taken: list[Any] = []

    def take(self, size: int) -> Any:
        parcel = self._take(size)
        assert parcel and parcel.contents.bytes >= size
        self._taken.append(parcel)
        return parcel

    def give(self, parcel: Any) -> None:
        self._taken = [one for one in self._taken if address(one) != address(parcel)]
        self._give(parcel)

    def state(self, parcel: Any, seconds: float = 0.0) -> int:
        return int(self._await(parcel, seconds))

    def give_all(self) -> None:
        for parcel in self._taken:
            self._give(parcel)


@pytest.fixture
def parcels(cuda: CudaLibrary) -> Iterator[Parcels]:
    made = Parcels(cuda._library)
    yield made
    torch.cuda.synchronize()
    made.give_all()


def address(parcel: Any) -> int:
    return ctypes.addressof(parcel.contents)


def memory(parcel: Any, offset: int, like: Any) -> np.ndarray:
    """The parcel's memory as an array of the kind of a tensor, which is not looked at."""
    kind = np.dtype(str(like.dtype).replace("torch.", ""))
    buffer = (ctypes.c_char * (like.numel() * kind.itemsize)).from_address(parcel.contents.memory + offset)
    return np.frombuffer(buffer, kind).reshape(tuple(like.shape))


def copy(cuda: CudaLibrary, op: str, values: Any, parcel: Any, offset: int = 0) -> None:
    """`post` or `upload`."""
    cuda(op, values=values, parcel=address(parcel), offset=offset, bytes=values.numel() * values.element_size())


def test_posts_hold_what_tensors_held(cuda: CudaLibrary, parcels: Parcels) -> None:
    """Several tensors in one parcel, each overwritten right behind its post."""
    for size in (1, 1000, 300_000):
        ids = torch.randint(-(2**62), 2**62, (size,), device="cuda")
        numbers = torch.randn(size, 3, device="cuda")
        expected = ids.cpu().numpy(), numbers.cpu().numpy()
        second = -(-8 * size // 64) * 64
        parcel = parcels.take(second + 12 * size)
        torch.cuda._sleep(LONG // 10)
        copy(cuda, "post", ids, parcel)
        copy(cuda, "post", numbers, parcel, second)
        ids.zero_()
        numbers.zero_()
        assert parcels.state(parcel, 5.0) == 0
        np.testing.assert_array_equal(memory(parcel, 0, ids), expected[0])
        np.testing.assert_array_equal(memory(parcel, second, numbers), expected[1])


def test_nothing_waits_but_who_asks_to(cuda: CudaLibrary, parcels: Parcels) -> None:
    """A post behind long work is made at once, is not there yet, and says so in the time given; then it comes."""
    values = torch.arange(100, device="cuda")
    parcel = parcels.take(800)
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(LONG)
    copy(cuda, "post", values, parcel)
    assert parcels.state(parcel) == NOT_READY and parcels.state(parcel, 0.02) == NOT_READY
    assert 0.02 < time.perf_counter() - began < 0.1
    assert parcels.state(parcel, 10.0) == 0
    assert time.perf_counter() - began > 0.1
    np.testing.assert_array_equal(memory(parcel, 0, values), np.arange(100))


def test_a_post_that_has_not_come_is_no_error_of_the_next_launch(cuda: CudaLibrary, parcels: Parcels) -> None:
    values, out = torch.arange(64, device="cuda", dtype=torch.int32)[None], torch.empty(1, 64, 128, device="cuda")
    parcel = parcels.take(256)
    torch.cuda._sleep(LONG)
    copy(cuda, "post", values, parcel)
    assert parcels.state(parcel) == NOT_READY
    frequencies = torch.ones(64, device="cuda")
    cuda("rotary_table", positions=values, inv_freq=frequencies, table=out, rows=64, head_dim=128)


def test_posts_come_in_their_order(cuda: CudaLibrary, parcels: Parcels) -> None:
    """One that has come says that all before it have."""
    values = torch.zeros(16, device="cuda")
    posts = [parcels.take(64) for _ in range(20)]
    for parcel in posts:
        torch.cuda._sleep(LONG // 40)
        copy(cuda, "post", values, parcel)
    while parcels.state(posts[-1]) == NOT_READY:
        states = [parcels.state(parcel) for parcel in reversed(posts)][::-1]
        assert states == sorted(states)  # asked from the last to the first
    assert [parcels.state(parcel) for parcel in posts] == [0] * 20


def test_other_threads_run_while_one_waits(cuda: CudaLibrary, parcels: Parcels) -> None:
    values, parcel = torch.zeros(16, device="cuda"), parcels.take(64)
    torch.cuda._sleep(LONG)
    copy(cuda, "post", values, parcel)
    waiter = threading.Thread(target=parcels.state, args=(parcel, 10.0))
    waiter.start()
    turns = 0
    while waiter.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 50


def test_a_parcel_is_kept_until_its_copies_are_done(cuda: CudaLibrary, parcels: Parcels) -> None:
    """Given back at once, it is nobody's as long as the GPU reads or writes it; then it is taken again."""
    target, source = torch.zeros(100, device="cuda"), np.arange(100, dtype=np.float32)
    parcel = parcels.take(400)
    busy = address(parcel)
    memory(parcel, 0, target)[...] = source
    torch.cuda._sleep(LONG)
    copy(cuda, "upload", target, parcel)
    parcels.give(parcel)
    others = [parcels.take(400) for _ in range(20)]
    assert busy not in map(address, others)
    for other in others:
        memory(other, 0, target)[...] = -1
    np.testing.assert_array_equal(target.cpu().numpy(), source)
    assert any(address(parcels.take(400)) == busy for _ in range(200))


def test_an_upload_fills_a_place_in_its_turn(cuda: CudaLibrary, parcels: Parcels) -> None:
    """Behind what was queued before, and before what is queued after; the rest of the tensor stays."""
    table = torch.zeros(4, 100, dtype=torch.int32, device="cuda")
    parcel = parcels.take(400)
    torch.cuda._sleep(LONG // 10)
    table.fill_(3)
    memory(parcel, 0, table[2:3])[...] = np.arange(100)
    copy(cuda, "upload", table[2:3], parcel)
    before = table.clone()
    table.zero_()
    expected = np.full((4, 100), 3)
    expected[2] = np.arange(100)
    np.testing.assert_array_equal(before.cpu().numpy(), expected)


def test_large_parcels_are_not_kept(cuda: CudaLibrary, parcels: Parcels) -> None:
    values = torch.full((1 << 23,), 7.0, device="cuda")
    parcel = parcels.take(values.numel() * 4)
    copy(cuda, "post", values, parcel)
    assert parcels.state(parcel, 10.0) == 0
    assert (memory(parcel, 0, values) == 7.0).all()
    parcels.give(parcel)
    small = parcels.take(64)
    assert small.contents.bytes < 1 << 20
