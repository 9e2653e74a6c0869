"""What rank 0 has every rank do next. An order is complete in itself: who follows keeps no prompts and no pages."""

from __future__ import annotations

import base64
from dataclasses import dataclass, fields
from typing import Any, Union

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Tokens of one prompt to prefill: `ids` int64 [n] at positions [begin, begin + n), `pages` of all up to there.

    length: the n of the temperature and of the sparse threshold. wanted: which of the n rows' logits are, ascending.
    """

    ids: np.ndarray
    begin: int
    pages: tuple[int, ...]
    length: int
    sparse: bool
    wanted: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.begin + len(self.ids)


@dataclass(frozen=True)
class Prefill:
    """Begin a chunk of one prompt, or of several short ones, and go on to its first point.

    row_blocks: a point behind so many row blocks of a layer's attention, 0: behind each layer alone. A chunk that is
    begun while another one stands at a point goes to its end at once; then the other can go on.
    """

    rows: tuple[Rows, ...]
    row_blocks: int = 0


@dataclass(frozen=True)
class Advance:
    """Go on with the chunk to its next point, or its end."""


@dataclass(frozen=True)
class Drop:
    """Forget the chunk that stands at a point."""


@dataclass(frozen=True)
class Join:
    """A sequence of `length` cached tokens takes a slot of the decode batch; `token` is the one behind them."""

    slot: int
    token: int
    length: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Decode:
    """Empty the slots `leave`, fill others, then choose the next token in each of the first `slots` slots."""

    slots: int
    join: tuple[Join, ...] = ()
    leave: tuple[int, ...] = ()


@dataclass(frozen=True)
class CopyPage:
    """Copy the keys and values of a page's first `tokens` tokens to another page."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True)
class Rest:
    """Nothing is left to do: who follows gives back what only running sequences need, and returns to its caller."""


Order = Union[Prefill, Advance, Drop, Decode, CopyPage, Rest]
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Prefill, Advance, Drop, Decode, CopyPage, Rest, Rows, Join)}


def to_message(order: Any) -> Any:
    """An order as JSON has it."""
    if isinstance(order, np.ndarray):
        return {"kind": "ids", "data": base64.b64encode(order.astype("<i4").tobytes()).decode("ascii")}
    if isinstance(order, tuple):
        return [to_message(one) for one in order]
    if type(order).__name__ in KINDS:
        return {
            "kind": type(order).__name__,
            **{one.name: to_message(getattr(order, one.name)) for one in fields(order)},
        }
    return order


def from_message(message: Any) -> Any:
    """The order again."""
    if isinstance(message, list):
        return tuple(from_message(one) for one in message)
    if not isinstance(message, dict):
        return message
    values = dict(message)
    kind = values.pop("kind")
    if kind == "ids":
        return np.frombuffer(base64.b64decode(values["data"]), "<i4").astype(np.int64)
    return KINDS[kind](**{name: from_message(value) for name, value in values.items()})
