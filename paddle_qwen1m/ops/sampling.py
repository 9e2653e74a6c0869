"""The ops that choose tokens from logits and tell how likely tokens are."""

from __future__ import annotations

import paddle

from paddle_qwen1m.ops.library import call

IN_PROMPT = 0x8000
"""Bit of a token's count: it stands in the prompt."""
LARGEST_COUNT = 0x7FFF
"""The other bits of a token's count: how often the answer has it, at most so often."""


def sample(
    logits: paddle.Tensor,
    counts: paddle.Tensor,
    mask: paddle.Tensor,
    masked: paddle.Tensor,
    bias: paddle.Tensor,
    biased: paddle.Tensor,
    repetition_penalty: paddle.Tensor,
    frequency_penalty: paddle.Tensor,
    presence_penalty: paddle.Tensor,
    temperature: paddle.Tensor,
    min_p: paddle.Tensor,
    top_k: paddle.Tensor,
    top_p: paddle.Tensor,
    seeds: paddle.Tensor,
    steps: paddle.Tensor,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """One token a row of float32 logits [B, vocab]: ids int64 [B] and log-probabilities float32 [B].

    What happens to a row, in the order in which vLLM's sampler does it:

    1. mask: int32 [B, ceil(vocab / 32)], where `masked` (uint8 [B]) is set. A token t stays where bit t % 32 of word
       t // 32 is set.
    2. bias: float32 [B, vocab] is added, where `biased` (uint8 [B]) is set.
    3. repetition_penalty (1: off) of tokens in the prompt or the answer: positive logits are divided by it, others
       multiplied. Then logits -= frequency_penalty * n + presence_penalty * (n > 0) with n, how often the answer has
       the token (0: off). float32 [B] each. Which tokens those are `counts` says, int16 [B, vocab] with the bits
       IN_PROMPT and, below it, the number n; it ends at LARGEST_COUNT.
    4. temperature, float32 [B]: 0 takes the largest, ties to the lower id, and what follows does not matter.
    5. min_p, float32 [B] (0: off): tokens at least so probable as min_p times the most probable one.
    6. top_k, int32 [B] (0: off), the k most probable, ties to the lower ids. Then top_p, float32 [B]: of those, each
       before which the probability, 1 in all, has not reached top_p; the first always.
    7. The draw, which depends on (seed, step) alone, int64 [B] each.

    The log-probability is that of the logits as they are before the temperature. The token is counted and the step
    grows by one, both in place. A row whose step is below 0 has no sequence: its id and log-probability are 0, nothing
    else of it is read or written. Rows without a penalty read no counts, those without a mask or a bias none of it.
    """
    parameters = repetition_penalty, frequency_penalty, presence_penalty, temperature, min_p, top_k, top_p
    *_, ids, logprobs = call("sample", logits, counts, mask, masked, bias, biased, *parameters, seeds, steps)
    return ids, logprobs


def top_logprobs(
    logits: paddle.Tensor, ids: paddle.Tensor, k: int
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """How likely tokens are under each row of float32 logits [n, vocab], taken as they are.

    Ids int32 [n, k] and log-probabilities float32 [n, k] of the k most likely tokens (1 to 512), the likeliest first,
    ties by id; the log-probability float32 [n] and the rank int32 [n] of the token that `ids` (int64 [n]) names. A rank
    is the number of tokens that are at least as likely, as in vLLM: 1 for the likeliest.
    """
    top_ids, top, logprobs, ranks = call("top_logprobs", logits, ids, k)
    return top_ids, top, logprobs, ranks
