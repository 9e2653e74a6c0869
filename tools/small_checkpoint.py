"""What the scripts that train small checkpoints share: a tokenizer of Qwen2's form, and a published-style directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SYSTEM = "You are a helpful assistant."
END_OF_TEXT, BEGIN_OF_TURN, END_OF_TURN = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\n{SYSTEM}<|im_end|>\n' }}}}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FRAME = (f"system\n{SYSTEM}", "assistant\n", "user\n")
"""What the template writes around the turns: texts for a tokenizer's training."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2 without tied embeddings, with heads of 128, and what it was trained on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    trained_length: int
    local_size: int
    max_positions: int = 1048576


def make_tokenizer(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of Qwen2's form, of at most `vocab_size` tokens, trained on a corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = vocab_size - len(SPECIAL_TOKENS)
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


class ChatTokenizer:
    """A tokenizer with the chat template, as evaluate's Prompter needs it, without transformers or PaddleNLP."""

    chat_template = CHAT_TEMPLATE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text).ids}

    def apply_chat_template(self, messages: list[dict[str, str]], **_options: Any) -> str:
        turns = [{"role": "system", "content": SYSTEM}, *messages]
        text = "".join(f"{BEGIN_OF_TURN}{one['role']}\n{one['content']}{END_OF_TURN}\n" for one in turns)
        return f"{text}{BEGIN_OF_TURN}assistant\n"

    def decode(self, ids: list[int], skip_special_tokens: bool = True, **_options: Any) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


def write_configuration(output: Path, shape: Shape, tokenizer: Tokenizer, budgets: Sequence[int]) -> None:
    """Writes all of a checkpoint's directory but its weights. budgets: columns and diagonals of every head."""
    output.mkdir(parents=True, exist_ok=True)
    special = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": special[END_OF_TEXT],
        "dual_chunk_attention_config": {
            "chunk_size": shape.trained_length,
            "local_size": shape.local_size,
            "original_max_position_embeddings": shape.trained_length,
        },
        "eos_token_id": special[END_OF_TURN],
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "max_window_layers": shape.num_layers,
        "model_type": "qwen2",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }
    write_json(output / "config.json", config)
    generation = {
        "bos_token_id": special[END_OF_TEXT],
        "pad_token_id": special[END_OF_TEXT],
        "do_sample": True,
        "eos_token_id": [special[END_OF_TURN], special[END_OF_TEXT]],
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
    }
    write_json(output / "generation_config.json", generation)
    of_layer = {str(head): ["vertical_and_slash", *budgets, 1.0] for head in range(shape.num_heads)}
    write_json(output / "sparse_attention_config.json", [of_layer] * shape.num_layers)
    tokenizer.save(str(output / "tokenizer.json"))
    tokenizer.model.save(str(output))
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer_config = {
        "add_prefix_space": False,
        "add_bos_token": False,
        "added_tokens_decoder": {str(i): {"content": token, **added} for token, i in special.items()},
        "additional_special_tokens": [BEGIN_OF_TURN, END_OF_TURN],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN,
        "errors": "replace",
        "model_max_length": shape.max_positions,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(output / "tokenizer_config.json", tokenizer_config)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
