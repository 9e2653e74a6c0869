"""How the answers to a prompt are chosen: SamplingParams, with the names and defaults that users of vLLM know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

GREEDY_BELOW, LOWEST_TEMPERATURE = 1e-5, 0.01
MAX_LOGPROBS = 20
MAX_SEED = 2**63
MAX_STOPS, MAX_STOP_BYTES = 16, 1024
MAX_LISTED = 4096
"""Entries of logit_bias, bad_words and allowed_token_ids."""
MAX_BIAS = 100.0
MAX_TOKEN_ID = 2**31
"""No vocabulary has so many."""
MAX_N = 16384
MAX_PENALTY = 1e6
"""Of repetition_penalty, and its inverse the least: beyond, the same tokens are chosen until logits overflow."""


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an answer must look like, in exactly one of these ways.

    json: a JSON schema, as text or a dict. regex: a regular expression. choice: one of these texts. grammar: a
    context-free grammar in Lark's notation. json_object: any JSON object.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [one.name for one in fields(self) if getattr(self, one.name) not in (None, False)]
        if len(given) != 1:
            ways = ", ".join(one.name for one in fields(self))
            raise ValueError(f"structured_outputs takes exactly one of {ways}, got {' and '.join(given) or 'none'}")
        if self.choice is not None and (isinstance(self.choice, str) or not all(map(_is_text, self.choice))):
            raise ValueError(f"structured_outputs: choice must be a list of texts, got {self.choice!r}")
        if self.choice is not None and not (self.choice and all(self.choice)):
            raise ValueError("structured_outputs: choice must not be empty, nor any of its texts")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not _is_text(value):
                raise ValueError(f"structured_outputs: {name} must be a text, got {value!r}")
        if self.json is not None and not isinstance(self.json, (str, dict)):
            raise ValueError(f"structured_outputs: json must be a schema, a text or a dict, got {self.json!r}")


@dataclass
class SamplingParams:
    """How the answers to a prompt are chosen and where they end. Checked when made, and again when a request is.

    n: answers; the j-th is what seed + j gives. presence_penalty, frequency_penalty (-2 to 2): taken from the logits of
    tokens that the answer has, once and for each time. repetition_penalty: divides (multiplies, where negative) the
    logits of tokens that prompt or answer have; held to 1e-6 to 1e6. temperature: 0 is greedy. top_k: 0, -1 or more
    than the vocabulary has keeps all. top_p, min_p: how much probability is kept, and the least, relative to the
    likeliest token, that one needs. seed: the draw of a token depends on (seed, its number) alone; None draws one.
    stop: texts that end an answer and are not part of it unless include_stop_str_in_output. stop_token_ids: tokens that
    do, beside the model's own, which ignore_eos passes over. max_tokens: of an answer; None is whatever the model's
    length leaves. min_tokens: before which nothing ends it. bad_words: texts that no answer has. logit_bias: added to
    the logits of token ids, at most 100 either way. allowed_token_ids: no other tokens. logprobs: log-probabilities of
    so many likeliest tokens and of the chosen one; 0: of that alone; None: none; -1: of 20. prompt_logprobs: the same
    for each token of the prompt, which is then computed anew. detokenize: whether tokens become text;
    skip_special_tokens: whether without the special ones. structured_outputs: what an answer must look like.
    skip_reading_prefix_cache: computes the whole prompt.

    ValueError for what cannot be used.
    """

    MAX_TEMPERATURE: ClassVar[float] = 2.0

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    bad_words: Sequence[str] = ()
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    skip_reading_prefix_cache: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        if self.temperature < GREEDY_BELOW:
            self.temperature = 0.0
        elif self.temperature < LOWEST_TEMPERATURE:
            self.temperature = LOWEST_TEMPERATURE
        if self.n > 1 and self.is_greedy:
            raise ValueError(f"n must be 1 at temperature 0, where all answers are the same, got {self.n}")
        self.top_k = min(max(0, self.top_k), MAX_TOKEN_ID - 1)
        self.repetition_penalty = min(max(1 / MAX_PENALTY, self.repetition_penalty), MAX_PENALTY)
        if self.stop and not self.detokenize:
            raise ValueError("stop needs detokenize=True: it is compared with the text")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are told beside the chosen one; None: no log-probabilities."""
        return MAX_LOGPROBS if self.logprobs == -1 else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return MAX_LOGPROBS if self.prompt_logprobs == -1 else self.prompt_logprobs

    def _check_numbers(self) -> None:
        for name, low, high in (
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("temperature", 0.0, self.MAX_TEMPERATURE),
            ("min_p", 0.0, 1.0),
        ):
            if not low <= number(name, getattr(self, name)) <= high:
                raise ValueError(f"{name} must be {low:g} to {high:g}, got {getattr(self, name)}")
        if not 0.0 < number("top_p", self.top_p) <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if number("repetition_penalty", self.repetition_penalty) <= 0.0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        for name, lowest in (("n", 1), ("top_k", -1), ("min_tokens", 0)):
            if whole(name, getattr(self, name)) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        if self.n > MAX_N:
            raise ValueError(f"n must be at most {MAX_N}, got {self.n}")
        if self.max_tokens is not None:
            if whole("max_tokens", self.max_tokens) < 1:
                raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
            if self.min_tokens > self.max_tokens:
                raise ValueError(f"min_tokens must be 0 to max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if self.seed is not None and not -MAX_SEED <= whole("seed", self.seed) < MAX_SEED:
            raise ValueError(f"seed must be in [-2^63, 2^63), got {self.seed}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not -1 <= whole(name, value) <= MAX_LOGPROBS:
                raise ValueError(f"{name} must be 0 to {MAX_LOGPROBS}, or -1 for {MAX_LOGPROBS}, got {value}")

    def _check_lists(self) -> None:
        self.stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        self.bad_words = tuple(self.bad_words or ())
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids or ())
        for name in ("stop", "bad_words"):
            texts = getattr(self, name)
            if not all(map(_is_text, texts)) or not all(texts):
                raise ValueError(f"{name} must be texts that are not empty, got {list(texts)!r}")
        if len(self.stop) > MAX_STOPS or any(len(text.encode()) > MAX_STOP_BYTES for text in self.stop):
            raise ValueError(f"stop must be at most {MAX_STOPS} texts of at most {MAX_STOP_BYTES} bytes")
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must not be empty: leave it out to allow all")
        if self.logit_bias is not None:
            bias = {_token_id("logit_bias", token): value for token, value in self.logit_bias.items()}
            self.logit_bias = {
                token: min(MAX_BIAS, max(-MAX_BIAS, number("logit_bias", value))) for token, value in bias.items()
            }
        for name in ("bad_words", "allowed_token_ids", "logit_bias"):
            if len(getattr(self, name) or ()) > MAX_LISTED:
                raise ValueError(f"{name} must have at most {MAX_LISTED} entries, got {len(getattr(self, name))}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def number(name: str, value: Any) -> float:
    """A finite one that float64 holds; ValueError for anything else."""
    try:
        read = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:
        read = math.inf
    if not math.isfinite(read):
        raise ValueError(f"{name} must be a finite number, got {value!r:.100}")
    return read


def whole(name: str, value: Any) -> int:
    """ValueError for what is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return value


def _token_id(name: str, value: Any) -> int:
    """A token id; JSON's keys are texts."""
    try:
        token = int(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else -1
    except ValueError:
        token = -1
    if not 0 <= token < MAX_TOKEN_ID:
        raise ValueError(f"{name} must hold token ids, got {value!r:.100}")
    return token


def _token_ids(name: str, values: Sequence[Any]) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)):
        raise ValueError(f"{name} must be a list of token ids, got {values!r}")
    return tuple(_token_id(name, value) for value in values)
