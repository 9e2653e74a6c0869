"""What an engine in other processes and its caller say to each other, as bytes: JSON, with numbers in arrays behind it.

Text, numbers, lists, tuples, dicts, arrays and the dataclasses of `KINDS` come out as they went in. Reading makes these
and nothing else, whatever the bytes are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import chain, islice
from typing import Any

import numpy as np

from paddle_qwen1m.engine import (
    Completion,
    Finished,
    Logits,
    Metrics,
    Prefilled,
    PromptLogprobs,
    Request,
    SamplingParams,
    StructuredOutputsParams,
    TokenChosen,
    TokenLogprobs,
)
from paddle_qwen1m.engine.admission import Limits

KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        Completion, Finished, Limits, Logits, Metrics, Prefilled, PromptLogprobs, Request, SamplingParams,
        StructuredOutputsParams, TokenChosen, TokenLogprobs,
    )
}  # fmt: skip
FIELDS = {name: tuple(field.name for field in fields(kind)) for name, kind in KINDS.items()}
HEAD = struct.Struct("<QQ")
"""Before each message: the bytes of its JSON and of its arrays."""
MAX_BYTES = 1 << 40
DTYPES = ("<i4", "<i8", "<f4", "<f8")
INT32, INT64 = np.iinfo(np.int32), np.iinfo(np.int64)


def encode(message: Any) -> bytes:
    """A message, as it goes over the wire. TypeError for what cannot be sent."""
    arrays: list[bytes] = []
    text = json.dumps(_written(message, arrays), separators=(",", ":")).encode()
    return b"".join((HEAD.pack(len(text), sum(map(len, arrays))), text, *arrays))


class Reader:
    """Puts messages together from the pieces in which their bytes come."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, piece: bytes) -> Iterator[Any]:
        """The messages that end in this piece. ValueError for what is no message."""
        self._received += piece
        while len(self._received) >= HEAD.size:
            text_bytes, array_bytes = HEAD.unpack_from(self._received)
            if text_bytes + array_bytes > MAX_BYTES:
                raise ValueError(f"a message of {text_bytes + array_bytes} bytes")
            begin, end = HEAD.size + text_bytes, HEAD.size + text_bytes + array_bytes
            if len(self._received) < end:
                return
            text, arrays = bytes(self._received[HEAD.size : begin]), bytes(self._received[begin:end])
            del self._received[:end]
            yield _read(text, arrays)


def _written(value: Any, arrays: list[bytes]) -> Any:
    """`value` as JSON: what holds others is a list that begins with what it is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    name = type(value).__name__
    if name in KINDS:
        return [name, *(_written(getattr(value, field), arrays) for field in FIELDS[name])]
    if isinstance(value, np.ndarray):
        return ["array", value.dtype.str, value.shape, _appended(value, arrays)]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return _written_items("list" if isinstance(value, list) else "tuple", value, arrays)
    if isinstance(value, Mapping):
        return ["dict", _written(tuple(value), arrays), _written(tuple(value.values()), arrays)]
    raise TypeError(f"{name} cannot be sent to another process: {value!r}")


def _written_items(kind: str, items: Sequence[Any], arrays: list[bytes]) -> Any:
    """Items of one type go together: as one array of numbers, or field by field."""
    types = set(map(type, items))
    only = types.pop() if len(types) == 1 else object
    if only is float or (only is int and min(items) >= INT64.min and max(items) <= INT64.max):
        return [f"{kind} of numbers", _appended(np.array(items, np.float64 if only is float else np.int64), arrays)]
    if only is tuple:
        lengths, flat = [len(one) for one in items], list(chain.from_iterable(items))
        return [f"{kind} of tuples", _written(lengths, arrays), _written(flat, arrays)]
    if only.__name__ in KINDS:
        columns = [[getattr(one, field) for one in items] for field in FIELDS[only.__name__]]
        return [f"{kind} of objects", only.__name__, *(_written(column, arrays) for column in columns)]
    return [kind, *(_written(one, arrays) for one in items)]


def _appended(values: np.ndarray, arrays: list[bytes]) -> list[Any]:
    """Adds the numbers to `arrays`, in half the bytes where they fit; their type there, and how many there are."""
    if values.dtype == np.int64 and values.size and INT32.min <= values.min() and values.max() <= INT32.max:
        values = values.astype(np.int32)
    dtype = values.dtype.newbyteorder("<").str
    if dtype not in DTYPES:
        raise TypeError(f"an array of {values.dtype} cannot be sent to another process")
    arrays.append(values.astype(dtype, copy=False).tobytes())
    return [dtype, values.size]


def _read(text: bytes, arrays: bytes) -> Any:
    try:
        return _Arrays(arrays).read(json.loads(text))
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"not a message: {error}") from error


class _Arrays:
    """Reads a message's JSON; its arrays come in the order in which they were written."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._offset = raw, 0

    def read(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *content = value
        if kind in KINDS:
            return KINDS[kind](*map(self.read, content))
        if kind == "array":
            dtype, shape, where = content
            return self._next(*where).astype(_checked(dtype)).reshape(shape)
        if kind == "dict":
            names, values = map(self.read, content)
            return dict(zip(names, values))
        container, _, of = kind.partition(" of ")
        if container not in ("list", "tuple"):
            raise ValueError(f"{kind!r} is no kind of value")
        if of == "numbers":
            items = self._next(*content[0]).tolist()
        elif of == "tuples":
            lengths, flat = self.read(content[0]), iter(self.read(content[1]))
            items = [tuple(islice(flat, length)) for length in lengths]
        elif of == "objects":
            items = list(map(KINDS[content[0]], *map(self.read, content[1:])))
        else:
            items = [self.read(one) for one in content]
        return items if container == "list" else tuple(items)

    def _next(self, dtype: str, size: int) -> np.ndarray:
        values = np.frombuffer(self._raw, _checked(dtype), size, self._offset)
        self._offset += values.nbytes
        return values


def _checked(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"an array of {dtype!r}")
    return dtype
