"""What fits on which GPUs, by the arithmetic that the engine admits by: the plan of one configuration, and a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from paddle_qwen1m.config import ModelConfig, SparseBudgets, published_budgets
from paddle_qwen1m.dtypes import FP8, INT8, QUANTIZATIONS
from paddle_qwen1m.engine.admission import LEFT_TO_THE_DRIVER, Allowance, Need, fitting_options, longest_fitting
from paddle_qwen1m.options import GPU_BATCHED_TOKENS, MAX_NUM_SEQS, EngineOptions
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.parallel.split import check_degree, degrees, local_config
from paddle_qwen1m.plan import scale_bytes_per_token

GPUS = {
    "RTX-3090": 25_769_803_776,
    "RTX-4090": 25_757_220_864,
    "RTX-5090": 34_190_917_632,
    "A100-40GB": 42_949_672_960,
    "L40S": 48_305_799_168,
    "RTX-A6000": 51_527_024_640,
    "H100-80GB": 85_520_809_984,
    "A100-80GB": 85_899_345_920,
    "H20": 102_625_181_696,
    "H200": 150_754_820_096,
    "B200": 192_265_846_784,
}
"""Bytes that the driver reports of cards."""
OF_THE_PROCESS = 1_200_000_000
"""Bytes of them that an engine does not find free at its start, measured on an H200: half is the driver's own, half its
process's context.
"""
OF_THE_COLLECTIVES = 910_000_000
"""Those that NCCL has taken by then on each of several cards."""
MEMORIES = (24, 40, 48, 80, 141)
"""Memory of common cards in GB, counted as 10^9 bytes."""
TABLE_RANKS = (1, 2, 4, 8)
SMALLEST_CHUNK = 2048

_BOTH: dict[str, Any] = {
    "vocab_size": 152_064,
    "rope_theta": 1e7,
    "max_position_embeddings": 1_010_000,
    "torch_dtype": "bfloat16",
    "dual_chunk_attention_config": {
        "chunk_size": 262_144,
        "local_size": 8_192,
        "original_max_position_embeddings": 262_144,
    },
}
_SHAPES = {
    "7B": {
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "14B": {
        "hidden_size": 5_120,
        "intermediate_size": 13_824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}
PUBLISHED_KEYS = {name: {**_BOTH, **shapes} for name, shapes in _SHAPES.items()}
"""What the models' config.json says of their shapes, by size."""
PUBLISHED = {name: ModelConfig.from_dict(keys) for name, keys in PUBLISHED_KEYS.items()}
"""By size; a hub's name of one is it too."""


def usable(gpu: str, ranks: int) -> int:
    """Bytes that an engine on so many cards takes of each, unless it is told otherwise; gpu: of GPUS."""
    return GPUS[gpu] - LEFT_TO_THE_DRIVER - OF_THE_PROCESS - (OF_THE_COLLECTIVES if ranks > 1 else 0)


def published(name: str) -> ModelConfig | None:
    """The shapes of a published model by its size, "7B" or "14B", or its name on a hub."""
    sizes = {f"qwen2.5-{size.lower()}-instruct-1m": size for size in PUBLISHED}
    return PUBLISHED.get(sizes.get(name.rpartition("/")[2].lower(), name.upper()))


@dataclass(frozen=True)
class Way:
    """Something that makes more fit. option: how it is written. length: the longest context with it alone."""

    option: str
    costs: str
    length: int | None


@dataclass(frozen=True)
class Plan:
    """Bytes on each of `ranks` GPUs, of which the engine may take `allowed`, for contexts of `length` tokens; `longest`
    is the most that fit, None where the weights and the workspace do not. chunk: tokens of a prefill chunk. cache: of
    keys and values, kept as cache_dtype; scales: of those of a byte; in_16_bits: layers whose are not.
    quantization: how weights are kept, None: in 16 bits.
    imbalance: Placement.imbalance of several ranks with budgets, with heads as they are placed and in published order.
    """

    ranks: int
    allowed: int
    length: int
    chunk: int
    weights: int
    cache_dtype: str
    cache: int
    scales: int
    workspace: int
    longest: int | None
    quantization: str | None = None
    ways: tuple[Way, ...] = ()
    in_16_bits: int = 0
    imbalance: tuple[float, float] | None = None

    @property
    def left(self) -> int:
        """What is not needed; less than 0 where that much is missing."""
        return self.allowed - self.weights - self.cache - self.scales - self.workspace

    @property
    def fits(self) -> bool:
        return self.longest is not None and self.longest >= self.length

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "left": self.left, "fits": self.fits}

    def lines(self) -> Iterator[str]:
        """For people to read."""
        each = "" if self.ranks == 1 else f" of each of {self.ranks} GPUs"
        rows = [("may be used", self.allowed), ("weights", self.weights), ("keys and values", self.cache)]
        if self.scales:
            rows.append(("their scales", self.scales))
        rows += [("workspace", self.workspace), ("left" if self.left >= 0 else "missing", abs(self.left))]
        remarks = {
            "may be used": each,
            "weights": "" if self.quantization is None else f", {self.quantization}",
            "keys and values": f", {self.cache_dtype}"
            + (self.in_16_bits > 0) * f", {self.in_16_bits} layers in 16 bits",
            "workspace": f", chunks of {self.chunk:,} tokens",
        }
        for name, size in rows:
            yield f"{name:<16}{size / 1e9:>8.2f} GB{remarks.get(name, '')}"
        if self.imbalance is not None:
            placed, published = self.imbalance
            yield (
                f"sparse attention: the busiest GPU of each layer visits {placed:.3f} times the mean of keys, with "
                f"heads in published order {published:.3f} times"
            )
        longest = "no length" if self.longest is None else f"{self.longest:,} tokens"
        yield f"{self.length:,} tokens {'fit' if self.fits else 'do not fit'}; the longest that fits: {longest}"
        for way in self.ways:
            with_it = "still none" if way.length is None else f"{way.length:,} tokens"
            yield f"  {way.option}: {with_it}; {way.costs}"


def plan(
    config: ModelConfig,
    memory: int,
    *,
    ranks: int = 1,
    length: int | None = None,
    options: EngineOptions | None = None,
    budgets: SparseBudgets | None = None,
    in_16_bits: int = 0,
) -> Plan:
    """What a context of `length` tokens takes, the model's longest by default, where the engine may use `memory` bytes
    of each GPU. budgets: of sparse prefill. in_16_bits: layers that an 8-bit cache does not round. ValueError for ranks
    or a length that the model does not have.

    Where nobody chose, chunks are smaller and keys and values int8 if it would not fit otherwise, as in the engine.
    Where it does not fit even so, the ways out come in the order of what they cost.
    """
    check_degree(config, ranks, "tensor_parallel_size")
    options = options or EngineOptions()

    def longest(ranks: int, options: EngineOptions) -> int | None:
        return longest_fitting(_need(config, ranks, options, budgets, in_16_bits), Allowance(memory))

    wanted = config.max_position_embeddings if length is None else length
    if not 1 <= wanted <= config.max_position_embeddings:
        raise ValueError(
            f"max_model_len must be 1 to max_position_embeddings, {config.max_position_embeddings}, got {wanted}"
        )

    computed = _computed(config)
    shape: dict[str, Any] = {"kept": computed, "computed": computed, "on_gpu": True, "in_16_bits": in_16_bits}
    options = fitting_options(config, ranks, options, budgets, Allowance(memory), wanted, **shape)
    cache_dtype = options.kv_cache_dtype or computed
    own = _need(config, ranks, options, budgets, in_16_bits)
    of_token = scale_bytes_per_token(local_config(config, ranks), cache_dtype, in_16_bits)
    scales = -(-wanted // own.page_size) * own.page_size * of_token
    made = Plan(
        ranks,
        memory,
        wanted,
        own.chunk,
        own.weights,
        cache_dtype,
        own.cache(wanted) - scales,
        scales,
        own.workspace(wanted),
        longest(ranks, options),
        options.quantization,
        in_16_bits=in_16_bits if cache_dtype in QUANTIZATIONS else 0,
        imbalance=None if budgets is None or ranks == 1 else _imbalance(config, ranks, budgets),
    )
    if made.fits:
        return made
    ways = []
    if options.max_num_seqs > 1:
        ways.append(Way("--max-num-seqs 1", "one answer at a time", longest(ranks, replace(options, max_num_seqs=1))))
    chunks = [own.chunk >> shift for shift in range(1, own.chunk.bit_length()) if own.chunk >> shift >= SMALLEST_CHUNK]
    ways += _enough(
        wanted,
        (
            Way(
                f"--max-num-batched-tokens {chunk}",
                "a little slower, and sparse keys are chosen for smaller chunks",
                longest(ranks, replace(options, max_num_batched_tokens=chunk)),
            )
            for chunk in chunks
        ),
    )
    if cache_dtype not in QUANTIZATIONS:
        int8 = longest(ranks, replace(options, kv_cache_dtype=INT8))
        ways.append(Way(f"--kv-cache-dtype {INT8}", "keys and values rounded to a byte, with scales", int8))
    if options.quantization is None:
        rounded = longest(ranks, replace(options, quantization=FP8))
        ways.append(Way(f"--quantization {FP8}", "weights rounded to a byte, with scales", rounded))
    more = [degree for degree in degrees(config) if degree > ranks and degree in TABLE_RANKS]
    ways += _enough(
        wanted, (Way(f"--tensor-parallel-size {degree}", "more GPUs", longest(degree, options)) for degree in more)
    )
    if made.longest is not None:
        ways.append(Way(f"--max-model-len {made.longest}", "shorter contexts", made.longest))
    return replace(made, ways=tuple(ways))


def _imbalance(config: ModelConfig, ranks: int, budgets: SparseBudgets) -> tuple[float, float]:
    placed, published = Placement.balanced(config, ranks, budgets), Placement.published(config, ranks)
    return placed.imbalance(budgets), published.imbalance(budgets)


def _need(
    config: ModelConfig, ranks: int, options: EngineOptions, budgets: SparseBudgets | None, in_16_bits: int = 0
) -> Need:
    """Of a GPU, which keeps and computes in 16 bits."""
    computed = _computed(config)
    shape: dict[str, Any] = {"kept": computed, "computed": computed, "on_gpu": True, "in_16_bits": in_16_bits}
    return Need.of(config, ranks, options, budgets, **shape)


def _computed(config: ModelConfig) -> str:
    return "bfloat16" if config.dtype == "float32" else config.dtype


def _enough(wanted: int, ways: Iterable[Way]) -> list[Way]:
    """The first of these that lets `wanted` tokens fit, or the last where none does."""
    last = None
    for last in ways:
        if last.length is not None and last.length >= wanted:
            break
    return [] if last is None else [last]


def table(
    chunk: int = GPU_BATCHED_TOKENS, kv_cache_dtype: str | None = None, quantization: str | None = None
) -> Iterator[str]:
    """Lines of a Markdown table: a row a model and number of cards, a column a card, thousands of tokens in a cell."""
    yield f"| | cards | {' | '.join(f'{memory} GB' for memory in MEMORIES)} |"
    yield "|---" * (2 + len(MEMORIES)) + "|"
    options = EngineOptions(
        max_num_batched_tokens=chunk,
        max_num_seqs=MAX_NUM_SEQS,
        kv_cache_dtype=kv_cache_dtype,
        quantization=quantization,
    )
    for name, config in PUBLISHED.items():
        for ranks in degrees(config):
            if ranks in TABLE_RANKS:
                need = _need(config, ranks, options, published_budgets(config))
                allowed = (Allowance(memory * 10**9 - LEFT_TO_THE_DRIVER) for memory in MEMORIES)
                yield f"| {name} | {ranks} | {' | '.join(_cell(longest_fitting(need, one)) for one in allowed)} |"


def _cell(tokens: int | None) -> str:
    return "-" if tokens is None or tokens < 1000 else f"{tokens // 1000:,}K"
