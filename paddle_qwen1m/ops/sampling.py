"""The op that chooses tokens from logits."""

from __future__ import annotations

import paddle

from paddle_qwen1m.ops.library import call


def sample(
    logits: paddle.Tensor,
    seen: paddle.Tensor,
    temperature: paddle.Tensor,
    top_k: paddle.Tensor,
    top_p: paddle.Tensor,
    repetition_penalty: paddle.Tensor,
    banned: paddle.Tensor,
    banned_steps: paddle.Tensor,
    seeds: paddle.Tensor,
    steps: paddle.Tensor,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """One token a row of float32 logits [B, vocab]: ids int64 [B] and log-probabilities float32 [B].

    In this order: repetition penalty over `seen` (uint8 [B, vocab], the drawn token is marked in place), banned ids
    (int32 [B, E], -1 for none) while the row's step is below its `banned_steps` (int64 [B]), temperature (0 takes the
    arg-max, ties to the lower id), top_k (0 for all), top_p. The draw depends on (seed, step) alone, int64 [B] each;
    steps grow by one in place. The log-probability is that of the penalised logits before the temperature.
    """
    *_, ids, logprobs = call(
        "sample", logits, seen, temperature, top_k, top_p, repetition_penalty, banned, banned_steps, seeds, steps
    )
    return ids, logprobs
