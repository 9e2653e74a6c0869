"""What differs between Paddle 3.3 with PaddleNLP 3.0.0b4 and Paddle 2.6 with PaddleNLP 3.0.0b2, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Callable, ClassVar

import paddlenlp.transformers as transformers
from paddlenlp.utils.log import logger
from tokenizers import Tokenizer

from paddle_qwen1m.config import read_json
from paddle_qwen1m.paddlenlp.hub import CHAT_TEMPLATE, TOKENIZER_CONFIG

QWEN2_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes of transformers 4 and 5 that mean what tokenizer.json says."""
STOCK_FAST_TOKENIZER = hasattr(transformers, "Qwen2TokenizerFast")


class ExactQwen2Tokenizer(transformers.Qwen2Tokenizer):  # type: ignore[misc]
    """PaddleNLP's Qwen2 tokenizer with Hugging Face's ids: every conversion is done by the file tokenizer.json.

    For PaddleNLP 3.0.0b2, which has no fast tokenizer for Qwen2; its slow one drops white space around special tokens
    and does not know added tokens that are not special. Needs tokenizer.json beside vocab.json and merges.txt.
    """

    resource_files_names: ClassVar[dict[str, str]] = {
        **transformers.Qwen2Tokenizer.resource_files_names,
        "tokenizer_file": "tokenizer.json",
    }

    def __init__(self, vocab_file: str, merges_file: str, tokenizer_file: str | None = None, **options: Any) -> None:
        if tokenizer_file is None:
            raise FileNotFoundError(f"{Path(vocab_file).parent} has no tokenizer.json, which exact token ids need")
        self._exact = Tokenizer.from_file(tokenizer_file)
        super().__init__(vocab_file, merges_file, **options)

    def tokenize(self, text: str, **_options: Any) -> list[str]:
        return list(self._exact.encode(text, add_special_tokens=False).tokens)

    def convert_tokens_to_ids(self, tokens: str | Iterable[str] | None) -> Any:
        if tokens is None:
            return None
        return self._id(tokens) if isinstance(tokens, str) else [self._id(token) for token in tokens]

    def _id(self, token: str) -> int:
        found = self._exact.token_to_id(token)
        return int(super()._convert_token_to_id(token) if found is None else found)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **_options: Any) -> str:
        return str(self._exact.decode([int(token) for token in token_ids], skip_special_tokens=skip_special_tokens))


def load_tokenizer(stock: Callable[..., Any], directory: Path, *arguments: Any, **options: Any) -> Any:
    """The tokenizer in `directory` whose ids equal Hugging Face's; `use_fast=False` gives PaddleNLP's slow one.

    stock: AutoTokenizer.from_pretrained as PaddleNLP has it, for tokenizer classes that are not Qwen2's. The files may
    be those of transformers 4 or 5.
    """
    path = directory / TOKENIZER_CONFIG
    config = read_json(path) if path.is_file() else {}
    if "chat_template" not in options:
        options.update(_chat_template(directory, config))
    fast = options.pop("use_fast", True)
    if config.get("tokenizer_class") not in QWEN2_CLASSES:
        return stock(
            os.fspath(directory), *arguments, **options, **({"use_fast": fast} if STOCK_FAST_TOKENIZER else {})
        )
    if fast:
        kind = transformers.Qwen2TokenizerFast if STOCK_FAST_TOKENIZER else ExactQwen2Tokenizer
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        kind = transformers.Qwen2Tokenizer
    else:
        raise FileNotFoundError(f"{directory} lacks vocab.json or merges.txt, which use_fast=False needs: leave it out")
    return kind.from_pretrained(os.fspath(directory), *arguments, **options)


def _chat_template(directory: Path, config: Mapping[str, Any]) -> dict[str, str | None]:
    """The option that sets the chat template: that of chat_template.jinja, which transformers 5 writes and which counts
    first, or the config's; of several the default one. Hugging Face renders it without the line break at its end.
    """
    found = config.get("chat_template")
    others = [path.name for path in sorted(directory.glob("additional_chat_templates/*.jinja"))]
    if (directory / CHAT_TEMPLATE).is_file():
        found = (directory / CHAT_TEMPLATE).read_text(encoding="utf-8")
    elif isinstance(found, list):  # transformers 4: [{"name": ..., "template": ...}, ...]
        named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        found = named.pop("default", None)
        others += named
        if found is None:
            logger.warning(f"{directory}: no chat template is named default, so none is set")
            return {"chat_template": None}
    if others:
        logger.warning(f"{directory}: the default chat template is set, not used: {', '.join(others)}")
    if not isinstance(found, str):  # none, or PaddleNLP's own form
        return {}
    return {"chat_template": found[:-1] if found.endswith("\n") else found}
