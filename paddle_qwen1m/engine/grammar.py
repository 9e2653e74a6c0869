"""What an answer must look like, compiled into the tokens that may come next: structured outputs, by llguidance."""

from __future__ import annotations

import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from paddle_qwen1m.engine.params import StructuredOutputsParams
from paddle_qwen1m.engine.rules import num_words

MAX_BYTES = 1 << 20
"""Of a schema, a grammar, a regular expression or all choices."""
NUM_KEPT = 64
"""Compiled grammars that are kept for requests to come."""
JSON_BLANKS = r"[ \t]{1,4}|[ \t]?\r?\n[ \t]{0,64}"
"""Between two parts of a JSON text: enough to indent it, too little for a model to write blanks until max_tokens. A
schema's own "x-guidance" goes before it."""


class GrammarCompiler:
    """Compiles structured outputs for one tokenizer, given by its tokenizer.json. Making one takes about a second.

    vocab_size: width of the logits. eos_token_ids: the tokens that end an answer. ValueError where llguidance, an
    optional dependency, is missing, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer_json: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._llguidance = _import_llguidance()
        self._vocab_size = vocab_size
        try:
            self._tokenizer = self._llguidance.LLTokenizer(str(tokenizer_json), vocab_size, list(eos_token_ids))
        except Exception as error:  # whatever type it is, its text says what is wrong
            raise ValueError(f"structured_outputs cannot use the tokenizer {tokenizer_json}: {error}") from error
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Future[Any]] = OrderedDict()

    def compile(self, params: StructuredOutputsParams) -> Matcher:
        """What follows an answer from its first token on. Complex grammars take seconds, most of it without the GIL.

        Any thread may call it. What one compiles the others wait for; what was compiled before is there at once.

        ValueError, saying what is wrong, for what is no schema, expression or grammar, or is too large.
        """
        way, text = _as_text(params)
        size = len(text.encode())
        if size > MAX_BYTES:
            raise ValueError(f"structured_outputs: {way} must be at most {MAX_BYTES} bytes, got {size}")
        return Matcher(self._compiled(way, text).deep_copy(), self._vocab_size)

    def _compiled(self, way: str, text: str) -> Any:
        """The grammar, compiled by whoever asks for it first."""
        with self._lock:
            is_first = (way, text) not in self._kept
            future = self._kept.setdefault((way, text), Future())
            self._kept.move_to_end((way, text))
            if len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
        if is_first:
            try:
                future.set_result(self._compile(way, text))
            except BaseException as error:
                with self._lock:
                    self._kept.pop((way, text), None)
                future.set_exception(error)
        return future.result()

    def _compile(self, way: str, text: str) -> Any:
        matcher = self._llguidance.LLMatcher
        if way == "json":
            options = {"whitespace_pattern": JSON_BLANKS} if _leaves_blanks_open(text) else None
            grammar = matcher.grammar_from_json_schema(text, defaults=options)
        elif way == "regex":
            grammar = matcher.grammar_from_regex(text)
        else:
            grammar = matcher.grammar_from_lark(text)
        # Verbose ones hold pages of the parser's state.
        limits = self._llguidance.LLParserLimits(verbose_errors=False)
        compiled = matcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if compiled.is_error():
            raise ValueError(f"structured_outputs: {way} cannot be used: {compiled.get_error().strip()}")
        return compiled


class Matcher:
    """Follows one answer through its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = num_words(vocab_size)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the answer may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why the answer can no longer be followed, and may only end: a token that may not come, or a limit."""
        return self._matcher.get_error().partition("\n")[0] or None

    def mask(self) -> np.ndarray:
        """Words uint32 [ceil(vocab / 32)] of the tokens that may come next, ends of the answer where it may end."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.dtype("<u4"))[: self._num_words]

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self._matcher.consume_token(token)


def _as_text(params: StructuredOutputsParams) -> tuple[str, str]:
    """The way in which an answer is described, and the description: "json" (a schema), "regex", "grammar", "choice"."""
    if params.json_object:
        return "json", '{"type": "object"}'
    if params.json is not None:
        return "json", _schema(params.json)
    if params.choice is not None:
        # Lark's texts are written as those of JSON.
        return "choice", "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in params.choice)
    if params.regex is not None:
        return "regex", params.regex
    assert params.grammar is not None
    return "grammar", params.grammar


def _schema(schema: str | dict[str, Any]) -> str:
    try:
        return json.dumps(json.loads(schema) if isinstance(schema, str) else schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs: json is not JSON: {error}") from error


def _leaves_blanks_open(schema: str) -> bool:
    """Whether a schema has no word of its own on blanks; true, which is one too, can have none."""
    read = json.loads(schema)
    if not isinstance(read, dict):
        return False
    own = read.get("x-guidance")
    return not (isinstance(own, dict) and any(name.startswith("whitespace") for name in own))


def _import_llguidance() -> Any:
    if sys.version_info < (3, 10):
        raise ValueError("structured_outputs needs Python 3.10 or newer, for llguidance")
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            "structured_outputs needs llguidance: pip install 'paddle-qwen1m[structured]', or llguidance itself"
        ) from error
    return llguidance
