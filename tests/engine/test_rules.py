"""Which tokens an answer may go on with, beside sets that are put together by brute force."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from paddle_qwen1m.engine.core import Request
from paddle_qwen1m.engine.params import SamplingParams
from paddle_qwen1m.engine.rules import BadWords, TokenRules, token_rules, token_words


def tokens_of(words: np.ndarray | None, vocabulary: int) -> set[int]:
    """The tokens that words allow, none of them outside the vocabulary."""
    if words is None:
        return set(range(vocabulary))
    assert words.dtype == np.uint32 and words.shape == (-(-vocabulary // 32),)
    assert not oracle.allowed_tokens(words, 32 * len(words))[vocabulary:].any()
    return set(np.flatnonzero(oracle.allowed_tokens(words, vocabulary)).tolist())


class OnlyAfter:
    """A grammar: each token is followed by one of the next three, modulo 7; nothing ends."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.last = vocabulary, 0

    def tokens(self) -> set[int]:
        return {(self.last + step) % 7 for step in (1, 2, 3)}

    def mask(self) -> np.ndarray:
        return token_words(self.tokens(), self.vocabulary)

    def accept(self, token: int) -> None:
        self.last = token


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 1000])
def test_words_hold_a_bit_a_token(rng: np.random.Generator, vocabulary: int) -> None:
    tokens = set(rng.integers(0, vocabulary, 40).tolist())
    assert tokens_of(token_words(tokens, vocabulary), vocabulary) == tokens
    assert tokens_of(token_words([], vocabulary), vocabulary) == set()


@pytest.mark.parametrize("name", ["allowed_token_ids", "bad_words", "logit_bias"])
def test_tokens_outside_the_vocabulary_are_refused(name: str) -> None:
    """But for those that end an answer: they never come."""
    params = SamplingParams(
        stop_token_ids=[12],
        allowed_token_ids=[3, 10] if name == "allowed_token_ids" else None,
        logit_bias={10: 1.0} if name == "logit_bias" else None,
    )
    request = Request("a", np.zeros(1, np.int64), params, bad_words=((1, 10),) if name == "bad_words" else ())
    with pytest.raises(ValueError, match=f"{name} must be 0 to 9, tokens of the vocabulary, got 10"):
        token_rules(request, 10)
    assert token_rules(request, 11).words() is None or name == "allowed_token_ids"


def test_a_requests_rules_are_those_of_its_params() -> None:
    params = SamplingParams(stop_token_ids=[4], min_tokens=1, allowed_token_ids=[1, 2, 3, 4, 5, 6])
    request = Request("a", np.zeros(1, np.int64), params, eos_token_ids=(5,), bad_words=((6,), (1, 2)))
    rules = token_rules(request, 40)
    assert tokens_of(rules.words(), 40) == {1, 2, 3}
    rules.accept(1)
    assert tokens_of(rules.words(), 40) == {1, 3, 4, 5}


def test_a_bad_word_never_comes_to_its_end(rng: np.random.Generator) -> None:
    """A token is forbidden where the answer, with it, would end with a bad word, and nowhere else."""
    for _ in range(30):
        words = [rng.integers(0, 3, rng.integers(1, 5)).tolist() for _ in range(rng.integers(0, 6))]
        bad, answer = BadWords(words), []
        changes = False
        for token in rng.integers(0, 3, 60).tolist():
            expected = {t for t in range(3) if any([*answer, t][-len(word) :] == word for word in words)}
            assert bad.forbidden() == expected
            bad.accept(token)
            answer.append(token)
            changes = changes or bad.forbidden() != expected
        assert not (changes and bad.is_static)


def test_all_rules_hold_together(rng: np.random.Generator) -> None:
    """Every mix of rules on random answers: what is allowed, whether a change is told, and when nothing will change."""
    vocabulary = 40
    for _ in range(60):
        ends = set(rng.choice(vocabulary, 2, replace=False).tolist())
        allowed = set(rng.choice(vocabulary, 30, replace=False).tolist()) if rng.random() < 0.5 else None
        bad = [tuple(rng.integers(0, 7, rng.integers(1, 3)).tolist()) for _ in range(rng.integers(0, 4))]
        grammar = OnlyAfter(vocabulary) if rng.random() < 0.5 else None
        min_tokens = int(rng.integers(0, 5))
        rules = TokenRules(
            vocabulary, ends=sorted(ends), min_tokens=min_tokens, allowed=allowed, bad_words=bad, grammar=grammar
        )
        answer: list[int] = []
        told, before, was_static = True, None, False
        for _ in range(12):
            expected = set(range(vocabulary)) if allowed is None else set(allowed)
            if grammar is not None:
                expected &= grammar.tokens()
            if not expected:
                expected = ends
            else:
                expected = {
                    t for t in expected if not any((*answer, t)[-len(word) :] == word for word in bad)
                } or expected
                expected = (expected - ends if len(answer) < min_tokens else expected) or expected
            actual = tokens_of(rules.words(), vocabulary)
            assert actual == expected
            assert actual == before or (told and not was_static)
            before, was_static = actual, rules.is_static
            answer.append(int(rng.choice(sorted(actual))))
            told = rules.accept(answer[-1])


def test_rules_that_rule_nothing_out_need_no_mask() -> None:
    rules = TokenRules(100, ends=[5], min_tokens=2, bad_words=[(1, 2)])
    assert tokens_of(rules.words(), 100) == set(range(100)) - {5}
    assert not rules.accept(7) and rules.accept(8)
    assert rules.words() is None and not rules.is_static
    assert TokenRules(100, ends=[5]).is_static


def test_min_tokens_gives_way_to_a_grammar_that_only_ends() -> None:
    """And so do bad words: an answer is never left without a token."""

    class Complete(OnlyAfter):
        def tokens(self) -> set[int]:
            return {5}

    for rules in (
        TokenRules(10, ends=[5], min_tokens=3, grammar=Complete(10)),
        TokenRules(10, ends=[5], bad_words=[[5]], grammar=Complete(10)),
        TokenRules(10, ends=[5], allowed=[1, 2], grammar=Complete(10)),
    ):
        assert tokens_of(rules.words(), 10) == {5}
