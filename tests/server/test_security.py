"""Safe by default: who may ask, what is told to whom, and what appears in logs, errors and metrics."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from serving import Server, serve

import paddle_qwen1m
from paddle_qwen1m.server.security import exposure
from paddle_qwen1m.server.settings import Settings

PATHS = ("/metrics", "/version", "/v1/models", "/tokenizer_info", "/nowhere")


@pytest.fixture(scope="module")
def guarded(texts):
    with serve(texts, FakeEngine(), settings=Settings(api_keys=("first-key", "second-key"))) as one:
        yield one


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_guards_every_path_but_health_and_the_page(guarded: Server) -> None:
    for path in PATHS:
        answer = guarded.client.get(path)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == 401, path
        assert guarded.client.get(path, headers=bearer("second-key")).status_code in (200, 404)
    for path in ("/v1/chat/completions", "/tokenize", "/detokenize", "/reset_prefix_cache"):
        assert guarded.post(path, {}).status_code == 401
    assert guarded.client.get("/health").status_code == guarded.client.get("/").status_code == 200


@pytest.mark.parametrize(
    "value", ["Bearer wrong", "Bearer", "Basic first-key", "first-key", "Bearer first-key2", "Bearer first-ke"]
)
def test_other_keys_do_not(guarded: Server, value: str) -> None:
    assert guarded.client.get("/version", headers={"Authorization": value}).status_code == 401


def test_metrics_can_be_opened(texts) -> None:
    with serve(texts, settings=Settings(api_keys=("key",), open_metrics=True)) as server:
        assert server.client.get("/metrics").status_code == 200
        assert server.client.get("/version").status_code == 401


def test_keys_are_compared_in_constant_time(monkeypatch, texts) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(
        hmac, "compare_digest", lambda one, other: compared.append((len(one), len(other))) or real(one, other)
    )
    with serve(texts, settings=Settings(api_keys=("a", "b" * 50))) as server:
        server.client.get("/version", headers=bearer("a"))
    assert compared == [(32, 32), (32, 32)]  # digests, and both, though the first one is right


def test_on_loopback_other_hosts_are_refused(texts) -> None:
    with serve(texts, settings=Settings(allowed_hosts=("gpu.example",))) as server:
        for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "gpu.example", "GPU.example:443"):
            assert server.client.get("/health", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil"):
            assert server.client.get("/health", headers={"Host": host}).status_code == 403, host
    with serve(texts, settings=Settings(host="0.0.0.0")) as server:
        assert server.client.get("/health", headers={"Host": "any.example"}).status_code == 200


def test_no_cors_header_unless_an_origin_is_allowed(texts) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    with serve(texts) as server:
        for answer in (
            server.client.options("/v1/models", headers=asked),
            server.client.get("/v1/models", headers=asked),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control")]
    with serve(texts, settings=Settings(allowed_origins=("https://app.example",), api_keys=("key",))) as server:
        assert server.client.options("/v1/models", headers=asked).status_code == 200
        answer = server.client.get("/v1/models", headers={**asked, **bearer("key")})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        other = server.client.get("/v1/models", headers={"Origin": "https://evil.example", **bearer("key")})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_bodies_must_be_json_by_their_type(server: Server, kind: str) -> None:
    answer = server.client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
    assert answer.status_code == 415
    right = {"Content-Type": "application/json; charset=utf-8"}
    assert server.client.post("/v1/completions", content=b'{"prompt": "x"}', headers=right).status_code == 200


@pytest.mark.parametrize("body", [{"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}])
def test_a_template_in_a_request_is_refused(server: Server, body: dict) -> None:
    assert server.chat("x", **body).status_code == 400
    assert not server.engine.added


def test_templates_are_rendered_in_the_immutable_sandbox(texts) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    assert isinstance(texts._tokenizer.chat_template.environment, ImmutableSandboxedEnvironment)


def test_neither_prompts_nor_answers_nor_keys_are_logged_or_told(texts, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "violet-crocodile"
    with serve(texts, settings=Settings(api_keys=("s3cr3t-key",))) as server:
        server.client.headers.update(bearer("s3cr3t-key"))
        server.engine.script = texts.encode(secret).tolist()
        assert server.chat(secret).json()["choices"][0]["message"]["content"] == secret
        told = [server.client.get("/metrics").text]
        for body in (
            {"messages": secret},
            {"messages": [{"role": secret}]},
            {"messages": [{"role": "user", "content": {secret: 1}}]},
            {"messages": [{"role": "user", "content": secret}], "n": secret},
            {"messages": [], secret: 1},
            {"messages": [{"role": "user", "content": secret}], "logit_bias": {secret: 1}},
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "chat_template_kwargs": {secret: 1}},
        ):
            told.append(server.post("/v1/chat/completions", body).text)
        server.engine.failure = RuntimeError(secret)
        told.append(server.chat(secret).text)
    lines = [
        record.getMessage() + str(record.exc_text) for record in caplog.records if not record.name.startswith("http")
    ]
    assert lines
    assert [line for line in (*told, *lines) if secret in line or "s3cr3t" in line] == []


def test_nothing_is_unpickled() -> None:
    """No module of the package imports what reads code from bytes, nor has numpy do it."""
    package = Path(paddle_qwen1m.__file__).parent
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert not imported & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}, path
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        named = {f"{ast.unparse(one)}" for one in calls}
        assert not named & {"np.load", "paddle.load", "eval", "exec"}, path
        assert "allow_pickle" not in path.read_text(encoding="utf-8"), path


def test_what_nobody_expected_is_a_500_with_an_id_and_no_internals(texts, caplog, monkeypatch) -> None:
    with serve(texts) as server:
        monkeypatch.setattr(server.thread, "submit", lambda *_: 1 / 0)
        answer = server.chat()
        error = answer.json()["error"]
        assert answer.status_code == error["code"] == 500 and "ZeroDivision" not in answer.text
    number = error["message"].split()[2].rstrip(":")
    assert [record for record in caplog.records if number in record.getMessage()]


def test_with_log_requests_they_are_logged(texts, caplog) -> None:
    caplog.set_level(logging.INFO)
    with serve(texts, settings=Settings(log_requests=True)) as server:
        server.chat("violet-crocodile", max_tokens=1)
    assert "violet-crocodile" in caplog.text


def test_it_warns_where_others_can_reach_it_without_a_key() -> None:
    assert Settings().host == "127.0.0.1"
    for settings, warns in (
        (Settings(), 0),
        (Settings(host="0.0.0.0"), 1),
        (Settings(host="0.0.0.0", api_keys=("k",)), 0),
        (Settings(host="::1"), 0),
    ):
        assert len(exposure(settings)) == warns


def test_unknown_paths_and_methods_have_openais_shape(server: Server) -> None:
    for answer, status in ((server.client.get("/nowhere"), 404), (server.client.get("/v1/completions"), 405)):
        assert answer.status_code == status and answer.json()["error"]["code"] == status


def test_the_page_is_one_file_under_a_policy(server: Server) -> None:
    answer = server.client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text and "https://" not in answer.text
