"""A connection between two ranks: JSON messages, each behind its length.

Once it is `open` the ops library sends (custom_ops/include/qwen1m/job.h): this process's messages, a beat between them,
and at the end of the process the exit status that it really has.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

MAX_FRAME = 1 << 30
SLICE_SECONDS = 1.0
"""A message that takes longer to send gives Ctrl-C its turn so often."""
CLOSED = "killed or crashed, its connection is closed"

Message = dict[str, Any]


class Progress(ctypes.Structure):
    """What this process has done so far; `entered`: collectives and replays begun, as many on every rank of a job."""

    _fields_ = (("work", ctypes.c_int64), ("entered", ctypes.c_int64), ("busy", ctypes.c_int32))


def library() -> ctypes.CDLL:
    from paddle_qwen1m.ops.library import library as ops_library

    return ops_library()


def own_progress() -> Message:
    """This process's own beat."""
    now = Progress()
    library().qwen1m_read_progress(ctypes.byref(now))
    return {"work": now.work, "entered": now.entered, "busy": now.busy}


class Connection:
    """To `rank` on `host`. Messages are dicts with a "kind"."""

    def __init__(self, raw: socket.socket, rank: int, host: str) -> None:
        self.socket, self.rank, self.host = raw, rank, host
        self._is_open = False
        self._received = bytearray()
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that is gone is noticed after 5 + 3 x 5 seconds, by the kernel, whatever this process computes.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)

    def open(self, beat_seconds: float) -> None:
        """From now on the other side gets a beat so often, and at the end of this process its status."""
        library().qwen1m_open_peer(self.socket.fileno(), ctypes.c_double(beat_seconds))
        self._is_open = True

    def close(self) -> None:
        """The other side gets what was sent, then the end of the connection."""
        if self._is_open:
            library().qwen1m_close_peer(self.socket.fileno())
            self._is_open = False
        self.socket.close()

    def send(self, message: Message, seconds: float | None = None) -> None:
        """OSError when the connection is gone, or when the other side has not taken it after `seconds`."""
        raw = json.dumps(message).encode()
        frame = struct.pack("<Q", len(raw)) + raw
        if not self._is_open:
            return self.socket.sendall(frame)
        while True:
            code = self._send(frame, SLICE_SECONDS if seconds is None else seconds)
            if code == 0:
                return
            if code == errno.ETIMEDOUT:
                frame = b""
            if seconds is not None or code not in (errno.ETIMEDOUT, errno.EBUSY):
                raise OSError(code, os.strerror(code))

    def _send(self, frame: bytes, seconds: float) -> int:
        call = library().qwen1m_send_to_peer
        return int(call(self.socket.fileno(), frame, ctypes.c_int64(len(frame)), ctypes.c_double(seconds)))

    def receive(self) -> Message | None:
        """The next message, None at the end of the connection; ValueError for what is no message."""
        while True:
            message = self._next()
            if message is not None:
                return message
            if not self._more():
                return None

    def buffered(self) -> Iterator[Message]:
        """The messages that came with the last one that was read."""
        while (message := self._next()) is not None:
            yield message

    def read(self) -> tuple[list[Message], str | None]:
        """The messages that have come, for a socket with something to read, and how the connection ended, if it did."""
        messages: list[Message] = []
        end = None
        try:
            if not self._more():
                end = CLOSED
            messages.extend(self.buffered())
        except (ConnectionResetError, BrokenPipeError):
            end = CLOSED
        except TimeoutError:
            end = "its machine does not answer"
        except (OSError, ValueError) as error:
            end = str(error)
        return messages, end

    def _more(self) -> bool:
        part = self.socket.recv(1 << 20)
        self._received += part
        return bool(part)

    def _next(self) -> Message | None:
        if len(self._received) < 8:
            return None
        (length,) = struct.unpack_from("<Q", self._received)
        if length > MAX_FRAME:
            raise ValueError(f"a message of {length} bytes")
        if len(self._received) < 8 + length:
            return None
        message = json.loads(self._received[8 : 8 + length])
        del self._received[: 8 + length]
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message
