"""Text of tokens as they come is the text of all of them, cut at the first stop; no half character, no half stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paddlenlp.transformers import AutoTokenizer

from paddle_qwen1m.text import REPLACEMENT, Detokenizer, bad_word_tokens, decoder

TEXT = "naïve café, 百万 токенов 🙂👩‍🚀 the access code for jade is 64931.\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(Path(__file__).parents[1] / "checkpoints" / "needle"))


@pytest.fixture(scope="module")
def decode(tokenizer: Any) -> Callable[[list[int]], str]:
    return decoder(tokenizer)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def answers(tokenizer: Any, rng: np.random.Generator) -> list[list[int]]:
    """Texts with tokens put in, or left out, and noise: half characters, special tokens, ids that nobody has."""
    found = []
    for _ in range(40):
        ids = ids_of(tokenizer, TEXT)
        cut = [token for token in ids if rng.random() > 0.1]
        places = sorted(rng.integers(0, len(ids), 5), reverse=True)
        for place in places:
            ids.insert(int(place), int(rng.integers(0, 760)))
        noise = rng.choice(np.concatenate([np.arange(94, 256), np.arange(740, 760)]), 60).tolist()
        found += [ids, cut, noise]
    return found


def run(detokenizer: Detokenizer, tokens: list[int]) -> tuple[list[str], int]:
    """The pieces of a text, and how many tokens it took."""
    pieces = []
    for number, token in enumerate(tokens, 1):
        pieces.append(detokenizer.put(token))
        if detokenizer.stopped_by is not None:
            return pieces, number
    return [*pieces, detokenizer.end()], len(tokens)


def certain(text: str) -> str:
    """Without a character at the end that more bytes may complete."""
    return text[:-1] if text.endswith(REPLACEMENT) else text


def first_stop(
    decode: Callable[[list[int]], str], tokens: list[int], stops: list[str], min_tokens: int
) -> tuple[str, str, int] | None:
    """Text before the stop that ends first, that stop, and how many tokens it took; by decoding everything anew."""
    before = 0
    for number in range(1, len(tokens) + 1):
        text = certain(decode(tokens[:number]))
        for end in range(before + 1, len(text) + 1):
            found = [stop for stop in stops if text[:end].endswith(stop)]
            if found and number >= min_tokens:
                stop = max(found, key=len)
                return text[: end - len(stop)], stop, number
        before = len(text)
    return None


def test_a_character_comes_with_its_last_byte_and_what_is_left_at_the_end() -> None:
    smile = "🙂".encode()
    pieces = [b"a", smile[:1], smile[1:3], smile[3:] + "é".encode()[:1], "é".encode()[1:], b" b", smile[:2]]
    detokenizer = Detokenizer(lambda tokens: b"".join(pieces[token] for token in tokens).decode("utf-8", "replace"))
    assert run(detokenizer, list(range(len(pieces))))[0] == ["a", "", "", "🙂", "é", " b", "", REPLACEMENT]


def test_the_text_is_that_of_all_tokens(tokenizer: Any, rng: np.random.Generator) -> None:
    for skip in (True, False):
        decode = decoder(tokenizer, skip_special_tokens=skip)
        for tokens in answers(tokenizer, rng):
            detokenizer = Detokenizer(decode)
            pieces, _ = run(detokenizer, tokens)
            assert "".join(pieces) == detokenizer.text == decode(tokens)


def test_every_piece_is_certain_and_nothing_certain_is_held_back(
    tokenizer: Any, decode: Callable[[list[int]], str], rng: np.random.Generator
) -> None:
    for tokens in answers(tokenizer, rng)[:12]:
        detokenizer = Detokenizer(decode)
        for number, token in enumerate(tokens, 1):
            detokenizer.put(token)
            assert detokenizer.text == certain(decode(tokens[:number]))


@pytest.mark.parametrize("include", [False, True])
def test_an_answer_ends_at_its_first_stop(
    tokenizer: Any, decode: Callable[[list[int]], str], rng: np.random.Generator, include: bool
) -> None:
    hits = 0
    for tokens in answers(tokenizer, rng):
        text = decode(tokens).replace(REPLACEMENT, "") or "x"
        stops = []
        for _ in range(int(rng.integers(1, 5))):
            begin = int(rng.integers(0, len(text)))
            stop = text[begin : begin + int(rng.integers(1, 9))]
            stops.append(stop + "~" if rng.random() < 0.4 else stop)  # some of them only begin
        min_tokens = int(rng.integers(0, 30)) if rng.random() < 0.3 else 0
        detokenizer = Detokenizer(decode, stop=stops, include_stop=include, min_tokens=min_tokens)
        pieces, used = run(detokenizer, tokens)
        expected = first_stop(decode, tokens, stops, min_tokens)
        if expected is None:
            assert ("".join(pieces), detokenizer.stopped_by) == (decode(tokens), None)
            continue
        hits += 1
        before, stop, number = expected
        assert ("".join(pieces), detokenizer.stopped_by, used) == (before + stop * include, stop, number)
        assert detokenizer.put(5) == detokenizer.end() == ""
    assert hits > 60


def test_a_stop_is_held_back_only_while_it_may_come(tokenizer: Any, decode: Callable[[list[int]], str]) -> None:
    tokens = [token for character in "aabaac" for token in ids_of(tokenizer, character)]
    detokenizer = Detokenizer(decode, stop=["aac"])
    assert [detokenizer.put(token) for token in tokens[:3]] == ["", "", "aab"]
    assert [detokenizer.put(token) for token in tokens[3:]] == ["", "", ""]
    assert (detokenizer.text, detokenizer.stopped_by) == ("aab", "aac")


def test_with_too_few_tokens_no_stop_ends_an_answer(tokenizer: Any, decode: Callable[[list[int]], str]) -> None:
    tokens = [ids_of(tokenizer, "a")[0]] * 6
    detokenizer = Detokenizer(decode, stop=["aa"], min_tokens=4)
    pieces, used = run(detokenizer, tokens)
    assert ("".join(pieces), used) == ("aa", 4)


def test_a_long_answer_takes_as_long_a_token_as_a_short_one(tokenizer: Any) -> None:
    def decode(tokens: list[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return plain(tokens)

    plain = decoder(tokenizer)
    broken = ids_of(tokenizer, "百")[0]
    special = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    for tokens in ([broken] * 2000, [broken] + [special] * 2000, ids_of(tokenizer, TEXT * 40)):
        decoded = 0
        detokenizer = Detokenizer(decode, stop=["never " * 20])
        pieces, _ = run(detokenizer, tokens)
        assert "".join(pieces) == plain(tokens)
        assert decoded < 40 * len(tokens)


def test_bad_words_are_forbidden_at_the_start_and_after_a_space(tokenizer: Any) -> None:
    def encode(text: str) -> list[int]:
        return ids_of(tokenizer, text)

    assert bad_word_tokens(encode, ["code", " code"]) == (tuple(encode("code")), tuple(encode(" code")))
    after_a_space = tuple(encode(" 百"))
    assert after_a_space[1:] == tuple(encode("百"))
    assert bad_word_tokens(encode, ["百"]) == (tuple(encode("百")),)  # which forbids it after a space too
