"""The command with ranks in processes of their own: the card's line, and what is left when one of them is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from serving import CHECKPOINT
from serving_command import Command, are_gone, running
from synthetic_checkpoint import write_checkpoint

CARD = (
    "--tensor-parallel-size 4 --max-model-len 1010000 --enable-chunked-prefill --max-num-batched-tokens 131072 "
    "--enforce-eager --max-num-seqs 1"
)
pytestmark = pytest.mark.slow


def test_the_cards_line_serves_a_million_tokens(tmp_path: Path) -> None:
    """On four CPU processes, of a model so small that its keys of so many tokens fit this machine."""
    directory = write_checkpoint(
        tmp_path / "small", 1, vocab_size=1024, hidden_size=256, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    for file in CHECKPOINT.iterdir():
        if file.name.startswith(("tokenizer", "vocab", "merges")):
            shutil.copy(file, directory)
    with running(str(directory), *CARD.split()) as command:
        command.wait_until_ready()
        client = openai.OpenAI(base_url=f"{command.url}/v1", api_key="none")
        (model,) = client.models.list().data
        assert model.id == str(directory) and model.max_model_len == 1_010_000
        answer = client.completions.create(model=model.id, prompt="Say", max_tokens=3)
        assert answer.usage.completion_tokens <= 3 and len(command.ranks()) == 4
        ranks = list(command.ranks().values())
        command.process.send_signal(signal.SIGTERM)
        assert command.end() == 0 and are_gone(ranks, 5)


def ask(command: Command, stream: bool, outcomes: list[str]) -> None:
    """What becomes of a request that would go on for long."""
    body = {"prompt": [40], "max_tokens": 3000, "ignore_eos": True, "stream": stream}
    try:
        answer = httpx.post(f"{command.url}/v1/completions", json=body, timeout=60)
        if stream:
            *_, error, done = [line for line in answer.text.splitlines() if line]
            assert done == "data: [DONE]"
            outcomes.append(str(json.loads(error[6:])["error"]["code"]))
        else:
            outcomes.append(str(answer.json()["error"]["code"]))
    except httpx.HTTPError as error:
        outcomes.append(type(error).__name__)


def test_a_rank_that_dies_while_nothing_is_asked_ends_the_server() -> None:
    with running(str(CHECKPOINT), "-tp", "2", "--max-model-len", "4K") as command:
        command.wait_until_ready()
        ranks = command.ranks()
        os.kill(ranks[1], signal.SIGKILL)
        assert are_gone(list(ranks.values()), 5) and command.end() == 1
    assert "rank 1 on " in "".join(command.lines)


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "the server"])
def test_where_one_process_is_killed_all_end_and_every_request_has_an_error(victim: str) -> None:
    with running(str(CHECKPOINT), "-tp", "2", "--max-model-len", "4K") as command:
        command.wait_until_ready()
        ranks, outcomes = command.ranks(), []
        asking = [
            threading.Thread(target=ask, args=(command, stream, outcomes)) for stream in (False, True, False, True)
        ]
        for thread in asking:
            thread.start()
        while 'vllm:generation_tokens_total{engine="0"' not in httpx.get(f"{command.url}/metrics").text:
            time.sleep(0.1)
        time.sleep(1)
        process = command.process.pid if victim == "the server" else ranks[int(victim[-1])]
        os.kill(process, signal.SIGKILL)
        killed = time.monotonic()
        assert are_gone(list(ranks.values()), 5)
        for thread in asking:
            thread.join(30)
        status = command.end()
        assert time.monotonic() - killed < 30
    if victim == "the server":
        assert status == -signal.SIGKILL and set(outcomes) == {"RemoteProtocolError"}
        return
    assert status == 1 and outcomes == ["503"] * 4
    assert f"{victim} on " in "".join(command.lines) and "SIGKILL" in "".join(command.lines)
