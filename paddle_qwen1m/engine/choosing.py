"""How rank 0 chooses tokens: fills the slots that are sampled from, keeps masks up to date, reads what was chosen."""

from __future__ import annotations

from collections.abc import Sequence as ManyOf
from typing import Callable

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.engine.core import Answer, TokenLogprobs
from paddle_qwen1m.engine.params import MAX_LOGPROBS
from paddle_qwen1m.engine.sampling import SamplingSlots
from paddle_qwen1m.engine.tasks import Chosen, DecodeStep, FirstTokens, PromptLikelihoods, PromptLogits, Result, Task

Read = Callable[[paddle.Tensor], ManyOf[paddle.Tensor]]
"""What of logits float32 [n, vocab] goes to the host."""
Arrays = ManyOf[np.ndarray]


class Chooser:
    """Samples the answers' first tokens from the logits of their prompts, and prepares the decode slots, which are
    sampled as part of their step, for `slots`. At most max_num_seqs answers at a time.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self.slots = SamplingSlots(max_num_seqs, vocab_size)
        self._first = SamplingSlots(max_num_seqs, vocab_size)
        self._outdated: set[Answer] = set()

    def prepare(self, task: Task) -> Read | None:
        """What to do before a task is given to the device, and with the logits that it leaves there."""
        if isinstance(task, DecodeStep):
            self._seat(task)
        if isinstance(task, FirstTokens):
            return lambda logits: self._sample_first(task, logits)
        if isinstance(task, PromptLikelihoods):
            return lambda logits: ops.top_logprobs(logits, ops.tensor(task.tokens), _most(task))
        return (lambda logits: (logits,)) if isinstance(task, PromptLogits) else None

    def result(self, task: Task, arrays: Arrays) -> Result:
        """What came of a task, given what has arrived of it on the host."""
        if isinstance(task, FirstTokens):
            return self._chosen(task.answers, arrays)
        if isinstance(task, DecodeStep):
            rows = [slot for slot, _ in task.held]
            return self._chosen([answer for _, answer in task.held], [array[rows] for array in arrays])
        if isinstance(task, PromptLikelihoods):
            count = task.sequence.answers[0].params.num_prompt_logprobs or 0
            return [_likelihood(token, row, count) for token, *row in zip(task.tokens.tolist(), *_lists(arrays))]
        return arrays[0] if arrays else None

    def _seat(self, task: DecodeStep) -> None:
        for slot in task.leaving:
            self.slots.clear(slot)
        for slot, answer in task.joining:
            _put(self.slots, slot, answer)
            self._outdated.discard(answer)
        for slot, answer in task.held:
            if answer in self._outdated:
                assert answer.rules is not None
                self.slots.set_mask(slot, answer.rules.words())
        self._outdated.clear()

    def _sample_first(self, task: FirstTokens, logits: paddle.Tensor) -> ManyOf[paddle.Tensor]:
        answers = task.answers
        if len(answers) > len(task.sequences):
            rows = np.repeat(np.arange(len(task.sequences)), [len(one.answers) for one in task.sequences])
            logits = ops.gather_rows(logits, ops.tensor(rows))
        for slot, answer in enumerate(answers):
            _put(self._first, slot, answer)
        ids, logprobs = self._first.sample(logits)
        if not any(answer.params.logprobs is not None for answer in answers):
            return ids, logprobs
        return ids, logprobs, *ops.top_logprobs(logits, ids, min(MAX_LOGPROBS, logits.shape[1]))

    def _chosen(self, answers: ManyOf[Answer], arrays: Arrays) -> list[Chosen]:
        """Of arrays int64 [b], float32 [b] and, where anybody asked, what ops.top_logprobs gives."""
        chosen = []
        for answer, token, logprob, *likelihood in zip(answers, *_lists(arrays)):
            if answer.finish_reason is None and answer.rules is not None and answer.rules.accept(token):
                self._outdated.add(answer)
            asked = answer.params.num_logprobs
            chosen.append(Chosen(token, logprob, None if asked is None else _likelihood(token, likelihood, asked)))
        return chosen


def _put(slots: SamplingSlots, slot: int, answer: Answer) -> None:
    slots.put(
        slot,
        answer.params,
        prompt=answer.request.prompt,
        answer_tokens=answer.token_ids,
        seed=answer.seed,
        mask=None if answer.rules is None else answer.rules.words(),
    )


def _most(task: PromptLikelihoods) -> int:
    return max(1, task.sequence.answers[0].params.num_prompt_logprobs or 0)


def _likelihood(token: int, row: ManyOf, count: int) -> TokenLogprobs:
    """Of a row of what ops.top_logprobs gives: top ids, their log-probabilities, the token's own, its rank."""
    top_ids, top, own, rank = row
    return TokenLogprobs(token, own, rank, tuple(top_ids[:count]), tuple(top[:count]))


def _lists(arrays: Arrays) -> list[list]:
    return [array.tolist() for array in arrays]
