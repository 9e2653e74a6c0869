"""Requests of every kind, as many clients send them: lengths, sampling options, shared documents, mistakes, aborts.

Everything is drawn from a seed. A Case makes its request when it is asked to, since some are mistakes; `check` says
whether what came of it is what its options promise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any, Callable

import numpy as np
from needle_documents import DocumentMaker, prompt_head, prompt_tail

from paddle_qwen1m.engine import Request, SamplingParams, StructuredOutputsParams
from paddle_qwen1m.outputs import Collector, CompletionOutput, RequestOutput, Tokens
from paddle_qwen1m.text import bad_word_tokens, decoder

EOS = (747, 745)
VOCABULARY = 1024
NEEDLES = 8
SHARING = 10
"""Requests about one document."""
AT_ONCE = 32

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Kind:
    """A way to ask: SamplingParams' keywords, and what an answer must be beside what every answer is."""

    name: str
    keywords: dict[str, Any]
    holds: Callable[[CompletionOutput], bool] = lambda answer: True

    @property
    def is_greedy(self) -> bool:
        return self.keywords.get("temperature") == 0.0


def _json_object(answer: CompletionOutput) -> bool:
    return answer.finish_reason == "length" or isinstance(json.loads(answer.text), dict)


CHOICES = ("yes", "no", "perhaps")
CODE = r"[0-9]{5}"
ALLOWED = tuple(range(100, 140))
KINDS = (
    Kind("greedy", {"temperature": 0.0, "max_tokens": 24}),
    Kind("greedy again", {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}),
    Kind("greedy, penalised", {"temperature": 0.0, "repetition_penalty": 1.05, "max_tokens": 24}),
    Kind(
        "greedy, frequency", {"temperature": 0.0, "frequency_penalty": 0.5, "presence_penalty": 0.5, "max_tokens": 24}
    ),
    Kind("the card's", {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "max_tokens": 32}),
    Kind("min_p", {"temperature": 1.5, "min_p": 0.1, "max_tokens": 24, "seed": 3}),
    Kind("several", {"n": 3, "temperature": 1.0, "max_tokens": 12, "seed": 7}),
    Kind(
        "stop text",
        {"temperature": 0.0, "stop": ["code", "is "], "max_tokens": 24},
        lambda answer: "code" not in answer.text and "is " not in answer.text,
    ),
    Kind(
        "stop text kept",
        {"temperature": 0.0, "stop": [" is"], "include_stop_str_in_output": True, "max_tokens": 24},
        lambda answer: answer.stop_reason != " is" or answer.text.endswith(" is"),
    ),
    Kind("stop token", {"temperature": 1.0, "stop_token_ids": list(range(200, 400)), "max_tokens": 32}),
    Kind(
        "at least",
        {"temperature": 1.0, "min_tokens": 10, "max_tokens": 20},
        lambda answer: len(answer.token_ids) >= 10,
    ),
    Kind(
        "bias",
        {"temperature": 0.0, "logit_bias": {300: 100.0}, "max_tokens": 6},
        lambda answer: set(answer.token_ids) == {300},
    ),
    Kind(
        "allowed",
        {"temperature": 1.0, "allowed_token_ids": ALLOWED, "max_tokens": 10},
        lambda answer: set(answer.token_ids) <= set(ALLOWED),
    ),
    Kind("bad words", {"temperature": 0.0, "bad_words": ["access", "code"], "max_tokens": 24}),
    Kind("log-probabilities", {"temperature": 0.0, "logprobs": 3, "max_tokens": 12}),
    Kind(
        "choice",
        {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(choice=CHOICES), "max_tokens": 12},
        lambda answer: answer.text in CHOICES,
    ),
    Kind(
        "json",
        {"temperature": 0.5, "structured_outputs": StructuredOutputsParams(json_object=True), "max_tokens": 40},
        _json_object,
    ),
    Kind(
        "regex",
        {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(regex=CODE), "max_tokens": 12},
        lambda answer: re.fullmatch(CODE, answer.text) is not None,
    ),
    Kind("the prompt's log-probabilities", {"temperature": 1.0, "prompt_logprobs": 2, "max_tokens": 4}),
    Kind("special tokens", {"temperature": 1.0, "skip_special_tokens": False, "max_tokens": 16}),
    Kind("whole prompt", {"temperature": 0.0, "skip_reading_prefix_cache": True, "max_tokens": 12}),
)

MISTAKES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"temperature": -1.0}, {}),
    ({"top_p": 0.0}, {}),
    ({"max_tokens": 0}, {}),
    ({"max_tokens": 2_000_000}, {}),
    ({"allowed_token_ids": [VOCABULARY]}, {}),
    ({"logit_bias": {VOCABULARY + 5: 1.0}}, {}),
    ({"n": 1000, "temperature": 1.0}, {}),
    ({}, {"prompt": np.asarray([VOCABULARY], np.int64)}),
    ({}, {"prompt": np.asarray([-1], np.int64)}),
    ({}, {"prompt": np.asarray([], np.int64)}),
)
"""Keywords of SamplingParams and of Request of which one is wrong."""


@dataclass(frozen=True)
class Case:
    """A request to come. document: the number of what it is about. abort_after: steps of the engine after which nobody
    wants it any more.
    """

    name: str
    prompt: np.ndarray
    document: int
    kind: Kind
    mistake: tuple[dict[str, Any], dict[str, Any]] | None = None
    abort_after: int | None = None

    def request(self, encode: Encode) -> Request:
        """ValueError for some mistakes; others the engine finds."""
        keywords, others = self.mistake or ({}, {})
        params = SamplingParams(**{**self.kind.keywords, **keywords})
        words = bad_word_tokens(encode, params.bad_words)
        return Request(
            self.name, **{"prompt": self.prompt, **others}, params=params, eos_token_ids=EOS, bad_words=words
        )


class Maker:
    """Draws cases. encode: text to ids."""

    def __init__(self, encode: Encode, seed: int) -> None:
        self._encode, self._rng = encode, np.random.default_rng(seed)
        self._maker = DocumentMaker(encode)
        self._kinds = cycle([KINDS[place] for place in self._rng.permutation(len(KINDS))])
        self._numbers = iter(range(1 << 30))

    def cases(self, number: int, shortest: int, longest: int) -> list[Case]:
        """So many, of lengths that are log-uniform between the two: half about shared documents, a tenth mistakes."""
        shared = number // 2
        groups = [1] * (number - shared) + [SHARING] * (shared // SHARING)
        groups += [shared % SHARING] if shared % SHARING else []
        prompts: list[tuple[int, np.ndarray]] = []
        for size, length in zip(groups, self._lengths(len(groups), shortest, longest)):
            document = next(self._numbers)
            prompts += [(document, prompt) for prompt in self._prompts(length, size, document)]
        made = [self._case(*prompts[place]) for place in self._rng.permutation(number)]
        for place in self._rng.choice(number, number // 10, replace=False):
            made[place] = replace(made[place], mistake=MISTAKES[int(self._rng.integers(len(MISTAKES)))])
        return made

    def _case(self, document: int, prompt: np.ndarray) -> Case:
        kind = next(self._kinds)
        return Case(f"{next(self._numbers)} {kind.name}", prompt, document, kind)

    def _lengths(self, number: int, shortest: int, longest: int) -> Iterator[int]:
        for value in self._rng.uniform(math.log(shortest), math.log(longest + 1), number):
            yield min(longest, int(math.exp(value)))

    def _prompts(self, length: int, number: int, seed: int) -> list[np.ndarray]:
        """A document of about so many tokens with a question each; without room for one, random tokens."""
        try:
            document = self._maker.make(length, NEEDLES, seed)
        except ValueError:
            ids = self._rng.integers(0, 700, length)
            return [np.concatenate([ids[:-1], [place]]) for place in self._rng.integers(0, 700, number)]
        start = self._encode(prompt_head()) + self._maker.ids(document)
        asked = self._rng.choice(NEEDLES, number, replace=number > NEEDLES)
        return [np.asarray(start + self._encode(prompt_tail(document.needles[one])), np.int64) for one in asked]


def shuffled(cases: Sequence[Case], seed: int, longest_wait: int) -> list[Case]:
    """The same in another order, those about one document together; a fifth of those that are no
    mistakes are not wanted any more after log-uniformly many steps, at most longest_wait.
    """
    rng = np.random.default_rng(seed)
    places = {document: rng.random() for document in sorted({case.document for case in cases})}
    keys = [places[case.document] + 0.05 * rng.random() for case in cases]
    made = [replace(cases[place], abort_after=None) for place in np.argsort(keys)]
    valid = [place for place, case in enumerate(made) if case.mistake is None]
    for place in rng.choice(valid, len(made) // 5, replace=False):
        steps = int(math.exp(rng.uniform(0, math.log(longest_wait))))
        made[place] = replace(made[place], abort_after=steps)
    return made


@dataclass
class Outcome:
    """What came of cases, by their names."""

    outputs: dict[str, RequestOutput] = field(default_factory=dict)
    refused: dict[str, ValueError] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)


def serve(engine: Any, cases: Sequence[Case], tokenizer: Any, encode: Encode, at_once: int = AT_ONCE) -> Outcome:
    """Has the engine answer the cases, so many at a time, in their order."""
    outcome, waiting = Outcome(), list(reversed(cases))
    running: dict[str, Collector] = {}
    left: dict[str, int] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            case = waiting.pop()
            try:
                request = case.request(encode)
                engine.add(request)
            except ValueError as error:
                outcome.refused[case.name] = error
                continue
            shown = decoder(tokenizer, skip_special_tokens=case.kind.keywords.get("skip_special_tokens", True))
            running[case.name] = Collector(request, None, Tokens(shown, decoder(tokenizer, skip_special_tokens=False)))
            if case.abort_after is not None:
                left[case.name] = case.abort_after
        for event in engine.step():
            collector = running[event.id]
            ended = collector.take(event)
            if ended is not None:
                engine.stop(event.id, *ended)
            if collector.finished:
                outcome.outputs[event.id] = running.pop(event.id).output()
                left.pop(event.id, None)
        for name in list(left):
            left[name] -= 1
            if left[name] < 0:
                assert engine.abort(name)
                del left[name], running[name]
                outcome.aborted.add(name)
    return outcome


def check(cases: Sequence[Case], outcome: Outcome) -> None:
    """AssertionError where a case did not come to the end that it should have."""
    for case in cases:
        if case.mistake is not None:
            assert case.name in outcome.refused, f"{case.name}: {case.mistake} was not refused"
        elif case.name not in outcome.aborted:
            assert case.name in outcome.outputs, f"{case.name}: {outcome.refused.get(case.name)}"
            _check_output(case, outcome.outputs[case.name])


def _check_prompt(case: Case, output: RequestOutput) -> None:
    """Each token of the prompt but the first is there with its likelihood."""
    if case.kind.keywords.get("prompt_logprobs") is None:
        assert output.prompt_logprobs is None
        return
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(case.prompt), case.name
    for token, entry in zip(case.prompt[1:].tolist(), output.prompt_logprobs[1:]):
        assert entry is not None and token in entry and len(entry) in (2, 3), case.name


def _check_output(case: Case, output: RequestOutput) -> None:
    params = SamplingParams(**case.kind.keywords)
    assert output.finished and [answer.index for answer in output.outputs] == list(range(params.n)), case.name
    assert output.prompt_token_ids == case.prompt.tolist()
    _check_prompt(case, output)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
    for answer in output.outputs:
        tokens, last = answer.token_ids, answer.token_ids[-1]
        assert params.max_tokens is not None and params.min_tokens <= len(tokens) <= params.max_tokens, case.name
        assert not ends & set(tokens[params.min_tokens : -1]), f"{case.name}: went on behind its end"
        if answer.finish_reason == "length":
            assert len(tokens) == params.max_tokens and last not in ends, case.name
        else:
            assert answer.finish_reason == "stop", case.name
            by_token = None if last in EOS and not params.ignore_eos else last
            assert answer.stop_reason in (by_token, *params.stop) and (last in ends or answer.stop_reason), case.name
        assert case.kind.holds(answer), f"{case.name}: {answer}"
        if params.logprobs is not None:
            assert answer.logprobs is not None and len(answer.logprobs) == len(tokens)
            for token, entry in zip(tokens, answer.logprobs):
                assert token in entry and len(entry) in (params.logprobs, params.logprobs + 1), case.name
                assert sorted(entry.values(), key=lambda one: one.rank)[0].logprob == max(
                    one.logprob for one in entry.values()
                )
