"""Who is asked: a model that this package loads, in this process, or whoever answers OpenAI's completions over HTTP."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from paddle_qwen1m.config import LOCAL_DIAGONALS, SINK_COLUMNS, SparseBudgets, read_json
from paddle_qwen1m.config_keys import DUAL_CHUNK
from paddle_qwen1m.engine import SamplingParams
from paddle_qwen1m.llm import LLM
from paddle_qwen1m.options import read_llm_options
from paddle_qwen1m.paddlenlp import serving

FORCED_COLUMNS = SINK_COLUMNS + 1
"""As many as are visited in any case, and one: exactly those would count as more."""
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dense": {"sparse": False},
    "sparse": {"sparse": True},
    "forced": {"sparse": True},
    "rope": {"sparse": False},
    "int8": {"kv_cache_dtype": "int8"},
    "kvfp8": {"kv_cache_dtype": "fp8"},
    "w8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
}
"""What --compare can name, several with a + between them, and their options of LLM. forced: sparse with the keys alone
that are visited in any case. rope: plain rotary positions, without dual chunks and temperature. int8, kvfp8: keys and
values; w8, fp8: weights.
"""
EXCLUDE_EACH_OTHER = ("dense", "sparse", "forced"), ("rope", "sparse", "forced"), ("w8", "fp8"), ("int8", "kvfp8")


def configuration(name: str) -> dict[str, Any]:
    """Options of LLM of a name such as "sparse+int8". ValueError for one that is none."""
    parts = name.split("+")
    strangers = [part for part in parts if part not in CONFIGURATIONS]
    if strangers:
        raise ValueError(f"--compare: there is no {strangers[0]!r}, but {', '.join(CONFIGURATIONS)}")
    for group in EXCLUDE_EACH_OTHER:
        both = [part for part in group if part in parts]
        if len(both) > 1:
            raise ValueError(f"--compare: {both[0]} and {both[1]} exclude each other, in {name!r}")
    merged = {option: value for part in parts for option, value in CONFIGURATIONS[part].items()}
    return read_llm_options(merged)


CONFIG = "config.json"
REQUEST_SECONDS = 3600.0
"""An endpoint may read a long prompt for so long without a word."""
CONNECT_SECONDS = 10.0
API_KEY_VARIABLE = "OPENAI_API_KEY"


class SubjectError(Exception):
    """An endpoint that cannot be reached, or that answered with an error; the message says which and what."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, the beginning of the answer included, and how many tokens the answer may have."""

    ids: Sequence[int]
    max_tokens: int


@dataclass(frozen=True)
class Reading:
    """Token ids of question and right answer, which has the last `answer_tokens` of them."""

    ids: Sequence[int]
    answer_tokens: int


@dataclass(frozen=True)
class Answer:
    """cached_tokens: of the prompt, which were not computed for this question; None where nobody says."""

    text: str
    finish_reason: str | None
    cached_tokens: int | None


class Subject(Protocol):
    """Answers greedily, and tells how likely a text is to it."""

    name: str

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """Answers to the questions of one document, in their order, as they come."""

    def logprobs(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Of each token but the first, [n - 1], after those before it."""

    def likeliest(self, reading: Reading) -> npt.NDArray[np.int64]:
        """The likeliest token in the place of each token of the answer, [answer_tokens], after those before it."""

    def close(self) -> None:
        """Gives back memory, or the connection."""


class InProcess:
    """A checkpoint loaded by LLM with a `configuration`.

    Questions of a document come together: the prefix cache lets the first one read it for all of them.
    """

    def __init__(self, model: str, name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        chosen, parts = {**options, **configuration(name)}, name.split("+")
        self._folder: TemporaryDirectory | None = None
        if "forced" in parts:
            config = serving.open_weights(model, options).config
            shape = config.num_layers, config.num_heads
            chosen["sparse_budgets"] = SparseBudgets.uniform(FORCED_COLUMNS, LOCAL_DIAGONALS, *shape)
        if "rope" in parts:
            chosen.setdefault("tokenizer", model)
            self._folder = TemporaryDirectory()
            with_plain_rope(serving.open_weights(model, options).directory, Path(self._folder.name))
            model = self._folder.name
        self._llm = LLM(model, **chosen)

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        params = [SamplingParams(temperature=0.0, max_tokens=prompt.max_tokens) for prompt in prompts]
        outputs = self._llm.generate([list(prompt.ids) for prompt in prompts], params, use_tqdm=False)
        for output in outputs:
            yield Answer(output.outputs[0].text, output.outputs[0].finish_reason, output.num_cached_tokens)

    def logprobs(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self._llm.generate([list(ids)], params, use_tqdm=False)
        entries = (output.prompt_logprobs or [])[1:]
        return np.array([entry[token].logprob for entry, token in zip(entries, ids[1:]) if entry is not None])

    def likeliest(self, reading: Reading) -> npt.NDArray[np.int64]:
        end = len(reading.ids) - 1
        logits = self._llm.logits(reading.ids, range(end - reading.answer_tokens, end))
        return np.asarray(logits.argmax(-1), np.int64)

    def close(self) -> None:
        self._llm.shutdown()
        if self._folder is not None:
            self._folder.cleanup()


def with_plain_rope(checkpoint: Path, folder: Path) -> None:
    """Makes `folder` the same checkpoint, by links, but for its config.json: one chunk for all that the model can have,
    and no temperature.
    """
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = read_json(checkpoint / CONFIG)
    longest = int(config["max_position_embeddings"])
    config[DUAL_CHUNK] = {
        "chunk_size": 1 << longest.bit_length(),
        "local_size": 0,
        "original_max_position_embeddings": 0,
    }
    (folder / CONFIG).unlink()
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


class Endpoint:
    """A server with OpenAI's /completions, which is sent token ids, so that it sees what a model in process sees."""

    name = "endpoint"

    def __init__(self, base_url: str, model: str | None = None) -> None:
        """model: its name there; without it the first one that the server lists. Raises SubjectError."""
        import httpx

        self._url = base_url.rstrip("/")
        key = os.environ.get(API_KEY_VARIABLE)
        self._client = httpx.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS),
        )
        self._errors: type[Exception] = httpx.HTTPError
        self._model = model or self._first_model()

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        for prompt in prompts:
            body = {"prompt": list(prompt.ids), "max_tokens": prompt.max_tokens}
            choice, usage = self._completion(body)
            details = usage.get("prompt_tokens_details") or {}
            yield Answer(str(choice.get("text", "")), choice.get("finish_reason"), details.get("cached_tokens"))

    def logprobs(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        choice, _ = self._completion({"prompt": list(ids), "max_tokens": 0, "echo": True, "logprobs": 0})
        told = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if len(told) < len(ids):
            raise SubjectError(f"{self._url} told {len(told):,} log-probabilities of {len(ids):,} tokens")
        return np.array(told[1 : len(ids)], np.float64)

    def likeliest(self, reading: Reading) -> npt.NDArray[np.int64]:
        raise SubjectError(f"{self._url}: --score logits needs a model in process")

    def close(self) -> None:
        self._client.close()

    def _first_model(self) -> str:
        listed = self._call("GET", "/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise SubjectError(f"{self._url}/models lists no model: give --served-model") from None

    def _completion(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The choice, and what it took."""
        reply = self._call("POST", "/completions", {"model": self._model, "temperature": 0, **body})
        try:
            return dict(reply["choices"][0]), dict(reply.get("usage") or {})
        except (KeyError, IndexError, TypeError, AttributeError):
            raise SubjectError(f"{self._url}/completions answered without a choice: {reply!r:.200}") from None

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            reply = self._client.request(method, f"{self._url}{path}", json=body)
        except self._errors as error:
            raise SubjectError(f"{self._url} does not answer: {error or type(error).__name__}") from error
        if reply.status_code != 200:
            raise SubjectError(f"{self._url}{path} answered {reply.status_code}: {' '.join(reply.text.split())[:500]}")
        try:
            return reply.json()
        except ValueError as error:
            raise SubjectError(f"{self._url}{path} answered with something other than JSON: {error}") from error
