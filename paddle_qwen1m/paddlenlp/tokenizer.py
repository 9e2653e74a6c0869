"""The tokenizer of a checkpoint, from the files of transformers 4 or 5: Hugging Face's ids, and its chat template."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable

from paddlenlp.transformers import Qwen2Tokenizer
from paddlenlp.utils.log import logger

from paddle_qwen1m.config import read_json
from paddle_qwen1m.paddlenlp.compat import FAST_TOKENIZER, STOCK_FAST_TOKENIZER
from paddle_qwen1m.paddlenlp.hub import CHAT_TEMPLATE, TOKENIZER_CONFIG

QWEN2_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes of transformers 4 and 5 that mean what tokenizer.json says."""


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
        kind = FAST_TOKENIZER
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        kind = Qwen2Tokenizer
    else:
        raise FileNotFoundError(f"{directory} lacks vocab.json or merges.txt, which use_fast=False needs: leave it out")
    options.pop("config", None)  # AutoTokenizer takes it, a tokenizer's class does not
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
