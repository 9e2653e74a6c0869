"""Wraps PaddleNLP's Auto classes, which have no registry for models. The model itself is imported at the first call."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
from paddlenlp.transformers.auto.modeling import _BaseAutoModelClass


def wrap_auto_classes() -> None:
    """Make PaddleNLP's AutoModelForCausalLM and AutoTokenizer recognise Qwen2.5-1M checkpoints. Safe to call again.

    PaddleNLP maps an architecture's name to a class of its own and has no registry for models, so three of its class
    methods are wrapped. What is not ours goes on to the wrapped method as it came.
    """
    stock_load = _BaseAutoModelClass.__dict__["_from_pretrained"].__func__
    if getattr(stock_load, "_qwen1m", False):
        return
    stock_class = _BaseAutoModelClass.__dict__["_get_model_class_from_config"].__func__
    stock_tokenizer = AutoTokenizer.__dict__["from_pretrained"].__func__

    def load(cls: Any, name: Any, *arguments: Any, **options: Any) -> Any:
        from paddle_qwen1m.paddlenlp import loading
        from paddle_qwen1m.paddlenlp.causal_lm import Qwen2OneMForCausalLM

        if cls is AutoModelForCausalLM:
            checkpoint = loading.find_ours(name, cls._pretrained_model_dict, options)
            if checkpoint is not None:
                return Qwen2OneMForCausalLM.from_pretrained(checkpoint, *arguments, **options)
        return stock_load(cls, name, *arguments, **options)

    def model_class(cls: Any, name: Any, config_file: Any, config: Any = None) -> Any:
        from paddle_qwen1m.paddlenlp import loading
        from paddle_qwen1m.paddlenlp.causal_lm import Qwen2OneMForCausalLM

        if cls is AutoModelForCausalLM and config is not None and loading.is_ours(loading.config_dict(config)):
            return Qwen2OneMForCausalLM
        return stock_class(cls, name, config_file, config)

    def tokenizer(cls: Any, name: Any, *arguments: Any, **options: Any) -> Any:
        from paddle_qwen1m.paddlenlp import chat_template, compat, loading

        checkpoint = loading.find_ours(name, cls._tokenizer_mapping, options)
        if checkpoint is None:
            return stock_tokenizer(cls, name, *arguments, **options)
        checkpoint.announce()
        rest = {key: value for key, value in options.items() if key not in loading.HUB_OPTIONS}
        directory = os.fspath(checkpoint.fetch_tokenizer())
        loaded = compat.load_tokenizer(partial(stock_tokenizer, cls), directory, *arguments, **rest)
        return chat_template.honour_keywords(loaded)

    load._qwen1m = True  # type: ignore[attr-defined]
    _BaseAutoModelClass._from_pretrained = classmethod(load)
    _BaseAutoModelClass._get_model_class_from_config = classmethod(model_class)
    AutoTokenizer.from_pretrained = classmethod(tokenizer)
