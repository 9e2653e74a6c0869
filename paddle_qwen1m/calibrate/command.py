"""`paddle-qwen1m calibrate`: reads what the flags name, takes the texts through the layers, writes the budgets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.cache import PagedCache, choose_page_size
from paddle_qwen1m.calibrate import results
from paddle_qwen1m.calibrate.flags import MODEL_OPTIONS
from paddle_qwen1m.calibrate.reading import Layer, Text
from paddle_qwen1m.calibrate.results import Measured
from paddle_qwen1m.calibrate.strategies import STRATEGIES, Goal, Pairs
from paddle_qwen1m.calibrate.stream import WeightStream
from paddle_qwen1m.config import LOCAL_DIAGONALS, SINK_COLUMNS, SparseBudgets
from paddle_qwen1m.options import default_batched_tokens
from paddle_qwen1m.paddlenlp import serving
from paddle_qwen1m.progress import Progress
from paddle_qwen1m.streams import InputError, file_argument, name_argument, read_document, say, shown

FORCED_ALONE = SINK_COLUMNS + 1, LOCAL_DIAGONALS
"""Columns and diagonals of a model without budgets, for the comparison: exactly 30 columns would be raised."""


def calibrate(arguments: argparse.Namespace) -> int:
    """Finds budgets for every layer; 0. InputError for what cannot be used."""
    name_argument("MODEL", arguments.model)
    out = Path(file_argument("--out", arguments.out))
    options = {name: getattr(arguments, name) for name in MODEL_OPTIONS if getattr(arguments, name) is not None}
    try:
        goal = Goal(arguments.recall, arguments.cost)
        opened = serving.open_weights(arguments.model, options)
        tokenizer = serving.load_tokenizer(arguments.model, options)
        texts = [_ids(name, tokenizer, arguments.tokens, opened) for name in arguments.text]
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError) as error:
        raise InputError(str(error)) from error
    given = _given(arguments, opened, texts, goal)
    progress = results.Progress(out, given)
    with paddle.no_grad():
        _run(arguments, opened, texts, goal, progress)
    chosen = STRATEGIES[arguments.strategy].choose([layer.candidates for layer in progress.layers], goal)
    report = results.write(out, given, [layer.chosen(which) for layer, which in zip(progress.layers, chosen)])
    progress.end()
    say(report.partition("\n\n| layer.head")[0])
    say(f"\n{shown(str(out))}")
    return 0


def _run(
    arguments: argparse.Namespace,
    opened: serving.Opened,
    ids: Sequence[npt.NDArray[np.int64]],
    goal: Goal,
    progress: results.Progress,
) -> None:
    config = opened.config
    stream = WeightStream(opened.directory, config, opened.dtype)
    residuals = progress.texts(config.hidden_size) or stream.embed(ids)
    texts = [Text(*pair) for pair in zip(ids, residuals)]
    page_size = choose_page_size(config.dual_chunk.chunk_len, None)
    pages = max(-(-len(one) // page_size) for one in ids)
    cache = PagedCache(replace(config, num_layers=1), pages, page_size, stream.compute_dtype)
    before = _before(opened)
    tokens, left = sum(map(len, ids)), config.num_layers - len(progress.layers)
    title = f"Calibrating, layers {len(progress.layers)} to {config.num_layers - 1}"
    with Progress(title, tokens * left) as bar:
        for number in range(len(progress.layers), config.num_layers):
            tell = partial(_tell, bar, number, count(1))
            layer = Layer(stream.layer(number), config, texts, cache, _chunk(arguments), tell)
            candidates = STRATEGIES[arguments.strategy].candidates(layer.measure, config.num_heads, goal)
            old = Pairs(before.vertical[number].astype(np.int64), before.slash[number].astype(np.int64))
            found = Measured.of(candidates, *layer.measure(old, change=True))
            for done in layer.advance():
                bar.update(done)
            progress.add(found, [text.residual for text in texts])


def _tell(bar: Progress, layer: int, measured: Iterator[int]) -> None:
    bar.note(f"layer {layer}, {next(measured)} pairs measured")


def _ids(name: str, tokenizer: Any, tokens: int | None, opened: serving.Opened) -> npt.NDArray[np.int64]:
    """Of a text's first tokens. InputError where it has fewer than asked for, or too few or too many for the model."""
    ids = np.asarray(tokenizer(read_document(name, "--text"), verbose=False)["input_ids"], np.int64)
    count, longest = len(ids), opened.config.max_position_embeddings
    wanted = count if tokens is None else tokens
    title = "standard input" if name == "-" else shown(name)
    if count < wanted:
        raise InputError(f"--text: {title} has {count:,} tokens, fewer than --tokens {wanted:,}")
    if wanted <= opened.sparse_threshold:
        raise InputError(
            f"--text: {wanted:,} tokens of {title} are too few: prompts of up to {opened.sparse_threshold:,} are "
            "prefilled densely; give a longer text, or the --sparse-threshold that the model will be used with"
        )
    if wanted > longest:
        raise InputError(
            f"--text: {title} has {wanted:,} tokens, more than the model can have, max_position_embeddings "
            f"{longest:,}: give --tokens"
        )
    return ids[:wanted]


def _given(
    arguments: argparse.Namespace, opened: serving.Opened, texts: Sequence[npt.NDArray[np.int64]], goal: Goal
) -> dict[str, Any]:
    """All that budgets depend on."""
    return {
        "model": arguments.model,
        "weights": opened.weights,
        "texts": [{"tokens": len(one), "sha256": sha256(one.tobytes()).hexdigest()} for one in texts],
        "strategy": arguments.strategy,
        **asdict(goal),
        "dtype": opened.dtype,
        "max_num_batched_tokens": _chunk(arguments),
        "before": opened.budgets_source if opened.budgets is not None else "what is visited in any case",
        "device": "gpu" if ops.on_gpu() else "cpu",
    }


def _before(opened: serving.Opened) -> SparseBudgets:
    shape = opened.config.num_layers, opened.config.num_heads
    return opened.budgets or SparseBudgets.uniform(*FORCED_ALONE, *shape)


def _chunk(arguments: argparse.Namespace) -> int:
    return arguments.max_num_batched_tokens or default_batched_tokens(ops.on_gpu())
