"""Tools in Qwen's way: calls in an answer's text, and grammars for answers that must be calls."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

OPEN, CLOSE = "<tool_call>", "</tool_call>"
SPACE = " \t\r\n"


@dataclass(frozen=True)
class Content:
    """Text beside the calls."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """The `index`-th call, from 0 without gaps."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next piece of a call's arguments, which together are JSON where the model wrote that."""

    index: int
    text: str


Part = Union[Content, CallBegun, Arguments]


class CallReader:
    """Parts an answer's text, in whatever pieces it comes, into content and calls.

    A call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>. It counts as one once its name and the beginning
    of its arguments are there: its arguments are then passed on as they come, broken or not. What does not get as far
    stays content, as it was written. White space beside calls is dropped.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        """Content that is not passed on: white space, or the beginning of a tag."""
        self._call: _Call | None = None
        self._after_call = False
        self._parts: list[Part] = []

    def feed(self, text: str) -> list[Part]:
        """What is certain with this text."""
        while text:
            text = self._in_content(text) if self._call is None else self._in_call(text)
        return self._taken()

    def end(self) -> list[Part]:
        """What was held back; there is no more text."""
        if self._call is not None:
            if not self._call.begun:
                self._say(self._held + OPEN + self._call.raw)
            self._call = None
        elif not (self._after_call and not self._held.strip(SPACE)):
            self._say(self._held)
        self._held = ""
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return _joined(parts)

    def _say(self, text: str) -> None:
        if text:
            self._parts.append(Content(text))
            self._after_call = False

    def _in_content(self, text: str) -> str:
        """Takes content up to a tag that opens a call; what is left of the text."""
        held = self._held + text
        if self._after_call:
            behind = _without_close(held)
            if behind is None:
                self._held = held
                return ""
            held = behind
        place = held.find(OPEN)
        if place >= 0:
            before = held[:place]
            said = before.rstrip(SPACE)
            self._say(said)
            self._held = before[len(said) :]  # comes back if this is no call
            self._call = _Call()
            return held[place + len(OPEN) :]
        keep = _begun(held, OPEN)
        body = held[: len(held) - keep].rstrip(SPACE)
        self._say(body)
        self._held = held[len(body) :]
        return ""

    def _in_call(self, text: str) -> str:
        """Takes the text of a call; what is left behind it."""
        call = self._call
        assert call is not None
        used = call.feed(text)
        if call.name is not None and call.begun and call.index is None:
            call.index, self._held = self.num_calls, ""
            self.num_calls += 1
            self._parts.append(CallBegun(call.index, f"call_{secrets.token_hex(12)}", call.name))
        if call.index is not None:
            pieces = call.take()
            if pieces:
                self._parts.append(Arguments(call.index, pieces))
        if call.is_done:
            if call.index is None:  # broken, or no call at all
                held, self._held = self._held, ""
                self._say(held + OPEN + call.raw)
            else:
                self._after_call = True
            self._call = None
        return text[used:]


class _Call:
    """Reads {"name": ..., "arguments": ...} character by character."""

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self.index: int | None = None
        self.is_done = False
        self._arguments: list[str] = []
        self._has_arguments = False
        self._key = ""
        self._value = ""
        """Of the key: so far, or what a string of arguments was read from."""
        self._state = "start"
        self._nesting = 0
        self._in_text = self._escaped = False

    @property
    def begun(self) -> bool:
        """Whether this is a call, for good."""
        return self.name is not None and self._has_arguments

    def take(self) -> str:
        """New text of the arguments."""
        text = "".join(self._arguments)
        self._arguments = []
        return text

    def feed(self, text: str) -> int:
        """Reads up to the call's end; how many characters it took."""
        for place, character in enumerate(text):
            if not self.begun:
                self.raw += character
            self._read(character)
            if not self.begun and self.raw.endswith(CLOSE) and (self._state == "broken" or not self._in_text):
                self.is_done = True
            if self.is_done:
                return place + 1
        return len(text)

    def _read(self, character: str) -> None:
        """One character of an object's members at the first level; values are copied until they end."""
        state = self._state
        if state == "start":
            if character == "{":
                self._state = "before key"
            elif character not in SPACE:
                self._state = "broken"
        elif state == "before key":
            if character == '"':
                self._state, self._key = "key", ""
            elif character == "}":
                self._end_object()
            elif character not in SPACE + ",":
                self._state = "broken"
        elif state == "key":
            if character == '"':
                self._state = "colon"
            else:
                self._key += character
        elif state == "colon":
            if character == ":":
                self._state, self._value = "before value", ""
            elif character not in SPACE:
                self._state = "broken"
        elif state == "before value":
            if character in ",}":
                self._state = "broken"
            elif character not in SPACE:
                self._state, self._nesting, self._in_text, self._escaped = "value", 0, False, False
                self._has_arguments = self._has_arguments or (self._key == "arguments" and character == "{")
                self._in_value(character)
        elif state == "value":
            self._in_value(character)

    def _in_value(self, character: str) -> None:
        streams = self._key == "arguments" and self._has_arguments
        if not self._in_text and self._nesting == 0 and character in ",}":
            self._state = "before key"
            self._end_value()
            if character == "}":
                self._end_object()
            return
        if streams:
            self._arguments.append(character)
        else:
            self._value += character
        if self._in_text:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_text = False
        elif character == '"':
            self._in_text = True
        elif character in "{[":
            self._nesting += 1
        elif character in "}]":
            self._nesting -= 1

    def _end_object(self) -> None:
        self.is_done = True
        if self.name is not None and not self._has_arguments:  # it takes none
            self._has_arguments, self._arguments = True, ["{}"]

    def _end_value(self) -> None:
        if self._key not in ("name", "arguments") or (self._key == "arguments" and self._has_arguments):
            return
        try:
            value = json.loads(self._value)
        except ValueError:
            self._state = "broken"
            return
        if self._key == "name" and isinstance(value, str) and value:
            self.name = value
        elif self._key == "arguments":
            self._has_arguments = True
            self._arguments.append(value if isinstance(value, str) else json.dumps(value))


def _without_close(text: str) -> str | None:
    """Behind a call: the text without white space and the tag that closes it; None where it may be a part of that."""
    bare = text.lstrip(SPACE)
    if bare.startswith(CLOSE):
        return bare[len(CLOSE) :]
    return None if CLOSE.startswith(bare) else text


def _begun(text: str, tag: str) -> int:
    """How many characters at the text's end are the beginning of a tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + part.text)
        elif isinstance(part, Arguments) and isinstance(last, Arguments) and last.index == part.index:
            joined[-1] = Arguments(part.index, last.text + part.text)
        else:
            joined.append(part)
    return joined


def call_grammar(tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """A grammar, in Lark's notation with llguidance's %json, of answers that are calls of these tools."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": tool.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    more = ' ("\\n" call)*' if several else ""
    # As the template writes calls, and no other white space: a model can go on with that for ever.
    spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = json.dumps({"x-guidance": spacing, "anyOf": calls})
    return f'start: call{more}\ncall: "{OPEN}\\n" object "\\n{CLOSE}"\nobject: %json {schema}\n'
