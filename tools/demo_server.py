"""The end of the demo: a server is started on a checkpoint, asked over HTTP, again from the cache, and stopped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from needle_documents import Document, is_answer, messages

START_SECONDS, END_SECONDS = 120, 60


@contextmanager
def serving(checkpoint: Path | str, *flags: str) -> Iterator[str]:
    """Runs `paddle-qwen1m serve` on a free port; yields where, once it is ready. RuntimeError if it does not start.

    What it has said goes to stderr where something fails.
    """
    command = [sys.executable, "-W", "ignore", "-m", "paddle_qwen1m", "serve", str(checkpoint), "--port", "0", *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            yield _when_ready(process, log)
            process.terminate()
            status = process.wait(END_SECONDS)
            if status:
                raise RuntimeError(f"the server ended with exit status {status}")
        except BaseException:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            log.seek(0)
            sys.stderr.write(log.read())
            raise
        finally:
            process.kill()
            process.wait()


def _when_ready(process: subprocess.Popen[bytes], log: Any) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        log.seek(0)
        found = re.search(r"running on (http://[\d.:]+)", log.read())
        if found is not None:
            try:
                with urlopen(f"{found[1]}/health"):
                    return found[1]
            except OSError:  # it is loading
                pass
    raise RuntimeError("the server did not start")


def ask(url: str, document: Document, number: int) -> tuple[str, dict[str, Any]]:
    """The answer to the document's `number`-th question as it streams, printed with its progress; and the usage."""
    body = {
        "messages": messages(document, document.needles[number]),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "temperature": 0,
        "max_tokens": 24,
    }
    request = Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    text, usage, shares = "", {}, []
    with urlopen(request, timeout=600) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "prompt_progress" in event:
                told = event["prompt_progress"]
                share = 100 * told["processed"] // told["total"]
                if share // 25 > len(shares):
                    shares.append(share)
                    print(f"{share} %", end=" ", flush=True)
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            usage = event.get("usage") or usage
    return text.strip(), usage


def show(checkpoint: Path, document: Document) -> list[str]:
    """Asks a server two questions about a document; what was not as it should be, one line each."""
    broken = []
    print("\nThe server: paddle-qwen1m serve, starting ...", end=" ", flush=True)
    with serving(checkpoint, "--max-model-len", "32K", "--kv-cache-memory-bytes", "600000000") as url:
        print(f"it listens on {url}", flush=True)
        for number in (0, 1):
            needle, start = document.needles[number], time.monotonic()
            print(f"POST /v1/chat/completions, {needle.question!r}:", end=" ", flush=True)
            answer, usage = ask(url, document, number)
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            print(
                f"{answer!r}, {time.monotonic() - start:.1f} s, {usage['prompt_tokens']:,} tokens read, {cached:,} of "
                "them from the cache",
                flush=True,
            )
            if not is_answer(answer, needle):
                broken.append(f"the server answered wrong: {answer!r}")
            if number and not cached:
                broken.append("the server's second answer read nothing from the cache")
        print("SIGTERM:", end=" ", flush=True)
    print("it has ended", flush=True)
    return broken
