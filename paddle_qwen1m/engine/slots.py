"""Which answer has which slot of the decode batch: the first ones, so that the batch is as small as it can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paddle_qwen1m.engine.core import Answer


@dataclass(frozen=True)
class Seats:
    """How the slots change before a decode step, and who is in which afterwards: the first `count` slots are used."""

    count: int
    joining: tuple[tuple[int, Answer], ...]
    leaving: tuple[int, ...]
    held: tuple[tuple[int, Answer], ...]


class Slots:
    """At most `most` answers, in slots from 0 on. Batches are computed in sizes 1, 2, 4, 8, ...: an answer whose slot
    lies behind the smallest one that holds all moves into a hole.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[int, Answer] = {}
        self._leaving: set[int] = set()
        self._joining: list[Answer] = []

    def __len__(self) -> int:
        return len(self._held) + len(self._joining)

    def __iter__(self) -> Iterator[Answer]:
        yield from self._held.values()
        yield from self._joining

    @property
    def are_settled(self) -> bool:
        """Whether the next step finds every answer in the slot that it has."""
        return len(self._held) > 0 and not self._joining and max(self._held) < self._size

    @property
    def _size(self) -> int:
        """Slots of the smallest batch that holds all."""
        return min(self._most, 1 << (len(self) - 1).bit_length())

    def join(self, answer: Answer) -> None:
        """It takes part from the next step on."""
        assert len(self) < self._most
        self._joining.append(answer)

    def leave(self, answer: Answer) -> None:
        """It takes no part in the next step; nothing happens where it had none."""
        if answer in self._joining:
            self._joining.remove(answer)
        for slot in [slot for slot, held in self._held.items() if held is answer]:
            del self._held[slot]
            self._leaving.add(slot)

    def seat(self) -> Seats:
        """Takes everybody's place for the next step."""
        size = self._size
        moving = {slot: answer for slot, answer in sorted(self._held.items()) if slot >= size}
        for slot in moving:
            del self._held[slot]
        free = [slot for slot in range(size) if slot not in self._held]
        joining = tuple(zip(free, (*moving.values(), *self._joining)))
        leaving = tuple(sorted(self._leaving | set(moving)))
        self._held.update(joining)
        self._joining.clear()
        self._leaving.clear()
        return Seats(max(self._held) + 1, joining, leaving, tuple(sorted(self._held.items(), key=lambda pair: pair[0])))

    def empty(self) -> None:
        """Forgets everybody, as the device does with Rest."""
        self._held.clear()
        self._leaving.clear()
        self._joining.clear()
