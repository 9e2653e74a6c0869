"""The engine behind every entry point: requests go in, events come out, one step at a time."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as ManyOf
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import count
from typing import Callable

import numpy as np
import paddle

from paddle_qwen1m.attention.selector import Observer, visited_keys
from paddle_qwen1m.cache import (
    MadeUnder,
    PagedCache,
    PagePool,
    PrefixChain,
    PrefixIndex,
    PrefixStore,
    SparseRule,
    budgets_digest,
    choose_page_size,
    salt_digest,
)
from paddle_qwen1m.cache.kv_scales import KVScales
from paddle_qwen1m.cache.transfers import UNFINISHED
from paddle_qwen1m.config import BLOCK, ModelConfig, SparseBudgets
from paddle_qwen1m.dtypes import FP8, QUANTIZATIONS
from paddle_qwen1m.engine.admission import Budget, Limits, cache_pages
from paddle_qwen1m.engine.borders import Chunking
from paddle_qwen1m.engine.choosing import Chooser
from paddle_qwen1m.engine.core import (
    Completion,
    Event,
    Finished,
    Logits,
    Metrics,
    Prefilled,
    PrefillProgress,
    Request,
    Sequence,
    TokenChosen,
    draw_seed,
)
from paddle_qwen1m.engine.following import Message, read_error, read_events, read_orders, tell_end, tell_orders
from paddle_qwen1m.engine.keeping import Keeper
from paddle_qwen1m.engine.leading import Lead
from paddle_qwen1m.engine.orders import CopyPage, Head, Order, Rest
from paddle_qwen1m.engine.pacing import LayerWork, Pacer
from paddle_qwen1m.engine.params import SamplingParams, StructuredOutputsParams
from paddle_qwen1m.engine.rules import Grammar, TokenRules, token_rules, token_words
from paddle_qwen1m.engine.runner import Runner
from paddle_qwen1m.engine.scheduler import Scheduler, SchedulerLimits
from paddle_qwen1m.engine.settling import check, settle
from paddle_qwen1m.engine.tasks import Task
from paddle_qwen1m.engine.waiting import WaitingRoom, pages_needed
from paddle_qwen1m.memory import available_gpu_memory, available_host_memory, kept_in_one_piece
from paddle_qwen1m.model import Qwen2OneM, unrounded_dtype
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.plan import Workspace, cache_bytes_per_token, plan_workspace, widened_bytes

logger = logging.getLogger(__name__)
MEGABYTE = 1 << 20
UNKNOWN = 1 << 40
"""Megabytes of a machine that does not say how many it has."""
STORE_SECONDS = 0.05
"""How long a step waits for what comes out of a prefix store, where there is nothing else to do."""
CompileGrammar = Callable[[StructuredOutputsParams], Grammar]


class Engine:
    """Serves requests with one model: `add` them, call `step` until the engine is idle, `abort` what nobody wants.

    `options` holds those given with every default filled in; `max_model_len` is the most tokens of one request, prompt
    and answer together; `chunking` says where prompts are cut. weights: names the checkpoint in prefixes.
    compile_grammar: for structured outputs, None refuses them. The KV cache is made by `reserve`, or at the first
    request, for it and those that come with it, and then kept until a call needs a larger one, options change, or
    `release_cache`.

    Where several ranks share the model, rank 0 decides what all of them do. `generate` and `logits` are called by every
    rank with the same input and give every rank the same; or rank 0 alone calls whatever it likes while the others are
    in `follow`, until it calls `dismiss`.
    """

    def __init__(
        self,
        model: Qwen2OneM,
        options: EngineOptions,
        budgets: SparseBudgets | None = None,
        *,
        weights: str = "",
        compile_grammar: CompileGrammar | None = None,
    ) -> None:
        self.model = model
        self.compile_grammar = compile_grammar
        self._weights = weights
        self._scales = KVScales.none(model.config)
        self._lead: Lead | None = None
        self._events: list[Event] = []
        self._untold: list[Event] = []
        self._cache_pages: int | None = None
        self._has_run = False
        self._metrics = Metrics()
        self._numbers = count()
        self._thread = threading.get_ident()
        self.configure(options, budgets)
        forget = weakref.WeakMethod(self._forget_other_thread)
        os.register_at_fork(after_in_child=lambda: (call := forget()) is not None and call())

    def configure(self, options: EngineOptions, budgets: SparseBudgets | None = None) -> None:
        """Changes options and budgets between calls. ValueError for what the model or its device does not allow."""
        model = self.model
        if not self.is_idle:
            raise ValueError(f"options cannot change while requests run: {', '.join(self._requests)}")
        check(options, model, budgets, named=bool(self._weights))
        chunk_len, parts = model.config.dual_chunk.chunk_len, options.prefix_border_parts
        page_size, settled = choose_page_size(chunk_len, options.page_size), settle(options, model)
        self._store = None
        if options.prefix_store is not None:
            group = model.group
            self._store = PrefixStore(options.prefix_store, options.prefix_store_size, group.rank, group.degree)
        self.budgets = budgets
        self.options = settled.over(options)
        self.page_size = page_size
        self.max_model_len = settled.max_model_len
        self.max_num_batched_tokens = settled.max_num_batched_tokens
        self.max_inter_token_ms = settled.max_inter_token_ms
        self.max_pause_tokens = settled.max_pause_tokens
        self.kv_cache_dtype = settled.kv_cache_dtype
        self.release_cache()
        self.runner = Runner(
            model,
            budgets if options.sparse else None,
            options.sparse_threshold,
            replay=model.on_gpu and options.cuda_graph,
            store=self._store,
        )
        self.chunking = chunking = Chunking(self.max_num_batched_tokens, chunk_len, page_size, parts)
        self._sparse_rule = None
        if budgets is not None:
            digest = budgets_digest(budgets.vertical, budgets.slash)
            self._sparse_rule = SparseRule(digest, chunking.chunk_tokens, chunking.part_tokens)

    def use_scales(self, scales: KVScales) -> None:
        """From now on an 8-bit cache is kept by these, of the whole model. ValueError for those of another shape."""
        assert self.is_idle, "what is cached belongs to the scales that it was made with"
        scales.check_fit(self.model.config, "", "scales of an 8-bit cache")
        self.release_cache()
        self._scales = scales

    @property
    def in_16_bits(self) -> tuple[int, ...]:
        """Layers of an 8-bit cache whose keys and values are not rounded to int8."""
        return self._scales.in_16_bits

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs, and no event is left to tell."""
        return not self._requests and not self._events

    @property
    def metrics(self) -> Metrics:
        """The numbers now."""
        values = replace(self._metrics)
        lead = self._lead
        if lead is not None:
            scheduler, pool = lead.scheduler, lead.pool
            values.waiting = scheduler.num_waiting
            values.running = len(scheduler.requests) - scheduler.num_waiting
            values.pages, values.pages_held = pool.num_pages, pool.num_pages - pool.available
            lead.add_counters(values)
        return values

    @property
    def pool(self) -> PagePool:
        """Who holds which page of the KV cache."""
        assert self._lead is not None, "there is no cache yet"
        return self._lead.pool

    @property
    def limits(self) -> Limits:
        """What requests must keep to."""
        config = self.model.config
        return Limits(self.max_model_len, config.max_position_embeddings, config.vocab_size, self.options.cache_tokens)

    def is_sparse(self, prompt_length: int) -> bool:
        """Whether a prompt of so many tokens is prefilled sparsely: all of its chunks are, or none."""
        return self.runner.is_sparse(prompt_length)

    def observe(self, observer: Observer | None) -> None:
        """From now on `observer` is called with (layer, piece, index) for every piece that is prefilled sparsely; in
        the last layer only for those in which logits are wanted.
        """
        self.runner.observe(observer)

    # --- requests ---

    def prepare(self, params: SamplingParams) -> None:
        """Compiles what answers of these params must look like, which may take seconds, so that `add` need not.
        ValueError for what cannot be used. Any thread may call it, while another one steps.
        """
        if params.structured_outputs is not None:
            self._grammar(params.structured_outputs)

    def add(self, request: Request) -> None:
        """Lines a request up. ValueError when its id is in use, it has tokens that the model has not, or cannot fit."""
        request = self._completed(request)
        self._make_room([request])
        self._line_up(request)

    def abort(self, request_id: str) -> bool:
        """Drops a request, whatever its state, and frees what it holds: no event of it comes any more. False when there
        is none of that id.
        """
        known = len(self._events)
        self._events = [event for event in self._events if event.id != request_id]
        if self._lead is None or not self._lead.scheduler.abort(request_id):
            return len(self._events) < known
        self._metrics.aborted += 1
        self._rest_if_idle()
        return True

    def stop(self, request_id: str, index: int, reason: int | str) -> bool:
        """Ends an answer, with finish_reason "stop" and this stop_reason. False where it has none of its tokens yet, or
        has ended.
        """
        events = None if self._lead is None else self._lead.scheduler.stop(request_id, index, reason)
        if events is None:
            return False
        self._events += events
        self._rest_if_idle()
        return True

    def step(self) -> list[Event]:
        """Gets on with the work, if there is some, and tells what became of requests meanwhile. Whatever it raises, no
        request is left then.
        """
        self._thread = threading.get_ident()
        events, self._events = self._events, []
        lead = self._lead
        if lead is None or not self._requests:
            return events
        try:
            tasks = lead.scheduler.next()
            self._run(lead, tasks)
            events += lead.collect(wait=not tasks and not events)
            if lead.keeper is not None and lead.keeper.is_restoring and not (tasks or events or lead.has_posts):
                lead.keeper.wait(STORE_SECONDS)
        except BaseException:
            self._drop_all()
            raise
        self._count(events)
        self._rest_if_idle()
        return events

    # --- calls ---

    def generate(
        self,
        prompts: ManyOf[np.ndarray],
        params: SamplingParams | ManyOf[SamplingParams],
        *,
        bad_words: ManyOf[tuple[int, ...]] = (),
        on_token: Callable[[int, int], str | None] | None = None,
        on_prefill: Callable[[PrefillProgress], None] | None = None,
    ) -> list[Completion]:
        """Completes prompts (int64 [n] each), under `params` for all or one each, with one answer each.

        bad_words: sequences of tokens that no answer has. `on_token(index, token)` sees each token as it is chosen; a
        text that it returns ends the answer with that token. `on_prefill` sees every finished prefill chunk. Whatever
        interrupts the call, its requests are gone afterwards.
        """
        choices = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(choices) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts and {len(choices)} sampling params")
        requests = [Request(self._new_id(), *pair, bad_words=tuple(bad_words)) for pair in zip(prompts, choices)]
        index = {request.id: number for number, request in enumerate(requests)}
        completions: dict[str, Completion] = {}
        heard = dict.fromkeys(index, 0)
        ended: dict[str, str] = {}
        with self._call(requests) as events:
            for event in events:
                if isinstance(event, TokenChosen) and on_token is not None:
                    if event.id in ended:  # it was chosen meanwhile
                        continue
                    heard[event.id] += 1
                    reason = on_token(index[event.id], event.token)
                    if reason is not None:
                        ended[event.id] = reason
                        self.stop(event.id, 0, reason)
                elif isinstance(event, Prefilled) and on_prefill is not None:
                    seconds = time.perf_counter() - event.started
                    reused, restored = event.reused_tokens, event.restored_tokens
                    done, total = event.done_tokens, event.total_tokens
                    on_prefill(PrefillProgress(event.id, done, total, seconds, reused, restored))
                elif isinstance(event, Finished):
                    (completion,) = event.completions
                    if event.id in ended:
                        completion = completion.up_to(heard[event.id], ended[event.id])
                    completions[event.id] = completion
        return [completions[request.id] for request in requests]

    def logits(self, token_ids: np.ndarray, positions: ManyOf[int] | None = None) -> np.ndarray:
        """Logits float32 [len(positions), vocab] after the tokens at `positions` (the last by default), ascending."""
        wanted = (len(token_ids) - 1,) if positions is None else tuple(positions)
        with self._call([Request(self._new_id(), token_ids, logit_positions=wanted)]) as events:
            return self._stacked(events)

    def check_length(self, prompt: int, max_new_tokens: int = 0) -> None:
        """ValueError when a prompt of so many tokens and its answer do not fit max_model_len."""
        self.limits.check_length(prompt, max_new_tokens)

    # --- the cache ---

    def reserve(self) -> None:
        """Makes the KV cache of options.cache_tokens, unless there is one, and takes what else serving needs of a GPU's
        memory. Every rank calls it.
        """
        if self._cache_pages is None:
            assert self.options.cache_tokens is not None
            steps = self._workspace(self.max_model_len).steps
            with kept_in_one_piece(steps) if self.model.on_gpu else nullcontext():
                self._make_cache(self._pages_for(self.options.cache_tokens))

    def reset_prefix_cache(self) -> bool:
        """Forgets every prefix. False, and nothing is forgotten, while requests run."""
        if not self.is_idle:
            return False
        if self._lead is not None and self._lead.prefixes is not None:
            self._lead.prefixes.reset()
        return True

    def finish_writes(self) -> None:
        """Returns when what this rank is writing to the prefix store is there; so does the end of the process."""
        if self._store is not None and self._cache_pages is not None:
            self.runner.transfers.finish()

    def release_cache(self) -> None:
        """Gives the memory of the KV cache back; the next request makes one anew."""
        if not self.is_idle:
            raise ValueError(f"the cache is in use by requests: {', '.join(self._requests)}")
        if self._cache_pages is not None:
            self._tell({"cache": 0})
            self._make_cache(0)

    def close(self) -> None:
        """Drops every request and gives the cache back, when all ranks have written what goes into the prefix store;
        once more does nothing.
        """
        self._drop_all()
        self._finish_keeping()
        self.release_cache()

    # --- ranks that follow ---

    def follow(self) -> None:
        """Does on this rank what rank 0 does, until that calls `dismiss`."""
        while "dismiss" not in (message := self.model.group.share(None)):
            list(self._obey(message))

    def dismiss(self) -> None:
        """Lets the ranks that follow return."""
        self._tell({"dismiss": True})

    # --- inside ---

    @property
    def _requests(self) -> ManyOf[str]:
        return () if self._lead is None else self._lead.scheduler.requests

    @property
    def _leads(self) -> bool:
        return self.model.group.rank == 0

    def _tell(self, message: Message) -> None:
        if self.model.group.degree > 1:
            self.model.group.share(message)

    def _run(self, lead: Lead, tasks: ManyOf[Task]) -> None:
        """Gives tasks to the device, and to the ranks that follow."""
        if not tasks:
            return
        self._has_run = True
        self._tell_orders(*(task.order for task in tasks))
        for task in tasks:
            lead.ran(task, self.runner.run(task.order, lead.chooser.prepare(task)))

    def _drop_all(self) -> None:
        for request_id in self._requests:
            self.abort(request_id)
        self._events.clear()

    def _tell_orders(self, *orders: Order) -> None:
        untold, self._untold = self._untold, []
        if self.model.group.degree > 1:
            self.model.group.share(tell_orders(orders, untold))

    def _count(self, events: ManyOf[Event]) -> None:
        for event in events:
            self._metrics.generated_tokens += isinstance(event, TokenChosen)
            self._metrics.finished += isinstance(event, Finished)
            if isinstance(event, Prefilled) and event.done_tokens == event.total_tokens:
                self._metrics.prompt_tokens += event.total_tokens

    def _rest_if_idle(self) -> None:
        """Without requests, whatever the device still has of some is forgotten."""
        if self._requests or not self._has_run or self._lead is None:
            return
        self._has_run = False
        self._lead.rest()
        self._tell_orders(Rest())
        self.runner.run(Rest())

    @contextmanager
    def _call(self, requests: ManyOf[Request]) -> Iterator[Iterator[Event]]:
        """Events of requests that come together, until all are done. At the end, whatever it is, none of them is left;
        every rank makes the call, and ends it as rank 0 does.
        """
        requests = [self._completed(request) for request in requests]
        if not self._leads:
            yield self._followed(gather=not any(request.params for request in requests))
            return
        error: BaseException | None = None
        try:
            if requests:
                self._make_room(requests)
            for request in requests:
                self._line_up(request)
            yield self._steps()
        except BaseException as reason:
            error = reason
            raise
        finally:
            with suppress(Exception) if error is not None else nullcontext():
                for request in requests:
                    self.abort(request.id)
                untold, self._untold = self._untold, []
                if self.model.group.degree > 1:
                    self.model.group.share(tell_end(untold, error))

    def _steps(self) -> Iterator[Event]:
        while not self.is_idle:
            events = self.step()
            if self.model.group.degree > 1:
                self._untold += events
            yield from events

    def _followed(self, *, gather: bool) -> Iterator[Event]:
        """Events of a call that rank 0 makes too. gather: logits that are computed are wanted here."""
        while True:
            message = self.model.group.share(None)
            yield from self._obey(message, gather=gather)
            if "end" in message:
                error = read_error(message)
                if error is not None:
                    raise error
                return

    def _obey(self, message: Message, *, gather: bool = False) -> Iterator[Event]:
        """Does what rank 0 has told; its events."""
        if "meet" in message:
            self._meet()
        if "cache" in message:
            self._make_cache(message["cache"])
        if "transfer" in message:
            self._agree(message["transfer"])
        for order in read_orders(message):
            read = (lambda logits: (logits,)) if gather and isinstance(order, Head) else None
            post = self.runner.run(order, read)
            if post is not None:
                yield Logits("", *post.result())
        yield from read_events(message)

    def _meet(self) -> int:
        """Every rank comes here before a cache is made. The bytes that the one with least memory can take."""
        available = available_gpu_memory() if self.model.on_gpu else available_host_memory()
        if self.model.on_gpu and self._cache_pages is not None:
            available = (available or 0) + self._cache_pages * self._page_bytes
        megabytes = UNKNOWN if available is None else max(0, available) // MEGABYTE
        return self.model.group.smallest(megabytes) * MEGABYTE

    def _agree(self, transfer: int) -> int:
        """Every rank comes here: how many segments of a transfer are whole on all of them; see Transfers.state."""
        transfers = self.runner.transfers
        whole = self.model.group.smallest(transfers.state(transfer) - UNFINISHED) + UNFINISHED
        if whole != UNFINISHED and not self._leads:
            transfers.forget(transfer)
        return whole

    def _ask_all(self, transfer: int) -> int:
        self._tell({"transfer": transfer})
        return self._agree(transfer)

    def _stacked(self, events: Iterator[Event]) -> np.ndarray:
        """The logits among events, float32 [n, vocab]."""
        parts = [event.values for event in events if isinstance(event, Logits)]
        return np.concatenate([np.empty((0, self.model.config.vocab_size), np.float32), *parts])

    def _completed(self, request: Request) -> Request:
        """The request with a number of new tokens. ValueError for one that can never run."""
        if request.id in self._requests:
            raise ValueError(f"there is a request with the id {request.id!r} already")
        limits, params, prompt_length = self.limits, request.params, len(request.prompt)
        if params is not None:
            token_words(params.stop_token_ids, limits.vocab_size, "stop_token_ids")
            self._rules(request)
            if params.max_tokens is None:
                limits.check_length(prompt_length, max(1, params.min_tokens))
                longest = min(limits.max_model_len, limits.cache_tokens or limits.max_model_len)
                request = replace(request, params=replace(params, max_tokens=longest - prompt_length))
        limits.check(request)
        return request

    def _rules(self, request: Request) -> TokenRules | None:
        """Which tokens an answer may have. ValueError for such as there are not."""
        params = request.params
        assert params is not None
        structured = params.structured_outputs
        if not (params.min_tokens or params.allowed_token_ids or params.logit_bias or request.bad_words or structured):
            return None
        grammar = None if structured is None else self._grammar(structured)
        return token_rules(request, self.model.config.vocab_size, grammar)

    def _grammar(self, structured: StructuredOutputsParams) -> Grammar:
        if self.compile_grammar is None:
            raise ValueError("structured_outputs needs the model's tokenizer, which this engine was not given")
        return self.compile_grammar(structured)

    def _line_up(self, request: Request) -> None:
        """Hands a request to the scheduler."""
        sparse = self._sparse_rule if self.is_sparse(len(request.prompt)) else None
        sequence = Sequence(request, draw_seed(request.params))
        self._hand_over(sequence, self._name(request, sparse))
        if sparse is not None:
            self._tell_crossing(sequence)

    def _tell_crossing(self, sequence: Sequence) -> None:
        """Says where a sparse prompt, the first of its kind, begins like dense ones: it does not reuse their keys."""
        request, chain = sequence.request, sequence.chain
        prefixes = None if self._lead is None else self._lead.prefixes
        if prefixes is None or chain is None or prefixes.find(chain).tokens:
            return
        dense = request.prompt[: self.options.sparse_threshold]
        cuts, name = self.chunking.cuts(len(dense), sparse=False), self._name(request, None)
        known = prefixes.find(PrefixChain.of(dense, cuts, name, sequence.m2, self.page_size)).tokens
        if known:
            self._metrics.prefix_dense_tokens += known
            logger.warning(
                f"request {request.id}: {known:,} of its tokens are cached, but as of a dense prompt; it has "
                f"{len(request.prompt):,}, more than sparse_threshold, {self.options.sparse_threshold:,}, and is "
                "prefilled sparsely from its start, once"
            )

    def _hand_over(self, sequence: Sequence, made_under: str = "") -> None:
        assert self._lead is not None
        length = len(sequence.prompt)
        sequence.made_under, sequence.sparse, sequence.m2 = made_under, self.is_sparse(length), self._m2(length)
        for answer in sequence.answers:
            answer.rules = self._rules(sequence.request)
        self._lead.scheduler.add(sequence)

    def _m2(self, length: int) -> float:
        """The square of the temperature m(length)."""
        return float(self.model.config.dual_chunk.temperature(length) ** 2)

    def _name(self, request: Request, sparse: SparseRule | None) -> str:
        """What else than tokens and m decides about the keys of a request's prompt."""
        ranks, placement = self.model.group.degree, self.model.placement.digest
        kept = self.kv_cache_dtype
        if kept in QUANTIZATIONS:
            kept = f"{kept}/{self._scales.digest}"
        salt = salt_digest(request.cache_salt)
        computed = FP8 if self.model.in_fp8 else self.model.compute_dtype
        return MadeUnder(self._weights, computed, kept, ranks, placement, salt, sparse).name

    def _new_id(self) -> str:
        return f"call-{next(self._numbers)}"

    def _forget_other_thread(self) -> None:
        """In a forked child: requests that a thread of the parent was in the middle of are not the child's."""
        if self._requests and self._thread != threading.get_ident() and not self.model.on_gpu:
            self._events, self._untold, self._has_run = [], [], False
            self._make_cache(0)

    # --- the cache, inside ---

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def _page_bytes(self) -> int:
        return self.page_size * cache_bytes_per_token(self.model.local, self.kv_cache_dtype, len(self.in_16_bits))

    def _make_room(self, requests: ManyOf[Request]) -> None:
        """A cache for these requests and, where memory allows, max_num_batched_tokens more each; see _make_room_for."""
        needed = [sum(pages_needed(request, self.page_size)) for request in requests]
        self._make_room_for(needed, max(request.max_length for request in requests))

    def _make_room_for(self, needed: ManyOf[int], longest: int) -> None:
        """A cache for requests that need so many pages each, of up to `longest` tokens.

        One that is there stays where it is large enough, or requests run. NotEnoughMemory when the longest does not
        fit.
        """
        self._thread = threading.get_ident()
        if self._requests or (self._cache_pages is not None and sum(needed) <= self._cache_pages):
            return
        self._tell({"meet": True})
        available = self._meet()
        if self.options.cache_tokens is not None:
            wanted = self._pages_for(self.options.cache_tokens)
        else:
            spare = self._pages_for(self.max_num_batched_tokens)
            wanted = cache_pages(needed, spare, self._budget(longest, available), page_size=self.page_size)
        if self._cache_pages is not None and wanted <= self._cache_pages:
            return
        self._finish_keeping()
        self._tell({"cache": wanted})
        self._make_cache(wanted)

    def _budget(self, longest: int, available: int) -> Budget:
        """What a cache for requests of up to `longest` tokens depends on."""
        copied = widened_bytes(self.model.local, self.page_size, self.kv_cache_dtype, self.model.compute_dtype)
        known = None if available == UNKNOWN * MEGABYTE else available
        return Budget(self._page_bytes + copied, self._workspace(longest).total, known)

    def _workspace(self, longest: int) -> Workspace:
        """What computing takes while requests of up to `longest` tokens are served."""
        return plan_workspace(
            self.model.local,
            longest,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_pause_tokens=self.max_pause_tokens,
            max_num_seqs=self.options.max_num_seqs,
            budgets=self.budgets if self.is_sparse(longest) else None,
            dtype=self.model.compute_dtype,
            quantization=self.model.quantization,
            degree=self.model.group.degree,
        )

    def _make_cache(self, pages: int) -> None:
        """This rank's memory for so many pages, in place of what there is; none for 0."""
        if self._cache_pages is not None:
            self._forget_cache()
        if pages == 0:
            return
        model, options = self.model, self.options
        scales, widened = None, None
        if self.kv_cache_dtype in QUANTIZATIONS:
            scales = self._scales.of_heads(model.placement.layers_kv_heads(model.group.rank))
            most = min(pages, self._pages_for(self.max_model_len))
            widened = (most, model.compute_dtype) if model.on_gpu else None
        group, rows = model.group, min(self.max_num_batched_tokens, self.max_model_len)
        group.open_copies(group.padded(rows), model.config.hidden_size, model.compute_dtype)
        unrounded = unrounded_dtype(model)
        cache = PagedCache(model.local, pages, self.page_size, self.kv_cache_dtype, scales, widened, unrounded)
        if self._leads:
            self._lead = self._new_lead(pages)
        self.runner.use(
            cache,
            None if self._lead is None else self._lead.chooser.slots,
            max_num_seqs=options.max_num_seqs,
            max_model_len=self.max_model_len,
        )
        self._cache_pages = pages  # last: a process that is forked meanwhile has no cache

    def _new_lead(self, pages: int) -> Lead:
        """What a cache of so many pages is led with."""
        options, on_gpu, layers = self.options, self.model.on_gpu, self.model.local
        tolerance, seats, short = options.prefix_temperature_tolerance, options.max_num_seqs, self.max_pause_tokens
        pool = PagePool(pages, self.page_size, self._copy_page)
        prefixes = PrefixIndex(pool, tolerance) if options.enable_prefix_caching else None
        keeper = None
        if prefixes is not None and self._store is not None:
            keeper = Keeper(
                self._store,
                pool,
                prefixes,
                lambda: self.runner.transfers,
                self._order,
                self._ask_all,
                min_tokens=options.prefix_store_min_tokens,
                tolerance=tolerance,
            )
        waiting = WaitingRoom(pool, self.chunking, seats, short, self._m2, prefixes, keeper)
        limits = SchedulerLimits(seats, short, ahead=1 if on_gpu else 0)
        work = layer_work(layers, self.budgets)
        pacer = Pacer(self.max_inter_token_ms / 1000, work, layers.num_layers, time.perf_counter)
        chooser = Chooser(seats, self.model.config.vocab_size)
        return Lead(pool, prefixes, keeper, chooser, Scheduler(waiting, pool, limits, pacer))

    def _forget_cache(self) -> None:
        if self._lead is not None:
            self._lead.add_counters(self._metrics)
        self._lead = self._cache_pages = None
        self.runner.cache.release()
        self.runner.use(None)
        if self.model.on_gpu:
            paddle.device.cuda.empty_cache()

    def _finish_keeping(self) -> None:
        if self._lead is not None and self._lead.keeper is not None:
            self._lead.keeper.finish()

    def _copy_page(self, source: int, target: int, tokens: int) -> None:
        self._order(CopyPage(source, target, tokens))

    def _order(self, order: Order) -> None:
        """Has every rank do what has no result."""
        self._tell_orders(order)
        self.runner.run(order)


def layer_work(config: ModelConfig, budgets: SparseBudgets | None) -> LayerWork:
    """Operations of a rank's share of one layer."""
    attention, hidden = config.num_heads * config.head_dim, config.hidden_size
    weights = hidden * (config.qkv_width + attention + 3 * config.intermediate_size)
    chosen = math.inf if budgets is None else float(visited_keys(budgets.vertical, budgets.slash).mean())
    return LayerWork(2.0 * weights, 4.0 * attention, chosen, config.rows_at_once // BLOCK)
