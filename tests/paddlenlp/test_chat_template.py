"""Every keyword of apply_chat_template reaches the template, or it is said that it does not."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paddlenlp.transformers import AutoTokenizer, Qwen2Tokenizer, Qwen2TokenizerFast

MESSAGES = [{"role": "user", "content": "Which day is it?"}]
TOOL = {
    "type": "function",
    "function": {"name": "day", "description": "<b> & it's à 日", "arguments": {"z": 1, "a": 2}},
}
WRITTEN = (
    '{"type": "function", "function": '
    '{"name": "day", "description": "<b> & it\'s à 日", "arguments": {"z": 1, "a": 2}}}'
)
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if mood is defined %} ({{ mood }}){% endif %}{% endif %}"
)


@pytest.fixture
def with_tools(copied_needle: Callable[..., Path]) -> Any:
    directory = copied_needle()
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "chat_template": TEMPLATE}), encoding="utf-8")
    return AutoTokenizer.from_pretrained(str(directory))


def test_tools_reach_the_template_as_hugging_face_writes_them(with_tools: Any) -> None:
    text = with_tools.apply_chat_template(MESSAGES, tools=[TOOL], tokenize=False)
    assert text == f"<tools>{WRITTEN}</tools>\nuser: Which day is it?\nassistant:"
    plain = with_tools.apply_chat_template(MESSAGES, tokenize=False)
    assert plain == "user: Which day is it?\nassistant:"
    for nothing in (None, []):
        assert with_tools.apply_chat_template(MESSAGES, tools=nothing, tokenize=False) == plain


def test_keywords_are_shared_out_between_template_and_tokenizer(with_tools: Any) -> None:
    text = with_tools.apply_chat_template(MESSAGES, tools=[TOOL], tokenize=False, mood="glad")
    assert text.endswith("assistant: (glad)")
    inputs = with_tools.apply_chat_template(MESSAGES, tools=[TOOL], mood="glad", return_tensors="pd")
    assert inputs["input_ids"].numpy()[0].tolist() == with_tools(text)["input_ids"]
    assert with_tools.apply_chat_template(MESSAGES, add_generation_prompt=False, tokenize=False).endswith("is it?\n")


def test_a_template_without_a_place_for_them_is_said_to_have_none(tokenizer: Any, logged: list[str]) -> None:
    with pytest.raises(ValueError, match="this tokenizer's chat template has no place for tools"):
        tokenizer.apply_chat_template(MESSAGES, tools=[TOOL], tokenize=False)
    with pytest.raises(ValueError, match="has no place for documents"):
        tokenizer.apply_chat_template(MESSAGES, documents=[{"text": "a"}])
    with pytest.raises(ValueError, match="has no place for chat_template"):
        tokenizer.apply_chat_template(MESSAGES, chat_template=TEMPLATE, tokenize=False)
    plain = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer.apply_chat_template(MESSAGES, tools=None, documents=[], tokenize=False) == plain
    assert logged == []
    assert tokenizer.apply_chat_template(MESSAGES, enable_thinking=True, tokenize=False) == plain
    assert logged == ["this tokenizer's chat template does not use enable_thinking"]


@pytest.mark.parametrize("tools", [[print], "day", {"name": "day"}, 3])
def test_what_tools_must_be_is_said(with_tools: Any, tools: Any) -> None:
    with pytest.raises(ValueError, match="tools must be a list of JSON schemas, each a dict, got "):
        with_tools.apply_chat_template(MESSAGES, tools=tools, tokenize=False)


def test_every_form_of_a_conversation(with_tools: Any) -> None:
    render = with_tools.apply_chat_template
    assert render("a", tokenize=False) == "user: a\nassistant:"
    assert render([["a", "b"], ["c"]], tokenize=False) == "user: a\nassistant: b\nuser: c\nassistant:"
    with pytest.raises(ValueError, match="the conversation is empty"):
        render([], tokenize=False)
    with pytest.raises(ValueError, match="several go one after the other"):
        render([MESSAGES, MESSAGES], tokenize=False)


@pytest.mark.parametrize("use_fast", [True, False])
def test_both_tokenizers_have_it(copied_needle: Callable[..., Path], use_fast: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(copied_needle()), use_fast=use_fast)
    with pytest.raises(ValueError, match="has no place for tools"):
        tokenizer.apply_chat_template(MESSAGES, tools=[TOOL], tokenize=False)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_tokenizer_has_it_too(with_tools: Any, duplicate: Callable[[Any], Any]) -> None:
    with_tools.chat_template = None  # PaddleNLP's compiled template cannot be copied
    other = duplicate(with_tools)
    other.init_chat_template(TEMPLATE)
    assert WRITTEN in other.apply_chat_template(MESSAGES, tools=[TOOL], tokenize=False)
    assert other("a text")["input_ids"] == with_tools("a text")["input_ids"]


@pytest.mark.parametrize("use_fast", [True, False])
def test_the_class_is_still_paddlenlps(needle_checkpoint: Path, tmp_path: Path, use_fast: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint), use_fast=use_fast)
    stock = Qwen2TokenizerFast if use_fast else Qwen2Tokenizer
    assert isinstance(tokenizer, stock)
    tokenizer.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["tokenizer_class"] == stock.__name__
