"""The demo: retrieval far beyond the trained length, with nothing but the positions changed.

    python tools/demo.py --out out/           the table, then a server (make demo), about three minutes on two cores
    python tools/demo.py --out out/ --long    131,072 and 262,144 tokens (make demo-long), about seven

Every cell is eight documents of four hidden access codes; one of them is asked for, its depth spread evenly over the
cell. The prompts go through AutoModelForCausalLM.from_pretrained and generate, greedy. The three rows are the same
weights with three `dual_chunk_attention_config`s. Exits with 1 when a bound that the project promises does not hold.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import demo_server
import resident_memory
from needle_documents import Document, DocumentMaker, is_answer, messages
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
from paddlenlp.utils.log import logger

import paddle_qwen1m  # noqa: F401  (importing it registers the model)
from paddle_qwen1m.evaluate.words import NAMES

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "needle"
TRAINED_LENGTH = 1024
LENGTHS = (1024, 4096, 16384)
SPARSE_LENGTH = 65536
SERVED_LENGTH = 16384
LONG_LENGTHS = (131072, 262144)
DOCUMENTS, LONG_DOCUMENTS = 8, 2
NEEDLES = 4
ANSWER_TOKENS = 24
FOUND_AT_LEAST, LOST_AT_MOST = 7, 1


@dataclass(frozen=True)
class Variant:
    """One way to give positions to the same weights: what replaces entries of `dual_chunk_attention_config`."""

    title: str
    overrides: dict[str, int]


# A chunk longer than any prompt leaves every pair of tokens at its true distance: ordinary RoPE.
PLAIN = Variant("plain RoPE", {"chunk_size": 2**22 + 256, "local_size": 256, "original_max_position_embeddings": 0})
DCA = Variant("DCA", {"original_max_position_embeddings": 0})
DCA_TEMPERATURE = Variant("DCA + temperature", {})
VARIANTS = (PLAIN, DCA, DCA_TEMPERATURE)

Table = dict[str, dict[int, int]]
"""Documents answered right, by the variant's title and the prompt's length in tokens."""


class Run(NamedTuple):
    """A question about a document and its answer. `peak`: the most bytes of this process resident meanwhile."""

    document: Document
    tokens: int
    answer: str
    right: bool
    seconds: float
    peak: int


class Reader:
    """One variant of the checkpoint, loaded."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
        self._model = AutoModelForCausalLM.from_pretrained(str(checkpoint))
        self._maker = DocumentMaker(lambda text: list(self._tokenizer(text)["input_ids"]))

    def document(self, tokens: int, seed: int) -> Document:
        """A document of about so many tokens with its question."""
        return self._maker.make(tokens, NEEDLES, seed, depth=0.5)

    def ask(self, tokens: int, seed: int, documents: int) -> Run:
        """Ask for the first code of document `seed` of `documents`; prompt and answer together fill `tokens`."""
        document = self._maker.make(tokens, NEEDLES, seed, depth=(seed + 0.5) / documents)
        needle = document.needles[0]
        text = self._tokenizer.apply_chat_template(
            messages(document, needle), tokenize=False, add_generation_prompt=True
        )
        inputs = self._tokenizer([text], return_tensors="pd")
        resident_memory.reset_peak()
        start = time.monotonic()
        generated = self._model.generate(
            **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, repetition_penalty=1.0, trunc_input=True
        )[0]
        seconds = time.monotonic() - start
        answer = self._tokenizer.batch_decode(generated, skip_special_tokens=True)[0]
        return Run(
            document=document,
            tokens=int(inputs["input_ids"].shape[1]),
            answer=answer,
            right=is_answer(answer, needle),
            seconds=seconds,
            peak=resident_memory.peak_bytes(),
        )


@contextmanager
def checkpoint_of(variant: Variant, checkpoint: Path) -> Iterator[Path]:
    """A directory like `checkpoint` with the variant's config.json; everything else is a link."""
    with tempfile.TemporaryDirectory(prefix="needle-") as name:
        directory = Path(name)
        for source in checkpoint.iterdir():
            if source.name != "config.json":
                (directory / source.name).symlink_to(source)
        config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        config["dual_chunk_attention_config"].update(variant.overrides)
        (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        yield directory


def kv_cache_bytes(checkpoint: Path, tokens: int) -> int:
    """Keys and values of one sequence, float32 as the CPU keeps them."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 4 * tokens)


def announce(step: str) -> None:
    """Says what begins now; what came of it is printed on the same line."""
    print(step, end=" ", flush=True)


def fill_table(checkpoint: Path) -> Table:
    """Every variant at every length; a dot for each document that was read."""
    table: Table = {}
    for variant in VARIANTS:
        table[variant.title] = {}
        with checkpoint_of(variant, checkpoint) as directory:
            reader = Reader(directory)
            for tokens in LENGTHS:
                announce(f"{variant.title}, {tokens:,} tokens, {DOCUMENTS} documents")
                right, start = 0, time.monotonic()
                for seed in range(DOCUMENTS):
                    right += reader.ask(tokens, seed, DOCUMENTS).right
                    print(".", end="", flush=True)
                table[variant.title][tokens] = right
                print(f" {right} right, {time.monotonic() - start:.0f} s", flush=True)
    return table


def print_table(table: Table) -> None:
    print(f"\nRetrieval, of {DOCUMENTS} documents; trained on {TRAINED_LENGTH:,} tokens\n")
    print("tokens".ljust(20) + "".join(f"{tokens:>9,}" for tokens in LENGTHS))
    for title, cells in table.items():
        print(title.ljust(20) + "".join(f"{cells[tokens]:>4} of {DOCUMENTS}" for tokens in LENGTHS))
    print()


def broken_bounds(table: Table) -> list[str]:
    """What the table should show and does not, one line each."""
    broken = []
    for title, cells in table.items():
        for tokens, right in cells.items():
            must_find = tokens == TRAINED_LENGTH or title == DCA_TEMPERATURE.title
            must_lose = tokens > TRAINED_LENGTH and title == PLAIN.title
            if must_find and right < FOUND_AT_LEAST:
                broken.append(f"{title} found {right} at {tokens:,} tokens, expected at least {FOUND_AT_LEAST}")
            if must_lose and right > LOST_AT_MOST:
                broken.append(f"{title} found {right} at {tokens:,} tokens, expected at most {LOST_AT_MOST}")
    return broken


def draw(table: Table, path: Path) -> None:
    """Writes the table as a picture (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [[row[tokens] for tokens in LENGTHS] for row in table.values()]
    figure, axes = pyplot.subplots(figsize=(7.0, 3.0), layout="constrained")
    axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=DOCUMENTS, aspect="auto", alpha=0.6)
    axes.set_xticks(range(len(LENGTHS)), [f"{tokens:,}" for tokens in LENGTHS])
    axes.set_yticks(range(len(table)), list(table))
    axes.set_xlabel(f"tokens (trained on {TRAINED_LENGTH:,})")
    figure.suptitle(
        f"Hidden codes found, of {DOCUMENTS} documents: the same weights, three kinds of positions", size=11
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, values in enumerate(cells):
        for column, right in enumerate(values):
            axes.text(column, row, f"{right} of {DOCUMENTS}", ha="center", va="center", size=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def describe(run: Run, checkpoint: Path) -> str:
    cache = kv_cache_bytes(checkpoint, run.tokens)
    return (
        f"{'right' if run.right else 'WRONG'} ({run.answer!r}), {run.seconds:.1f} s, "
        f"{run.peak / 1e6:,.0f} MB resident at the peak, of it {cache / 1e6:,.0f} MB of KV cache"
    )


def show_question(run: Run) -> None:
    """What was asked, the place of the document that answers it, and the answer."""
    needle, sentences = run.document.needles[0], run.document.sentences
    place = sentences.index(needle.sentence)
    print(f"\nIts sentences {place - 1:,} to {place + 3:,} of {len(sentences):,}:")
    print(f"    ... {' '.join(sentences[max(0, place - 2) : place + 3])} ...")
    print(f"Question: {needle.question}\nAnswer:   {run.answer.strip()}")


def show_next(checkpoint: Path, document: Path, question: str) -> None:
    """What to try now."""
    print(f"""
Next, the same question from a shell; set-up is in .venv, which has to be activated:
    . .venv/bin/activate
    paddle-qwen1m generate --model {checkpoint} --prompt-file {document} --greedy \\
        --question "{question}"
    paddle-qwen1m serve {checkpoint}    # then http://127.0.0.1:8000 has a page to ask documents, /v1 OpenAI's interface
Or ask a text of your own: this checkpoint of 9M parameters finds the sentence "The access code for NAME is 12345." in
it, and nothing else; NAME is one of
{textwrap.fill(", ".join(NAMES), 116, initial_indent="    ", subsequent_indent="    ")}
Qwen2.5-7B/14B-Instruct-1M answer anything, with --model DIR or a hub name: see README.md.""")


def demo(checkpoint: Path, out: Path) -> int:
    print(
        "Three kinds of positions, nine steps, then a long document and a server: about three minutes on two cores.\n"
    )
    table = fill_table(checkpoint)
    print_table(table)
    broken = broken_bounds(table)
    announce(f"{DCA_TEMPERATURE.title}, one document of {SPARSE_LENGTH:,} tokens, sparse prefill:")
    reader = Reader(checkpoint)
    run = reader.ask(SPARSE_LENGTH, seed=0, documents=1)
    print(describe(run, checkpoint))
    show_question(run)
    if not run.right:
        broken.append(f"the document of {SPARSE_LENGTH:,} tokens was answered wrong: {run.answer!r}")
    broken += demo_server.show(checkpoint, reader.document(SERVED_LENGTH, seed=1))
    for line in broken:
        print(f"FAILED: {line}")
    picture = out / "retrieval.png"
    draw(table, picture)
    document = out / "document.txt"
    document.write_text(run.document.text, encoding="utf-8")
    print(f"\nPicture of the table: {picture}. The document: {document}")
    show_next(nearby(checkpoint), document, run.document.needles[0].question)
    return 1 if broken else 0


def nearby(path: Path) -> Path:
    """The path as it is written from the directory that this was started in, where it lies in that."""
    here = Path.cwd()
    return path.relative_to(here) if here in path.parents else path


def demo_long(checkpoint: Path) -> int:
    reader = Reader(checkpoint)
    holds, beyond = SPARSE_LENGTH, ""
    for tokens in LONG_LENGTHS:
        right = 0
        for seed in range(LONG_DOCUMENTS):
            announce(f"{DCA_TEMPERATURE.title}, {tokens:,} tokens, sparse, document {seed + 1} of {LONG_DOCUMENTS}:")
            run = reader.ask(tokens, seed, LONG_DOCUMENTS)
            print(describe(run, checkpoint), flush=True)
            right += run.right
        if right == LONG_DOCUMENTS and not beyond:
            holds = tokens
        else:
            beyond += f"; at {tokens:,} it finds {right} of {LONG_DOCUMENTS}"
    if beyond:
        print(f"Retrieval is whole up to {holds:,} tokens{beyond}.")
    else:
        print(f"Retrieval did not stop within {holds:,} tokens, {holds // TRAINED_LENGTH} times the trained length.")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes (default: %(default)s)")
    parser.add_argument("--long", action="store_true", help="131,072 and 262,144 tokens instead of the table")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the one of the repository")
    arguments = parser.parse_args()
    logger.set_level("ERROR")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    start = time.monotonic()
    checkpoint = arguments.checkpoint.resolve()
    status = demo_long(checkpoint) if arguments.long else demo(checkpoint, arguments.out)
    print(f"Demo time: {time.monotonic() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
