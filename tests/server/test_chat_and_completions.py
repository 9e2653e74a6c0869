"""Chat and completions as OpenAI's client and its types see them, streamed and whole."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import openai
import pytest
from fake_engine import FakeEngine
from serving import CHECKPOINT, EOS, Server, serve

from paddle_qwen1m.engine.grammar import GrammarCompiler
from paddle_qwen1m.server.settings import Settings
from paddle_qwen1m.server.texts import Texts

MESSAGES = [{"role": "user", "content": "Say it."}]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def script(server: Server, texts: Texts, text: str) -> list[int]:
    server.engine.script = texts.encode(text).tolist()
    return server.engine.script


def test_a_chat_answer_has_every_field_that_openais_types_have(client, server, texts) -> None:
    tokens = script(server, texts, "It is blue.")
    answer = client.chat.completions.create(model="needle", messages=MESSAGES)
    (choice,) = answer.choices
    assert (answer.object, answer.model, answer.service_tier) == ("chat.completion", "needle", "default")
    assert answer.id.startswith("chatcmpl-") and answer.system_fingerprint
    assert choice.message.content == "It is blue."
    assert (choice.message.role, choice.message.refusal, choice.message.annotations) == ("assistant", None, [])
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert answer.usage.prompt_tokens == len(server.engine.added[0].prompt)
    assert answer.usage.completion_tokens == len(tokens) + 1  # the one that ends it
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_says_the_same_as_a_whole_one(client, server, texts) -> None:
    script(server, texts, "It is blue — and 🙂 wide.")
    chunks = list(
        client.chat.completions.create(
            model="needle", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == "It is blue — and 🙂 wide."
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(server.engine.script) + 1
    whole = client.chat.completions.create(model="needle", messages=MESSAGES)
    assert whole.choices[0].message.content == text
    assert whole.usage == chunks[-1].usage


def test_without_include_usage_a_stream_has_none(server) -> None:
    events = server.events("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stream_options": {}})
    assert all(event["choices"] and "usage" not in event for event in events)


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_come_under_their_indices(server, stream) -> None:
    body = {"prompt": ["one", [40, 41]], "n": 2, "max_tokens": 3, "temperature": 1.0}
    if stream:
        choices = [choice for event in server.events("/v1/completions", body) for choice in event["choices"]]
        assert {choice["index"] for choice in choices if choice["finish_reason"]} == {0, 1, 2, 3}
    else:
        choices = server.post("/v1/completions", body).json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        assert choices[0]["text"] == choices[1]["text"] != choices[2]["text"]


def test_logprobs_of_a_chat_are_openais(client, server, texts) -> None:
    script(server, texts, "no")
    answer = client.chat.completions.create(model="needle", messages=MESSAGES, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [one.logprob for one in content] == [-0.5] * len(content)
    assert all(len(one.top_logprobs) == 3 and one.top_logprobs[0].token == one.token for one in content)
    assert bytes(content[0].bytes).decode() == content[0].token


def test_a_stop_text_never_leaks_a_part_and_ends_the_work(server, texts) -> None:
    script(server, texts, "Say BLUE STOP and more, much more than that")
    body = {"prompt": "x", "max_tokens": 100, "stop": [" STOP"]}
    events = server.events("/v1/completions", body)
    pieces = [choice["text"] for event in events for choice in event["choices"]]
    assert "".join(pieces) == "Say BLUE"
    last = events[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", " STOP")
    server.wait(lambda: server.engine.is_idle)


def test_no_chunk_has_half_a_character(server, texts) -> None:
    script(server, texts, "🙂 ž 字 🙂🙂")
    events = server.events("/v1/completions", {"prompt": "x", "max_tokens": 100})
    pieces = [choice["text"] for event in events for choice in event["choices"]]
    assert "".join(pieces) == "🙂 ž 字 🙂🙂"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_echo_with_logprobs_scores_the_prompt_as_harnesses_read_it(server) -> None:
    prompt = [40, 41, 42]
    choice = server.complete(prompt, echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == len(prompt) + 1
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == [-0.5] * 3
    assert "".join(told["tokens"]) == choice["text"]
    offsets = [len("".join(told["tokens"][:place])) for place in range(len(told["tokens"]))]
    assert told["text_offset"] == offsets


def test_max_tokens_0_with_echo_scores_the_prompt_alone(server) -> None:
    answer = server.complete([40, 41, 42], echo=True, logprobs=0, max_tokens=0).json()
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3
    assert answer["usage"]["completion_tokens"] == 0
    assert server.complete("x", max_tokens=0).status_code == 400


def test_what_a_request_leaves_out_comes_from_the_generation_config(texts) -> None:
    engine = FakeEngine()
    with serve(texts, engine, defaults={"temperature": 0.7, "top_k": 20}) as server:
        server.chat(max_tokens=1)
        server.chat(max_tokens=1, temperature=0.0)
        server.complete()
    first, second, third = (request.params for request in engine.added)
    assert (first.temperature, first.top_k, first.top_p) == (0.7, 20, 1.0)
    assert second.is_greedy and second.top_k == 20
    assert third.max_tokens == 16


def test_a_chat_without_max_tokens_gets_the_rest_of_the_context(server) -> None:
    server.engine.script = [40]
    server.chat()
    server.chat(max_tokens=5, max_completion_tokens=7)
    server.complete("x", max_tokens=3, truncate_prompt_tokens=-1)
    rest, given, _ = server.engine.added
    assert rest.max_length == server.engine.limits.max_model_len
    assert given.params.max_tokens == 7
    assert rest.eos_token_ids == EOS


def test_models_are_told_under_every_name(texts) -> None:
    with serve(texts, names=["one", "two"], root="/where") as server:
        cards = server.client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["one", "two"]
        assert cards[0]["max_model_len"] == 4096 and cards[0]["root"] == "/where"
        assert server.client.get("/v1/models/two").json()["object"] == "model"
        assert server.chat(model="two", max_tokens=1).json()["model"] == "one"
        missing = server.chat(model="three")
        assert missing.status_code == 404 and missing.json()["error"]["type"] == "NotFoundError"


def test_tokens_and_texts(server, texts) -> None:
    told = server.post("/tokenize", {"prompt": "It is blue.", "return_token_strs": True}).json()
    assert told["tokens"] == texts.encode("It is blue.").tolist()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) and told["max_model_len"] == 4096
    assert server.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "It is blue."}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()
    server.chat("Say it.", max_tokens=1)
    assert chat["tokens"] == server.engine.added[-1].prompt.tolist()
    info = server.client.get("/tokenizer_info").json()
    assert info["tokenizer_class"] == "Qwen2Tokenizer" and "chat_template" in info


def test_version_health_and_metrics(server) -> None:
    server.chat(max_tokens=3)
    assert server.client.get("/version").json()["version"]
    assert server.client.get("/health").content == b""
    text = server.client.get("/metrics").text
    labels = '{engine="0",model_name="needle"}'
    assert f"vllm:generation_tokens_total{labels} 3.0" in text
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert f"{name}{labels} 0.0" in text
    assert f"vllm:time_to_first_token_seconds_count{labels} 1.0" in text
    assert 'finished_reason="length",model_name="needle"} 1.0' in text


def test_unknown_fields_are_ignored_and_text_parts_are_joined(server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "of_the_future": {"x": 1}}
    assert server.post("/v1/chat/completions", body).status_code == 200
    server.chat("ab", max_tokens=1)
    assert server.engine.added[0].prompt.tolist() == server.engine.added[1].prompt.tolist()


def test_a_final_message_is_gone_on_with(server, texts) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    body = {"messages": messages, "max_tokens": 1, "add_generation_prompt": False, "continue_final_message": True}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert texts.decode(server.engine.added[0].prompt.tolist()).endswith("assistant\nIt is")


def test_token_ids_are_told_where_they_are_asked_for(server) -> None:
    choice = server.complete([40], max_tokens=2, return_token_ids=True, logprobs=0, return_tokens_as_token_ids=True)
    told = choice.json()["choices"][0]
    assert told["token_ids"] == [40, 40] and told["logprobs"]["tokens"] == ["token_id:40"] * 2


def test_the_client_raises_openais_errors_and_tries_again_when_told(server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="at most 20"):
        client.chat.completions.create(model="needle", messages=MESSAGES, logprobs=True, top_logprobs=21)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    server.engine.failure = RuntimeError("a rank is gone")
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="needle", messages=MESSAGES)


def test_the_client_waits_and_tries_again_where_too_many_wait(texts) -> None:
    with serve(texts, settings=Settings(max_waiting=1)) as server:
        server.engine.hold.set()
        first = threading.Thread(target=lambda: server.chat(max_tokens=1))
        first.start()
        server.wait(lambda: server.thread.num_waiting == 1)
        refused = server.client.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "2"
        threading.Timer(0.3, server.engine.hold.clear).start()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2)
        answer = client.chat.completions.create(model="needle", messages=MESSAGES, max_tokens=1)
        assert answer.usage.completion_tokens == 1
        first.join()


def test_on_python_3_9_structured_outputs_are_refused_clearly(texts, monkeypatch) -> None:
    monkeypatch.setattr("paddle_qwen1m.engine.grammar.sys", SimpleNamespace(version_info=(3, 9, 0)))
    engine = FakeEngine()
    engine.prepare = lambda _params: GrammarCompiler(CHECKPOINT / "tokenizer.json", 1024, EOS)
    with serve(texts, engine) as server:
        answer = server.chat(response_format={"type": "json_object"})
        assert answer.status_code == 400 and "Python 3.10" in answer.json()["error"]["message"]


def test_bodies_are_utf8_json_in_both_directions(server, texts) -> None:
    server.engine.script = texts.encode("ž🙂").tolist()
    raw = server.chat("ž🙂").content
    assert json.loads(raw)["choices"][0]["message"]["content"] == "ž🙂" and "ž🙂".encode() in raw
