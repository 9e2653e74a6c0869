"""The paged KV cache: its memory, who holds which page, and which pages a prompt can reuse."""

from paddle_qwen1m.cache.layer_cache import LayerCache, PagedCache
from paddle_qwen1m.cache.pool import CacheFull, PagePool, choose_page_size
from paddle_qwen1m.cache.prefix import MadeUnder, Prefix, PrefixChain, PrefixIndex, SparseRule, budgets_digest

__all__ = [
    "CacheFull",
    "LayerCache",
    "MadeUnder",
    "PagePool",
    "PagedCache",
    "Prefix",
    "PrefixChain",
    "PrefixIndex",
    "SparseRule",
    "budgets_digest",
    "choose_page_size",
]
