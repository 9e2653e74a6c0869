"""Random prompts: unrotated projections, their rotations, and the shuffled paged caches that attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import oracle
from faces import Face, stored

CHUNK_LEN, LOCAL_SIZE = 128, 32
CHUNK_SIZE = CHUNK_LEN + LOCAL_SIZE


def exact_frequencies(head_dim: int) -> np.ndarray:
    """Powers of two: the float32 angles are then exact and rotations compose to the rounding of float64."""
    return (2.0 ** -np.arange(head_dim // 2)).astype(np.float32)


class PagedCache(NamedTuple):
    """Keys and values of several sequences in pages that lie in random order; slots that hold no token are NaN."""

    keys: np.ndarray
    values: np.ndarray
    tables: np.ndarray

    def slots(self, sequence: int, start: int, end: int) -> np.ndarray:
        """Slot (page * page_size + offset) of the tokens [start, end) of a sequence, int64."""
        page_size = self.keys.shape[1]
        positions = np.arange(start, end)
        pages = self.tables[sequence, positions // page_size].astype(np.int64)
        return pages * page_size + positions % page_size


def paged_cache(
    rng: np.random.Generator,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    page_size: int,
    spare_pages: int = 3,
) -> PagedCache:
    """Scatter keys and values [tokens, G, D] of each sequence over shuffled pages of one pool.

    Table entries past a sequence's pages are -1.
    """
    needed = [-(-len(k) // page_size) for k in keys]
    order = rng.permutation(sum(needed) + spare_pages).astype(np.int32)
    shape = (len(order), page_size, *keys[0].shape[1:])
    cache = PagedCache(np.full(shape, np.nan), np.full(shape, np.nan), np.full((len(keys), max(needed)), -1, np.int32))
    taken = 0
    for sequence, pages in enumerate(needed):
        cache.tables[sequence, :pages] = order[taken : taken + pages]
        taken += pages
        slots = cache.slots(sequence, 0, len(keys[sequence]))
        cache.keys.reshape(-1, *shape[2:])[slots] = keys[sequence]
        cache.values.reshape(-1, *shape[2:])[slots] = values[sequence]
    return cache


@dataclass(frozen=True)
class Prompt:
    """q [T, H, D], k and v [T, G, D] unrotated; queries and critical [3, T, H, D]; rotated, rounded keys in pages."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    queries: np.ndarray
    critical: np.ndarray
    cache: PagedCache
    chunk_len: int
    chunk_size: int
    scale: float

    @property
    def caches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Key pages, value pages and the block table, as single-sequence ops take them."""
        return self.cache.keys, self.cache.values, self.cache.tables[0]

    def pieces(self, borders: list[int]) -> np.ndarray:
        """Pieces of a prefill in chunks that start at `borders`; row and position agree."""
        chunks = zip(borders, [*borders[1:], len(self.q)])
        pieces = [p for begin, end in chunks for p in oracle.pieces_of(begin, end, self.chunk_len)]
        return np.array([(0, begin, end - begin, begin) for begin, end in pieces], dtype=np.int32)

    def dense(self, face: Face, borders: list[int] | None = None) -> np.ndarray:
        """Dense attention [T, H, D] by a face; every row is poisoned before it is written."""
        out = np.full(self.q.shape, np.nan)
        tables = self.cache.tables
        pieces = self.pieces(borders or [0])
        face.dca_prefill(self.queries, out, *self.caches[:2], tables, pieces, [self.scale], self.chunk_len)
        return out

    def dense_lse(self, begin: int, end: int) -> np.ndarray:
        """LSE [H, end - begin] of dense attention, by the oracle."""
        return oracle.dense_piece(self.queries[:, begin:end], *self.caches, begin, self.chunk_len, self.scale)[1]

    def index(self, face: Face, begin: int, end: int, vertical: int, slash: int) -> oracle.SparseIndex:
        """What a face selects for the piece [begin, end) with the same budgets for every head."""
        first_probe = max(begin, end - 64)
        keys, _, table = self.caches
        scores = face.dca_probe(self.critical[:, first_probe:end], keys, table, end, self.chunk_len, self.scale)
        heads = self.q.shape[1]
        sizes = np.full(heads, vertical), np.full(heads, slash)
        selected = face.select_critical(*scores, *sizes, vertical, slash)
        return face.sparse_index(*selected, begin, end - begin, self.chunk_len)

    def sparse(
        self, face: Face, begin: int, end: int, index: oracle.SparseIndex | oracle.IndexTables
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sparse attention [n, H, D] and LSE [n, H] of the piece [begin, end) by a face."""
        out, lse = np.full(self.q.shape, np.nan), np.full(self.q.shape[:2], np.nan)
        face.dca_sparse_prefill(
            self.queries, out, *self.caches, index, begin, begin, end - begin, self.chunk_len, self.scale, lse
        )
        untouched = np.r_[:begin, end : len(out)]
        assert np.isnan(out[untouched]).all() and np.isnan(lse[untouched]).all()
        return out[begin:end], lse[begin:end]


def rotations(x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """Rotations [V, T, heads, D] of x [T, heads, D] to positions [V, T]."""
    return oracle.rotate(x[None], oracle.rotary_table(positions, inv_freq)[:, :, None])


def make_prompt(
    rng: np.random.Generator,
    tokens: int,
    chunk_len: int = CHUNK_LEN,
    local_size: int = LOCAL_SIZE,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    inv_freq: np.ndarray | None = None,
    temperature: float = 1.0,
    storage: str | None = None,
) -> Prompt:
    """A prompt of normal random projections. `storage` rounds what is cached to a type, exactly as a cache would."""
    chunk_size = chunk_len + local_size
    inv_freq = exact_frequencies(head_dim) if inv_freq is None else inv_freq
    q = rng.standard_normal((tokens, heads, head_dim))
    k, v = rng.standard_normal((2, tokens, kv_heads, head_dim))
    positions = np.arange(tokens)
    keys = rotations(k, oracle.key_positions(positions, chunk_len)[None], inv_freq)[0]
    values = v
    if storage is not None:
        keys, values = stored(keys, storage), stored(values, storage)
    return Prompt(
        q=q,
        k=k,
        v=v,
        queries=rotations(q, oracle.query_positions(positions, chunk_len, chunk_size), inv_freq),
        critical=rotations(q, oracle.critical_positions(positions, chunk_len, chunk_size), inv_freq),
        cache=paged_cache(rng, [keys], [values], page_size),
        chunk_len=chunk_len,
        chunk_size=chunk_size,
        scale=head_dim**-0.5 * temperature**2,
    )
