"""apply_chat_template whose keywords reach the template, as Hugging Face's do; PaddleNLP's drops tools and the rest."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import cache
from types import new_class
from typing import Any

from jinja2 import Template, pass_eval_context
from paddlenlp.transformers.utils import convert_to_dict_message
from paddlenlp.utils.log import logger

MUST_BE_USED = ("tools", "documents", "chat_template", "continue_final_message")


class _ChatTemplate:
    """The apply_chat_template of `honour_keywords`."""

    stock: type

    def apply_chat_template(
        self,
        conversation: str | Sequence[Any],
        tokenize: bool = True,
        context_data: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> Any:
        """The prompt of one conversation: text, or with `tokenize` what calling the tokenizer returns.

        conversation: a user's text, messages {"role": ..., "content": ...}, or PaddleNLP's rounds [question, answer].
        keywords: those of the tokenizer's call go there, the others to the template: add_generation_prompt (default
        True, as in PaddleNLP), tools and documents (JSON schemas and objects, as Hugging Face takes them), and whatever
        else it knows. context_data: for PaddleNLP's own, older form of templates.
        ValueError when the template has no place for what Hugging Face's function would honour; what else it does not
        use is a line in the log.
        """
        tokenizer: Any = self
        call = set(inspect.signature(self.stock.__call__).parameters)  # type: ignore[operator]
        for_call = {name: value for name, value in keywords.items() if name in call}
        variables = {name: value for name, value in keywords.items() if name not in call}
        if isinstance(tokenizer.chat_template, Template):
            text, used = _render(tokenizer, _messages(conversation), variables)
        else:
            stock = super().apply_chat_template  # type: ignore[misc]
            text, used = stock(conversation, tokenize=False, context_data=context_data or {}), set()
        unused = {name: value for name, value in variables.items() if name not in {*used, "add_generation_prompt"}}
        dropped = [name for name, value in unused.items() if value not in (None, False, [], {})]
        for name in dropped:
            if name in MUST_BE_USED:
                raise ValueError(f"this tokenizer's chat template has no place for {name}")
        if dropped:
            logger.warning(f"this tokenizer's chat template does not use {', '.join(dropped)}")
        return tokenizer(text, **{**for_call, "add_special_tokens": False}) if tokenize else text

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.stock,), vars(self)


def honour_keywords(tokenizer: Any) -> Any:
    """The same tokenizer, of a class by the name of its own, whose apply_chat_template passes every keyword on."""
    stock: Any = type(tokenizer)
    tokenizer.__class__ = _class_of(stock)
    return tokenizer


@cache
def _class_of(stock: Any) -> Any:
    return new_class(
        stock.__name__,
        (_ChatTemplate, stock),
        exec_body=lambda body: body.update(stock=stock, __module__=stock.__module__),
    )


def _restored(stock: type) -> Any:
    """A copied or unpickled tokenizer, whose attributes are set next."""
    kind = _class_of(stock)
    return kind.__new__(kind)


class _Variables(dict[str, Any]):
    """A template's variables; `read` are those that it asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


def _render(tokenizer: Any, messages: list[Any], variables: dict[str, Any]) -> tuple[str, set[str]]:
    """The text, and the variables that the template read for it."""
    template: Template = tokenizer.chat_template
    tools = variables.get("tools") or []
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools must be a list of JSON schemas, each a dict, got {tools!r}")
    template.environment.filters["tojson"] = _to_json
    values = _Variables(
        {
            **template.globals,
            **tokenizer.special_tokens_map,
            "add_generation_prompt": True,
            **variables,
            "messages": messages,
        }
    )
    text = "".join(template.root_render_func(template.new_context(values, shared=True)))
    return text, values.read


@pass_eval_context  # as Jinja's own: the compiled template passes it
def _to_json(_context: Any, value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Hugging Face's filter: plain JSON in the order of its keys, where Jinja's own is sorted and safe within HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _messages(conversation: str | Sequence[Any]) -> list[Any]:
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    if not conversation:
        raise ValueError("the conversation is empty")
    if isinstance(conversation[0], dict):
        return list(conversation)
    if isinstance(conversation[0], (list, tuple)) and all(isinstance(one, str) for one in conversation[0]):
        return list(convert_to_dict_message(list(conversation)))
    raise ValueError("a conversation is a text, a list of messages or a list of rounds; several go one after the other")
