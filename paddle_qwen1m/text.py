"""Text of an answer as its tokens come: whole characters, ended by stop strings; and texts as token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Callable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONG_WINDOW = 16
"""Tokens that are decoded together before a place is looked for where they can be parted."""
CHARACTER_BYTES = 4

Decode = Callable[[list[int]], str]


def decoder(tokenizer: Any, *, skip_special_tokens: bool = True) -> Decode:
    """How a tokenizer makes text of token ids."""

    def decode(tokens: list[int]) -> str:
        return str(
            tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    return decode


def bad_word_tokens(encode: Callable[[str], Sequence[int]], words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of words that no answer has, each at the start of a text and after a space."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip() or word
        plain = tuple(encode(bare))
        spaced = tuple(encode(f" {bare}"))
        sequences[plain] = None
        if spaced[-len(plain) :] != plain:  # else the plain one forbids it already
            sequences[spaced] = None
    return tuple(sequences)


class Detokenizer:
    """Turns the tokens of one answer into its text, as they come.

    decode: of a byte-level tokenizer, where tokens stand for bytes of UTF-8, a character for one or several of them.
    stop: texts that end the answer; `stopped_by` is the one that did, the first to be complete, of several the longest.
    It is not part of the text unless include_stop. min_tokens: with fewer tokens no text ends the answer.
    """

    def __init__(
        self, decode: Decode, *, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self.stopped_by: str | None = None
        self._decode = decode
        self._window: list[int] = []
        self._text = ""
        """Of the window, of which so many characters were passed on:"""
        self._decoded = 0
        self._stops = [_Matcher(text) for text in sorted(stop, key=len, reverse=True)]
        self._include_stop, self._min_tokens = include_stop, min_tokens
        self._num_tokens = 0
        self._held = ""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that was returned so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def put(self, token: int) -> str:
        """The text that is certain with this token; nothing once the answer has ended."""
        if self.stopped_by is not None:
            return ""
        self._num_tokens += 1
        return self._told(self._cut(self._characters(token)))

    def end(self) -> str:
        """The text that was held back, an incomplete character included; there is none more."""
        if self.stopped_by is not None:
            return ""
        rest = self._held + self._text[self._decoded :]
        self._window, self._text, self._decoded, self._held = [], "", 0, ""
        return self._told(rest)

    def _told(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text

    def _characters(self, token: int) -> str:
        """New whole characters.

        Only the last one of a text can change when more bytes come, and only where it stands for incomplete ones.
        """
        text = self._decode([*self._window, token])
        if text != self._text or self._decode([token]):  # else one that is skipped
            self._window.append(token)
        self._text = text
        whole = text[:-1] if text.endswith(REPLACEMENT) else text
        new = whole[self._decoded :]
        if len(whole) == len(text):
            self._window, self._text, self._decoded = [], "", 0
        else:
            self._decoded = len(whole)
            if len(self._window) > LONG_WINDOW:
                self._shorten()
        return new

    def _shorten(self) -> None:
        """Forgets tokens whose bytes can no longer be part of a character to come: of a long row of broken ones.

        Decoded apart, the parts of a character are more than one; with enough text behind, it is complete.
        """
        for place in range(len(self._window) - 1, 0, -1):
            behind = self._decode(self._window[place:])
            if len(behind) >= CHARACTER_BYTES and self._decode(self._window[:place]) + behind == self._text:
                self._decoded -= len(self._text) - len(behind)
                self._window, self._text = self._window[place:], behind
                return

    def _cut(self, text: str) -> str:
        """What of held and new text is certain: no beginning of a stop, and nothing behind one."""
        if not self._stops:
            return text
        known, may_end = len(self._held), self._num_tokens >= self._min_tokens
        self._held += text
        for place in range(known, len(self._held)):
            found = [one for one in self._stops if one.feed(self._held[place])]
            if found and may_end:
                self.stopped_by = found[0].text
                end = place + 1 - (0 if self._include_stop else len(self.stopped_by))
                certain, self._held = self._held[:end], ""
                return certain
        begun = 0 if self._include_stop else max(one.begun for one in self._stops)
        certain = self._held[: len(self._held) - begun]
        self._held = self._held[len(certain) :]
        return certain


def stopper(decode: Decode, stop: Sequence[str]) -> Callable[[int], str | None]:
    """What takes an answer's tokens one by one, and returns the text among `stop` that a token completes."""
    text = Detokenizer(decode, stop=stop)

    def put(token: int) -> str | None:
        text.put(token)
        return text.stopped_by

    return put


class _Matcher:
    """Looks for `text` in characters that come one by one.

    Knuth, Morris and Pratt, Fast pattern matching in strings, 1977.
    """

    def __init__(self, text: str) -> None:
        self.text, self._matched = text, 0
        self._shorter = [0] * len(text)
        """Behind i + 1 matched characters: how many of its end are the text's beginning, too."""
        for place in range(1, len(text)):
            self._shorter[place] = self._longest(self._shorter[place - 1], text[place])

    @property
    def begun(self) -> int:
        """How many of the last characters are the text's beginning, and not all of it."""
        return self._shorter[-1] if self._matched == len(self.text) else self._matched

    def feed(self, character: str) -> bool:
        """Whether the text is complete with this character."""
        self._matched = self._longest(self.begun, character)
        return self._matched == len(self.text)

    def _longest(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)


def until(prompt: str, last: str) -> str:
    """The prompt up to the end of its last message, without what a chat template puts behind it.

    ValueError where the template does not have the message as it is.
    """
    place = prompt.rfind(last.strip())
    if place < 0:
        raise ValueError("the chat template does not have the last message's content as it is")
    return prompt[: place + len(last.strip())]
