"""Makes PaddleNLP know the model: each of its modules that decides about one is wrapped as soon as it has run.

PaddleNLP has no registry for models. It is not imported here, and the model only at the first call. The import hook
stays for as long as the process lives, so that a failed import, a reload or a second copy of a module changes nothing.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial, wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from paddle_qwen1m.config_keys import DUAL_CHUNK

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType


def install() -> None:
    """Wrap what is wrapped of PaddleNLP, now where it has been imported, else when it will be. Safe to call again."""
    sys.meta_path[:] = [_Finder(), *(finder for finder in sys.meta_path if not getattr(finder, "is_qwen1m", False))]
    if _is_running("paddlenlp"):
        with suppress(Exception):  # which that thread sees
            import_module("paddlenlp")  # waits for another thread that imports it, and that may have passed the hook
    for name, wrap in WRAPPED.items():
        if sys.modules.get(name) is not None and not _is_running(name):
            wrap(sys.modules[name])


def _is_running(name: str) -> bool:
    """Whether the module is being imported."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def _wrap_auto_models(module: ModuleType) -> None:
    """AutoModelForCausalLM loads our checkpoints by our class; what is not ours goes on as it came."""
    auto, ours_alone = module._BaseAutoModelClass, module.AutoModelForCausalLM
    stock_load = auto.__dict__["_from_pretrained"].__func__
    if getattr(stock_load, "is_qwen1m", False):
        return
    stock_class = auto.__dict__["_get_model_class_from_config"].__func__

    def load(cls: Any, name: Any, *arguments: Any, **options: Any) -> Any:
        from paddle_qwen1m.paddlenlp import loading
        from paddle_qwen1m.paddlenlp.causal_lm import Qwen2OneMForCausalLM

        if cls is ours_alone:
            checkpoint = loading.find_ours(name, cls._pretrained_model_dict, options)
            if checkpoint is not None:
                return Qwen2OneMForCausalLM.from_pretrained(checkpoint, *arguments, **options)
        return stock_load(cls, name, *arguments, **options)

    def model_class(cls: Any, name: Any, config_file: Any, config: Any = None) -> Any:
        from paddle_qwen1m.paddlenlp import loading
        from paddle_qwen1m.paddlenlp.causal_lm import Qwen2OneMForCausalLM

        if cls is ours_alone and config is not None and loading.is_ours(loading.config_dict(config)):
            return Qwen2OneMForCausalLM
        return stock_class(cls, name, config_file, config)

    load.is_qwen1m = True  # type: ignore[attr-defined]
    auto._from_pretrained = classmethod(load)
    auto._get_model_class_from_config = classmethod(model_class)


def _wrap_auto_tokenizer(module: ModuleType) -> None:
    """AutoTokenizer gives our checkpoints the tokenizer with Hugging Face's ids."""
    auto = module.AutoTokenizer
    stock = auto.__dict__["from_pretrained"].__func__
    if getattr(stock, "is_qwen1m", False):
        return

    @wraps(stock)
    def tokenizer(cls: Any, name: Any, *arguments: Any, **options: Any) -> Any:
        from paddle_qwen1m.paddlenlp import chat_template, loading
        from paddle_qwen1m.paddlenlp.tokenizer import load_tokenizer

        checkpoint = loading.find_ours(name, cls._tokenizer_mapping, options, weights=False)
        if checkpoint is None:
            return stock(cls, name, *arguments, **options)
        checkpoint.announce()
        rest = {key: value for key, value in options.items() if key not in loading.HUB_OPTIONS}
        loaded = load_tokenizer(partial(stock, cls), checkpoint.fetch_tokenizer(), *arguments, **rest)
        return chat_template.honour_keywords(loaded)

    tokenizer.is_qwen1m = True  # type: ignore[attr-defined]
    auto.from_pretrained = classmethod(tokenizer)


def _guard(class_name: str, module: ModuleType) -> None:
    """What is built on PaddleNLP's own Qwen2 refuses a config whose dual chunk attention it would ignore."""
    model = getattr(module, class_name)
    stock_init, stock_load = model.__init__, model.from_pretrained.__func__
    if getattr(stock_init, "is_qwen1m", False):
        return

    @wraps(stock_init)
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        for argument in (*arguments, *options.values()):
            _refuse_dual_chunk(type(self), getattr(argument, DUAL_CHUNK, None))
        stock_init(self, *arguments, **options)

    @wraps(stock_load)
    def load(cls: Any, name: Any, *arguments: Any, **options: Any) -> Any:
        """Refuses before anything is read or converted, where the config lies at hand."""
        from paddle_qwen1m.config import read_json

        path = Path(name) / "config.json" if isinstance(name, (str, os.PathLike)) else None
        if options.get("config") is None and path is not None and path.is_file():
            _refuse_dual_chunk(cls, read_json(path).get(DUAL_CHUNK))
        return stock_load(cls, name, *arguments, **options)

    init.is_qwen1m = True  # type: ignore[attr-defined]
    model.__init__ = init
    model.from_pretrained = classmethod(load)


def _refuse_dual_chunk(model: type, dual_chunk: Any) -> None:
    if dual_chunk is not None:
        raise ValueError(
            f"PaddleNLP's {model.__name__} would ignore the {DUAL_CHUNK} of its config and compute plain RoPE: use "
            "AutoModelForCausalLM or paddle_qwen1m.Qwen2OneMForCausalLM. Where plain RoPE is meant, set "
            f"config.{DUAL_CHUNK} = None and give that config"
        )


WRAPPED: dict[str, Callable[[ModuleType], None]] = {
    "paddlenlp.transformers.auto.modeling": _wrap_auto_models,
    "paddlenlp.transformers.auto.tokenizer": _wrap_auto_tokenizer,
    "paddlenlp.transformers.qwen2.modeling": partial(_guard, "Qwen2PretrainedModel"),
    "paddlenlp.transformers.qwen2.modeling_pp": partial(_guard, "Qwen2ForCausalLMPipe"),
}


class _WrappingLoader(Loader):
    """Loads a module as `loader` does, then wraps what is in it."""

    def __init__(self, loader: Loader, wrap: Callable[[ModuleType], None]) -> None:
        self.loader, self.wrap = loader, wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.wrap(module)


class _Finder(MetaPathFinder):
    """Finds the modules in WRAPPED where the finders behind it do, and has them loaded by a _WrappingLoader."""

    is_qwen1m = True

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        wrap = WRAPPED.get(name)
        if wrap is None:
            return None
        for finder in sys.meta_path:
            find = None if getattr(finder, "is_qwen1m", False) else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _WrappingLoader(spec.loader, wrap)
                return spec
        return None
