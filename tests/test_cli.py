"""paddle-qwen1m as a user meets it: its own process, real checkpoints, exit status and what lands on which stream."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from paddle_qwen1m import cli

ROOT = Path(__file__).resolve().parent.parent
NEEDLE = ROOT / "checkpoints" / "needle"
QUESTION = "What is the access code for quartz?"
SENTENCE = "The access code for quartz is 54704."


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "paddle_qwen1m.cli", *map(str, arguments)]


def run(*arguments: object, stdin: bytes = b"", timeout: float = 300) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), input=stdin, capture_output=True, timeout=timeout, env=environment())
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2,000 tokens with one needle, twice the length the checkpoint was trained on."""
    filler = "The river bends past the old mill and on toward the sea. The council met twice and agreed on nothing. "
    path = tmp_path_factory.mktemp("cli") / "document.txt"
    path.write_text(filler * 40 + SENTENCE + " " + filler * 40 + "\n", encoding="utf-8")
    return path


def terminal() -> tuple[int, int]:
    """A pseudo-terminal of 100 columns: the end to read, and the end to give to a process."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    return leader, follower


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr, nothing on stdout."""
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


# --- text that is streamed ---


def streamed(pieces: list[bytes]) -> list[str]:
    """What a TextStream writes when token i stands for the bytes pieces[i]."""
    written: list[str] = []
    stream = cli.TextStream(lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", "replace"), written.append)
    for token in range(len(pieces)):
        stream.put(token)
    stream.end()
    return written


def test_stream_writes_every_token_as_it_comes() -> None:
    assert streamed([b"The", b" code", b" is", b" 5"]) == ["The", " code", " is", " 5"]


def test_stream_never_writes_half_a_character() -> None:
    smile = "🙂".encode()
    written = streamed([b"a", smile[:1], smile[1:3], smile[3:], "é".encode()[:1], "é".encode()[1:]])
    assert written == ["a", "🙂", "é"]


def test_stream_ends_with_what_was_held_back() -> None:
    assert streamed([b"a", "🙂".encode()[:2]]) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_stream_is_the_text_whatever_the_split() -> None:
    text = "Zürich, 東京 and 🙂🙃 — naïve\n\n½ done"
    raw = text.encode()
    for width in (1, 2, 3, 5):
        assert "".join(streamed([raw[i : i + width] for i in range(0, len(raw), width)])) == text


# --- the prompt ---


def test_question_follows_the_document_on_a_line_of_its_own() -> None:
    assert cli.user_text("A document.\n\n", "Why?") == "A document.\nWhy?"
    assert cli.user_text("A document.\n", None) == "A document.\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty"), (b" \n\t", "is empty"), (b"caf\xe9 au lait", "is not UTF-8: byte 0xe9 at offset 3")],
)
def test_unusable_documents_are_refused_in_one_line(
    tmp_path: Path, content: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    assert cli.main(["generate", "--model", str(NEEDLE), "--prompt-file", str(path)]) == 2
    assert capsys.readouterr() == ("", f"error: --prompt-file: {path} {reason}\n")


def test_a_missing_document_and_a_directory_are_refused(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.txt", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(cli.InputError, match=re.escape(f"cannot read {path}: {reason}")):
            cli.read_document(str(path))


def test_empty_standard_input_is_refused() -> None:
    done = run("generate", "--model", NEEDLE, "--prompt-file", "-")
    assert done.returncode == 2
    assert error_line(done) == "error: --prompt-file: standard input is empty"


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: COMMAND"),
        (["serve-it"], "invalid choice: 'serve-it'"),
        (["generate", "--model", "x"], "required: --prompt-file"),
        (["generate", "--prompt-file", "x"], "required: --model"),
        (["generate", "--model", "x", "--prompt-file", "y", "--max-new-tokens", "0"], "must be at least 1, got 0"),
        (["generate", "--model", "x", "--prompt-file", "y", "--threads", "two"], "'two' is not a whole number"),
        (["generate", "--model", "x", "--prompt-file", "y", "--dtype", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--raw", "--system", "Be brief."], "--system has no place in a --raw prompt"),
        (["--greedy", "--temperature", "0.5"], "--greedy and --temperature 0.5 exclude each other"),
        (["--question", " "], "--question is empty"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    document: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--model", str(NEEDLE), "--prompt-file", str(document), *options]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--temperature", "nan"], "temperature must be a finite number"),
        (["--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["--max-model-len", "300"], "exceeds max_model_len"),
        (["--sparse-budgets", "/nowhere/budgets.json"], "/nowhere/budgets.json"),
    ],
)
def test_what_the_model_refuses_is_bad_input(
    document: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--model", str(NEEDLE), "--prompt-file", str(document), *options]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert captured.out == ""


def test_a_model_that_is_not_there_is_refused_in_one_line(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", "/nowhere/model", "--prompt-file", str(document)]) == 2
    assert capsys.readouterr() == ("", "error: /nowhere/model: no such directory\n")


def test_a_truncated_shard_fails_naming_the_file(
    document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(NEEDLE, broken)
    shard = broken / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    done = run("generate", "--model", broken, "--prompt-file", document)
    assert done.returncode == 1
    assert shard.name in error_line(done)
    assert cli.main(["check", str(broken)]) == 1
    assert re.search(rf"^FAIL +files: .*{shard.name}", capsys.readouterr().out, re.MULTILINE)


# --- generate ---


def test_the_answer_alone_is_on_stdout(document: Path) -> None:
    done = run("generate", "--model", NEEDLE, "--prompt-file", document, "--question", QUESTION, "--greedy")
    assert done.returncode == 0, done.stderr
    assert done.stdout == SENTENCE + "\n"
    assert re.fullmatch(
        r"prefill: [\d,]+ tokens in .* s \(.* tokens/s\); answer: \d+ tokens \(.* tokens/s\)\n", done.stderr
    )


def test_the_document_may_come_from_standard_input_and_json_is_one_object(document: Path) -> None:
    done = run(
        *("generate", "--model", NEEDLE, "--prompt-file", "-", "--question", QUESTION, "--greedy", "--json"),
        stdin=document.read_bytes(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["text"] == SENTENCE
    assert report["finish_reason"] == "stop"
    assert report["prompt_tokens"] > 1024
    assert 0 < report["completion_tokens"] < 40
    assert report["seed"] is None
    for name in ("load_seconds", "prefill_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"):
        assert report[name] > 0


def generate_json(document: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    arguments = ["generate", "--model", str(NEEDLE), "--prompt-file", str(document), "--json", *options]
    assert cli.main(arguments) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_a_seed_repeats_a_sampled_answer(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "3", "--top-p", "1", "--top-k", "0", "--max-new-tokens", "12"]
    first = generate_json(document, capsys, *options)
    again = generate_json(document, capsys, *options, "--seed", str(first["seed"]))
    other = generate_json(document, capsys, *options, "--seed", str(first["seed"] + 1))
    assert again["text"] == first["text"] != other["text"]


def test_max_new_tokens_ends_an_answer_by_length(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = generate_json(document, capsys, "--question", QUESTION, "--greedy", "--max-new-tokens", "3")
    assert (report["completion_tokens"], report["finish_reason"]) == (3, "length")


def test_raw_text_and_a_system_message_change_the_prompt(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--greedy", "--max-new-tokens", "1"]
    plain = generate_json(document, capsys, *options)["prompt_tokens"]
    assert generate_json(document, capsys, *options, "--raw")["prompt_tokens"] < plain
    assert generate_json(document, capsys, *options, "--system", "Answer. " * 50)["prompt_tokens"] > plain


def test_a_terminal_shows_how_far_the_prefill_is(document: Path) -> None:
    arguments = ["--prompt-file", document, "--question", QUESTION, "--greedy", "--max-num-batched-tokens", "256"]
    leader, follower = terminal()
    with subprocess.Popen(
        command("generate", "--model", NEEDLE, *arguments), stdout=subprocess.PIPE, stderr=follower, env=environment()
    ) as process:
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # a pseudo-terminal reports its end as EIO
            while piece := os.read(leader, 65536):
                shown += piece
        assert process.stdout is not None
        assert process.stdout.read().decode() == SENTENCE + "\n"
    os.close(leader)
    assert re.search(rb"Prefill: +\d+%.*tokens/s", shown), shown


def test_ctrl_c_stops_at_once_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("The sky is blue and the lamp is lit. " * 6000, encoding="utf-8")
    leader, follower = terminal()
    with subprocess.Popen(
        command("generate", "--model", NEEDLE, "--prompt-file", path, "--no-sparse", "--max-num-batched-tokens", "512"),
        stdout=subprocess.PIPE,
        stderr=follower,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    ) as process:
        os.close(follower)
        shown = b""
        while b"Prefill" not in shown:
            shown += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while piece := os.read(leader, 65536):
                shown += piece
        assert process.wait(30) == 130
        assert time.monotonic() - started < 15
    os.close(leader)
    assert b"interrupted" in shown
    assert b"Traceback" not in shown


# --- check ---


def test_check_finds_the_needle_checkpoint_in_order() -> None:
    done = run("check", NEEDLE)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(re.findall(r"^(?:OK|WARN) +([\w ]+): +(.*)$", done.stdout, re.MULTILINE))
    assert set(found) == {"versions", "custom ops", "GPU", "model", "files", "tokenizer", "sparse budgets", "memory"}
    assert "51 tensors in 3 file(s)" in found["files"]
    assert found["sparse budgets"].endswith("sparse_attention_config.json")
    assert done.stderr == ""


def test_check_says_which_context_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("paddle_qwen1m.check.available_memory", lambda: 1_000_000_000)
    assert cli.main(["check", str(NEEDLE)]) == 0
    warned = re.search(r"^WARN +memory: +.* give --max-model-len (\d+) or less$", capsys.readouterr().out, re.MULTILINE)
    assert warned is not None
    assert cli.main(["check", str(NEEDLE), "--max-model-len", warned[1]]) == 0
    assert re.search(r"^OK +memory:", capsys.readouterr().out, re.MULTILINE)


def test_check_fails_on_a_tokenizer_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(NEEDLE, mixed)
    config = json.loads((mixed / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    assert cli.main(["check", str(mixed)]) == 1
    assert re.search(
        r"^FAIL +tokenizer: +gives id \d+, the model's vocabulary has 300", capsys.readouterr().out, re.MULTILINE
    )


def test_check_of_a_directory_without_a_checkpoint_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(tmp_path)]) == 1
    assert re.search(r"^FAIL +checkpoint: +.* has no config.json", capsys.readouterr().out, re.MULTILINE)
