"""lm-evaluation-harness's model `paddle_qwen1m`, and its command with that model registered."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import lm_eval.models  # noqa: F401  (its own models register; after one that is not its own they would not)
import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from paddle_qwen1m.engine import SamplingParams
from paddle_qwen1m.llm import LLM

NAME = "paddle_qwen1m"
logger = logging.getLogger(__name__)
BATCH = 64
"""Requests that are given to the engine together; what they share is read once, and answers are kept after each."""
MOST_ROWS = 256
"""Tokens of a continuation that are scored by their rows of logits, behind what the prefix cache has of the context."""
MAX_NEW_TOKENS = 256
TASKS_OWN = ("until", "do_sample", "max_gen_toks", "max_new_tokens", "max_tokens")
Scored = tuple[tuple[str, str], Sequence[int], Sequence[int]]


@register_model(NAME)
class PaddleQwen1M(TemplateLM):
    """A checkpoint that LLM loads. pretrained: directory or hub name; options: LLM's."""

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = MAX_NEW_TOKENS,
        **options: Any,
    ) -> None:
        """batch_size: requests that are scored or answered together; "auto": BATCH. max_batch_size, device: without
        effect, what runs together and where is the engine's choice. Raises as LLM does.
        """
        super().__init__()
        self._llm = LLM(pretrained, **options)
        self._name = str(options.get("tokenizer", pretrained))
        self._batch = BATCH if batch_size in (None, "auto") else int(str(batch_size))
        self._max_gen_toks = int(max_gen_toks)
        self.tokenizer = self._llm.get_tokenizer()
        self.max_length = self._llm.max_model_len - 1
        """One token is always left for an answer, as harness's `local-completions` has it."""

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_others: Any) -> list[int]:
        return list(self.tokenizer(string, verbose=False)["input_ids"])

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's, by which results and cached requests are told apart; there is no other to choose."""
        return str(self.tokenizer.init_kwargs.get("chat_template") or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a prompt; without `add_generation_prompt` its last message is to be gone on with."""
        if not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {self._name} has no chat template: leave out --apply_chat_template")
        text = str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
        last = chat_history[-1]["content"]
        return text if add_generation_prompt else text[: text.rindex(last) + len(last)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each text, in windows of the model's length, each token once."""
        sums = []
        for (text,) in _shown([request.args for request in requests], disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            scored = [self._score(*make_disjoint_window(window)) for window in windows]
            sums.append(float(sum(logprob for logprob, _ in scored)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stops, in the order of the requests."""
        texts = []
        with tqdm(total=len(requests), desc=NAME, disable=disable_tqdm) as bar:
            for batch in _batches(requests, self._batch):
                params = [self._params(dict(request.args[1])) for request in batch]
                prompts = [
                    self._cut(self.tok_encode(request.args[0]), self.max_length - (one.max_tokens or 0))
                    for request, one in zip(batch, params)
                ]
                outputs = self._llm.generate(prompts, params, use_tqdm=False)
                for request, output in zip(batch, outputs):
                    texts.append(output.outputs[0].text)
                    self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                bar.update(len(batch))
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_others: Any
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # those of one context follow each other: it is read once
        order = sorted(range(len(requests)), key=lambda number: tuple(requests[number][1]))
        for number in _shown(order, disable_tqdm):
            pair, context, continuation = requests[number]
            scores[number] = self._score(context, continuation)
            self.cache_hook.add_partial("loglikelihood", pair, scores[number])
        return scores

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """The sum of log-probabilities of the continuation, and whether each of its tokens is the likeliest."""
        if not continuation:
            return 0.0, True
        if len(continuation) >= self.max_length:
            raise ValueError(f"a continuation of {len(continuation):,} tokens is as long as the model's max_model_len")
        ids = self._cut([*context, *continuation], self.max_length)
        begin = len(ids) - len(continuation)
        if len(continuation) <= MOST_ROWS:
            logits = self._llm.logits(ids, range(begin - 1, len(ids) - 1))
            wide = logits.astype(np.float64)
            chosen = wide[np.arange(len(wide)), ids[begin:]]
            sums = np.logaddexp.reduce(wide, axis=-1)
            return float((chosen - sums).sum()), bool((logits.argmax(-1) == ids[begin:]).all())
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self._llm.generate([ids], params, use_tqdm=False)
        told = [entry[token] for entry, token in zip((output.prompt_logprobs or [])[begin:], ids[begin:]) if entry]
        return float(sum(one.logprob for one in told)), all(one.rank == 1 for one in told)

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        """Of a task's generation_kwargs: greedy unless it samples. TypeError for one that SamplingParams has not."""
        until = given.get("until") or []
        longest = next((given[name] for name in TASKS_OWN[2:] if name in given), self._max_gen_toks)
        own = {name: value for name, value in given.items() if name not in TASKS_OWN}
        if not given.get("do_sample", float(own.get("temperature", 0.0)) > 0):
            own["temperature"] = 0.0
        stops = [until] if isinstance(until, str) else list(until)
        return SamplingParams(**own, max_tokens=int(longest), stop=stops)

    def _cut(self, ids: list[int], longest: int) -> list[int]:
        """The last `longest` of the ids, which is told."""
        if longest < 1:
            raise ValueError(f"max_gen_toks leaves no token of max_model_len, {self.max_length + 1:,}, to the prompt")
        if len(ids) > longest:
            logger.warning(
                f"{len(ids):,} tokens are more than fit max_model_len, {self.max_length + 1:,}: the first "
                f"{len(ids) - longest:,} are left out; give max_model_len in --model_args for more"
            )
        return ids[-longest:]


def main(arguments: Sequence[str]) -> None:
    """lm-evaluation-harness's own command."""
    sys.argv = ["paddle-qwen1m lm-eval", *arguments]
    cli_evaluate()


def _shown(items: Sequence[Any], hidden: bool) -> Iterator[Any]:
    yield from tqdm(items, desc=NAME, disable=hidden)


def _batches(requests: Sequence[Any], size: int) -> Iterator[list[Any]]:
    left = iter(requests)
    while batch := list(islice(left, size)):
        yield batch
