"""Servers for tests, and the tokenizer of the small checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import paddle_qwen1m  # noqa: F401  (first: it sets how the threads of a CPU wait, and registers the tokenizer)

from fake_engine import FakeEngine  # isort: skip
from paddlenlp.transformers import AutoTokenizer  # isort: skip
from serving import CHECKPOINT, Server, serve  # isort: skip

from paddle_qwen1m.server.texts import Texts

TOOLS_TEMPLATE = """<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' }}
{%- if tools %}

# Tools
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>
{%- endif %}<|im_end|>
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role != 'system' %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As Qwen's: tools behind the system's text, arguments as JSON, responses in a user's turn."""


@pytest.fixture(scope="session")
def texts() -> Texts:
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text(encoding="utf-8"))
    return Texts(AutoTokenizer.from_pretrained(str(CHECKPOINT)), config)


@pytest.fixture(scope="session")
def tool_texts() -> Texts:
    """With a chat template that has a place for tools."""
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT))
    tokenizer.init_chat_template(TOOLS_TEMPLATE)
    return Texts(tokenizer, {"chat_template": TOOLS_TEMPLATE})


@pytest.fixture
def server(texts: Texts) -> Iterator[Server]:
    """With the bounds that hold by default."""
    with serve(texts, FakeEngine()) as one:
        yield one
