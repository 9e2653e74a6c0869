"""Which tokens an answer may go on with, as the mask of its row in a sampling step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from paddle_qwen1m.engine.core import Request


def num_words(vocab_size: int) -> int:
    """Words of 32 bits that a mask of the vocabulary takes."""
    return -(-vocab_size // 32)


def token_words(tokens: Iterable[int] | np.ndarray, vocab_size: int, name: str = "token ids") -> np.ndarray:
    """Mask words uint32 [ceil(vocab / 32)] with the bits of these tokens set: bit t % 32 of word t // 32.

    ValueError, with the name of what they are, for a token outside the vocabulary.
    """
    ids = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens), np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside) > 0:
        raise ValueError(f"{name} must be 0 to {vocab_size - 1}, tokens of the vocabulary, got {outside[0]}")
    bits = np.zeros(num_words(vocab_size) * 32, np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view(np.dtype("<u4"))


class Grammar(Protocol):
    """What an answer must look like, token by token."""

    def mask(self) -> np.ndarray:
        """Words uint32 [ceil(vocab / 32)] of the tokens that may come next: an end of answers where it is complete."""
        ...

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        ...


class BadWords:
    """Token sequences that no answer has: each forbids its last token where the answer ends with all before it."""

    def __init__(self, words: Iterable[Sequence[int]]) -> None:
        self._always: set[int] = set()
        self._after: dict[int, list[tuple[int, ...]]] = {}  # by the last token before the forbidden one
        self._longest = 1
        for word in words:
            if not word:
                raise ValueError("a bad word must have at least one token")
            if len(word) == 1:
                self._always.add(word[0])
            else:
                self._after.setdefault(word[-2], []).append(tuple(word))
                self._longest = max(self._longest, len(word))
        self._tail: tuple[int, ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether what is forbidden never changes."""
        return not self._after

    def forbidden(self) -> set[int]:
        """Tokens that may not come next."""
        if not self._tail or self._tail[-1] not in self._after:
            return self._always
        words = self._after[self._tail[-1]]
        return self._always | {word[-1] for word in words if self._tail[1 - len(word) :] == word[:-1]}

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        if self._longest > 1:
            self._tail = (*self._tail, token)[1 - self._longest :]


class TokenRules:
    """Everything that says which tokens an answer may go on with.

    ends: the tokens that end an answer, forbidden before it has min_tokens; those outside the vocabulary never come.
    allowed: no other tokens; None: all. bad_words: BadWords of these. grammar: what the answer must look like. Where
    the rules leave no token, min_tokens gives way first, then bad_words; an answer that its grammar and `allowed`
    cannot both go on with may only end.

    ValueError for allowed or bad tokens outside the vocabulary.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        ends: Sequence[int] = (),
        min_tokens: int = 0,
        allowed: Sequence[int] | None = None,
        bad_words: Iterable[Sequence[int]] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self._vocab_size, self._num_missing, self._grammar = vocab_size, min_tokens, grammar
        self._ends = token_words((token for token in ends if token < vocab_size), vocab_size)
        base = np.arange(vocab_size) if allowed is None else allowed
        self._base = token_words(base, vocab_size, "allowed_token_ids")
        self._allows_all = allowed is None
        words = list(bad_words)
        token_words((token for word in words for token in word), vocab_size, "tokens of bad_words")
        self._bad_words = BadWords(words)

    @property
    def is_static(self) -> bool:
        """Whether words() stays as it is, whatever the answer goes on with."""
        return self._grammar is None and self._num_missing == 0 and self._bad_words.is_static

    def words(self) -> np.ndarray | None:
        """Mask words uint32 [ceil(vocab / 32)] for the next token; None where every token is allowed."""
        forbidden = self._bad_words.forbidden()
        if self._allows_all and self._grammar is None and self._num_missing == 0 and not forbidden:
            return None
        allowed = self._base if self._grammar is None else self._base & self._grammar.mask()
        if not allowed.any():
            return self._ends
        if forbidden:
            allowed = _without(allowed, token_words(forbidden, self._vocab_size))
        return _without(allowed, self._ends) if self._num_missing > 0 else allowed

    def accept(self, token: int) -> bool:
        """The answer goes on with this token. Returns whether words() may be others than before."""
        forbidden = self._bad_words.forbidden()
        self._bad_words.accept(token)
        was_missing, self._num_missing = self._num_missing, max(0, self._num_missing - 1)
        if self._grammar is not None:
            self._grammar.accept(token)
        return self._grammar is not None or was_missing == 1 or forbidden != self._bad_words.forbidden()


def token_rules(request: Request, vocab_size: int, grammar: Grammar | None = None) -> TokenRules:
    """The rules of one answer to a request, from its first token on.

    ValueError for tokens outside the vocabulary, those of logit_bias included.
    """
    assert request.params is not None
    params = request.params
    token_words(params.logit_bias or (), vocab_size, "tokens of logit_bias")
    return TokenRules(
        vocab_size,
        ends=(*request.eos_token_ids, *params.stop_token_ids),
        min_tokens=params.min_tokens,
        allowed=params.allowed_token_ids,
        bad_words=request.bad_words,
        grammar=grammar,
    )


def _without(allowed: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    """Of the allowed tokens those that are not forbidden, or all where none would be left."""
    rest = allowed & ~forbidden
    return rest if rest.any() else allowed
