"""The tokenizer as the server uses it: texts and conversations to token ids, and back. Every call may take seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import numpy as np
from jinja2 import meta

from paddle_qwen1m.outputs import Tokens
from paddle_qwen1m.server.errors import bad
from paddle_qwen1m.text import bad_word_tokens, decoder, until

KEPT = ("tools", "documents")
"""What a template must not leave out."""


class Texts:
    """tokenizer: PaddleNLP's. config: its tokenizer_config.json, with the chat template that it has."""

    def __init__(self, tokenizer: Any, config: Mapping[str, Any]) -> None:
        self.config = {"tokenizer_class": type(tokenizer).__name__, **config}
        self._template_names = _names_in(self.config.get("chat_template"))
        self._tokenizer = tokenizer
        self._single = lru_cache(1 << 16)(lambda token: self._decode_whole([token]))
        self._decode_whole = decoder(tokenizer, skip_special_tokens=False)
        self._decode_plain = decoder(tokenizer)

    def encode(self, text: str, *, special: bool = True) -> np.ndarray:
        """Token ids int64 [n]. A long text is encoded without the GIL, so that others can go on."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:  # the slow tokenizer
            return np.asarray(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], np.int64)
        return np.asarray(backend.encode_batch([text], add_special_tokens=special)[0].ids, np.int64)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._decode_whole(list(token_ids))

    def tokens(self, *, skip_special_tokens: bool) -> Tokens:
        """How an answer's tokens become text."""
        answer = self._decode_plain if skip_special_tokens else self._decode_whole
        return Tokens(answer, lambda tokens: self._single(tokens[0]))

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary writes them."""
        return [str(token) for token in self._tokenizer.convert_ids_to_tokens(list(token_ids))]

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        return bad_word_tokens(lambda text: self.encode(text, special=False).tolist(), words)

    def chat(self, messages: Sequence[Mapping[str, Any]], continue_final: bool, **keywords: Any) -> str:
        """The prompt of a conversation. ApiError 400 where the template cannot render it."""
        if not self._tokenizer.chat_template:
            raise bad("the model has no chat template: start the server with --chat-template FILE")
        if self._template_names is not None:  # what it does not use is a line in the log, and a client's text
            keywords = {name: value for name, value in keywords.items() if name in self._template_names or name in KEPT}
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **keywords)
        except jinja2.TemplateError as error:
            raise bad(f"the chat template refuses these messages: {error.message}", "messages") from None
        except ValueError as error:  # keywords for which it has no place
            raise bad(str(error)) from None
        except (ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise bad(f"the chat template cannot render these messages: {type(error).__name__}", "messages") from None
        if not continue_final:
            return str(text)
        try:
            return until(text, messages[-1]["content"])
        except ValueError as error:
            raise bad(f"continue_final_message: {error}", "messages") from None


def _names_in(template: object) -> set[str] | None:
    """The variables that a chat template asks for; None where it is not known."""
    if not isinstance(template, str):
        return None
    try:
        return meta.find_undeclared_variables(
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        )
    except jinja2.TemplateError:
        return None
