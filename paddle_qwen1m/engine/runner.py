"""Runs one step on the model: a chunk of a prompt, or the next token of every running sequence."""

from __future__ import annotations

from collections.abc import Sequence as ManyOf

import numpy as np
import paddle

from paddle_qwen1m.attention.selector import LayerBudgets, Observer, Selector
from paddle_qwen1m.attention.step import SequenceRows, Step, StepBuilder
from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.engine.core import Sequence
from paddle_qwen1m.engine.decode import Decoder
from paddle_qwen1m.engine.graph import Outputs
from paddle_qwen1m.engine.sampling import SamplingBatch
from paddle_qwen1m.engine.scheduler import PrefillChunk
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.parallel.split import own_heads


class Runner:
    """One model and the cache that its steps fill. `budgets` are those of the whole model, None prefills densely;
    prompts longer than `sparse_threshold` are prefilled sparsely; `replay` captures decode steps in a CUDA graph.
    """

    def __init__(self, model: Qwen2OneM, budgets: SparseBudgets | None, sparse_threshold: int, *, replay: bool) -> None:
        self.model = model
        self._threshold, self._replay = sparse_threshold, replay
        self._builder = StepBuilder(model.config)
        self._selectors = None if budgets is None else selectors(model, budgets)
        self._cache: PagedCache | None = None
        self._decoder: Decoder | None = None

    @property
    def cache(self) -> PagedCache:
        assert self._cache is not None, "a cache is made before a step runs"
        return self._cache

    def use(self, cache: PagedCache | None) -> None:
        """Steps fill this cache from now on."""
        self.rest()
        self._cache = cache

    def observe(self, observer: Observer | None) -> None:
        """From now on `observer` sees every choice of keys."""
        for selector in self._selectors or ():
            selector.observer = observer

    def is_sparse(self, prompt_length: int) -> bool:
        """Whether a prompt of so many tokens is prefilled sparsely: all of its chunks are, or none."""
        return self._selectors is not None and prompt_length > self._threshold

    def prefill(self, chunk: PrefillChunk) -> paddle.Tensor | None:
        """Caches a chunk of a prompt; logits float32 [n, vocab] of those of its rows that are asked for.

        They are the request's logit positions, then the prompt's last token where an answer follows.
        """
        sequence, end = chunk.sequence, chunk.end
        begin, length = sequence.num_cached, sequence.temperature_length
        rows = SequenceRows(sequence.prompt[begin:end], begin, sequence.pages, length, self.is_sparse(length))
        wanted = [place - begin for place in sequence.request.logit_positions if begin <= place < end]
        if sequence.request.params is not None and end == len(sequence.prompt):
            wanted.append(end - begin - 1)
        logits = self.forward(self._builder.prefill([rows], self.cache, wanted))
        sequence.num_cached = end
        return logits

    def first_token(self, sequence: Sequence, logits: paddle.Tensor) -> Outputs:
        """The first token of an answer, int64 [1], and its log-probability float32 [1], from logits [1, vocab]."""
        return SamplingBatch([sequence], self.model.config.vocab_size).sample(logits)

    def decode(self, sequences: ManyOf[Sequence]) -> Outputs:
        """The sequences' next tokens int64 [B] and their log-probabilities float32 [B]."""
        if self._decoder is None:
            page_size, vocabulary = self.cache.pool.page_size, self.model.config.vocab_size
            self._decoder = Decoder(self._builder, page_size, vocabulary, self._logits, replay=self._replay)
        ids, logprobs = self._decoder.step(sequences)
        if self._replay:  # no layer of a replay marks itself
            self.model.group.mark(ids, replayed=True)
        return ids, logprobs

    def rest(self) -> None:
        """Gives back what only running sequences need."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None

    def forward(self, step: Step) -> paddle.Tensor | None:
        """Runs a step from its first layer to its last."""
        with paddle.no_grad():
            running = self.model.layer_by_layer(step, self.cache.layers, self._selectors)
            while True:
                try:
                    next(running)
                except StopIteration as done:
                    logits: paddle.Tensor | None = done.value
                    return logits

    def _logits(self, step: Step) -> paddle.Tensor:
        logits = self.forward(step)
        assert logits is not None
        return logits


def selectors(model: Qwen2OneM, budgets: SparseBudgets) -> list[Selector]:
    """Each layer's choice of keys, with the budgets of this rank's heads."""
    own = own_heads(budgets.vertical.shape[1], model.group.degree, model.group.rank)
    sizes = zip(np.ascontiguousarray(budgets.vertical[:, own]), np.ascontiguousarray(budgets.slash[:, own]))
    return [Selector(number, LayerBudgets(*of_layer)) for number, of_layer in enumerate(sizes)]
