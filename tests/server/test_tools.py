"""Calls in an answer's text: the same whatever pieces it comes in; and answers that must be calls."""

from __future__ import annotations

import json
import sys

import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import CHECKPOINT, serve

from paddle_qwen1m.engine.grammar import GrammarCompiler
from paddle_qwen1m.engine.params import StructuredOutputsParams
from paddle_qwen1m.server.tools import Arguments, CallBegun, CallReader, Content, call_grammar

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


WEATHER = call("weather", '{"city": "Brno"}')
CASES = {
    "no call": ("It is 5 < 6 and <tool>.", "It is 5 < 6 and <tool>.", []),
    "one call": (WEATHER, "", [("weather", '{"city": "Brno"}')]),
    "text before": (f"Let me see.\n\n{WEATHER}", "Let me see.", [("weather", '{"city": "Brno"}')]),
    "two calls": (f"{WEATHER}\n{call('time', '{}')}\n", "", [("weather", '{"city": "Brno"}'), ("time", "{}")]),
    "text between": (f"a {WEATHER} b {WEATHER}", "a b", [("weather", '{"city": "Brno"}')] * 2),
    "a tag in a text": (call("say", '{"t": "</tool_call> \\"}{"}'), "", [("say", '{"t": "</tool_call> \\"}{"}')]),
    "arguments first": (
        '<tool_call>{"arguments": {"a": [1, {"b": 2}]}, "name": "f"}</tool_call>', "", [("f", '{"a": [1, {"b": 2}]}')]
    ),
    "arguments as a text": (call("f", '"{\\"a\\": 1}"'), "", [("f", '{"a": 1}')]),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    "no JSON": ("<tool_call>weather in Brno</tool_call>", "<tool_call>weather in Brno</tool_call>", []),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    "cut in the name": ('<tool_call>\n{"name": "wea', '<tool_call>\n{"name": "wea', []),
    "cut in the arguments": ('<tool_call>\n{"name": "f", "arguments": {"a": "x', "", [("f", '{"a": "x')]),
    "no closing tag": ('<tool_call>{"name": "f", "arguments": {}} then', " then", [("f", "{}")]),
    "a part of a tag at the end": ("yes <tool_ca", "yes <tool_ca", []),
    "white space at the end": ("yes \n", "yes \n", []),
}  # fmt: skip


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    reader, content, calls = CallReader(), "", []
    parts = [part for piece in pieces for part in reader.feed(piece)] + reader.end()
    for part in parts:
        if isinstance(part, Content):
            content += part.text
        elif isinstance(part, CallBegun):
            assert part.index == len(calls), "indices have gaps"
            calls.append((part.name, ""))
        else:
            assert isinstance(part, Arguments) and part.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    assert reader.num_calls == len(calls)
    return content, calls


@pytest.mark.parametrize("name", CASES)
def test_content_and_calls_are_parted(name: str) -> None:
    text, content, calls = CASES[name]
    assert read([text]) == (content, calls)
    assert read(list(text)) == (content, calls)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(1, 12), max_size=60))
def test_any_split_gives_the_same(name: str, sizes: list[int]) -> None:
    text, pieces, place = CASES[name][0], [], 0
    for size in sizes:
        pieces.append(text[place : place + size])
        place += size
    assert read([*pieces, text[place:]]) == CASES[name][1:]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", '{"name": "f", ', '"arguments": ', "{", "}", '"', "\\", "x", " ", "\n", "<"]
        ),
        max_size=14,
    )
)
def test_whatever_a_model_writes_splits_change_nothing_and_nothing_fails(words: list[str]) -> None:
    text = "".join(words)
    assert read([text]) == read(list(text)) == read(words)


def test_arguments_leave_before_they_are_complete() -> None:
    reader = CallReader()
    parts = reader.feed('<tool_call>{"name": "f", "arguments": {"long": "aaa')
    assert [type(part) for part in parts] == [CallBegun, Arguments]


@pytest.fixture(scope="module")
def tool_server(tool_texts):
    with serve(tool_texts, FakeEngine()) as server:
        yield server


def ask(server, texts, text: str, **fields):
    server.engine.script = texts.encode(text).tolist()
    return {"messages": [{"role": "user", "content": "?"}], "tools": [TOOL], **fields}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "reason"),
    [(None, "tool_calls"), ("auto", "tool_calls"), ("required", "tool_calls"),
     ({"type": "function", "function": {"name": "weather"}}, "stop")],
)  # fmt: skip
def test_calls_come_back_as_openais(tool_server, texts, choice, reason, stream) -> None:
    body = ask(tool_server, texts, f"I look.\n{WEATHER}", **({} if choice is None else {"tool_choice": choice}))
    if stream:
        choices = [one for event in tool_server.events("/v1/chat/completions", body) for one in event["choices"]]
        content = "".join(one["delta"].get("content") or "" for one in choices)
        pieces = [piece for one in choices for piece in one["delta"].get("tool_calls", [])]
        assert pieces[0]["id"] and pieces[0]["type"] == "function" and pieces[0]["function"]["name"] == "weather"
        arguments = "".join(piece["function"]["arguments"] for piece in pieces)
        finish = choices[-1]["finish_reason"]
    else:
        (one,) = tool_server.post("/v1/chat/completions", body).json()["choices"]
        content, finish = one["message"]["content"], one["finish_reason"]
        (told,) = one["message"]["tool_calls"]
        arguments = told["function"]["arguments"]
        assert told["id"] and told["type"] == "function" and told["function"]["name"] == "weather"
    assert json.loads(arguments) == {"city": "Brno"}
    assert (content, finish) == ("I look.", reason)
    structured = tool_server.engine.added[-1].params.structured_outputs
    assert (structured is not None) == (choice not in (None, "auto"))


def test_tool_choice_none_leaves_the_text_and_tools_without_name_are_refused(tool_server, texts) -> None:
    body = ask(tool_server, texts, WEATHER, tool_choice="none")
    message = tool_server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert message["content"] == WEATHER and "tool_calls" not in message
    other = {"type": "function", "function": {"name": "other"}}
    for wrong in ({"tool_choice": other}, {"tools": []}, {"tools": None, "tool_choice": "auto"}):
        assert tool_server.post("/v1/chat/completions", {**body, **wrong}).status_code == 400


def test_a_clients_arguments_are_not_encoded_twice(tool_server, texts) -> None:
    body = ask(tool_server, texts, "ok")
    called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Brno"}'}}
    body["messages"] += [
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    assert tool_server.post("/v1/chat/completions", body).status_code == 200
    prompt = texts.decode(tool_server.engine.added[-1].prompt.tolist())
    assert '{"name": "weather", "arguments": {"city": "Brno"}}' in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in prompt


@pytest.mark.skipif(sys.version_info < (3, 10), reason="llguidance")
@pytest.mark.parametrize("several", [False, True])
def test_the_grammar_of_a_forced_call_allows_calls_alone(texts, several) -> None:
    compiler = GrammarCompiler(CHECKPOINT / "tokenizer.json", 1024, (747, 745))
    grammar = call_grammar([TOOL["function"]], several=several)

    def fits(text: str) -> bool:
        matcher = compiler.compile(StructuredOutputsParams(grammar=grammar))
        for token in texts.encode(text).tolist():
            matcher.accept(token)
            if matcher.error is not None:
                return False
        return bool(matcher.mask()[747 // 32] >> (747 % 32) & 1)

    assert fits(WEATHER)
    assert fits(f"{WEATHER}\n{WEATHER}") == several
    for wrong in ("Sure.", call("other", "{}"), call("weather", '{"town": 1}'), WEATHER[:-3]):
        assert not fits(wrong)
