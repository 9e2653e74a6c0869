"""AutoTokenizer gives Hugging Face's ids for our checkpoints; the golden ids were made by Hugging Face transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paddlenlp.transformers import AutoTokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "tokenizer" / "golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: repr(case["text"])[:30])
def test_ids_equal_hugging_faces(tokenizer: Any, case: dict[str, Any]) -> None:
    assert list(tokenizer(case["text"])["input_ids"]) == case["needle"]


def test_the_chat_template_gives_hugging_faces_text_and_ids(tokenizer: Any) -> None:
    chat = GOLDEN["chat"]
    text = tokenizer.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True)
    assert text == chat["text"]
    assert list(tokenizer(text)["input_ids"]) == chat["ids"]


def test_the_line_break_between_two_messages_is_kept(tokenizer: Any) -> None:
    ids = list(tokenizer("<|im_end|>\n<|im_start|>")["input_ids"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_end|>", "Ċ", "<|im_start|>"]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: repr(case["text"])[:30])
def test_added_tokens_are_whole_whether_special_or_not(
    copied_needle: Callable[..., Path], case: dict[str, Any]
) -> None:
    directory = copied_needle()
    tokenizer_json = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    for token in GOLDEN["added"]:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        tokenizer_json["added_tokens"].append({**token, **plain})
        number = str(token["id"])
        config["added_tokens_decoder"][number] = {"content": token["content"], "special": token["special"], **plain}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    ids = list(tokenizer(case["text"])["input_ids"])
    assert ids == case["with_added_tokens"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded"]


def test_the_oracles_prompt_has_the_oracles_ids(tokenizer: Any) -> None:
    import numpy as np

    oracle = Path(__file__).parents[1] / "data" / "needle_oracle"
    text = json.loads((oracle / "oracle.json").read_text(encoding="utf-8"))["text"]
    expected = np.load(oracle / "oracle.npz")["input_ids"].reshape(-1).tolist()
    assert list(tokenizer(text)["input_ids"]) == expected


def test_the_slow_tokenizer_is_given_when_asked_for(needle_checkpoint: Path) -> None:
    assert type(AutoTokenizer.from_pretrained(str(needle_checkpoint), use_fast=False)).__name__ == "Qwen2Tokenizer"


def test_a_checkpoint_without_dual_chunk_attention_keeps_paddlenlps_choice(copied_needle: Callable[..., Path]) -> None:
    directory = copied_needle(dual_chunk_attention_config=None)
    assert type(AutoTokenizer.from_pretrained(str(directory))).__name__ == "Qwen2Tokenizer"


def test_a_batch_of_texts_is_padded_on_the_left_when_asked(tokenizer: Any) -> None:
    tokenizer.padding_side = "left"
    batch = tokenizer(["one", "one two three"], padding=True, return_tensors="pd")
    assert batch["attention_mask"].numpy()[0, 0] == 0
    assert batch["input_ids"].shape == batch["attention_mask"].shape
