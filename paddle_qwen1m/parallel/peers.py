"""How the ranks of one machine come to the memory of each other's cards: all of them, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from paddle_qwen1m import ops

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NONE = "none"


class Store(Protocol):
    """Texts by key, the same for all ranks: Paddle's TCPStore. `get` waits until one is there."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class Peers:
    """The ranks 0 to degree - 1, of which this is `rank`, and what they tell each other under the name `what`, which is
    nobody else's. Whatever a rank calls, all of them call, in the same order.
    """

    def __init__(self, store: Store, what: str, rank: int, degree: int) -> None:
        self._store, self._what = store, what
        self.rank, self.degree = rank, degree
        self._told = 0

    def reach(self, own: int | None) -> list[int] | None:
        """Where this process has the memory that each rank has at the address `own` of its card; None on all ranks
        where one has none, or cannot reach another's.
        """
        machine = BOOT_ID.read_text().strip() if BOOT_ID.exists() else NONE
        name = None if own is None else _name(own)
        names = self._exchange(NONE if name is None else f"{machine} {name}")
        if own is None or machine == NONE or not all(name.startswith(f"{machine} ") for name in names):
            return None
        found = [own if other == self.rank else _open(name) for other, name in enumerate(names)]
        addresses = [address for address in found if address is not None]
        return addresses if self.agree(len(addresses) == self.degree) else None

    def agree(self, right: bool) -> bool:
        """Whether all ranks say so; returns once they have."""
        return NONE not in self._exchange("all" if right else NONE)

    def _exchange(self, own: str) -> list[str]:
        """What every rank says."""
        self._told += 1
        self._store.set(f"{self._what}/{self._told}/{self.rank}", own)
        return [self._store.get(f"{self._what}/{self._told}/{other}").decode() for other in range(self.degree)]


def _name(address: int) -> str | None:
    try:
        name, offset = ops.name_memory(address)
    except OSError:
        return None
    return f"{name.hex()} {offset}"


def _open(name: str) -> int | None:
    _machine, allocation, offset = name.split()
    try:
        return ops.open_memory(bytes.fromhex(allocation)) + int(offset)
    except OSError:
        return None
