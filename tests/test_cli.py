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

from paddle_qwen1m import cli, progress
from paddle_qwen1m.commands.generate import user_text

ROOT = Path(__file__).resolve().parent.parent
NEEDLE = ROOT / "checkpoints" / "needle"
QUESTION = "What is the access code for quartz?"
SENTENCE = "The access code for quartz is 54704."


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "paddle_qwen1m", *map(str, arguments)]


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


def error_line(stdout: str, stderr: str) -> str:
    """The only line on stderr, nothing on stdout."""
    assert stdout == ""
    assert "Traceback" not in stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    return lines[0]


# --- the prompt ---


def test_question_follows_the_document_on_a_line_of_its_own() -> None:
    assert user_text("A document.\n\n", "Why?") == "A document.\nWhy?"
    assert user_text("A document.\n", None) == "A document.\n"


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


def test_empty_standard_input_is_refused() -> None:
    done = run("generate", "--model", NEEDLE, "--prompt-file", "-")
    assert done.returncode == 2
    assert error_line(done.stdout, done.stderr) == "error: --prompt-file: standard input is empty"


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: COMMAND"),
        (["serve-it"], "invalid choice: 'serve-it'"),
        (["generate", "--model", "x"], "one of the arguments --prompt-file --prompt is required"),
        (["generate", "--model", "x", "--prompt-file", "y", "--prompt", "z"], "not allowed with argument"),
        (["generate", "--prompt-file", "x"], "required: --model"),
        (["generate", "--model", "x", "--prompt-file", "y", "--max-new-tokens", "0"], "must be at least 1, got 0"),
        (["generate", "--model", "x", "--prompt-file", "y", "--threads", "two"], "'two' is not a whole number"),
        (["generate", "--model", "x", "--prompt-file", "y", "--top-k", "9" * 30], "must be at most 2147483647"),
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
        (["--question", "Why?", "--question", ""], "--question is empty"),
        (["--question", "a \ud800"], "--question is no text"),
        (["--system", "a \ud800"], "--system is no text"),
        (["--sparse-budgets", "."], "--sparse-budgets: cannot read .: Is a directory"),
        (["--sparse-budgets", "a\0b"], "--sparse-budgets: a name cannot hold the character NUL"),
        (["--output", "/nowhere/answer.txt"], "--output: cannot write /nowhere/answer.txt: No such file"),
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
        (["--max-model-len", "300"], "exceeds the capacity of max_model_len"),
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
    document: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(NEEDLE, broken)
    shard = broken / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert cli.main(["generate", "--model", str(broken), "--prompt-file", str(document)]) == 1
    assert shard.name in error_line(*capfd.readouterr())
    assert cli.main(["check", str(broken)]) == 1
    assert re.search(rf"^FAIL +files: .*{shard.name}", capfd.readouterr().out, re.MULTILINE)


# --- generate ---


def test_the_answer_alone_is_on_stdout(document: Path) -> None:
    done = run("generate", "--model", NEEDLE, "--prompt-file", document, "--question", QUESTION, "--greedy")
    assert done.returncode == 0, done.stderr
    assert done.stdout == SENTENCE + "\n"
    *lines, summary = done.stderr.splitlines()
    assert re.fullmatch(r"prefill: [\d,]+ tokens in .* s \(.* tokens/s\); answer: \d+ tokens \(.* tokens/s\)", summary)
    assert all(line.startswith("Prefill: ") for line in lines)


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
    assert report["question"] == QUESTION
    assert (report["max_num_batched_tokens"], report["sparse"]) == (2048, False)
    for name in ("load_seconds", "prefill_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"):
        assert report[name] > 0


def generate_json(document: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    arguments = ["generate", "--model", str(NEEDLE), "--prompt-file", str(document), "--json", *options]
    assert cli.main(arguments) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_a_seed_repeats_a_sampled_answer(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "2", "--top-p", "1", "--top-k", "0", "--max-new-tokens", "12"]
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


def test_several_questions_are_answered_in_order_after_one_prefill(
    document: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from paddle_qwen1m.engine.orders import Order, Prefill
    from paddle_qwen1m.engine.runner import Runner

    run, chunks = Runner.run, []

    def note(runner: Runner, order: Order, *arguments: Any) -> Any:
        if isinstance(order, Prefill):
            chunks.append(order.rows[0].end)
        return run(runner, order, *arguments)

    monkeypatch.setattr(Runner, "run", note)
    arguments = ["generate", "--model", str(NEEDLE), "--prompt-file", str(document), "--json", "--greedy"]
    options = ["--max-num-batched-tokens", "256", "--max-new-tokens", "20"]
    questions = [QUESTION, "What is the access code for jade?", QUESTION]
    assert cli.main([*arguments, *options, *(word for one in questions for word in ("--question", one))]) == 0
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [report["question"] for report in reports] == questions
    assert reports[0]["text"] == reports[2]["text"] == SENTENCE != reports[1]["text"]
    assert "jade" in reports[1]["text"]
    first = chunks.index(reports[0]["prompt_tokens"]) + 1
    assert first >= reports[0]["prompt_tokens"] // 256 and len(chunks) <= first + 4, "the document is read once"


def test_the_text_may_be_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"The grass is green. {SENTENCE} The sky is blue."
    arguments = ["generate", "--model", str(NEEDLE), "--prompt", text, "--question", QUESTION, "--greedy"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == SENTENCE + "\n"


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_the_answer_may_go_to_a_file(
    document: Path, tmp_path: Path, form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = tmp_path / "answer"
    arguments = ["--prompt-file", str(document), "--question", QUESTION, "--greedy", "--output", str(answer)]
    assert cli.main(["generate", "--model", str(NEEDLE), *arguments, *form]) == 0
    assert capsys.readouterr().out == ""
    text = answer.read_text(encoding="utf-8")
    assert (json.loads(text)["text"] + "\n" if form else text) == SENTENCE + "\n"


def test_the_answer_does_not_overwrite_its_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "document.txt"
    path.write_text("Once upon a time", encoding="utf-8")
    arguments = ["generate", "--model", str(NEEDLE), "--prompt-file", str(path), "--output", str(path)]
    assert cli.main(arguments) == 2
    assert "is the document itself" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "Once upon a time"


def test_without_a_number_of_new_tokens_the_answer_gets_what_the_prompt_leaves(
    document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--question", QUESTION, "--greedy"]
    prompt = generate_json(document, capsys, *options)["prompt_tokens"]
    room = ["--max-model-len", str(prompt + 5)]
    cut = generate_json(document, capsys, *options, *room)
    assert (cut["completion_tokens"], cut["finish_reason"]) == (5, "length")
    arguments = ["generate", "--model", str(NEEDLE), "--prompt-file", str(document), *options, *room]
    assert cli.main([*arguments, "--max-new-tokens", "512"]) == 2
    assert "ask for at most 5 new tokens" in capsys.readouterr().err


def test_what_the_checkpoints_file_says_of_ends_and_words_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "ending"
    shutil.copytree(NEEDLE, model)
    path = model / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    arguments = ["generate", "--model", str(model), "--prompt", SENTENCE, "--question", QUESTION, "--greedy"]
    for changes, answer in (
        ({"stop_strings": ["for", "quartz"]}, "The access code for"),
        ({"stop_strings": "quartz"}, "The access code for quartz"),
    ):
        path.write_text(json.dumps({**values, **changes}), encoding="utf-8")
        assert cli.main([*arguments, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["text"], report["finish_reason"]) == (answer, "stop")
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out == f"{answer}\n"
    path.write_text(json.dumps({**values, "bad_words_ids": [[279]]}), encoding="utf-8")
    assert cli.main(arguments) == 0
    assert not capsys.readouterr().out.startswith("The access code")


def test_a_prompt_that_is_too_long_is_refused_in_one_line_that_helps(
    document: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "short"
    shutil.copytree(NEEDLE, model)
    for name, changes in (
        ("config.json", {"max_position_embeddings": 1000}),
        ("tokenizer_config.json", {"model_max_length": 1000}),
    ):
        values = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps({**values, **changes}), encoding="utf-8")
    assert cli.main(["generate", "--model", str(model), "--prompt-file", str(document)]) == 2
    line = error_line(*capfd.readouterr())
    assert re.search(
        r"max_model_len \(1000 tokens, all that the model has\), .* beside it: shorten the prompt by \d+",
        line,
    )
    assert "0 new tokens" not in line and "increase" not in line and "from_pretrained" not in line
    limit = ["--max-model-len", "1000"]
    assert cli.main(["generate", "--model", str(NEEDLE), "--prompt-file", str(document), *limit]) == 2
    line = error_line(*capfd.readouterr())
    assert line.endswith(", or increase max_model_len (--max-model-len) to at most 1048576, all that the model has")


def test_memory_that_cannot_be_had_is_named_with_what_takes_less(
    document: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise MemoryError(
            "(ResourceExhausted) Fail to alloc memory of 61603840 size, error code is 12.\n  [Hint: Expected "
            "error == 0] (at /paddle/paddle/phi/core/memory/allocation/cpu_allocator.cc:44)\n"
        )

    monkeypatch.setattr("paddle_qwen1m.engine.Engine.generate", refuse)
    assert cli.main(["generate", "--model", str(NEEDLE), "--prompt-file", str(document)]) == 1
    line = capsys.readouterr().err
    assert "out of memory: 0.06 GB more" in line and "--max-num-batched-tokens" in line and "allocator.cc" not in line


def test_without_a_terminal_lines_show_how_far_the_prefill_is(
    document: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    arguments = ["--prompt-file", str(document), "--max-num-batched-tokens", "128", "--max-new-tokens", "1"]
    assert cli.main(["generate", "--model", str(NEEDLE), *arguments]) == 0
    assert re.search(r"^Prefill: [\d,]+ of [\d,]+ tokens \(\d+%\), \d+ s$", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize(
    ("question", "status"), [("Où est quartz?".encode(), 0), (b"What \xff is quartz?", 2)], ids=["UTF-8", "no text"]
)
def test_a_question_is_utf8_under_the_c_locale(document: Path, question: bytes, status: int) -> None:
    words = [*command("generate", "--model", NEEDLE, "--prompt-file", document, "--max-new-tokens", 3), "--question"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*words, question], env={**environment(), **locale}, capture_output=True, timeout=300)
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr == b"error: --question is not UTF-8: byte 0xff at offset 5\n"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PADDLE_TRAINERS_NUM": "two"}, "PADDLE_TRAINERS_NUM"),
        ({"PADDLE_TRAINER_ID": "\u00b2"}, "PADDLE_TRAINER_ID"),
        (
            {"PADDLE_TRAINERS_NUM": "2", "PADDLE_TRAINER_ENDPOINTS": "a:1,b:2", "PADDLE_QWEN1M_START_SECONDS": "soon"},
            "soon",
        ),
    ],
)
def test_a_variable_that_is_no_number_is_bad_input(document: Path, variables: dict[str, str], reason: str) -> None:
    words = command("generate", "--model", NEEDLE, "--prompt-file", document)
    done = subprocess.run(words, env={**environment(), **variables}, capture_output=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr.decode() and b"Traceback" not in done.stderr


def test_threads_that_are_no_number_count_as_not_given(document: Path) -> None:
    words = command("generate", "--model", NEEDLE, "--prompt-file", document, "--max-new-tokens", 1)
    done = subprocess.run(words, env={**environment(), "OMP_NUM_THREADS": "\u00b2"}, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr


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


def test_check_never_suggests_more_than_the_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(NEEDLE), "--max-model-len", "5000000"]) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"^FAIL +memory: +--max-model-len 5,000,000 is more than the model has: 1,048,5", out, re.MULTILINE
    )
    assert re.search(r"^(OK|WARN) +memory: +1,048,576 tokens need", out, re.MULTILINE)


def test_check_counts_what_each_rank_of_a_set_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = str(tmp_path / "ranks")
    form = ["--format", "tensor-parallel", "--tensor-parallel-size", "2"]
    assert cli.main(["convert", str(NEEDLE), ranks, *form]) == 0
    capsys.readouterr()

    def cache(*arguments: str) -> float:
        assert cli.main(["check", *arguments]) == 0
        found = re.search(r"memory: .* ([\d.]+) GB KV cache", capsys.readouterr().out)
        assert found is not None
        return float(found[1])

    assert cache(ranks) == pytest.approx(cache(str(NEEDLE)) / 2, abs=0.01)
    assert cli.main(["check", ranks]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^WARN +files: .* cut for 2 ranks, .*one process cannot load them: start 2 \(", out, re.MULTILINE)
    assert re.search(r"memory: .* on each of 2 ranks .* available to all of them on this machine", out)


def test_plan_prints_the_table_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--table"]) == 0
    assert capsys.readouterr().out in (ROOT / "README.md").read_text(encoding="utf-8")


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


# --- the rest ---


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from paddle_qwen1m import __version__

    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"paddle-qwen1m {__version__}\n"


@pytest.mark.parametrize(("name", "state"), [("none", "is not there"), ("file", "is a file")])
def test_converting_what_is_no_directory_is_bad_input(
    tmp_path: Path, name: str, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["convert", str(tmp_path / name), str(tmp_path / "out"), "--format", "paddlenlp"]) == 2
    assert capsys.readouterr().err == f"error: SRC: {tmp_path / name} {state}: give a directory\n"
