"""What a call of generate asks for: its keywords over the model's defaults, turned into the engine's SamplingParams."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paddle.base import core
from paddlenlp.generation import GenerationConfig
from paddlenlp.utils.log import logger

from paddle_qwen1m.engine import SamplingParams
from paddle_qwen1m.paddlenlp.generation_keys import (
    GREEDY,
    HARMLESS,
    HONOURED,
    MISSING,
    SAMPLING,
    is_known,
    read_file,
    refuse_missing,
    token_ids,
)

DEFAULT_NEW_TOKENS = 20  # what a fresh GenerationConfig says, so it cannot be told from a choice
OPTIONS = (*HONOURED, "attention_mask", "generation_config", "streamer", "tokenizer")


class AnyTemperature(SamplingParams):
    """Those of generate(): PaddleNLP sets the temperature no limit."""

    MAX_TEMPERATURE = math.inf


@dataclass(frozen=True)
class Defaults:
    """generate()'s defaults, and what they were before a caller changed any of them.

    config: the object that callers see. strategy: decode_strategy; where it and do_sample disagree later, the one that
    was changed holds. max_new_tokens, max_length, min_length: an unchanged one nobody chose. with_prompt: unchanged,
    max_length and min_length count the prompt too, as they do in Hugging Face's files. pad_token_id: the one that the
    checkpoint names, None when it names none.
    """

    config: GenerationConfig
    strategy: str
    max_new_tokens: int | None
    max_length: int
    min_length: int
    with_prompt: bool
    pad_token_id: int | None

    @classmethod
    def of(cls, config: GenerationConfig, *, with_prompt: bool = False, pad_token_id: int | None = None) -> Defaults:
        """Those of a PaddleNLP object. Prompt and answer are returned unless its trunc_input is set afterwards."""
        config.trunc_input = False
        return cls(
            config,
            config.decode_strategy,
            config.max_new_tokens,
            config.max_length,
            config.min_length,
            with_prompt,
            config.pad_token_id if pad_token_id is None else pad_token_id,
        )

    @classmethod
    def from_file(cls, values: Mapping[str, Any], source: str, pad_token_id: Any = None) -> Defaults:
        """Those of a generation_config.json, or what a config.json has of its keys; ValueError names `source`.

        As in Hugging Face's: null is off, max_new_tokens wins over max_length, min_new_tokens over min_length.
        pad_token_id: config.json's.
        """
        given = read_file(values, source)
        config = GenerationConfig()
        config.max_new_tokens = None
        for name, value in given.items():
            setattr(config, name, value)
        if "eos_token_id" in given:
            config.eos_token_id = list(given["eos_token_id"] or ())
        pads = given.get("pad_token_id") or ()
        config.pad_token_id = pads[0] if pads else None
        votes = _votes(given.get("decode_strategy"), given.get("do_sample"))
        if len(votes) > 1:
            raise ValueError(f"{source}: do_sample and decode_strategy contradict each other")
        config.decode_strategy = votes.pop() if votes else GREEDY
        config.do_sample = config.decode_strategy == SAMPLING
        for name, old_name in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
            if given.get(name) is not None or given.get(old_name) is None:
                setattr(config, old_name, 0)
        config.min_new_tokens = config.min_new_tokens or 0
        return cls.of(config, with_prompt="paddlenlp_version" not in values, pad_token_id=pad_token_id)


@dataclass(frozen=True)
class Request:
    """One call of generate: how to choose tokens, and how to lay the answer out.

    params: how tokens are chosen; `params_for` gives those of a prompt. bad_words: sequences of token ids that no
    answer has. stop_strings: texts that end one. may_cut: nobody chose max_new_tokens.
    max_length, min_length: lengths of prompt and answer together that hold in place of those in `params`. padding: the
    id that may be padding where there is no attention mask; pad_is_end: it is the one that ends an answer, too.
    """

    params: SamplingParams
    bad_words: tuple[tuple[int, ...], ...]
    stop_strings: tuple[str, ...]
    pad_token_id: int
    trunc_input: bool
    num_return_sequences: int
    padding: int | None
    pad_is_end: bool
    may_cut: bool
    max_length: int | None
    min_length: int | None

    def params_for(self, prompt_tokens: int, max_model_len: int) -> SamplingParams:
        """The params of a prompt of so many tokens; a number of new tokens that nobody chose is what is left at most.

        ValueError where a max_length that counts the prompt leaves nothing.
        """
        longest, shortest = self.params.max_tokens or 0, self.params.min_tokens
        if self.max_length is not None:
            longest = self.max_length - prompt_tokens
            if longest < 1:
                raise ValueError(
                    f"the prompt has {prompt_tokens} tokens and the checkpoint's generation_config.json allows "
                    f"{self.max_length} for prompt and answer together (max_length): give max_new_tokens"
                )
        if self.may_cut:
            longest = min(longest, max(1, max_model_len - prompt_tokens))
        if self.min_length is not None:
            shortest = max(0, self.min_length - prompt_tokens)
        if self.may_cut or self.min_length is not None:
            shortest = min(shortest, longest)
        return replace(self.params, max_tokens=longest, min_tokens=shortest)


def read_request(
    defaults: Defaults,
    base: GenerationConfig,
    keywords: Mapping[str, Any],
    *,
    eos_token_id: Any,
    pad_token_id: int | None,
    vocab_size: int,
) -> Request:
    """Merge a GenerationConfig and the keywords of one call; a keyword that is None counts as not given.

    defaults: the model's; base: the object that is used, theirs or a caller's own. eos_token_id and pad_token_id: the
    model's own, used where `base` has none.
    Raises TypeError for a keyword that does not exist, ValueError for one whose value cannot be used.
    """
    unknown = sorted(set(keywords) - set(HONOURED) - HARMLESS - set(MISSING))
    if unknown:
        raise TypeError(f"generate() has no option {', '.join(unknown)}; it has: {', '.join(OPTIONS)}")
    given = {name: value for name, value in keywords.items() if value is not None}
    refuse_missing({**vars(base), **given})
    ours = base is defaults.config
    strangers = [] if ours else [name for name in vars(base) if not is_known(name)]
    if strangers:
        logger.warning(f"generation_config: {', '.join(strangers)} is unknown here and has no effect")
    given = {name: HONOURED[name](name, value) for name, value in given.items() if name in HONOURED}

    def option(name: str, default: Any) -> Any:
        if name in given:
            return given[name]
        value = getattr(base, name, None)
        return default if value is None else HONOURED[name](name, value)

    def is_token(token: int) -> bool:
        return 0 <= token < vocab_size

    def tokens(name: str, own: Any = None) -> tuple[int, ...]:
        """Token ids of an option. A default outside the vocabulary can never be chosen and counts as none."""
        if name in given:
            _check_tokens(name, given[name], vocab_size)
            return tuple(given[name])
        ids = option(name, () if own is None else HONOURED[name](name, own))
        return tuple(filter(is_token, ids))

    for sequence in given.get("bad_words_ids", ()):
        _check_tokens("bad_words_ids", sequence, vocab_size)

    strategy = _strategy(base, given, defaults.strategy if ours else None)
    eos_ids = tokens("eos_token_id", eos_token_id)
    pads = tokens("pad_token_id", pad_token_id)
    longest, chosen, max_length = _longest(given, base, defaults if ours else None)
    shortest, min_length = _shortest(given, base, defaults if ours else None)
    if shortest > longest:
        raise ValueError(f"min_new_tokens must be between 0 and max_new_tokens ({longest}), got {shortest}")
    temperature = option("temperature", 1.0) if strategy == SAMPLING else 0.0
    samples = option("num_return_sequences", 1)
    if samples > 1 and temperature == 0:
        raise ValueError(f"num_return_sequences={samples} needs do_sample=True: a greedy answer is always the same")

    if temperature == 0:
        idle = [
            name
            for name, off in (("temperature", 0), ("top_k", 0), ("top_p", 1), ("min_p", 0))
            if given.get(name, off) != off
        ]
        if idle:
            logger.warning(f"{', '.join(idle)} has no effect on a greedy answer: give do_sample=True to sample")
    padding, pad_is_end = _padding(given, base, defaults, eos_token_id)
    # As in PaddleNLP's NoBadWordsLogitsProcessor an end of answers is none of the words; suppress_tokens may name it.
    ends = {(token,) for token in eos_ids}
    words = [word for word in option("bad_words_ids", ()) if word not in ends and all(map(is_token, word))]

    return Request(
        AnyTemperature(
            max_tokens=longest,
            min_tokens=shortest,
            temperature=temperature,
            top_k=option("top_k", 0),
            top_p=option("top_p", 1.0),
            min_p=option("min_p", 0.0),
            repetition_penalty=option("repetition_penalty", 1.0),
            presence_penalty=option("presence_penalty", 0.0),
            frequency_penalty=option("frequency_penalty", 0.0),
            logit_bias={**option("sequence_bias", {}), **option("logit_bias", {})} or None,
            stop_token_ids=eos_ids,
            seed=option("seed", None),
        ),
        bad_words=(*words, *((token,) for token in tokens("suppress_tokens"))),
        stop_strings=option("stop_strings", ()),
        pad_token_id=(*pads, *eos_ids, 0)[0],
        trunc_input=given.get("trunc_input", ours and bool(base.trunc_input)),
        num_return_sequences=samples,
        padding=padding,
        pad_is_end=pad_is_end,
        may_cut=not chosen,
        max_length=max_length,
        min_length=min_length,
    )


def _check_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"{name} must be in [0, {vocab_size}), got {outside[0]}")


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
    return str(HONOURED["decode_strategy"]("decode_strategy", *named))


def _votes(decode_strategy: str | None, do_sample: Any) -> set[str]:
    votes = set() if decode_strategy is None else {decode_strategy}
    if do_sample is not None:
        votes.add(SAMPLING if HONOURED["do_sample"]("do_sample", do_sample) else GREEDY)
    return votes


def _longest(given: dict[str, Any], base: GenerationConfig, defaults: Defaults | None) -> tuple[int, bool, int | None]:
    """max_new_tokens, whether anybody chose it, and the max_length that counts the prompt too and holds instead.

    In a call, and in a caller's own object, PaddleNLP's older max_length counts new tokens only.
    """
    _agree(given, "max_new_tokens", "max_length")
    read = HONOURED["max_new_tokens"]
    for name in ("max_new_tokens", "max_length"):
        if name in given:
            return read("max_new_tokens", given[name]), True, None
    new, old, own = base.max_new_tokens, base.max_length or None, defaults is not None
    new_changed = defaults is not None and new != defaults.max_new_tokens
    old_changed = defaults is not None and base.max_length != defaults.max_length
    if old is not None and not new_changed and (old_changed or new in (None, DEFAULT_NEW_TOKENS)):
        longest = read("max_length", old)
        with_prompt = defaults is not None and defaults.with_prompt and not old_changed
        return longest, old_changed or not own, longest if with_prompt else None
    if new is None:
        return DEFAULT_NEW_TOKENS, False, None
    return read("max_new_tokens", new), new_changed or (not own and new != DEFAULT_NEW_TOKENS), None


def _shortest(given: dict[str, Any], base: GenerationConfig, defaults: Defaults | None) -> tuple[int, int | None]:
    """min_new_tokens, and the min_length that counts the prompt too and holds instead."""
    _agree(given, "min_new_tokens", "min_length")
    for name in ("min_new_tokens", "min_length"):
        if name in given:
            return given[name], None
    if base.min_new_tokens:
        return HONOURED["min_new_tokens"]("min_new_tokens", base.min_new_tokens), None
    old = HONOURED["min_length"]("min_length", base.min_length or 0)
    if defaults is not None and defaults.with_prompt and old == defaults.min_length:
        return 0, old or None
    return old, None


def _agree(given: dict[str, Any], name: str, old_name: str) -> None:
    if name in given and old_name in given and given[name] != given[old_name]:
        raise ValueError(
            f"{name}={given[name]} and {old_name}={given[old_name]} both count new tokens: give {name} alone"
        )


def _padding(
    given: dict[str, Any], base: GenerationConfig, defaults: Defaults, eos_token_id: Any
) -> tuple[int | None, bool]:
    """pad_token_id where it is named, and whether it is the one id that ends an answer."""
    pads = given.get("pad_token_id") or token_ids("pad_token_id", _first(base.pad_token_id, defaults.pad_token_id, []))
    ends = given.get("eos_token_id") or token_ids("eos_token_id", _first(base.eos_token_id, eos_token_id, []))
    return (pads[0], ends == pads[:1]) if pads else (None, False)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
