"""Pieces of a GPU's memory go to host buffers and back on a stream of their own, beside what is computed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from cuda_library import CudaLibrary, read_structs  # noqa: E402
from test_post import LONG, NOT_READY, Parcels, address, memory, parcels  # noqa: E402, F401

PIECES = read_structs()["pieces"]
PIECE = 1024


def copy(cuda: CudaLibrary, direction: str, places: list[Any], parcel: Any, offset: int = 0) -> None:
    """Pieces of PIECE numbers each, None for one that is left out."""
    addresses = np.asarray([0 if place is None else place.data_ptr() for place in places], np.int64)
    pieces = PIECES(addresses.ctypes.data, len(places), 4 * PIECE, address(parcel), offset)
    function = getattr(cuda._library, f"qwen1m_cuda_{direction}")
    function.argtypes = (ctypes.POINTER(PIECES),)
    assert function(ctypes.byref(pieces)) == 0


def test_pieces_are_gathered_and_scattered_but_for_those_left_out(
    cuda: CudaLibrary,
    parcels: Parcels,  # noqa: F811
) -> None:
    pages = torch.arange(8 * PIECE, dtype=torch.float32, device="cuda").reshape(8, PIECE)
    parcel = parcels.take(64 + 3 * 4 * PIECE)
    whole = torch.empty(3, PIECE)
    memory(parcel, 64, whole)[...] = -1
    torch.cuda.synchronize()
    copy(cuda, "gather", [pages[5], None, pages[2]], parcel, 64)
    assert parcels.state(parcel, 5.0) == 0
    expected = np.stack([np.arange(5 * PIECE, 6 * PIECE), np.full(PIECE, -1), np.arange(2 * PIECE, 3 * PIECE)])
    np.testing.assert_array_equal(memory(parcel, 64, whole), expected)
    before = pages.cpu().numpy()
    copy(cuda, "scatter", [pages[0], None, pages[7]], parcel, 64)
    assert parcels.state(parcel, 5.0) == 0
    before[0], before[7] = expected[0], expected[2]
    np.testing.assert_array_equal(pages.cpu().numpy(), before)


def test_they_do_not_wait_for_what_is_computed(cuda: CudaLibrary, parcels: Parcels) -> None:  # noqa: F811
    page, busy = torch.ones(PIECE, device="cuda"), torch.zeros(16, device="cuda")
    parcel, behind = parcels.take(4 * PIECE), parcels.take(64)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    cuda("post", values=busy, parcel=address(behind), offset=0, bytes=64)
    copy(cuda, "gather", [page], parcel)
    assert parcels.state(parcel, 5.0) == 0 and parcels.state(behind) == NOT_READY
    np.testing.assert_array_equal(memory(parcel, 0, page), np.ones(PIECE))
