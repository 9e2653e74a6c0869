"""Wrong use of `paddle-qwen1m eval`, and what fails on its way: the error says what it was, and answers so far stay."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from evaluations import altered, run, serve

NEEDLES = ("--lengths", "512", "--depths", "3")


def journal(folder: Path) -> bytes:
    return (folder / "journal.jsonl").read_bytes()


@dataclass
class Mortal:
    """An endpoint that answers `lives` completions and then closes each connection without a word."""

    url: str
    lives: int
    asked: list[list[int]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)


@pytest.fixture
def mortal() -> Iterator[Mortal]:
    endpoint = Mortal("", 2)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({"data": [{"id": "one"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.keys.add(self.headers["Authorization"])
            if len(endpoint.asked) == endpoint.lives:
                self.close_connection = True
                return
            endpoint.asked.append(body["prompt"])
            self._reply({"choices": [{"text": "00000", "finish_reason": "stop"}]})

        def _reply(self, content: Any) -> None:
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_told: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    running = threading.Thread(target=server.serve_forever)
    running.start()
    yield endpoint
    server.shutdown()
    running.join()
    server.server_close()


def test_an_endpoint_that_dies_on_the_way_is_gone_on_with_when_it_is_back(
    needle_checkpoint: Path, tmp_path: Path, mortal: Mortal, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    options = (*NEEDLES, "--base-url", mortal.url)
    assert run("needle", needle_checkpoint, tmp_path, *options) == 1
    told = capsys.readouterr().err
    assert f"2 answers are kept in {tmp_path}/endpoint: the same command goes on from there\n" in told
    assert told.splitlines()[-1].startswith(f"error: {mortal.url} does not answer: ")
    before = journal(tmp_path / "endpoint")
    assert before.count(b"\n") == 2
    mortal.lives = 99
    assert run("needle", needle_checkpoint, tmp_path, *options) == 0
    assert journal(tmp_path / "endpoint").startswith(before)
    assert len(mortal.asked) == 3 == len({tuple(prompt) for prompt in mortal.asked}), "nothing is asked twice"
    assert mortal.keys == {"Bearer secret"}


def test_an_endpoint_says_itself_what_is_longer_than_its_model_can_have(
    needle_checkpoint: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--lengths", 512, 2048, "--depths", 1)
    with serve(needle_checkpoint, tokenizer, max_model_len=1024) as server:
        assert run("needle", needle_checkpoint, tmp_path, *options, "--base-url", f"{server.url}/v1") == 1
    told = capsys.readouterr().err
    assert "/completions answered 400: " in told and "context length is only 1024 tokens" in told
    assert "1 answer is kept in" in told
    assert json.loads(journal(tmp_path / "endpoint"))["length"] == 512


@pytest.mark.parametrize(
    ("other", "change"),
    [
        (["--seed", "1"], "seed was 0 and is 1"),
        (["--score", "logits"], "score was 'generation' and is 'logits'"),
        (["--sparse-threshold", "300"], "options was "),
        (["--haystack", "prose"], "haystack was 'filler' and is 'prose'"),
    ],
)
def test_a_run_is_gone_on_with_by_the_same_options_alone(
    other: list[str], change: str, needle_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run("needle", needle_checkpoint, tmp_path, "--lengths", 512, "--depths", 1) == 0
    before = journal(tmp_path / "sparse")
    capsys.readouterr()
    assert run("needle", needle_checkpoint, tmp_path, "--lengths", 512, "--depths", 1, *other) == 2
    told = capsys.readouterr().err
    assert f"holds answers of a run with other options ({change}" in told
    assert "give the same ones to go on, or another folder" in told
    assert journal(tmp_path / "sparse") == before


def test_other_weights_under_the_same_name_are_another_run(
    needle_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = altered(needle_checkpoint, tmp_path / "model", "model-00001-of-00003.safetensors")
    options = ("--lengths", 512, "--depths", 1)
    assert run("needle", tmp_path / "model", tmp_path / "out", *options) == 0
    before = journal(tmp_path / "out" / "sparse")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run("needle", tmp_path / "model", tmp_path / "out", *options) == 2
    assert "a run with other options (weights was " in capsys.readouterr().err
    assert journal(tmp_path / "out" / "sparse") == before


def test_without_a_chat_template_prompts_are_plain_or_not_at_all(
    needle_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = altered(needle_checkpoint, tmp_path / "model", "tokenizer_config.json")
    config.write_text(
        json.dumps({name: value for name, value in json.loads(config.read_text()).items() if name != "chat_template"})
    )
    options = ("--lengths", 512, "--depths", 1)
    assert run("needle", tmp_path / "model", tmp_path / "out", *options) == 2
    assert (
        capsys.readouterr().err == "error: the tokenizer has no chat template: give --raw, and prompts are plain text\n"
    )
    assert not (tmp_path / "out").exists()
    assert run("needle", tmp_path / "model", tmp_path / "out", *options, "--raw") == 0
    assert "<|im_start|>" not in json.loads(journal(tmp_path / "out" / "sparse"))["prompt"]


def test_a_text_shorter_than_a_window_is_refused_before_any_work(
    needle_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("The grass is green.", encoding="utf-8")
    options = ("--lengths", 128, "--text", tmp_path / "text")
    assert run("perplexity", needle_checkpoint, tmp_path / "out", *options) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: perplexity: the text has ") and told.endswith("fewer than a window of 128\n")
    assert not (tmp_path / "out").exists()
