"""Documents are read once in their life: other processes, of the command and of LLM, go on from what is kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from needle_documents import DocumentMaker, is_answer, prompt_head, prompt_tail
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

import paddle_qwen1m  # noqa: F401  (importing it registers the model)
from paddle_qwen1m import LLM, SamplingParams, cli

ROOT = Path(__file__).resolve().parent.parent
NEEDLE = ROOT / "checkpoints" / "needle"
FILLER = "The river bends past the old mill and on toward the sea. The council met twice and agreed on nothing. "
CODES = {"quartz": "54704", "jade": "64931", "ruby": "20518"}
GREEDY = SamplingParams(temperature=0, max_tokens=24)
LIMITS: dict[str, Any] = {"max_model_len": 4096, "kv_cache_memory_bytes": 200_000_000}


def sentence(name: str) -> str:
    return f"The access code for {name} is {CODES[name]}."


def question(name: str) -> str:
    return f"What is the access code for {name}?"


@pytest.fixture(scope="module")
def document() -> str:
    """About 2,000 tokens."""
    return "".join(FILLER * 25 + sentence(name) + " " for name in CODES) + FILLER


def generate(document: Path, *options: object, folder: Path | None = None) -> list[dict[str, Any]]:
    """What a process of the command reports."""
    command = [sys.executable, "-m", "paddle_qwen1m", "generate", "--model", NEEDLE, "--prompt-file", document]
    kept = [] if folder is None else ["--prefix-store", folder]
    done = subprocess.run(
        [*map(str, [*command, "--json", "--greedy", *kept, *options])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def store(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> list[str]:
    capsys.readouterr()
    assert cli.main(["store", *map(str, arguments)]) == status
    return capsys.readouterr().out.splitlines()


def test_a_second_process_of_the_command_goes_on_from_the_first(
    document: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = tmp_path / "document.txt", tmp_path / "store"
    text.write_text(document, encoding="utf-8")
    least = ("--prefix-store-min-tokens", 512)
    (first,) = generate(text, "--question", question("jade"), *least, folder=folder)
    assert (first["text"], first["stored_tokens"]) == (sentence("jade"), 0)
    second, third = generate(
        text, *("--question", question("ruby"), "--question", question("quartz")), *least, folder=folder
    )
    assert (second["text"], third["text"]) == (sentence("ruby"), sentence("quartz"))
    prompt = second["prompt_tokens"]
    assert second["stored_tokens"] % 512 == 0 and prompt - 600 < second["stored_tokens"] < prompt
    assert third["stored_tokens"] == 0 and third["cached_tokens"] >= second["stored_tokens"]

    lines = store(capsys, "list", folder)
    listed = re.fullmatch(
        r"[0-9a-f]{12}  +([\d,]+) tokens  dense  float32  weights [0-9a-f]{12}  ranks 1  (\d+) files  ([\d,]+) bytes  "
        r"used \d{4}-\d\d-\d\d \d\d:\d\d",
        lines[0],
    )
    assert listed is not None and int(listed[1].replace(",", "")) >= second["stored_tokens"], lines
    assert lines[1:] == [f"{folder}: 1 documents, {listed[3]} bytes"]
    files = sorted(folder.glob("*/*"))
    size = sum(file.stat().st_size for file in files)
    assert len(files) == int(listed[2]) and f"{size:,}" == listed[3]
    assert store(capsys, "verify", folder) == [f"{folder}: {len(files)} files, {size:,} bytes, 0 cannot be used"]
    damaged = files[0].read_bytes()
    files[0].write_bytes(damaged[:100_000] + b"\0\1\2\3" + damaged[100_004:])
    assert store(capsys, "verify", folder, status=1)[0].startswith(f"{files[0]}: block 0 of ")
    assert store(capsys, "prune", folder, "--size", "1") == [f"{folder}: {len(files)} files removed, {size:,} bytes"]
    assert store(capsys, "list", folder) == [f"{folder}: 0 documents, 0 bytes"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["prune", "FOLDER"], "--size says how many bytes may stay"),
        (["list", "FOLDER", "--size", "1GB"], "--size says how many bytes may stay"),
        (["list", "FOLDER/nothing"], "FOLDER/nothing is no folder"),
        (["verify", "OPEN"], "OPEN belongs to user .* chmod 700 OPEN"),
    ],
)
def test_what_the_command_store_cannot_do_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    folder, open_to_all = tmp_path / "folder", tmp_path / "open"
    folder.mkdir(0o700)
    open_to_all.mkdir(0o755)
    (open_to_all / "file").touch()
    names = [word.replace("FOLDER", str(folder)).replace("OPEN", str(open_to_all)) for word in arguments]
    assert cli.main(["store", *names]) == 2
    wanted = reason.replace("FOLDER", str(folder)).replace("OPEN", str(open_to_all))
    assert re.search(f"^error: .*{wanted}", capsys.readouterr().err)


def test_from_pretrained_keeps_and_finds(document: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(NEEDLE))

    def answer(name: str) -> tuple[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(
            str(NEEDLE), prefix_store=tmp_path / "store", prefix_store_size="1GB", prefix_store_min_tokens=512
        )
        messages = [{"role": "user", "content": f"{document}\n{question(name)}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer([text], return_tensors="pd")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
        model.engine.finish_writes()
        return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True), model.engine.metrics

    assert answer("jade")[0] == sentence("jade")
    text, metrics = answer("ruby")  # as long a question: m is the same, and from_pretrained's tolerance is 0
    assert text == sentence("ruby") and metrics.store_tokens > 1024


def llm(folder: Path, ranks: int, name: str, document: str) -> tuple[str, Any]:
    """What a new LLM answers, and its metrics."""
    options = {"prefix_store": folder, "prefix_store_min_tokens": 512, "tensor_parallel_size": ranks, **LIMITS}
    with LLM(str(NEEDLE), **options) as one:
        messages = [{"role": "user", "content": f"{document}\n{question(name)}"}]
        (output,) = one.chat(messages, GREEDY, use_tqdm=False)
        return output.outputs[0].text, one.get_metrics()


@pytest.mark.slow
def test_two_ranks_find_what_both_have_kept_and_no_other_number_does(
    document: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "store"
    text, metrics = llm(folder, 2, "jade", document)
    assert (text, metrics.store_hits) == (sentence("jade"), 0)
    files = sorted(folder.glob("*/*"))
    assert {file.name.rpartition(".kv")[0].rpartition(".")[2] for file in files} == {"0of2", "1of2"}

    text, metrics = llm(folder, 2, "ruby", document)
    kept = metrics.store_tokens
    assert text == sentence("ruby") and kept >= 1024

    text, metrics = llm(folder, 1, "jade", document)
    assert (text, metrics.store_hits) == (sentence("jade"), 0)
    assert "was made differently: tensor parallel ranks 2, here 1" in caplog.text

    segments = sorted({file.name.partition(".")[0] for file in files})
    lacking = [file for file in files if file.name.startswith(segments[0]) and file.name.endswith(".1of2.kv")]
    lacking[0].unlink()
    text, metrics = llm(folder, 2, "ruby", document)
    assert text == sentence("ruby") and metrics.store_tokens < kept, "what one rank lacks, all compute"
    assert lacking[0].exists(), "it is kept again"
    text, metrics = llm(folder, 2, "jade", document)
    assert (text, metrics.store_tokens) == (sentence("jade"), kept)


@pytest.mark.parametrize(
    "sparse",
    [pytest.param(False, id="dense", marks=pytest.mark.soak), pytest.param(True, id="sparse", marks=pytest.mark.slow)],
)
def test_another_process_asks_a_document_of_60_000_tokens(
    tmp_path: Path, sparse: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words are those of a process without a store, and the first one comes ten times sooner than cold."""
    tokenizer = AutoTokenizer.from_pretrained(str(NEEDLE))
    maker = DocumentMaker(lambda text: list(tokenizer(text)["input_ids"]))
    made = maker.make(60_000, 4, 0)
    text, folder = tmp_path / "document.txt", tmp_path / "store"
    text.write_text(prompt_head() + made.text, encoding="utf-8")
    mode = ["--raw"] if sparse else ["--raw", "--no-sparse"]
    asked = [prompt_tail(needle).lstrip("\n") for needle in made.needles[:2]]
    (first,) = generate(text, "--question", asked[0], *mode, folder=folder)
    (second,) = generate(text, "--question", asked[1], *mode, folder=folder)
    (cold,) = generate(text, "--question", asked[1], *mode)
    assert second["text"] == cold["text"] and first["stored_tokens"] == cold["stored_tokens"] == 0
    assert is_answer(second["text"], made.needles[1]) and second["sparse"] == sparse
    sooner = cold["prefill_seconds"] / second["prefill_seconds"]
    with capsys.disabled():
        print(
            f"\n{cold['prompt_tokens']:,} tokens, {'sparse' if sparse else 'dense'}: {cold['prefill_seconds']:.2f} s "
            f"cold, {second['prefill_seconds']:.2f} s in another process, {sooner:.1f} times sooner; "
            f"{second['stored_tokens']:,} tokens from the store"
        )
    assert sooner >= (1 if sparse else 10)
