"""How the ranks of a job work on the same requests: rank 0 leads, the others follow what it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Callable

import numpy as np

from paddle_qwen1m.engine import Completion, Engine, PrefillProgress, SamplingParams


class Leader:
    """Rank 0's face of an engine that is spread over ranks: every call runs on all of them."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._share = engine, engine.model.group.share

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        params: Sequence[SamplingParams],
        *,
        on_token: Callable[[int, int], None] | None = None,
        on_prefill: Callable[[PrefillProgress], None] | None = None,
    ) -> list[Completion]:
        """As Engine.generate, with params for each prompt."""
        self._share({"prompts": [prompt.tolist() for prompt in prompts], "params": [asdict(one) for one in params]})
        return self._engine.generate(prompts, params, on_token=on_token, on_prefill=on_prefill)

    def close(self) -> None:
        """Lets the others go."""
        self._share(None)


def follow(engine: Engine) -> None:
    """Runs on this rank what its leader asks for, until that closes."""
    share = engine.model.group.share
    request: Any = share(None)
    while request is not None:
        prompts = [np.asarray(prompt, np.int64) for prompt in request["prompts"]]
        engine.generate(prompts, [_params(values) for values in request["params"]])
        request = share(None)


def _params(values: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**values)
