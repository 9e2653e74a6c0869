"""The engine behind every entry point: requests go in, events come out, one step at a time."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as ManyOf
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Callable

import numpy as np
import paddle

from paddle_qwen1m.attention.selector import Observer
from paddle_qwen1m.cache import CacheFull, PagedCache, PagePool, choose_page_size
from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.engine.admission import Budget, Limits, cache_pages
from paddle_qwen1m.engine.borders import Chunking
from paddle_qwen1m.engine.core import (
    Completion,
    Event,
    Finished,
    Logits,
    Prefilled,
    PrefillProgress,
    Request,
    Sequence,
    TokenChosen,
    draw_seed,
)
from paddle_qwen1m.engine.graph import Outputs
from paddle_qwen1m.engine.params import SamplingParams
from paddle_qwen1m.engine.runner import Runner
from paddle_qwen1m.engine.scheduler import PrefillChunk, Scheduler
from paddle_qwen1m.memory import available_gpu_memory, available_host_memory
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions, default_batched_tokens
from paddle_qwen1m.plan import activation_bytes, cache_bytes_per_token

MEGABYTE = 1 << 20


class Engine:
    """Serves requests with one model: `add` them, call `step` until the engine is idle, `abort` what nobody wants.

    `options` holds those given with every default filled in; `max_model_len` is the most tokens of one request, prompt
    and answer together. `runner` runs the steps. The KV cache is made at the first request, for it and those that come
    with it, and kept until a call needs a larger one, options change, or `release_cache`.
    """

    def __init__(self, model: Qwen2OneM, options: EngineOptions, budgets: SparseBudgets | None = None) -> None:
        self.model = model
        self._sequences: dict[str, Sequence] = {}
        self._scheduler: Scheduler | None = None
        self._numbers = count()
        self._thread = threading.get_ident()
        self.configure(options, budgets)
        forget = weakref.WeakMethod(self._forget_other_thread)
        os.register_at_fork(after_in_child=lambda: (call := forget()) is not None and call())

    def configure(self, options: EngineOptions, budgets: SparseBudgets | None = None) -> None:
        """Changes options and budgets between calls. ValueError for what the model or its device does not allow."""
        config, model = self.model.config, self.model
        if self._sequences:
            raise ValueError(f"options cannot change while requests run: {', '.join(self._sequences)}")
        if options.max_model_len is not None and options.max_model_len > config.max_position_embeddings:
            raise ValueError(
                f"max_model_len must be at most max_position_embeddings, {config.max_position_embeddings}, got "
                f"{options.max_model_len}"
            )
        if model.on_gpu and options.kv_cache_dtype not in (None, model.compute_dtype):
            raise ValueError(
                f"kv_cache_dtype on a GPU must be that of the computation, {model.compute_dtype}, got "
                f"{options.kv_cache_dtype}"
            )
        page_size = choose_page_size(config.dual_chunk.chunk_len, options.page_size)
        if budgets is not None and budgets.vertical.shape != (config.num_layers, config.num_heads):
            raise ValueError(
                f"the sparse budgets are for {budgets.vertical.shape} (layers, heads), the model has "
                f"{(config.num_layers, config.num_heads)}"
            )
        self.page_size = page_size
        self.budgets = budgets
        self.max_model_len = options.max_model_len or config.max_position_embeddings
        self.max_num_batched_tokens = options.max_num_batched_tokens or default_batched_tokens(model.on_gpu)
        self.kv_cache_dtype = options.kv_cache_dtype or model.compute_dtype
        self.options = replace(
            options,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        self.release_cache()
        self.runner = Runner(
            model,
            budgets if options.sparse else None,
            options.sparse_threshold,
            replay=model.on_gpu and options.cuda_graph,
        )

    @property
    def limits(self) -> Limits:
        """What requests must keep to."""
        config = self.model.config
        return Limits(self.max_model_len, config.max_position_embeddings, config.vocab_size, self.options.cache_tokens)

    def is_sparse(self, prompt_length: int) -> bool:
        """Whether a prompt of so many tokens is prefilled sparsely: all of its chunks are, or none."""
        return self.runner.is_sparse(prompt_length)

    def observe(self, observer: Observer | None) -> None:
        """From now on `observer` is called with (layer, piece, index) for every piece that is prefilled sparsely."""
        self.runner.observe(observer)

    def add(self, request: Request) -> None:
        """Lines a request up. ValueError when its id is in use, it has tokens that the model has not, or cannot fit."""
        self._check(request)
        if not self._sequences:
            self._make_room([request.max_length])
        seed = self.model.group.share(draw_seed(request.params))
        self._line_up(Sequence(request, seed, len(request.prompt)))

    def abort(self, request_id: str) -> bool:
        """Drops a request, whatever its state, and frees what it holds. False when there is none of that id."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        assert self._scheduler is not None
        self._scheduler.retire(sequence)
        if not self._sequences:
            self.runner.rest()
        return True

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._sequences

    def step(self) -> list[Event]:
        """Runs one step, if there is something to do, and tells what became of the requests in it."""
        self._thread = threading.get_ident()
        work = self._scheduler.next() if self._scheduler is not None else None
        if work is None:
            return []
        if isinstance(work, PrefillChunk):
            events, sequences = self._prefill(work), [work.sequence]
        else:
            sequences = list(work.sequences)
            events = _chosen(sequences, self.runner.decode(sequences))
        for sequence in sequences:
            if sequence.is_finished:
                self.abort(sequence.id)
                events.append(Finished(sequence.id, sequence.completions()))
        return events

    def generate(
        self,
        prompts: ManyOf[np.ndarray],
        params: SamplingParams | ManyOf[SamplingParams],
        *,
        on_token: Callable[[int, int], None] | None = None,
        on_prefill: Callable[[PrefillProgress], None] | None = None,
    ) -> list[Completion]:
        """Completes prompts (int64 [n] each), under `params` for all or one each.

        `on_token(index, token)` sees each token as it is chosen, `on_prefill` every finished prefill chunk. Whatever
        interrupts the call, its requests are gone afterwards.
        """
        choices = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(choices) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts and {len(choices)} sampling params")
        requests = [Request(self._new_id(), *pair) for pair in zip(prompts, choices)]
        index = {request.id: number for number, request in enumerate(requests)}
        completions: dict[str, Completion] = {}
        for event in self._run(requests):
            if isinstance(event, TokenChosen) and on_token is not None:
                on_token(index[event.id], event.token)
            elif isinstance(event, Prefilled) and on_prefill is not None:
                if self.model.on_gpu:
                    paddle.device.cuda.synchronize()
                seconds = time.perf_counter() - event.started
                on_prefill(PrefillProgress(event.id, event.done_tokens, event.total_tokens, seconds))
            elif isinstance(event, Finished):
                (completions[event.id],) = event.completions
        return [completions[request.id] for request in requests]

    def logits(self, token_ids: np.ndarray, positions: ManyOf[int] | None = None) -> np.ndarray:
        """Logits float32 [len(positions), vocab] after the tokens at `positions` (the last by default), ascending."""
        wanted = (len(token_ids) - 1,) if positions is None else tuple(positions)
        request = Request(self._new_id(), token_ids, logit_positions=wanted)
        return self._collect(self._run([request]))

    @contextmanager
    def prefilled(self, document_ids: np.ndarray, prompt_length: int | None = None) -> Iterator[PrefilledContext]:
        """Prefills a document once; the context then runs any number of continuations on it, each as the last chunk.

        prompt_length is the n of the temperature and of the sparse threshold, for the document and what follows it
        (default: the document's length). There is room for continuations of max_num_batched_tokens.
        """
        document = Request(self._new_id(), document_ids)
        length = prompt_length or len(document_ids)
        if not len(document_ids) <= length <= self.max_model_len:
            raise ValueError(
                f"prompt_length must be {len(document_ids)}, the document's tokens, to max_model_len "
                f"{self.max_model_len}, got {length}"
            )
        self._check(document)
        self._make_room([len(document_ids) + self.max_num_batched_tokens + self.page_size])
        pool = self.runner.cache.pool
        pages: list[int] = []
        pool.grow(pages, len(document_ids))
        try:
            yield PrefilledContext(self, document_ids, pages, length)
        finally:
            pool.release(pages)

    def release_cache(self) -> None:
        """Gives the memory of the KV cache back; the next request makes one anew."""
        if self._sequences:
            raise ValueError(f"the cache is in use by requests: {', '.join(self._sequences)}")
        if self._scheduler is not None:
            self.runner.cache.release()
            self.runner.use(None)
            self._scheduler = None
            if self.model.on_gpu:
                paddle.device.cuda.empty_cache()

    def check_length(self, prompt: int, max_new_tokens: int = 0) -> None:
        """ValueError when a prompt of so many tokens and its answer do not fit max_model_len."""
        self.limits.check_length(prompt, max_new_tokens)

    def _check(self, request: Request) -> None:
        """ValueError for a request that is not one, or that does not fit max_model_len."""
        if request.id in self._sequences:
            raise ValueError(f"there is a request with the id {request.id!r} already")
        self.limits.check(request)

    def _run(self, requests: ManyOf[Request]) -> Iterator[Event]:
        """Events of requests that come together, until all are done; those that are not at the end are dropped."""
        for request in requests:
            self._check(request)
        if requests:
            self._make_room([request.max_length for request in requests])
            self.model.group.meet()
        try:
            for request in requests:
                self.add(request)
            yield from self._steps()
        finally:
            for request in requests:
                self.abort(request.id)

    def _steps(self) -> Iterator[Event]:
        while not self.is_idle:
            yield from self.step()

    def _collect(self, events: Iterator[Event]) -> np.ndarray:
        """The logits among events, float32 [n, vocab]."""
        parts = [event.values for event in events if isinstance(event, Logits)]
        return np.concatenate([np.empty((0, self.model.config.vocab_size), np.float32), *parts])

    def _prefill(self, chunk: PrefillChunk) -> list[Event]:
        sequence = chunk.sequence
        if sequence.started is None:
            sequence.started = time.perf_counter()
        asked = sum(sequence.num_cached <= place < chunk.end for place in sequence.request.logit_positions)
        logits = self.runner.prefill(chunk)
        assert self._scheduler is not None
        self._scheduler.cached(sequence)
        events: list[Event] = [
            Prefilled(sequence.id, chunk.end, len(sequence.prompt), sequence.num_reused, sequence.started)
        ]
        if logits is None:
            return events
        if asked:
            events.append(Logits(sequence.id, logits[:asked].numpy()))
        if len(logits) > asked:
            last = logits[asked:] if asked else logits
            events += _chosen([sequence], self.runner.first_token(sequence, last))
        return events

    def _line_up(self, sequence: Sequence) -> None:
        assert self._scheduler is not None
        length = sequence.temperature_length
        sequence.sparse = self.is_sparse(length)
        sequence.m2 = self.model.config.dual_chunk.temperature(length) ** 2
        sequence.made_under = "sparse" if sequence.sparse else "dense"
        self._scheduler.add(sequence)
        self._sequences[sequence.id] = sequence

    def _new_id(self) -> str:
        return f"call-{next(self._numbers)}"

    def _forget_other_thread(self) -> None:
        """In a forked child: requests that a thread of the parent was in the middle of are not the child's."""
        if self._sequences and self._thread != threading.get_ident() and not self.model.on_gpu:
            self._sequences.clear()
            self._scheduler = None
            self.runner.use(None)

    def _make_room(self, lengths: ManyOf[int]) -> None:
        """A cache for requests of so many tokens each and, where memory allows, max_num_batched_tokens more each.

        One that is there and large enough stays. NotEnoughMemory when the longest does not fit.
        """
        size = self.page_size
        needed = [-(-length // size) for length in lengths]
        current = self.runner.cache.pool if self._scheduler is not None else None
        if current is not None and (sum(needed) <= current.num_pages or self._sequences):
            return
        if self.options.cache_tokens is not None:
            wanted = -(-self.options.cache_tokens // size)
        else:
            spare = -(-self.max_num_batched_tokens // size)
            wanted = cache_pages(needed, spare, self._budget(max(lengths), current), page_size=size)
        if current is not None and wanted <= current.num_pages:
            return
        if current is not None and current.in_use:
            raise CacheFull("the KV cache is too small for this call, and a prefilled document holds a part of it")
        self.release_cache()
        cache = PagedCache(self.model.local, wanted, size, self.kv_cache_dtype)
        self.runner.use(cache)
        prefixes = cache.prefixes if self.options.enable_prefix_caching else None
        chunking = Chunking(self.max_num_batched_tokens, self.model.config.dual_chunk.chunk_len, size)
        self._scheduler = Scheduler(cache.pool, chunking, prefixes)

    def _budget(self, longest: int, current: PagePool | None) -> Budget:
        """What a cache for requests of up to `longest` tokens depends on; the current one's memory is available."""
        config, on_gpu = self.model.local, self.model.on_gpu
        page_bytes = self.page_size * cache_bytes_per_token(config, self.kv_cache_dtype)
        rows = min(longest, self.max_num_batched_tokens)
        budgets = self.budgets if self.is_sparse(longest) else None
        activations = activation_bytes(config, rows, longest, budgets, self.model.compute_dtype)
        available = available_gpu_memory() if on_gpu else available_host_memory()
        if available is not None:
            if current is not None and on_gpu:
                available += current.num_pages * page_bytes
            available = self.model.group.smallest(max(0, available) // MEGABYTE) * MEGABYTE  # ranks decide alike
        return Budget(page_bytes, activations, available)


class PrefilledContext:
    """A document in the cache, on which continuations are run and then taken back."""

    def __init__(self, engine: Engine, document_ids: np.ndarray, pages: list[int], length: int) -> None:
        self._engine, self._document, self._pages, self._length = engine, document_ids, pages, length
        self._pool = engine.runner.cache.pool
        self._pool.hold(pages)
        self._read(Request(engine._new_id(), document_ids), list(pages), 0)

    def extend_logits(self, token_ids: np.ndarray, positions: ManyOf[int]) -> np.ndarray:
        """Logits float32 [len(positions), vocab] after the tokens of `token_ids` at `positions`, run as a chunk."""
        begin = len(self._document)
        prompt = np.concatenate([self._document, token_ids])
        wanted = tuple(begin + place for place in positions)
        request = Request(self._engine._new_id(), prompt, logit_positions=wanted)
        self._engine._check(request)
        return self._read(request, self._pool.fork(self._pages, begin), begin)

    def _read(self, request: Request, pages: list[int], begin: int) -> np.ndarray:
        engine, length = self._engine, max(self._length, len(request.prompt))
        engine._line_up(Sequence(request, 0, length, pages=pages, num_cached=begin))
        return engine._collect(engine._steps())


def _chosen(sequences: ManyOf[Sequence], outputs: Outputs) -> list[Event]:
    """Appends each sequence's token; the events of it."""
    events: list[Event] = []
    for sequence, token, logprob in zip(sequences, *(values.numpy().tolist() for values in outputs)):
        sequence.append(token, logprob)
        events.append(TokenChosen(sequence.id, token, logprob))
    return events
