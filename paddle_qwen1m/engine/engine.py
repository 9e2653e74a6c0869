"""The engine behind every entry point: prompts in, completions or logits out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as ManyOf
from contextlib import contextmanager
from dataclasses import replace
from typing import Callable

import numpy as np
import paddle

from paddle_qwen1m.attention.attend import Observer
from paddle_qwen1m.attention.step import SequenceRows, Step, StepBuilder
from paddle_qwen1m.cache import PagedCache, choose_page_size
from paddle_qwen1m.config import EngineOptions, SparseBudgets
from paddle_qwen1m.engine.core import Completion, PrefillProgress, SamplingParams, Sequence
from paddle_qwen1m.engine.sampling import Sampler
from paddle_qwen1m.engine.scheduler import Scheduler, chunk_end
from paddle_qwen1m.model import Qwen2OneM, layer_budgets


class Engine:
    """Runs one model under one set of options.

    `observe`, when set, is called with (layer, piece, index) for every piece that is prefilled sparsely.
    """

    def __init__(self, model: Qwen2OneM, options: EngineOptions, budgets: SparseBudgets | None = None) -> None:
        self.model = model
        self.observe: Observer | None = None
        self._step = StepBuilder(model.config)
        self.configure(options, budgets)

    def configure(self, options: EngineOptions, budgets: SparseBudgets | None = None) -> None:
        """Changes options and budgets between calls. Raises ValueError for limits that the model does not allow."""
        config = self.model.config
        if options.max_model_len is not None and options.max_model_len > config.max_position_embeddings:
            raise ValueError(
                f"max_model_len must be at most max_position_embeddings, {config.max_position_embeddings}, got "
                f"{options.max_model_len}"
            )
        page_size = choose_page_size(config.dual_chunk.chunk_len, options.page_size)
        if budgets is not None and budgets.vertical.shape != (config.num_layers, config.num_heads):
            raise ValueError(
                f"the sparse budgets are for {budgets.vertical.shape} (layers, heads), the model has "
                f"{(config.num_layers, config.num_heads)}"
            )
        self.page_size = page_size
        self.budgets = budgets
        self._budgets = layer_budgets(budgets) if budgets is not None and options.sparse else None
        self.options = replace(options, max_model_len=options.max_model_len or config.max_position_embeddings)

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and answer together."""
        assert self.options.max_model_len is not None
        return self.options.max_model_len

    def is_sparse(self, prompt_length: int) -> bool:
        """Whether a prompt of so many tokens is prefilled sparsely: all of its chunks are, or none."""
        return self._budgets is not None and prompt_length > self.options.sparse_threshold

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
        interrupts the call, the memory of its cache is freed.
        """
        choices = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(choices) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts and {len(choices)} sampling params")
        for prompt, choice in zip(prompts, choices):
            self._check(prompt, choice.max_new_tokens)
        sequences = [Sequence(index, *pair) for index, pair in enumerate(zip(prompts, choices))]
        with self._cache([sequence.max_length for sequence in sequences]) as cache:
            scheduler = Scheduler(cache, self.options.max_num_batched_tokens, self.model.config.dual_chunk.chunk_len)
            sampler = Sampler(self.model.config.vocab_size)
            for sequence in sequences:
                scheduler.add(sequence)
            started = time.perf_counter()
            while not scheduler.is_idle:
                chunk = scheduler.next_chunk()
                if chunk is not None:
                    sequence, end = chunk
                    if sequence.num_cached == 0:
                        started = time.perf_counter()
                    batch = [sequence]
                    logits = self._prefill_chunk(cache, sequence, end)
                    if on_prefill is not None:
                        seconds = time.perf_counter() - started
                        on_prefill(PrefillProgress(sequence.index, end, len(sequence.prompt), seconds))
                    if logits is None:
                        continue
                else:
                    batch = scheduler.next_batch()
                    logits = self._decode(cache, batch)
                assert logits is not None
                for row, sequence in enumerate(batch):
                    sequence.append(*sampler.sample(logits[row : row + 1], sequence))
                    if on_token is not None:
                        on_token(sequence.index, sequence.token_ids[-1])
                    if sequence.finish_reason is not None:
                        scheduler.retire(sequence)
                        sampler.forget(sequence)
        return [sequence.completion() for sequence in sequences]

    def logits(self, token_ids: np.ndarray, positions: ManyOf[int] | None = None) -> np.ndarray:
        """Logits float32 [len(positions), vocab] after the tokens at `positions` (the last by default), ascending."""
        self._check(token_ids, 0)
        wanted = [len(token_ids) - 1] if positions is None else list(positions)
        with self._cache([len(token_ids)]) as cache:
            return self._extend(cache, [], token_ids, 0, len(token_ids), wanted)

    @contextmanager
    def prefilled(self, document_ids: np.ndarray, prompt_length: int | None = None) -> Iterator[PrefilledContext]:
        """Prefills a document once; the context then runs any number of continuations on it, each as the last chunk.

        prompt_length is the n of the temperature and of the sparse threshold, for the document and what follows it
        (default: the document's length). There is room for continuations of max_num_batched_tokens.
        """
        self._check(document_ids, 0)
        length = prompt_length or len(document_ids)
        if not len(document_ids) <= length <= self.max_model_len:
            raise ValueError(f"prompt_length must be {len(document_ids)} to {self.max_model_len}, got {length}")
        room = min(length + self.options.max_num_batched_tokens, self.max_model_len)
        with self._cache([room]) as cache:
            pages: list[int] = []
            self._extend(cache, pages, document_ids, 0, length, [])
            yield PrefilledContext(self, cache, pages, len(document_ids), length)

    def _check(self, token_ids: np.ndarray, max_new_tokens: int) -> None:
        vocab_size = self.model.config.vocab_size
        if token_ids.ndim != 1 or token_ids.dtype != np.int64:
            raise ValueError(f"a prompt must be int64 [n], got {token_ids.dtype} {list(token_ids.shape)}")
        if len(token_ids) == 0:
            raise ValueError("a prompt must have at least one token")
        if token_ids.min() < 0 or token_ids.max() >= vocab_size:
            raise ValueError(
                f"token ids must be 0 to {vocab_size - 1}, got {token_ids.min()} to {token_ids.max()}: another model's "
                "tokenizer?"
            )
        if len(token_ids) + max_new_tokens > self.max_model_len:
            raise ValueError(
                f"Input prompt ({len(token_ids)} tokens) + max_new_tokens ({max_new_tokens}) is too long and exceeds "
                f"max_model_len ({self.max_model_len}): shorten it or increase max_model_len"
            )

    @contextmanager
    def _cache(self, lengths: ManyOf[int]) -> Iterator[PagedCache]:
        """A cache with room for sequences of these lengths; its memory is given back at the end."""
        num_pages = sum(-(-length // self.page_size) for length in lengths)
        dtype = self.options.kv_cache_dtype or "float32"
        cache = PagedCache(self.model.config, num_pages, self.page_size, dtype)
        try:
            yield cache
        finally:
            cache.release()

    def _prefill_chunk(self, cache: PagedCache, sequence: Sequence, end: int) -> paddle.Tensor | None:
        """Caches the prompt up to `end`; logits [1, vocab] after its last token."""
        begin, length = sequence.num_cached, len(sequence.prompt)
        rows = SequenceRows(sequence.prompt[begin:end], begin, sequence.pages, max(length, end), self.is_sparse(length))
        step = self._step.prefill([rows], cache, [end - begin - 1] if end == length else [])
        sequence.num_cached = end
        return self._forward(step, cache)

    def _decode(self, cache: PagedCache, batch: ManyOf[Sequence]) -> paddle.Tensor | None:
        """Logits [len(batch), vocab] after each sequence's last token, which is cached."""
        rows = [SequenceRows(np.asarray(s.token_ids[-1:], np.int64), s.length - 1, s.pages, s.length) for s in batch]
        for sequence in batch:
            sequence.num_cached = sequence.length
        return self._forward(self._step.decode(rows, cache), cache)

    def _forward(self, step: Step, cache: PagedCache) -> paddle.Tensor | None:
        with paddle.no_grad():
            return self.model(step, cache, self._budgets, self.observe)

    def _extend(
        self, cache: PagedCache, pages: list[int], ids: np.ndarray, begin: int, length: int, positions: ManyOf[int]
    ) -> np.ndarray:
        """Caches `ids` behind the first `begin` tokens, chunk by chunk; logits after those of them at `positions`."""
        if list(positions) != sorted(set(positions)) or any(not 0 <= p < len(ids) for p in positions):
            raise ValueError(f"positions must ascend within 0 to {len(ids) - 1}, got {list(positions)}")
        parts = [np.empty((0, self.model.config.vocab_size), np.float32)]
        chunk_len, done = self.model.config.dual_chunk.chunk_len, begin
        while done < begin + len(ids):
            end = chunk_end(done, begin + len(ids), self.options.max_num_batched_tokens, chunk_len)
            cache.grow(pages, end)
            rows = SequenceRows(ids[done - begin : end - begin], done, pages, max(length, end), self.is_sparse(length))
            wanted = [p + begin - done for p in positions if done <= p + begin < end]
            logits = self._forward(self._step.prefill([rows], cache, wanted), cache)
            if logits is not None:
                parts.append(logits.numpy())
            done = end
        return np.concatenate(parts)


class PrefilledContext:
    """A document in the cache, on which continuations are run and then taken back."""

    def __init__(self, engine: Engine, cache: PagedCache, pages: list[int], document: int, length: int) -> None:
        self._engine, self._cache, self._pages = engine, cache, pages
        self._document, self._length = document, length

    def extend_logits(self, token_ids: np.ndarray, positions: ManyOf[int]) -> np.ndarray:
        """Logits float32 [len(positions), vocab] after the tokens of `token_ids` at `positions`, run as a chunk."""
        total = self._document + len(token_ids)
        self._engine._check(token_ids, self._document)
        try:
            return self._engine._extend(
                self._cache, self._pages, token_ids, self._document, max(self._length, total), positions
            )
        finally:
            self._cache.shrink(self._pages, self._document)
