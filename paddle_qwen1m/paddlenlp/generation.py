"""PaddleNLP's words for generation turned into the engine's: a batch into prompts, options into SamplingParams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import paddle
from paddle.base import core
from paddlenlp.generation import GenerationConfig

from paddle_qwen1m.engine import SamplingParams

GREEDY, SAMPLING = "greedy_search", "sampling"
DEFAULT_NEW_TOKENS = 20  # what a fresh GenerationConfig says, so it cannot be told from a choice

OPTIONS = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "do_sample",
    "decode_strategy",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "eos_token_id",
    "pad_token_id",
    "seed",
    "trunc_input",
)
# accepted and without effect: the cache is always used, the prompt brings its own first token
IGNORED = ("use_cache", "bos_token_id", "use_fast", "use_fp16_decoding", "fast_ptq_sampling", "synced_gpus")
# PaddleNLP options that this model does not have, with the value that means "off"
ONLY_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "num_return_sequences": (1, None),
    "diversity_rate": (0, None),
    "length_penalty": (0, 1, None),
    "early_stopping": (False, None),
    "no_repeat_ngram_size": (0, None),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "decoder_start_token_id": (None,),
    "stopping_criteria": (None,),
    "logits_processors": (None,),
}

TokenIds = Union[paddle.Tensor, np.ndarray, Sequence[int], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Request:
    """One call of generate: how to choose tokens, and how to lay the answer out."""

    params: SamplingParams
    pad_token_id: int
    trunc_input: bool


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts. ids: int64 [B, N] as given; starts: the column of each row's first real token."""

    ids: np.ndarray
    starts: tuple[int, ...]

    @property
    def prompts(self) -> list[np.ndarray]:
        """Each row without its padding: int64 [n]."""
        return [row[start:] for row, start in zip(self.ids, self.starts)]


def read_batch(input_ids: TokenIds, attention_mask: Any | None, vocab_size: int) -> Batch:
    """Check a batch of token ids before any work is done.

    input_ids: integers [N] or [B, N], a tensor, an array or nested lists. attention_mask: the same shape, 1 for tokens
    and 0 for padding, which may stand on the left only; None means that there is no padding.
    Raises ValueError for an empty prompt, padding on the right, ids outside [0, vocab_size) and wrong types or shapes.
    """
    ids = _integers("input_ids", input_ids)
    mask = np.ones(ids.shape, dtype=bool) if attention_mask is None else _mask(attention_mask, ids.shape)
    starts: list[int] = []
    for row in range(ids.shape[0]):
        tokens = np.flatnonzero(mask[row])
        if tokens.size == 0:
            raise ValueError(f"row {row} of input_ids is an empty prompt: give at least one token")
        if tokens[-1] != ids.shape[1] - 1 or tokens.size != ids.shape[1] - tokens[0]:
            raise ValueError(
                f"row {row} of attention_mask has a 0 right of a 1: padding may stand on the left only; "
                'set tokenizer.padding_side = "left"'
            )
        starts.append(int(tokens[0]))
    wrong = np.argwhere(mask & ((ids < 0) | (ids >= vocab_size)))
    if wrong.size:
        row, column = wrong[0]
        raise ValueError(
            f"input_ids[{row}, {column}] is {ids[row, column]}, outside the vocabulary [0, {vocab_size}): "
            "was another model's tokenizer used?"
        )
    return Batch(ids, tuple(starts))


def read_positions(positions: Sequence[int] | None, batch: Batch) -> list[int]:
    """Columns of the batch whose logits are wanted; the last one when `positions` is None. ValueError for others."""
    length = batch.ids.shape[1]
    if positions is None:
        return [length - 1]
    columns = [int(column) for column in np.asarray(positions).reshape(-1)]
    low = max(batch.starts)
    if not columns or min(columns) < low or max(columns) >= length:
        raise ValueError(
            f"positions must be columns of input_ids in [{low}, {length}), padding left out; got {columns}"
        )
    return columns


def read_request(
    base: GenerationConfig,
    keywords: dict[str, Any],
    *,
    usual_strategy: str | None,
    trunc_input: bool,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    vocab_size: int,
) -> Request:
    """Merge a GenerationConfig and the keywords of one call; a keyword that is None counts as not given.

    usual_strategy: the strategy that `base` was loaded with: where its do_sample and decode_strategy disagree, the one
    that was changed since then holds. eos_token_id and pad_token_id: the model's own, used where `base` has none.
    Raises TypeError for a keyword that does not exist, ValueError for one whose value cannot be used.
    """
    unknown = sorted(set(keywords) - set(OPTIONS) - set(IGNORED) - set(ONLY_OFF))
    if unknown:
        raise TypeError(f"generate() has no option {', '.join(unknown)}; it has: {', '.join(OPTIONS)}")
    given = {name: value for name, value in keywords.items() if value is not None}

    def option(name: str, default: Any = None) -> Any:
        value = given.get(name)
        if value is None:
            value = getattr(base, name, None)
        return default if value is None else value

    strategy = _strategy(base, given, usual_strategy)
    for name, neutral in ONLY_OFF.items():
        value = given.get(name, getattr(base, name, None))
        if value not in neutral:
            raise ValueError(
                f"{name}={value!r}: this model decodes one answer a prompt, greedy or sampled; leave {name} out"
            )

    def tokens(name: str, own: Any) -> tuple[int, ...]:
        """Token ids of an option. A default outside the vocabulary can never be chosen and counts as none."""
        if name in given:
            return tuple(_token(name, token, vocab_size) for token in _listed(given[name]))
        return tuple(token for token in _listed(option(name, own)) if token is not None and 0 <= token < vocab_size)

    eos_ids = tokens("eos_token_id", eos_token_id)
    pad, *_ = *tokens("pad_token_id", pad_token_id), *eos_ids, 0

    longest = _length(given, base, "max_new_tokens", "max_length", DEFAULT_NEW_TOKENS)
    shortest = _length(given, base, "min_new_tokens", "min_length", 0)
    if longest < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {longest}")
    if not 0 <= shortest <= longest:
        raise ValueError(f"min_new_tokens must be between 0 and max_new_tokens ({longest}), got {shortest}")

    temperature = _number("temperature", option("temperature", 1.0))
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or greater, got {temperature}")
    top_p = _number("top_p", option("top_p", 1.0))
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    top_k = _whole("top_k", option("top_k", 0))
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or greater, got {top_k}")
    penalty = _number("repetition_penalty", option("repetition_penalty", 1.0))
    if penalty <= 0:
        raise ValueError(f"repetition_penalty must be greater than 0 (1 is off), got {penalty}")
    seed = option("seed")
    if seed is not None:
        seed = _whole("seed", seed)
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")

    return Request(
        SamplingParams(
            max_new_tokens=longest,
            min_new_tokens=shortest,
            temperature=temperature if strategy == SAMPLING else 0.0,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=penalty,
            eos_token_ids=eos_ids,
            seed=seed,
        ),
        pad,
        bool(given.get("trunc_input", trunc_input)),
    )


def drawn_seed() -> int:
    """The next number of Paddle's default generator, in [0, 2**63): the same after the same `paddle.seed`."""
    return int(core.default_cpu_generator().random()) & (2**63 - 1)


def _strategy(base: GenerationConfig, given: dict[str, Any], usual: str | None) -> str:
    named = _votes(given.get("decode_strategy"), given.get("do_sample"))
    if not named:
        named = _votes(getattr(base, "decode_strategy", None), getattr(base, "do_sample", None)) or {GREEDY}
        if len(named) > 1:
            named.discard(usual or "")
    if len(named) > 1:
        raise ValueError("do_sample and decode_strategy contradict each other: give one of them")
    strategy = str(*named)
    if strategy not in (GREEDY, SAMPLING):
        raise ValueError(f"decode_strategy={strategy!r}: this model has {GREEDY!r} and {SAMPLING!r}")
    return strategy


def _votes(decode_strategy: str | None, do_sample: bool | None) -> set[str]:
    votes = set() if decode_strategy is None else {decode_strategy}
    if do_sample is not None:
        votes.add(SAMPLING if do_sample else GREEDY)
    return votes


def _length(given: dict[str, Any], base: GenerationConfig, name: str, old_name: str, unset: int) -> int:
    """A number of new tokens, by its name or by PaddleNLP's older one, which also counts new tokens only."""
    if name in given and old_name in given and given[name] != given[old_name]:
        raise ValueError(
            f"{name}={given[name]} and {old_name}={given[old_name]} both count new tokens: give {name} alone"
        )
    for key in (name, old_name):
        if key in given:
            return _whole(key, given[key])
    chosen = getattr(base, name, None)
    old = getattr(base, old_name, None)
    return _whole(name, old if old and chosen in (None, unset) else unset if chosen is None else chosen)


def _integers(name: str, values: Any) -> np.ndarray:
    """int64 [B, N]; ValueError for other types and shapes."""
    raw = values.numpy() if isinstance(values, paddle.Tensor) else values
    try:
        array = np.asarray(raw)
    except ValueError:
        array = np.asarray(raw, dtype=object)
    if array.dtype == object:
        raise ValueError(f"{name} must be rows of equal length: pad them on the left and give an attention_mask")
    if array.size == 0:
        raise ValueError(f"{name} has shape {list(array.shape)}: an empty prompt; give at least one token")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers (int64), got {array.dtype}")
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must be [length] or [batch, length], got shape {list(array.shape)}")
    return np.array(array, dtype=np.int64, ndmin=2)


def _mask(attention_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(attention_mask.numpy() if isinstance(attention_mask, paddle.Tensor) else attention_mask)
    if array.ndim == 1:
        array = array[None]
    if array.shape != shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {list(shape)}, got {list(array.shape)}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError("attention_mask must be 1 for tokens and 0 for padding, got other values")
    return array.astype(bool)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _token(name: str, value: Any, vocab_size: int) -> int:
    token = _whole(name, value)
    if not 0 <= token < vocab_size:
        raise ValueError(f"{name} must be in [0, {vocab_size}), got {token}")
    return token


def _whole(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)
