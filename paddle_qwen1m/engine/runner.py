"""Runs orders on the model: chunks of prompts, from point to point, and between them the next tokens of sequences."""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as ManyOf
from itertools import count
from typing import Callable, Optional, cast

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.selector import LayerBudgets, Observer, Selector
from paddle_qwen1m.attention.step import RowShare, Step, StepBuilder
from paddle_qwen1m.cache import PagedCache, PrefixStore, Transfers
from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.engine.decode import DecodeSlots, Sampler
from paddle_qwen1m.engine.orders import (
    Advance,
    CopyPage,
    Decode,
    Drop,
    GiveUp,
    Head,
    Order,
    Prefill,
    Rest,
    Restore,
    Rows,
    Save,
)
from paddle_qwen1m.engine.questions import Questions
from paddle_qwen1m.model import Qwen2OneM

Chunk = Generator[None, None, Optional[paddle.Tensor]]
"""A prefill that can stand at a point."""
Read = Callable[[paddle.Tensor], ManyOf[paddle.Tensor]]
"""What of logits float32 [n, vocab] goes to the host."""


class Runner:
    """One model and the cache that its steps fill. `budgets` are those of the whole model, None prefills densely;
    prompts longer than `sparse_threshold` are prefilled sparsely; `replay` captures decode steps in CUDA graphs. store:
    where prefixes are kept beside the cache.

    Every rank runs the same orders. They are done in their order, on one stream; nothing here waits for the device.
    """

    def __init__(
        self,
        model: Qwen2OneM,
        budgets: SparseBudgets | None,
        sparse_threshold: int,
        *,
        replay: bool,
        store: PrefixStore | None = None,
    ) -> None:
        self.model = model
        self._store = store
        self._transfers: Transfers | None = None
        self._threshold, self._replay = sparse_threshold, replay
        placement = model.placement
        share = RowShare(placement.row_share(model.group.rank), placement.row_shares)
        self._attends_for_all = share.count == 1
        self._builder = StepBuilder(model.local, model.group.padded, share)
        self._selectors = None if budgets is None else selectors(model, budgets)
        self._cache: PagedCache | None = None
        self._slots: DecodeSlots | None = None
        self._questions: Questions | None = None
        self._standing: Chunk | None = None
        self._wanted: paddle.Tensor | None = None
        self._point = ops.tensor(np.zeros(1, np.int32))
        """What is posted where only that it has come matters."""

    @property
    def cache(self) -> PagedCache:
        assert self._cache is not None, "a cache is made before a step runs"
        return self._cache

    @property
    def transfers(self) -> Transfers:
        """What is on its way between the cache and the store."""
        assert self._transfers is not None, "there is no store, or no cache"
        return self._transfers

    @property
    def in_flight(self) -> bool:
        """Whether a chunk stands at a point."""
        return self._standing is not None

    def use(
        self,
        cache: PagedCache | None,
        sampler: Sampler | None = None,
        *,
        max_num_seqs: int = 1,
        max_model_len: int = 1,
    ) -> None:
        """Orders fill this cache from now on, and decode in max_num_seqs slots sequences of at most max_model_len
        tokens. sampler: rank 0's.
        """
        if self._transfers is not None:
            self._transfers.finish()
            self._transfers = None
        if self._slots is not None:
            self._run(Rest())
            self._slots.release()
            self._slots = None
        if self._questions is not None:
            self._questions.release()
            self._questions = None
        self._cache = cache
        if cache is not None and self._store is not None:
            self._transfers = Transfers(self._store, cache, gpu=self.model.on_gpu)
        if cache is not None:
            builder, group, max_pages = self._builder, self.model.group, -(-max_model_len // cache.page_size)
            self._slots = DecodeSlots(
                max_num_seqs,
                max_pages,
                cache.page_size,
                builder,
                self._logits,
                sampler,
                group,
                replay=self._replay,
            )
            if self._replay and self._attends_for_all and cache.widened is None:
                self._questions = Questions(builder, cache, max_pages, self._hidden, group)

    def run(self, order: Order, read: Read | None = None) -> ops.Post | None:
        """Queues what an order says. Rank 0 gets a post of a Prefill or Advance, which says with `done` whether the
        chunk has come to its end, and of a Decode, which holds what DecodeSlots.step gives. Whoever has a `read` gets
        one of a Head, of what that makes of the logits. There are no others.

        After an error the chunk that it came from is gone.
        """
        with paddle.no_grad():
            values, done = self._run(order, read)
        return ops.Post(values, done=done) if values else None

    def observe(self, observer: Observer | None) -> None:
        """From now on `observer` sees every choice of keys."""
        for selector in self._selectors or ():
            selector.observer = observer

    def is_sparse(self, prompt_length: int) -> bool:
        """Whether a prompt of so many tokens is prefilled sparsely: all of its chunks are, or none."""
        return self._selectors is not None and prompt_length > self._threshold

    def _run(self, order: Order, read: Read | None = None) -> tuple[ManyOf[paddle.Tensor], bool]:
        """What this rank posts, if anything, and whether no chunk has been left standing by it."""
        slots = self._slots
        assert slots is not None, "a cache is made before orders are run"
        if isinstance(order, Prefill):
            assert not self.in_flight or order.points == 0, "one chunk at most stands at a point"
            if self._questions is not None and order.is_whole and Questions.takes(order.rows[0]):
                self._wanted = self._ask(self._questions, order.rows[0])
                return self._at_point, True
            return self._at_point, self._go_on(self._begin(order), order.points)
        if isinstance(order, Advance):
            assert self._standing is not None, "no chunk stands at a point"
            chunk, self._standing = self._standing, None
            return self._at_point, self._go_on(chunk, order.points)
        if isinstance(order, Head):
            logits = self._head(order)
            return (() if read is None else read(logits)), True
        if isinstance(order, Decode):
            for slot in order.leave:
                slots.leave(slot)
            for join in order.join:
                slots.join(join)
            return slots.step(order.slots, top_logprobs=order.top_logprobs), True
        if isinstance(order, CopyPage):
            self.cache.copy_page(order.source, order.target, order.tokens)
        if isinstance(order, (Restore, Save)):
            ready = ops.Post([self._point]).wait
            self.transfers.begin(order.number, order.what, writes=isinstance(order, Save), ready=ready)
        if isinstance(order, GiveUp):
            self.transfers.give_up(order.number)
        if isinstance(order, (Drop, Rest)) and self._standing is not None:
            self._standing.close()
            self._standing = None
        if isinstance(order, Rest):
            self._wanted = None
            slots.clear()
        return (), True

    @property
    def _at_point(self) -> ManyOf[paddle.Tensor]:
        return [self._point] if self.model.group.rank == 0 else []

    def _begin(self, order: Prefill) -> Chunk:
        firsts = np.cumsum([0, *(len(rows.ids) for rows in order.rows)]).tolist()
        wanted = [first + row for first, rows in zip(firsts, order.rows) for row in rows.wanted]
        step = self._builder.prefill(order.rows, self.cache, wanted, order.row_blocks)
        return self.model.layer_by_layer(step, self.cache.layers, self._selectors)

    def _ask(self, questions: Questions, rows: Rows) -> paddle.Tensor | None:
        """Reads a question; what logits of its wanted rows are made of."""
        hidden, wanted = questions.read(rows), rows.wanted
        if not wanted:
            return None
        if wanted[-1] - wanted[0] + 1 == len(wanted):
            return hidden[wanted[0] : wanted[-1] + 1]
        return ops.gather_rows(hidden, ops.tensor(np.asarray(wanted, np.int64)))

    def _go_on(self, chunk: Chunk, points: int) -> bool:
        """Runs a chunk to its `points`-th next point, where it is left standing, or to its end, which is told."""
        try:
            for _ in range(points) if points else count():
                next(chunk)
        except StopIteration as end:
            self._wanted = end.value
            return True
        self._standing = chunk
        return False

    def _head(self, order: Head) -> paddle.Tensor:
        wanted = self._wanted
        assert wanted is not None and order.first + order.count <= len(wanted), "of a row that no chunk wanted"
        logits = self.model.logits(wanted[order.first : order.first + order.count])
        self.model.group.mark(logits)
        return logits

    def forward(self, step: Step) -> paddle.Tensor | None:
        """Runs a step from its first layer to its last: what logits are made of, [n, hidden], of the rows that want
        them.
        """
        with paddle.no_grad():
            chunk = self.model.layer_by_layer(step, self.cache.layers, self._selectors)
            while True:
                try:
                    next(chunk)
                except StopIteration as done:
                    return cast(Optional[paddle.Tensor], done.value)

    def _hidden(self, step: Step) -> paddle.Tensor:
        hidden = self.forward(step)
        assert hidden is not None
        return hidden

    def _logits(self, step: Step) -> paddle.Tensor:
        return self.model.logits(self._hidden(step))


def selectors(model: Qwen2OneM, budgets: SparseBudgets) -> list[Selector]:
    """Each layer's choice of keys, with the budgets of this rank's heads."""
    made = []
    for layer in range(model.config.num_layers):
        own = list(model.placement.query_heads(layer, model.group.rank))
        made.append(Selector(layer, LayerBudgets(budgets.vertical[layer, own], budgets.slash[layer, own])))
    return made
