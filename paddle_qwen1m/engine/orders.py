"""What rank 0 has every rank do next. An order is complete in itself: who follows keeps no prompts and no pages."""

from __future__ import annotations

import base64
from dataclasses import dataclass, fields
from typing import Any, Union

import numpy as np

from paddle_qwen1m.attention.step import SequenceRows
from paddle_qwen1m.cache import SegmentPages, StoredSegment

HEAD_ROWS = 256
"""Rows whose logits are computed at once: they are as wide as the vocabulary."""


@dataclass(frozen=True)
class Rows(SequenceRows):
    """Tokens of one prompt to prefill. wanted: which of the rows' logits are, ascending."""

    wanted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prefill:
    """Begin a chunk of one prompt, or of several short ones, and go on to its `points`-th point.

    Points are behind each layer and, in it, behind all of its attention and each `row_blocks` row blocks of that; 0:
    none between them. points=0 goes to the chunk's end at once: then another one may stand at a point meanwhile.
    """

    rows: tuple[Rows, ...]
    row_blocks: int = 0
    points: int = 1

    @property
    def num_wanted(self) -> int:
        return sum(len(rows.wanted) for rows in self.rows)

    @property
    def is_whole(self) -> bool:
        """Whether it is of one prompt, and stands nowhere."""
        return self.points == 0 and len(self.rows) == 1


@dataclass(frozen=True)
class Advance:
    """Go on with the chunk that stands at a point to the `points`-th one from there, 0: to its end."""

    points: int = 1


@dataclass(frozen=True)
class Drop:
    """Forget the chunk that stands at a point."""


@dataclass(frozen=True)
class Head:
    """Compute the logits of `count` of the rows that the chunk which ended last wanted, from the `first` of them on."""

    first: int
    count: int

    def __post_init__(self) -> None:
        assert self.first >= 0 and 0 < self.count <= HEAD_ROWS


@dataclass(frozen=True)
class Join:
    """A sequence of `length` cached tokens takes a slot of the decode batch; `token` is the one behind them.

    pages: all that its answer can come to need.
    """

    slot: int
    token: int
    length: int
    pages: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.slot >= 0 and self.length > 0


@dataclass(frozen=True)
class Decode:
    """Empty the slots `leave`, fill others, then choose the next token in each of the first `slots` slots.

    top_logprobs: tell the likeliest tokens too.
    """

    slots: int
    join: tuple[Join, ...] = ()
    leave: tuple[int, ...] = ()
    top_logprobs: bool = False


@dataclass(frozen=True)
class CopyPage:
    """Copy the keys and values of a page's first `tokens` tokens to another page."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True)
class Restore:
    """Begin, in the background, to fill pages from a prefix store. number: of this transfer, as no other has."""

    number: int
    what: SegmentPages


@dataclass(frozen=True)
class Save:
    """Begin, in the background, to write pages to a prefix store. number: of this transfer, as no other has."""

    number: int
    what: SegmentPages


@dataclass(frozen=True)
class GiveUp:
    """End a transfer: whoever has done this touches none of its pages."""

    number: int


@dataclass(frozen=True)
class Rest:
    """Nothing is left to do: the chunk is dropped and every slot emptied; who follows returns to its caller."""


Order = Union[Prefill, Advance, Drop, Head, Decode, CopyPage, Restore, Save, GiveUp, Rest]
KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(Prefill, Advance, Drop, Head, Decode, CopyPage, Restore, Save, GiveUp, Rest),
        *(Rows, Join, SegmentPages, StoredSegment),
    )
}


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
