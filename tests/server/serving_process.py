"""`paddle-qwen1m serve` with a fake engine in place of the model's; a prompt that ends with token 13 kills it."""

from __future__ import annotations

import sys
from typing import Any

from fake_engine import FakeEngine

from paddle_qwen1m import cli
from paddle_qwen1m.engine import Request
from paddle_qwen1m.server import command


class Mortal(FakeEngine):
    def add(self, request: Request) -> None:
        super().add(request)
        self.step_seconds = 0.1
        if request.prompt[-1] == 13:
            self.failure = RuntimeError("rank 1 has ended: killed by signal 9")


def start(_model: str, options: dict[str, Any]) -> FakeEngine:
    return Mortal(max_model_len=options["max_model_len"])


command.start_serving = start
sys.exit(cli.main())
