"""The command: the card's line, vLLM's spellings, and how it ends."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

import httpx
import pytest
from serving import CHECKPOINT
from serving_command import running

from paddle_qwen1m.options import read_llm_options
from paddle_qwen1m.server.flags import add_flags, model_options, settings_of, spelled
from paddle_qwen1m.server.settings import API_KEY_VARIABLE, SERVER_OPTIONS
from paddle_qwen1m.streams import InputError

ROOT = Path(__file__).parents[2]
LABELS = f'{{engine="0",model_name="{CHECKPOINT}"}}'
CARD = (
    "MODEL --tensor-parallel-size 4 --max-model-len 1010000 --enable-chunked-prefill "
    "--max-num-batched-tokens 131072 --enforce-eager --max-num-seqs 1"
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_flags(made)
    return made


def parse(line: str) -> argparse.Namespace:
    return parser().parse_args(spelled(line.split()))


def test_the_cards_line_is_understood_as_it_is() -> None:
    options = read_llm_options(model_options(parse(CARD)))
    assert options == {
        "tensor_parallel_size": 4,
        "max_model_len": 1_010_000,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 131_072,
        "enforce_eager": True,
        "max_num_seqs": 1,
    }


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("M -tp 2 --max_model_len 1K", {"tensor_parallel_size": 2, "max_model_len": 1024}),
        ("M --max-model-len=131k", {"max_model_len": 131_000}),
        ("M --max-model-len auto", {"max_model_len": -1}),
        ("M --max-model-len -1", {"max_model_len": -1}),
        ("M --no-enable-prefix-caching --no_sparse", {"enable_prefix_caching": False, "sparse": False}),
        ("M --gpu-memory-utilization 0.9 --dtype bfloat16", {"gpu_memory_utilization": 0.9, "dtype": "bfloat16"}),
        ("M --enable-auto-tool-choice --tool-call-parser hermes --disable-log-requests --trust-remote-code", {}),
    ],
)
def test_vllms_spellings(line: str, options: dict) -> None:
    assert read_llm_options(model_options(parse(line))) == options


def test_what_is_no_whole_number_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        parse("M --max-model-len 1.01e6")
    assert "1.01e6" in capsys.readouterr().err


def test_keys_come_from_flags_variable_and_file(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "keys").write_text("three\nfour\n", encoding="utf-8")
    monkeypatch.setenv(API_KEY_VARIABLE, "two")
    assert settings_of(parse(f"M --api-key one --api-key-file {tmp_path}/keys")).api_keys == (
        "one",
        "two",
        "three",
        "four",
    )
    monkeypatch.delenv(API_KEY_VARIABLE)
    assert settings_of(parse("M")).api_keys == ()
    for line in (f"M --api-key-file {tmp_path}/none", "M --ping-seconds 9"):
        with pytest.raises(InputError):
            settings_of(parse(line))


FAKE = (str(Path(__file__).with_name("serving_process.py")), "serve")


def test_sigterm_drains_and_ends_and_a_failed_engine_ends_with_an_error() -> None:
    flags = (str(CHECKPOINT), "--max-model-len", "1k")
    with running(*flags, arguments=FAKE) as ending, running(*flags, arguments=FAKE) as failing:
        ending.wait_until_ready()
        answers: list[httpx.Response] = []
        body = {"prompt": [40], "max_tokens": 8}
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{ending.url}/v1/completions", json=body, timeout=30))
        )
        asking.start()
        while "vllm:num_requests_running" + LABELS + " 1.0" not in httpx.get(f"{ending.url}/metrics").text:
            assert asking.is_alive()
        ending.process.send_signal(signal.SIGTERM)
        asking.join(30)
        assert answers[0].json()["usage"]["completion_tokens"] == 8
        assert ending.end() == 0
        failing.wait_until_ready()
        answer = httpx.post(f"{failing.url}/v1/completions", json={"prompt": [13], "max_tokens": 8}, timeout=30)
        assert answer.status_code == 503
        assert failing.end() == 1
        assert "rank 1 has ended" in "".join(failing.lines)


def test_it_says_where_it_listens_whatever_a_library_did_to_the_root_logger() -> None:
    quiet = "import logging; logging.basicConfig(level=logging.CRITICAL); from paddle_qwen1m.cli import main; main()"
    with running(str(CHECKPOINT), "--max-model-len", "256", arguments=("-c", quiet, "serve")) as served:
        assert served.url.startswith("http://127.0.0.1:")


FLAGS = (
    ("--host", "127.0.0.1", "where it listens"),
    ("--served-model-name", "MODEL", "names of the model, the first one is told"),
    ("--api-key", "none", f"requests need one of these keys; also from the environment variable {API_KEY_VARIABLE}"),
    ("--api-key-file", "none", "the same, a key a line"),
    ("--allowed-origins", "none", "web pages that may ask (CORS)"),
    ("--allowed-hosts", "none", "Host headers besides localhost's, where it listens on loopback"),
    ("--chat-template", "the checkpoint's", "a file in Jinja's language"),
)


def test_the_readme_has_the_table_of_flags() -> None:
    rows = [*FLAGS, *((f"--{one.name.replace('_', '-')}", one.default, one.help) for one in SERVER_OPTIONS)]
    lines = [
        "| flag | default | meaning |",
        "|---|---|---|",
        *(f"| `{row[0]}` | {row[1]} | {row[2]} |" for row in rows),
    ]
    table = "\n".join(lines)
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), f"paste this into the README:\n{table}"
    known = {option for action in parser()._actions for option in action.option_strings}
    assert {row[0] for row in rows} <= known
