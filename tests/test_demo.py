"""What the demo says and when: a step before it runs, then its outcome; at the end what was asked, and what is next."""

from __future__ import annotations

from pathlib import Path

import demo
import pytest
from needle_documents import Document, DocumentMaker

ROOT = Path(__file__).resolve().parent.parent


class Reader:
    """Answers right without a model; `seen` is what was on the screen when each question was asked."""

    seen: list[str]
    capture: pytest.CaptureFixture[str]

    def __init__(self, _checkpoint: Path) -> None:
        self._maker = DocumentMaker(lambda text: list(text.encode()))

    def document(self, tokens: int, seed: int) -> Document:
        return self._maker.make(tokens, 2, seed, depth=0.5)

    def ask(self, tokens: int, seed: int, documents: int) -> demo.Run:
        Reader.seen.append(Reader.capture.readouterr().out)
        document = self._maker.make(tokens, 1, seed, depth=0.5)
        return demo.Run(document, tokens, document.needles[0].sentence, right=True, seconds=1.0, peak=10**9)


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """All that a short demo prints."""
    Reader.seen, Reader.capture = [], capsys
    for name, value in {"Reader": Reader, "LENGTHS": (1024,), "DOCUMENTS": 2, "FOUND_AT_LEAST": 2}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "draw", lambda *_: None)
    monkeypatch.setattr(demo.demo_server, "show", lambda _checkpoint, _document: [])
    monkeypatch.chdir(ROOT)
    assert demo.demo(ROOT / "checkpoints" / "needle", tmp_path) == 0
    return "".join(Reader.seen) + capsys.readouterr().out


def test_a_step_is_said_before_it_runs(shown: str) -> None:
    assert Reader.seen[0].endswith("plain RoPE, 1,024 tokens, 2 documents ")
    assert Reader.seen[-1].endswith("one document of 65,536 tokens, sparse prefill: ")
    assert "minutes" in Reader.seen[0], "how long all of it takes"


def test_the_end_shows_question_and_excerpt_and_what_to_do_next(shown: str, tmp_path: Path) -> None:
    end = shown[shown.index("Its sentences") :]
    question = end.split("Question: ")[1].splitlines()[0]
    answer = end.split("Answer:   ")[1].splitlines()[0]
    assert answer in end.split("Question: ")[0], "the excerpt is where the answer is"
    assert ". .venv/bin/activate" in end
    document = tmp_path / "document.txt"
    assert f"paddle-qwen1m generate --model checkpoints/needle --prompt-file {document} --greedy" in end
    assert end.count(question) == 2 and answer in document.read_text(encoding="utf-8")
    assert all(name in end for name in demo.NAMES)


@pytest.mark.slow
def test_the_server_is_asked_twice_and_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = ROOT / "checkpoints" / "needle"
    assert demo.demo_server.show(checkpoint, demo.Reader(checkpoint).document(4096, seed=1)) == []
    shown = capsys.readouterr().out
    assert shown.count("The access code for") == 2 and "it has ended" in shown
