"""The paged KV cache: its memory, who holds which page, which pages a prompt can reuse, and what is kept in files."""

from paddle_qwen1m.cache.layer_cache import CopiedPages, LayerCache, PagedCache
from paddle_qwen1m.cache.pool import CacheFull, PagePool, choose_page_size
from paddle_qwen1m.cache.prefix import (
    M2Range,
    MadeUnder,
    Prefix,
    PrefixChain,
    PrefixIndex,
    SparseRule,
    budgets_digest,
    salt_digest,
)
from paddle_qwen1m.cache.store import PrefixStore
from paddle_qwen1m.cache.transfers import SegmentPages, StoredSegment, Transfers

__all__ = [
    "CacheFull",
    "CopiedPages",
    "LayerCache",
    "M2Range",
    "MadeUnder",
    "PagePool",
    "PagedCache",
    "Prefix",
    "PrefixChain",
    "PrefixIndex",
    "PrefixStore",
    "SegmentPages",
    "SparseRule",
    "StoredSegment",
    "Transfers",
    "budgets_digest",
    "choose_page_size",
    "salt_digest",
]
