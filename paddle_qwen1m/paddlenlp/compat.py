"""What differs between Paddle 3.3 with PaddleNLP 3.0.0b4 and Paddle 2.6 with PaddleNLP 3.0.0b2, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import paddlenlp.transformers as transformers
from tokenizers import Tokenizer

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


FAST_TOKENIZER: Any = transformers.Qwen2TokenizerFast if STOCK_FAST_TOKENIZER else ExactQwen2Tokenizer
