"""Decides by arithmetic how many pages a cache gets, before any memory is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class NotEnoughMemory(MemoryError):
    """A request needs more memory than there is; the message says how much, and which options help."""


@dataclass(frozen=True)
class Budget:
    """What a cache's size depends on, in bytes, of one rank: a page in all layers, the activations of the largest step,
    and what is available for both (None: unknown, so nothing is refused).
    """

    page_bytes: int
    activations: int
    available: int | None

    def pages(self) -> int | None:
        """Pages that fit beside the activations."""
        return None if self.available is None else max(0, (self.available - self.activations) // self.page_bytes)


def cache_pages(needed: Sequence[int], spare: int, budget: Budget, *, page_size: int) -> int:
    """Pages of a cache for requests that need so many each, with `spare` more for each of them where they fit.

    With less memory the requests take turns, in a cache that holds the largest of them at least. NotEnoughMemory when
    even that does not fit.
    """
    largest, together = max(needed), sum(needed)
    fits = budget.pages()
    if fits is None:
        return together + spare * len(needed)
    if largest > fits:
        wanted = largest * budget.page_bytes
        raise NotEnoughMemory(
            f"{largest * page_size:,} tokens need {(wanted + budget.activations) / 1e9:.1f} GB beside the weights "
            f"({wanted / 1e9:.1f} GB of keys and values, {budget.activations / 1e9:.1f} GB of activations), and "
            f"{(budget.available or 0) / 1e9:.1f} GB are available: a shorter prompt or answer, fewer "
            "max_num_batched_tokens, kv_cache_dtype bfloat16 on a CPU, or more ranks need less"
        )
    return max(largest, min(together + spare * len(needed), fits))
