"""The paged KV cache: its memory, who holds which page, and which pages a prompt can reuse."""

from paddle_qwen1m.cache.layer_cache import LayerCache, PagedCache
from paddle_qwen1m.cache.pool import CacheFull, PagePool, choose_page_size
from paddle_qwen1m.cache.prefix import Prefix, PrefixIndex, digests

__all__ = [
    "CacheFull",
    "LayerCache",
    "PagePool",
    "PagedCache",
    "Prefix",
    "PrefixIndex",
    "choose_page_size",
    "digests",
]
