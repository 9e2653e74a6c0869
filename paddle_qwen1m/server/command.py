"""`paddle-qwen1m serve`: reads what a checkpoint says of itself, then listens while the engine loads, until its end."""

from __future__ import annotations

import argparse
import contextlib
import resource
import signal
from pathlib import Path
from typing import Any

import uvicorn
from paddlenlp.transformers import AutoTokenizer  # noqa: F401  (takes off signal handlers that it finds: before uvicorn)

from paddle_qwen1m.config import read_json
from paddle_qwen1m.llm import start_serving
from paddle_qwen1m.options import read_llm_options
from paddle_qwen1m.paddlenlp import serving
from paddle_qwen1m.paddlenlp.hub import TOKENIZER_CONFIG
from paddle_qwen1m.paddlenlp.loading import find_checkpoint
from paddle_qwen1m.server.app import ServedModel, create_app
from paddle_qwen1m.server.connections import protocol
from paddle_qwen1m.server.engine_thread import EngineThread
from paddle_qwen1m.server.flags import model_options, settings_of
from paddle_qwen1m.server.security import exposure
from paddle_qwen1m.server.texts import Texts
from paddle_qwen1m.streams import InputError, note

KEEP_ALIVE_SECONDS = 75
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": "INFO", "propagate": False} for name in ("uvicorn", "paddle_qwen1m")
    },
}
"""Loggers of their own: what a library has made of the root logger does not hide where the server listens."""


def serve(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C; 1 when the engine has failed. InputError for what cannot be used."""
    settings = settings_of(arguments)
    try:
        options = read_llm_options(model_options(arguments))
        model = _served(arguments, options)
        for name in ("tokenizer", "generation_config", "seed"):
            options.pop(name, None)
        engine = EngineThread(lambda: start_serving(arguments.model, options), lambda error: _failed(server, error))
        app = create_app(engine, model, settings)
    except (FileNotFoundError, NotADirectoryError, PermissionError, TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    for line in exposure(settings):
        note(line)
    _allow_many_connections()
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, http=protocol(settings.header_seconds), ws="none", lifespan="on",
        log_config=LOGGING, access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )  # fmt: skip
    server = uvicorn.Server(config)
    # uvicorn raises the signal that ended it once more, when all is done.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: None)
    server.run()
    return 1 if engine.error is not None else 0


def _failed(server: uvicorn.Server, error: Exception) -> None:
    note(f"error: the engine has failed: {error}")
    server.should_exit = True


def _served(arguments: argparse.Namespace, options: dict[str, Any]) -> ServedModel:
    """What the server knows of the model without loading it."""
    checked = serving.check(arguments.model, options)
    checkpoint = find_checkpoint(arguments.model, dict(options))
    other = options.get("tokenizer")
    tokenizer = serving.load_tokenizer(other or arguments.model, {} if other else options)
    path = checkpoint.extra_file(TOKENIZER_CONFIG)
    config = {} if path is None else read_json(path)
    if arguments.chat_template is not None:
        config["chat_template"] = Path(arguments.chat_template).read_text(encoding="utf-8")
        tokenizer.init_chat_template(config["chat_template"])
    return ServedModel(
        names=tuple(arguments.served_model_name or [arguments.model]),
        root=arguments.model,
        texts=Texts(tokenizer, config),
        defaults=checked.defaults if options.get("generation_config", "auto") == "auto" else {},
        eos_token_ids=checked.eos_token_ids,
    )


def _allow_many_connections() -> None:
    """As many open files as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
