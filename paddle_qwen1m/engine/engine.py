"""The engine behind every entry point: prompts in, completions or logits out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as ManyOf
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Callable

import numpy as np
import paddle

from paddle_qwen1m.attention.attend import Observer
from paddle_qwen1m.attention.step import SequenceRows, Step, StepBuilder
from paddle_qwen1m.cache import PagedCache, choose_page_size
from paddle_qwen1m.config import EngineOptions, SparseBudgets, default_batched_tokens
from paddle_qwen1m.engine.core import Completion, PrefillProgress, SamplingParams, Sequence
from paddle_qwen1m.engine.decode import Decoder
from paddle_qwen1m.engine.sampling import SamplingBatch
from paddle_qwen1m.engine.scheduler import Scheduler, chunk_end
from paddle_qwen1m.model import Qwen2OneM, layer_budgets


class Engine:
    """Runs one model under one set of options; `options` holds them with every default filled in.

    `max_model_len` is the most tokens of one request, prompt and answer together. `observe`, when set, is called with
    (layer, piece, index) for every piece that is prefilled sparsely.
    """

    def __init__(self, model: Qwen2OneM, options: EngineOptions, budgets: SparseBudgets | None = None) -> None:
        self.model = model
        self.observe: Observer | None = None
        self._step = StepBuilder(model.config)
        self.configure(options, budgets)

    def configure(self, options: EngineOptions, budgets: SparseBudgets | None = None) -> None:
        """Changes options and budgets between calls. ValueError for what the model or its device does not allow."""
        config, model = self.model.config, self.model
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
        self._budgets = layer_budgets(budgets, model.group) if budgets is not None and options.sparse else None
        self.max_model_len = options.max_model_len or config.max_position_embeddings
        self.max_num_batched_tokens = options.max_num_batched_tokens or default_batched_tokens(model.on_gpu)
        self.kv_cache_dtype = options.kv_cache_dtype or model.compute_dtype
        self.options = replace(
            options,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_dtype=self.kv_cache_dtype,
        )

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
        for sequence, seed in zip(sequences, self.model.group.share([sequence.seed for sequence in sequences])):
            sequence.seed = seed
        lengths = [sequence.max_length for sequence in sequences]
        with self._cache(lengths) as cache, closing(self._decoder(cache)) as decoder:
            scheduler = Scheduler(cache, self.max_num_batched_tokens, self.model.config.dual_chunk.chunk_len)
            for sequence in sequences:
                scheduler.add(sequence)
            started = time.perf_counter()
            while not scheduler.is_idle:
                chunk = scheduler.next_chunk()
                if chunk is None:
                    batch = scheduler.next_batch()
                    chosen = decoder.step(batch)
                else:
                    sequence, end = chunk
                    if sequence.num_cached == 0:
                        started = time.perf_counter()
                    batch = [sequence]
                    logits = self._prefill_chunk(cache, sequence, end)
                    if on_prefill is not None:
                        if self.model.on_gpu:
                            paddle.device.cuda.synchronize()
                        seconds = time.perf_counter() - started
                        on_prefill(PrefillProgress(sequence.index, end, len(sequence.prompt), seconds))
                    if logits is None:
                        continue
                    chosen = SamplingBatch(batch, self.model.config.vocab_size).sample(logits)
                for sequence, token, logprob in zip(batch, *(values.numpy().tolist() for values in chosen)):
                    sequence.append(token, logprob)
                    if on_token is not None:
                        on_token(sequence.index, token)
                    if sequence.finish_reason is not None:
                        scheduler.retire(sequence)
        return [sequence.completion() for sequence in sequences]

    def logits(self, token_ids: np.ndarray, positions: ManyOf[int] | None = None) -> np.ndarray:
        """Logits float32 [len(positions), vocab] after the tokens at `positions` (the last by default), ascending."""
        self._check(token_ids)
        wanted = [len(token_ids) - 1] if positions is None else list(positions)
        with self._cache([len(token_ids)]) as cache:
            return self._extend(cache, [], token_ids, 0, len(token_ids), wanted)

    @contextmanager
    def prefilled(self, document_ids: np.ndarray, prompt_length: int | None = None) -> Iterator[PrefilledContext]:
        """Prefills a document once; the context then runs any number of continuations on it, each as the last chunk.

        prompt_length is the n of the temperature and of the sparse threshold, for the document and what follows it
        (default: the document's length). There is room for continuations of max_num_batched_tokens.
        """
        self._check(document_ids)
        length = prompt_length or len(document_ids)
        if not len(document_ids) <= length <= self.max_model_len:
            raise ValueError(f"prompt_length must be {len(document_ids)} to {self.max_model_len}, got {length}")
        room = min(length + self.max_num_batched_tokens, self.max_model_len)
        with self._cache([room]) as cache:
            pages: list[int] = []
            self._extend(cache, pages, document_ids, 0, length, [])
            yield PrefilledContext(self, cache, pages, len(document_ids), length)

    def check_length(self, prompt: int, max_new_tokens: int = 0) -> None:
        """ValueError when a prompt of so many tokens and its answer do not fit max_model_len."""
        limit = self.max_model_len
        if prompt + max_new_tokens > limit:
            raise ValueError(
                f"Input prompt ({prompt} tokens) + max_new_tokens ({max_new_tokens}) is too long and exceeds "
                f"max_model_len ({limit} tokens): shorten the prompt, ask for at most {max(0, limit - prompt)} new "
                "tokens, or increase max_model_len in from_pretrained"
            )

    def _check(self, token_ids: np.ndarray, others: int = 0) -> None:
        """ValueError for what is no prompt, and for one that does not fit beside `others` more tokens."""
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
        self.check_length(len(token_ids), others)

    @contextmanager
    def _cache(self, lengths: ManyOf[int]) -> Iterator[PagedCache]:
        """A cache with room for sequences of these lengths; its memory is given back at the end."""
        num_pages = sum(-(-length // self.page_size) for length in lengths)
        cache = PagedCache(self.model.local, num_pages, self.page_size, self.kv_cache_dtype)
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

    def _decoder(self, cache: PagedCache) -> Decoder:
        def forward(step: Step) -> paddle.Tensor:
            logits = self._forward(step, cache)
            assert logits is not None
            return logits

        replay = self.model.on_gpu and self.options.cuda_graph
        return Decoder(self._step, self.page_size, self.model.config.vocab_size, forward, replay=replay)

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
            end = chunk_end(done, begin + len(ids), self.max_num_batched_tokens, chunk_len)
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
