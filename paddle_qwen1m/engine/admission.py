"""Decides by arithmetic what fits: how large the KV cache becomes, which requests it can hold, what to do otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Callable

from paddle_qwen1m.cache import choose_page_size
from paddle_qwen1m.config import ModelConfig, SparseBudgets
from paddle_qwen1m.dtypes import INT8
from paddle_qwen1m.engine.core import Request
from paddle_qwen1m.options import AUTO, EngineOptions, default_batched_tokens, default_pause_tokens
from paddle_qwen1m.parallel.split import local_config
from paddle_qwen1m.plan import cache_bytes_per_token, longest_context, plan_workspace, weight_bytes, widened_bytes

LEFT_TO_THE_DRIVER = 1_500_000_000
"""Bytes of a GPU that nobody asked for share of it: libraries' buffers, and what allocators round up."""
CPU_CACHE_SHARE = 4
"""Keys and values on a CPU get one part of so many of the memory that is available at start."""
GIB = 1 << 30


class NotEnoughMemory(MemoryError):
    """More memory is needed than there is; the message says how much, and which options help."""


@dataclass(frozen=True)
class Budget:
    """What a cache's size depends on, in bytes, of one rank: a page in all layers, the activations of the largest step,
    and what is available for both (None: unknown, so nothing is refused).
    """

    page_bytes: int
    activations: int
    available: int | None

    def pages(self) -> int | None:
        """Pages that fit beside the activations."""
        return None if self.available is None else max(0, (self.available - self.activations) // self.page_bytes)


def cache_pages(needed: Sequence[int], spare: int, budget: Budget, *, page_size: int) -> int:
    """Pages of a cache for requests that need so many each, with `spare` more for each of them where they fit.

    With less memory the requests take turns, in a cache that holds the largest of them at least. NotEnoughMemory when
    even that does not fit.
    """
    largest, together = max(needed), sum(needed)
    fits = budget.pages()
    if fits is None:
        return together + spare * len(needed)
    if largest > fits:
        wanted = largest * budget.page_bytes
        raise NotEnoughMemory(
            f"{largest * page_size:,} tokens need {(wanted + budget.activations) / 1e9:.1f} GB beside the weights "
            f"({wanted / 1e9:.1f} GB of keys and values, {budget.activations / 1e9:.1f} GB of activations), and "
            f"{(budget.available or 0) / 1e9:.1f} GB are available: a shorter prompt or answer, fewer "
            "max_num_batched_tokens, kv_cache_dtype int8, or more ranks need less"
        )
    return max(largest, min(together + spare * len(needed), fits))


@dataclass(frozen=True)
class Allowance:
    """Bytes that one rank of an engine may take. total: weights, workspace, keys and values together, None where the
    machine does not say. cache: keys and values alone, None where the total alone bounds them; `exact`, no less either.
    """

    total: int | None
    cache: int | None = None
    exact: bool = False

    @classmethod
    def of_gpu(cls, free: int, total: int, utilization: float | None, cache_bytes: int | None) -> Allowance:
        """On a GPU of which `free` of `total` bytes are nobody's; ValueError for a share that is not to be had."""
        if cache_bytes is not None:
            return cls(free, cache_bytes, exact=True)
        if utilization is None:
            return cls(max(0, free - LEFT_TO_THE_DRIVER))
        wanted = int(utilization * total)
        if wanted > free:
            raise ValueError(
                f"gpu_memory_utilization={utilization:g} of a GPU's {_gb(total)} is {_gb(wanted)}, but only "
                f"{_gb(free)} of it are free at start: give at most {free / total - 0.005:.2f}, or end what holds the "
                "rest"
            )
        return cls(wanted)

    @classmethod
    def of_host(cls, available: int | None, cache_bytes: int | None) -> Allowance:
        """On a CPU, for a rank to which `available` bytes are left."""
        if cache_bytes is not None:
            return cls(available, cache_bytes, exact=True)
        return cls(available, None if available is None else available // CPU_CACHE_SHARE)


@dataclass(frozen=True)
class Need:
    """What serving takes of one rank, in bytes: weights, a page in all layers, and `workspace(length)` beside them for
    contexts of up to `length` tokens. longest: that the model has. chunk: most tokens of a prefill chunk.
    """

    weights: int
    page_bytes: int
    page_size: int
    workspace: Callable[[int], int]
    longest: int
    chunk: int

    @classmethod
    def of(
        cls,
        shapes: ModelConfig,
        degree: int,
        options: EngineOptions,
        budgets: SparseBudgets | None,
        *,
        kept: str,
        computed: str,
        on_gpu: bool,
        in_16_bits: int = 0,
    ) -> Need:
        """Of one rank of `degree`. kept: the type of the weights; computed: what is computed in; in_16_bits: layers of
        an 8-bit cache that are not rounded to int8.
        """
        local = local_config(shapes, degree)
        cached = options.kv_cache_dtype or computed
        chunk = options.max_num_batched_tokens or default_batched_tokens(on_gpu)
        page_size = choose_page_size(shapes.dual_chunk.chunk_len, options.page_size)

        def workspace(length: int) -> int:
            planned = plan_workspace(
                local,
                length,
                max_num_batched_tokens=chunk,
                max_pause_tokens=options.max_pause_tokens or default_pause_tokens(on_gpu),
                max_num_seqs=options.max_num_seqs,
                budgets=budgets if length > options.sparse_threshold else None,
                dtype=computed,
                quantization=options.quantization,
                degree=degree,
            )
            return planned.total + widened_bytes(local, length, cached, computed)

        return cls(
            weights=weight_bytes(local, kept, options.quantization),
            page_bytes=page_size * cache_bytes_per_token(local, cached, in_16_bits),
            page_size=page_size,
            workspace=workspace,
            longest=shapes.max_position_embeddings,
            chunk=chunk,
        )

    def cache(self, length: int) -> int:
        """Bytes of the pages of one context."""
        return -(-length // self.page_size) * self.page_bytes


@dataclass(frozen=True)
class Capacity:
    """What an engine can hold: contexts of max_model_len tokens, cache_tokens together."""

    max_model_len: int
    cache_tokens: int


def fitting_options(
    shapes: ModelConfig,
    degree: int,
    options: EngineOptions,
    budgets: SparseBudgets | None,
    allowance: Allowance,
    max_model_len: int | None,
    *,
    kept: str,
    computed: str,
    on_gpu: bool,
    in_16_bits: int = 0,
) -> EngineOptions:
    """The options, or where contexts of max_model_len do not fit with them, the first of those that let them: on a GPU
    chunks of three quarters of the tokens or half, an 8-bit cache, both. What a user chose stays. The arguments are
    those of Need.of and choose_capacity.
    """
    if max_model_len == AUTO:
        return options
    wanted = shapes.max_position_embeddings if max_model_len is None else max_model_len
    chunks: list[int | None] = [options.max_num_batched_tokens]
    if options.max_num_batched_tokens is None and on_gpu:
        chunks += [default_batched_tokens(on_gpu) * quarters // 4 for quarters in (3, 2)]
    kinds = [None, INT8] if options.kv_cache_dtype is None else [options.kv_cache_dtype]
    for kind in kinds:
        for chunk in chunks:
            one = replace(options, kv_cache_dtype=kind, max_num_batched_tokens=chunk)
            shape: dict[str, Any] = {"kept": kept, "computed": computed, "on_gpu": on_gpu, "in_16_bits": in_16_bits}
            need = Need.of(shapes, degree, one, budgets, **shape)
            if (longest_fitting(need, allowance) or 0) >= wanted:
                return one
    return options


def choose_capacity(need: Need, allowance: Allowance, max_model_len: int | None) -> Capacity:
    """How large the KV cache becomes, for contexts of max_model_len: None is all that the model has, AUTO what fits.

    NotEnoughMemory when weights and workspace leave nothing; ValueError when the cache would not hold one context.
    """
    fitting = longest_fitting(need, allowance)
    length = need.longest if max_model_len is None else max_model_len
    if length > need.longest:
        raise ValueError(f"max_model_len must be at most max_position_embeddings, {need.longest}, got {length}")
    if length == AUTO:
        length = fitting or min(need.longest, need.chunk)
    room = _cache_room(need, allowance, length)
    if room is None:
        return Capacity(length, -(-length // need.page_size) * need.page_size)
    if room < need.page_bytes or (allowance.exact and _beside(need, allowance, length) < room):
        raise NotEnoughMemory(_out_of_memory(need, allowance, length, fitting))
    tokens = room // need.page_bytes * need.page_size
    if tokens < length:
        raise ValueError(
            f"The model's max sequence length ({length}) is larger than the maximum number of tokens that can be "
            f"stored in the KV cache ({tokens}). To serve at least one request with the model's max seq len "
            f"({length}), {need.cache(length) / GIB:.2f} GiB KV cache is needed, which is larger than the available KV "
            f"cache memory ({room / GIB:.2f} GiB). Based on the available memory, the estimated maximum model length "
            f"is {fitting or tokens}. Reduce max_model_len (max_model_len='auto' takes the longest that fits), "
            f"increase tensor_parallel_size, {_more_cache(need, allowance, length)}, or reduce max_num_batched_tokens "
            f"({need.chunk}), which leaves more for the cache."
        )
    return Capacity(length, tokens)


def _beside(need: Need, allowance: Allowance, length: int) -> int:
    """Bytes that weights and workspace leave of the total; without a total as many as are asked for."""
    if allowance.total is None:
        return allowance.cache or need.cache(length)
    return allowance.total - need.weights - need.workspace(length)


def _cache_room(need: Need, allowance: Allowance, length: int) -> int | None:
    """Bytes that keys and values get while contexts of up to `length` are served; None where nobody knows."""
    if allowance.exact:
        return allowance.cache
    if allowance.total is None:
        return None
    left = _beside(need, allowance, length)
    return left if allowance.cache is None else min(left, allowance.cache)


def longest_fitting(need: Need, allowance: Allowance) -> int | None:
    """The longest context that one cache can hold; None when not one token does."""

    def fits(length: int) -> bool:
        room = _cache_room(need, allowance, length)
        return room is None or need.cache(length) <= min(room, _beside(need, allowance, length))

    return longest_context(need.longest, fits)


def _more_cache(need: Need, allowance: Allowance, length: int) -> str:
    """What makes the cache large enough; a number of bytes counts in whole pages."""
    wanted = f"give kv_cache_memory_bytes={need.cache(length)}"
    return wanted if allowance.cache is not None else f"raise gpu_memory_utilization or {wanted}"


def _out_of_memory(need: Need, allowance: Allowance, length: int, fitting: int | None) -> str:
    """The text in place of the device's own, which would come later and say less."""
    workspace, cache = need.workspace(length), allowance.cache if allowance.exact else None
    parts = (
        f"the weights ({_gb(need.weights)}) and the workspace of a chunk of {need.chunk:,} tokens ({_gb(workspace)})"
    )
    if cache is not None:
        parts = f"{parts} and kv_cache_memory_bytes ({_gb(cache)})"
    ways = [
        "reduce max_num_batched_tokens or max_num_seqs",
        "increase tensor_parallel_size",
        "on a GPU raise gpu_memory_utilization, on a CPU give dtype='bfloat16'",
        "give quantization='fp8' or 'int8'",
    ]
    if allowance.exact:
        ways[2] = "reduce kv_cache_memory_bytes"
    if fitting is not None and fitting < length:
        ways.insert(0, f"reduce max_model_len ({length}) to at most {fitting}")
    needed = need.weights + workspace + (cache or 0)
    return (
        f"out of memory, found before anything was loaded: {parts} need {_gb(needed)}, and {_gb(allowance.total or 0)} "
        f"may be used: {', or '.join(ways)}"
    )


@dataclass(frozen=True)
class Limits:
    """What a request must keep to. cache_tokens: of the KV cache; None while it is made for those that come."""

    max_model_len: int
    max_position_embeddings: int
    vocab_size: int
    cache_tokens: int | None = None

    def check(self, request: Request) -> None:
        """ValueError for a request that can never run: tokens that the model has not, or too many."""
        prompt = request.prompt
        if prompt.min() < 0 or prompt.max() >= self.vocab_size:
            raise ValueError(
                f"token ids must be 0 to {self.vocab_size - 1}, got {prompt.min()} to {prompt.max()}: another model's "
                "tokenizer?"
            )
        self.check_length(len(prompt), request.max_length - len(prompt))

    def check_length(self, prompt: int, max_new_tokens: int = 0) -> None:
        """ValueError when a prompt of so many tokens and its answer do not fit max_model_len or the cache."""
        length, most = prompt + max_new_tokens, self.max_position_embeddings
        if length > self.max_model_len:
            all_there_is = ", all that the model has" if self.max_model_len == most else ""
            self._refuse(prompt, max_new_tokens, self.max_model_len, f"max_model_len ({{}} tokens{all_there_is})")
        if self.cache_tokens is not None and length > self.cache_tokens:
            self._refuse(prompt, max_new_tokens, self.cache_tokens, "the KV cache ({} tokens)")

    def _refuse(self, prompt: int, max_new_tokens: int, limit: int, capacity: str) -> None:
        most = self.max_position_embeddings
        excess, ways = prompt + max_new_tokens - limit, []
        if prompt < limit:
            ways.append(f"ask for at most {limit - prompt} new tokens")
        ways.append(f"shorten the prompt by {excess} tokens" if excess < prompt else "give a shorter prompt")
        if limit < self.max_model_len:
            ways.append("give the KV cache more memory (kv_cache_memory_bytes)")
        elif prompt < most and limit < most:
            ways.append(f"increase max_model_len (--max-model-len) to at most {most}, all that the model has")
        beside = f", with max_new_tokens ({max_new_tokens}) beside it" if max_new_tokens else ""
        raise ValueError(
            f"Input prompt ({prompt} tokens) + lookahead slots (0) is too long and exceeds the capacity of "
            f"{capacity.format(limit)}{beside}: {', or '.join(ways)}"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size < 10 * 10**9 else f"{size / 1e9:.1f} GB"
