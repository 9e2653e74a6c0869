"""Many requests of every kind at once: each gets what its options promise and what it gets alone; nothing is lost."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import mixed_requests
import numpy as np
import pytest
import resident_memory
from mixed_requests import Case, Maker, Outcome
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

import paddle_qwen1m  # noqa: F401  (importing it registers the model)
from paddle_qwen1m.engine import Engine
from paddle_qwen1m.engine.grammar import GrammarCompiler
from paddle_qwen1m.options import EngineOptions

POOL_BYTES = 10**9
SPARSE_FROM = 4096
MEGABYTE = 10**6


class Subject:
    """The needle checkpoint; with `always` its temperature is 1 at every length, so that prefixes of any serve."""

    def __init__(self, checkpoint: Path, *, always: bool) -> None:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        if always:
            config["dual_chunk_attention_config"]["original_max_position_embeddings"] = 262144
        loaded = AutoModelForCausalLM.from_pretrained(str(checkpoint), config=config)
        self.tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
        self._model, self._budgets = loaded.model, loaded.engine.budgets
        vocabulary = loaded.model.config.vocab_size
        self._grammars = GrammarCompiler(str(checkpoint / "tokenizer.json"), vocabulary, mixed_requests.EOS)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def engine(self, **options: Any) -> Engine:
        options = {"sparse_threshold": SPARSE_FROM, **options}
        return Engine(self._model, EngineOptions(**options), self._budgets, compile_grammar=self._grammars.compile)

    def serve(self, engine: Engine, cases: list[Case], at_once: int = mixed_requests.AT_ONCE) -> Outcome:
        return mixed_requests.serve(engine, cases, self.tokenizer, self.encode, at_once)


def run(subject: Subject, cases: list[Case], engine: Engine, alone: Engine) -> Outcome:
    """Serves the cases, and holds every one to its options and the greedy ones to what they get alone."""
    outcome = subject.serve(engine, cases)
    mixed_requests.check(cases, outcome)
    for case in cases:
        if case.kind.is_greedy and case.name in outcome.outputs:
            expected = subject.serve(alone, [case]).outputs[case.name]
            got = outcome.outputs[case.name]
            assert [one.token_ids for one in got.outputs] == [one.token_ids for one in expected.outputs], case.name
    return outcome


def served_engine(subject: Subject, tolerance: float) -> Engine:
    return subject.engine(
        kv_cache_memory_bytes=POOL_BYTES, enable_prefix_caching=True, prefix_temperature_tolerance=tolerance
    )


def cases_of(subject: Subject, seed: int, number: int, longest: int) -> list[Case]:
    maker = Maker(subject.encode, seed)
    made = maker.cases(number // 2, 1, SPARSE_FROM) + maker.cases(number // 2, SPARSE_FROM + 1, longest)
    return [made[place] for place in np.random.default_rng(seed).permutation(len(made))]


def test_forty_requests(needle_checkpoint: Path) -> None:
    subject = Subject(needle_checkpoint, always=True)
    engine, alone = served_engine(subject, 0.0), subject.engine()
    run(subject, cases_of(subject, 1, 40, 9000), engine, alone)
    assert engine.is_idle and engine.metrics.pages_held == 0
    assert engine.metrics.prefix_reused_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize(("always", "rounds"), [(False, 1), (True, 2)], ids=["strict", "one temperature"])
def test_two_hundred_requests(needle_checkpoint: Path, always: bool, rounds: int) -> None:
    """200 requests, in a pool that holds a few of the long ones at a time, of which nothing is left behind."""
    subject = Subject(needle_checkpoint, always=always)
    engine, alone = served_engine(subject, 0.0), subject.engine()
    resident: list[int] = []
    hits = 0
    for number in range(rounds):
        outcome = run(subject, cases_of(subject, number, 200, 30_000), engine, alone)
        hits += sum(bool(output.num_cached_tokens) for output in outcome.outputs.values())
        assert engine.is_idle and engine.metrics.pages_held == 0
        gc.collect()
        resident.append(resident_memory.resident_bytes())
    assert resident[-1] - resident[0] <= 20 * MEGABYTE
    assert not always or hits >= 60


@pytest.mark.slow
def test_ten_long_requests_with_the_usual_threshold(needle_checkpoint: Path) -> None:
    subject = Subject(needle_checkpoint, always=True)
    engine = subject.engine(kv_cache_memory_bytes=POOL_BYTES, enable_prefix_caching=True, sparse_threshold=32768)
    run(subject, Maker(subject.encode, 7).cases(10, 33_000, 60_000), engine, subject.engine(sparse_threshold=32768))
    assert engine.is_idle and engine.metrics.pages_held == 0
