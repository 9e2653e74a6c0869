"""The needle checkpoint as it is, or a copy whose temperature is 1 at every length, and engines on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixed_requests
from mixed_requests import Case, Outcome
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

import paddle_qwen1m  # noqa: F401  (importing it registers the model)
from paddle_qwen1m.engine import Engine
from paddle_qwen1m.engine.grammar import GrammarCompiler
from paddle_qwen1m.options import EngineOptions

ONE_TEMPERATURE_UP_TO = 262144


class Subject:
    """A loaded checkpoint. always: m is 1 up to ONE_TEMPERATURE_UP_TO tokens, so that prefixes serve at any length."""

    def __init__(self, checkpoint: Path, *, always: bool) -> None:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        if always:
            config["dual_chunk_attention_config"]["original_max_position_embeddings"] = ONE_TEMPERATURE_UP_TO
        loaded = AutoModelForCausalLM.from_pretrained(str(checkpoint), config=config)
        self.tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
        self.model, self._budgets = loaded.model, loaded.engine.budgets
        vocabulary = loaded.model.config.vocab_size
        self._grammars = GrammarCompiler(str(checkpoint / "tokenizer.json"), vocabulary, mixed_requests.EOS)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def engine(self, **options: Any) -> Engine:
        return Engine(self.model, EngineOptions(**options), self._budgets, compile_grammar=self._grammars.compile)

    def serve(self, engine: Engine, cases: list[Case], at_once: int = mixed_requests.AT_ONCE) -> Outcome:
        return mixed_requests.serve(engine, cases, self.tokenizer, self.encode, at_once)
