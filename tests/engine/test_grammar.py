"""Structured outputs with the real llguidance: whatever the logits say, an answer is what was asked for."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from tokenizers import Tokenizer

from paddle_qwen1m.engine.grammar import MAX_BYTES, GrammarCompiler
from paddle_qwen1m.engine.params import SamplingParams, StructuredOutputsParams
from paddle_qwen1m.engine.rules import TokenRules
from paddle_qwen1m.engine.sampling import SamplingSlots

pytest.importorskip("llguidance", reason="needs Python 3.10 or newer")

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "needle" / "tokenizer.json"
NEEDLES = Tokenizer.from_file(str(TOKENIZER))
VOCABULARY, END, ENDOFTEXT = 1024, 747, 745
TEXTS = [NEEDLES.decode([token], skip_special_tokens=False) for token in range(VOCABULARY)]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "dark green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCABULARY, [END, ENDOFTEXT])


def walk(compiler: GrammarCompiler, spec: StructuredOutputsParams, seed: int) -> str:
    """The text of an answer that is sampled, under the grammar's mask, from logits that know nothing.

    But that they prefer, from the 200th token on, what closes JSON: it would go on for ever otherwise.
    """
    rng = np.random.default_rng(seed)
    closing = [TEXTS.index(text) for text in ('"', "]", "}")]
    grammar = compiler.compile(spec)
    rules = TokenRules(VOCABULARY, ends=[END, ENDOFTEXT], grammar=grammar)
    slots = SamplingSlots(1, VOCABULARY)
    slots.put(0, SamplingParams(), prompt=np.zeros(1, np.int64), seed=seed, mask=rules.words())
    answer: list[int] = []
    for number in range(3000):
        logits = 2.0 * rng.standard_normal((1, VOCABULARY)).astype(np.float32)
        logits[:, closing] += 8.0 * (number >= 200)
        token = int(slots.sample(paddle.to_tensor(logits))[0].numpy()[0])
        if token in (END, ENDOFTEXT):
            assert grammar.error is None
            return str(NEEDLES.decode(answer, skip_special_tokens=False))
        answer.append(token)
        assert rules.accept(token)
        slots.set_mask(0, rules.words())
    raise AssertionError(f"no end: {answer}")


def is_person(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags"]
        and re.fullmatch("[A-Z][a-z]{1,8}", value["name"]) is not None
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 120
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"red", "dark green"}
    )


CHOICES = ["yes", "no", 'in "quotes"', "two\nlines", "back\\slash", "häß"]
CASES: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "schema": ({"json": PERSON}, is_person),
    "schema as text": ({"json": json.dumps(PERSON)}, is_person),
    "any schema": ({"json": "true"}, lambda text: json.loads(text) is not ...),
    "object": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    "choice": ({"choice": CHOICES}, lambda text: text in CHOICES),
    "regex": ({"regex": "(ab|c){2,5}[0-9]"}, lambda text: re.fullmatch("(ab|c){2,5}[0-9]", text) is not None),
    "grammar": (
        {"grammar": 'start: sum\nsum: NUMBER ("+" NUMBER)~1..4\nNUMBER: /[1-9][0-9]{0,3}/'},
        lambda text: re.fullmatch(r"[1-9]\d{0,3}(\+[1-9]\d{0,3}){1,4}", text) is not None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_what_was_asked_for(compiler: GrammarCompiler, case: str) -> None:
    description, is_right = CASES[case]
    answers = [walk(compiler, StructuredOutputsParams(**description), seed) for seed in range(8)]
    assert all(map(is_right, answers)), answers
    assert len(set(answers)) > 1


@pytest.mark.parametrize("vocabulary", [1024, 1030, 1056])
def test_a_mask_has_as_many_words_as_the_logits_need(vocabulary: int) -> None:
    """Also at multiples of 32; logits beyond the tokenizer's tokens are never allowed."""
    matcher = GrammarCompiler(TOKENIZER, vocabulary, [END]).compile(StructuredOutputsParams(regex="(?s:.*)"))
    words = matcher.mask()
    assert words.dtype == np.uint32 and words.shape == (-(-vocabulary // 32),)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert bits[END] and bits.sum() > 500 and not bits[NEEDLES.get_vocab_size() :].any()


def test_where_an_answer_is_complete_it_may_only_end(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(StructuredOutputsParams(choice=["a"]))
    (token,) = NEEDLES.encode("a").ids
    assert not matcher.is_complete and matcher.error is None
    matcher.accept(token)
    assert matcher.is_complete
    for _ in range(2):  # and again behind the end, for who goes on regardless
        assert np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist() == [745, 747]
        matcher.accept(END)
    assert matcher.is_complete


def test_a_token_that_may_not_come_leaves_the_end_alone(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(StructuredOutputsParams(choice=["a"]))
    matcher.accept(5)
    assert matcher.error is not None and "doesn't satisfy the grammar" in matcher.error
    assert np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist() == [745, 747]


@pytest.mark.parametrize(
    ("text", "may_come"),
    [
        ('{\n  "a": 1,\n  "b": [\n    1\n  ]\n}', True),
        ('{\r\n\t"a" : 1 }', True),
        ("{\n\n", False),
        ("{\n" + " " * 65, False),
        ("{" + " " * 5, False),
    ],
)
@pytest.mark.parametrize("description", [{"json_object": True}, {"json": {"type": "object"}}])
def test_json_may_be_indented_but_not_padded_until_the_answers_limit(
    compiler: GrammarCompiler, description: dict[str, Any], text: str, may_come: bool
) -> None:
    matcher = compiler.compile(StructuredOutputsParams(**description))
    for character in text[:-1]:
        matcher.accept(TEXTS.index(character))
        assert matcher.error is None
    assert np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[TEXTS.index(text[-1])] == may_come


def test_a_schema_may_have_its_own_word_on_blanks(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(StructuredOutputsParams(json={**PERSON, "x-guidance": {"whitespace_flexible": False}}))
    matcher.accept(TEXTS.index("{"))
    allowed = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))
    assert allowed.size and all(TEXTS[token].startswith('"') for token in allowed)


def test_answers_follow_one_grammar_apart(compiler: GrammarCompiler) -> None:
    spec = StructuredOutputsParams(regex="ab")
    first, second = compiler.compile(spec), compiler.compile(spec)
    before = second.mask()
    first.accept(int(np.flatnonzero(np.unpackbits(before.view(np.uint8), bitorder="little"))[0]))
    np.testing.assert_array_equal(second.mask(), before)
    assert (first.mask() != before).any()


def test_a_large_grammar_is_compiled_once_and_stops_no_other_thread(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    original = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda way, text: compiled.append(way) or original(way, text))
    large = StructuredOutputsParams(choice=[f"choice {number}" for number in range(20_000)])
    with ThreadPoolExecutor(3) as threads:
        matchers = [threads.submit(compiler.compile, large) for _ in range(3)]
        ticks = 0
        while not all(one.done() for one in matchers):
            time.sleep(0.002)
            compiler.compile(StructuredOutputsParams(choice=["a"]))
            ticks += 1
    assert ticks > 10 and compiled.count("choice") <= 2  # "a" may be among them
    first, second, _ = (one.result() for one in matchers)
    first.accept(5)
    assert first.error is not None and second.error is None


def test_what_cannot_be_compiled_is_told_to_all_who_wait_and_tried_again(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Event()

    def failing(way: str, text: str) -> None:
        waiting.wait(5)
        raise ValueError("no")

    spec = StructuredOutputsParams(regex="once more")
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(compiler, "_compile", failing)
        asked = [threads.submit(compiler.compile, spec) for _ in range(2)]
        waiting.set()
        for one in asked:
            with pytest.raises(ValueError, match=r"^no$"):
                one.result()
    assert not compiler.compile(spec).is_complete


@pytest.mark.parametrize(
    "description, reason",
    [
        ({"json": "{"}, "json is not JSON: Expecting property name"),
        ({"json": {"type": "integerx"}}, "json cannot be used: Invalid type: integerx"),
        ({"json": "[1]"}, "json cannot be used: schema must be an object or boolean"),
        ({"json": {"$ref": "http://example.org/schema"}}, "json cannot be used: .*not present in a registry"),
        ({"json": {"minimum": {1, 2}}}, "json is not JSON: .*set is not JSON serializable"),
        ({"json": "[" * 100_000}, "json is not JSON: "),
        ({"regex": "[a-z"}, "regex cannot be used: .*unclosed character class"),
        ({"grammar": 'start: "a" b'}, 'grammar cannot be used: .*unknown name: "b"'),
        ({"regex": "a" * (MAX_BYTES + 1)}, f"regex must be at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(
    compiler: GrammarCompiler, description: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s)^structured_outputs: {reason}"):
        compiler.compile(StructuredOutputsParams(**description))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"needs llguidance: pip install 'paddle-qwen1m\[structured\]'"):
        GrammarCompiler(TOKENIZER, VOCABULARY, [END])


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot use the tokenizer .*tokenizer\.json: "):
        GrammarCompiler(tmp_path / "tokenizer.json", VOCABULARY, [END])
