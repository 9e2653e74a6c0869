"""AutoTokenizer gives Hugging Face's ids for our checkpoints; the golden ids were made by Hugging Face transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paddlenlp.transformers import AutoTokenizer, Qwen2Config

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


def as_transformers_5_saves_it(directory: Path) -> Path:
    """One file of the vocabulary, the template in a file of its own, fewer and other keys in tokenizer_config.json."""
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "chat_template.jinja").write_text(config.pop("chat_template"), encoding="utf-8")
    for name in ("vocab.json", "merges.txt"):
        (directory / name).unlink()
    for name in ("added_tokens_decoder", "add_bos_token"):
        del config[name]
    config["extra_special_tokens"] = config.pop("additional_special_tokens")
    config.update(backend="tokenizers", is_local=False, tokenizer_class="TokenizersBackend")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def test_files_of_transformers_5_give_the_same_ids_and_texts(
    copied_needle: Callable[..., Path], tokenizer: Any
) -> None:
    loaded = AutoTokenizer.from_pretrained(str(as_transformers_5_saves_it(copied_needle())))
    for case in GOLDEN["cases"]:
        assert list(loaded(case["text"])["input_ids"]) == case["needle"]
    chat = GOLDEN["chat"]
    text = loaded.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True)
    assert text == chat["text"]
    assert list(loaded(text)["input_ids"]) == chat["ids"]
    assert loaded.decode(chat["ids"], skip_special_tokens=True) == tokenizer.decode(
        chat["ids"], skip_special_tokens=True
    )
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2TokenizerFast", None])
def test_every_name_of_the_class_gives_the_same_ids(copied_needle: Callable[..., Path], name: str | None) -> None:
    directory = copied_needle()
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = name
    if name is None:
        del config["tokenizer_class"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(str(directory))(GOLDEN["chat"]["text"])["input_ids"]
    assert list(ids) == GOLDEN["chat"]["ids"]


def test_a_config_given_by_hand_is_none_of_the_tokenizers_business(needle_checkpoint: Path) -> None:
    config = Qwen2Config.from_pretrained(str(needle_checkpoint))
    loaded = AutoTokenizer.from_pretrained(str(needle_checkpoint), config=config)
    assert list(loaded(GOLDEN["chat"]["text"])["input_ids"]) == GOLDEN["chat"]["ids"]


def rendered(directory: Path, **options: Any) -> str:
    loaded = AutoTokenizer.from_pretrained(str(directory), **options)
    return loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_the_template_in_a_file_of_its_own_counts_before_the_configs(copied_needle: Callable[..., Path]) -> None:
    directory = copied_needle()
    (directory / "chat_template.jinja").write_text("<{{ messages[0]['content'] }}>", encoding="utf-8")
    assert rendered(directory) == "<hi>"
    assert rendered(directory, chat_template="({{ messages[0]['content'] }})") == "(hi)"
    saved = directory.parent / "saved"
    AutoTokenizer.from_pretrained(str(directory)).save_pretrained(str(saved))
    for name in ("config.json", "tokenizer.json"):
        (saved / name).write_bytes((directory / name).read_bytes())
    assert rendered(saved) == "<hi>"


def test_a_line_break_at_the_end_of_the_template_is_not_rendered(copied_needle: Callable[..., Path]) -> None:
    """As jinja does by default, and with it Hugging Face; a second one is rendered."""
    directory = copied_needle()
    for end, expected in (("\n", "<hi>"), ("\n\n", "<hi>\n"), ("\n ", "<hi>\n ")):
        (directory / "chat_template.jinja").write_text("<{{ messages[0]['content'] }}>" + end, encoding="utf-8")
        assert rendered(directory) == expected


def test_of_several_templates_the_default_one_counts_and_the_others_are_named(
    copied_needle: Callable[..., Path], logged: list[str]
) -> None:
    directory = copied_needle()
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {"tool_use": "tools", "default": "<{{ messages[0]['content'] }}>", "rag": "documents"}
    config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert rendered(directory) == "<hi>"
    assert [line for line in logged if "not used: tool_use, rag" in line]

    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools", encoding="utf-8")
    (directory / "chat_template.jinja").write_text("[{{ messages[0]['content'] }}]", encoding="utf-8")
    logged.clear()
    assert rendered(directory) == "[hi]"
    assert [line for line in logged if "not used: tool_use.jinja" in line]


def test_the_slow_tokenizer_says_which_files_it_lacks(copied_needle: Callable[..., Path]) -> None:
    directory = as_transformers_5_saves_it(copied_needle())
    with pytest.raises(FileNotFoundError, match=r"lacks vocab\.json or merges\.txt, which use_fast=False needs"):
        AutoTokenizer.from_pretrained(str(directory), use_fast=False)


def test_a_damaged_tokenizer_config_is_named(copied_needle: Callable[..., Path]) -> None:
    directory = copied_needle()
    (directory / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        AutoTokenizer.from_pretrained(str(directory))
