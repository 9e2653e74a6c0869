"""The faces of every op behind one numpy signature: the float64 oracle, and the custom op as Python calls it."""

from __future__ import annotations

from typing import Any, Callable, Union

import numpy as np
import oracle
import paddle

from paddle_qwen1m import ops

STORAGE = ("float32", "bfloat16", "float16")


def tensor(array: np.ndarray, dtype: str | None = None) -> paddle.Tensor:
    """A CPU tensor of an array; floating arrays become `dtype` (float32 unless told)."""
    array = np.asarray(array)
    if array.dtype.kind == "f":
        return paddle.to_tensor(array.astype(np.float32)).astype(dtype or "float32")
    return paddle.to_tensor(array)


def array(value: paddle.Tensor) -> np.ndarray:
    """The numbers of a tensor, floating ones as float64."""
    if value.dtype in (paddle.bfloat16, paddle.float16):
        value = value.astype("float32")
    numbers = value.numpy()
    return numbers.astype(np.float64) if numbers.dtype.kind == "f" else numbers


def stored(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers rounded once to a storage type, as float64."""
    return array(tensor(numbers, dtype))


def visits(index: oracle.SparseIndex | oracle.IndexTables) -> ops.SparseIndex:
    """What the ops take of an index."""
    tables = oracle.index_tables(index) if isinstance(index, oracle.SparseIndex) else index
    return ops.SparseIndex(*map(_int32, tables))


class OracleFace:
    """The oracle. Its results are exact up to the rounding of float64."""

    name = "oracle"
    tolerance = 1e-13

    def __getattr__(self, name: str) -> Any:
        return getattr(oracle, name)


class OpFace:
    """The custom op on this device, with weights and caches stored in one type.

    `tolerance` bounds errors relative to the largest number of an output: float32 sums of some hundred products of
    order 1, in another order than the oracle's, stay below it with room to spare.
    """

    tolerance = 1e-5

    def __init__(self, storage: str = "float32") -> None:
        self.storage = storage
        self.name = f"op-{storage}"

    def embedding(
        self, ids: np.ndarray, table: np.ndarray, first: int = 0, vocabulary: int | None = None
    ) -> np.ndarray:
        return array(ops.embedding(tensor(ids), self._stored(table), first=first, vocabulary=vocabulary))

    def rms_norm(self, hidden: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        return array(ops.rms_norm(tensor(hidden), self._stored(weight), eps))

    def add_rms_norm(self, delta: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        total = tensor(residual)
        normed = ops.add_rms_norm(tensor(delta), total, self._stored(weight), eps)
        residual[:] = array(total)
        return array(normed)

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        return array(ops.linear(tensor(x), self._stored(weight), None if bias is None else self._stored(bias)))

    def gated_linear(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return array(ops.gated_linear(tensor(x), self._stored(weight)))

    def cast(self, values: np.ndarray, dtype: str) -> np.ndarray:
        return array(ops.cast(self._stored(values), dtype))

    def silu_mul(self, gate_up: np.ndarray) -> np.ndarray:
        return array(ops.silu_mul(tensor(gate_up)))

    def gather_rows(self, hidden: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return array(ops.gather_rows(tensor(hidden), tensor(rows)))

    def join_columns(self, parts: np.ndarray, columns: int) -> np.ndarray:
        return array(ops.join_columns(tensor(parts), columns))

    def rotary_table(self, positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
        return array(ops.rotary_table(tensor(positions.astype(np.int32)), tensor(inv_freq)))

    def rotate_and_cache(
        self,
        qkv: np.ndarray,
        bias: np.ndarray,
        table: np.ndarray,
        slots: np.ndarray,
        key_cache: np.ndarray,
        value_cache: np.ndarray,
    ) -> np.ndarray:
        inputs = tensor(qkv), self._stored(bias), tensor(table), tensor(slots)
        return self._caching(lambda *cache: ops.rotate_and_cache(*inputs, *cache), key_cache, value_cache)

    def rotating_linear(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray,
        table: np.ndarray,
        slots: np.ndarray,
        key_cache: np.ndarray,
        value_cache: np.ndarray,
    ) -> np.ndarray:
        inputs = tensor(x), self._stored(weight), self._stored(bias), tensor(table), tensor(slots)
        return self._caching(lambda *cache: ops.rotating_linear(*inputs, *cache), key_cache, value_cache)

    def _caching(
        self, queries: Callable[..., paddle.Tensor], key_cache: np.ndarray, value_cache: np.ndarray
    ) -> np.ndarray:
        """What an op makes of caches like these, which take on what it writes."""
        caches = self._stored(key_cache), self._stored(value_cache)
        made = queries(*caches)
        key_cache[:], value_cache[:] = map(array, caches)
        return array(made)

    def rotate_queries(self, qkv: np.ndarray, bias: np.ndarray, table: np.ndarray, row: int, heads: int) -> np.ndarray:
        return array(ops.rotate_queries(tensor(qkv), self._stored(bias), tensor(table), heads, row=row))

    def dca_prefill(
        self,
        q: np.ndarray,
        out: np.ndarray,
        key_cache: np.ndarray,
        value_cache: np.ndarray,
        block_tables: np.ndarray,
        pieces: np.ndarray,
        scale: np.ndarray,
        chunk_len: int,
        lse: np.ndarray | None = None,
    ) -> None:
        result, sums = tensor(out), None if lse is None else tensor(lse)
        caches = self._stored(key_cache), self._stored(value_cache), tensor(block_tables)
        scales = tensor(np.asarray(scale, dtype=np.float32))
        ops.dca_prefill(tensor(q), result, *caches, _int32(pieces), scales, chunk_len, sums)
        out[:] = array(result)
        if lse is not None:
            lse[:] = array(sums)

    def dca_decode(
        self,
        q: np.ndarray,
        key_cache: np.ndarray,
        value_cache: np.ndarray,
        block_tables: np.ndarray,
        lengths: np.ndarray,
        scale: np.ndarray,
        chunk_len: int,
    ) -> np.ndarray:
        caches = self._stored(key_cache), self._stored(value_cache)
        lengths_and_scale = _int32(lengths), tensor(np.asarray(scale, dtype=np.float32))
        return array(ops.dca_decode(tensor(q), *caches, tensor(block_tables), *lengths_and_scale, chunk_len))

    def decode_inputs(
        self,
        lengths: np.ndarray,
        block_tables: np.ndarray,
        inv_freq: np.ndarray,
        page_size: int,
        chunk_len: int,
        chunk_size: int,
        original: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        grown = _int32(lengths)
        inputs = grown, _int32(block_tables), tensor(inv_freq), page_size, chunk_len, chunk_size, original
        slots, table, scale = (array(result) for result in ops.decode_inputs(*inputs))
        lengths[:] = array(grown)
        return slots, table, scale

    def dca_probe(
        self, q: np.ndarray, key_cache: np.ndarray, block_table: np.ndarray, end: int, chunk_len: int, scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        cache = self._stored(key_cache)
        vertical, slash = ops.dca_probe(tensor(q), cache, tensor(block_table), end, chunk_len, scale)
        return array(vertical), array(slash)

    def select_critical(
        self,
        vertical: np.ndarray,
        slash: np.ndarray,
        vertical_sizes: np.ndarray,
        slash_sizes: np.ndarray,
        max_vertical: int,
        max_slash: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        sizes = _int32(vertical_sizes), _int32(slash_sizes)
        columns, slashes = ops.select_critical(tensor(vertical), tensor(slash), *sizes, max_vertical, max_slash)
        return array(columns), array(slashes)

    def sparse_index(
        self, columns: np.ndarray, slashes: np.ndarray, begin: int, rows: int, chunk_len: int, block: int = 64
    ) -> oracle.SparseIndex:
        index = ops.sparse_index(_int32(columns), _int32(slashes), begin, rows, chunk_len, block)
        return oracle.listed_columns(oracle.IndexTables(*map(array, index)))

    def dca_sparse_prefill(
        self,
        q: np.ndarray,
        out: np.ndarray,
        key_cache: np.ndarray,
        value_cache: np.ndarray,
        block_table: np.ndarray,
        index: oracle.SparseIndex | oracle.IndexTables,
        row: int,
        begin: int,
        rows: int,
        chunk_len: int,
        scale: float,
        lse: np.ndarray | None = None,
    ) -> None:
        result, sums = tensor(out), None if lse is None else tensor(lse)
        caches = self._stored(key_cache), self._stored(value_cache), tensor(block_table)
        ops.dca_sparse_prefill(tensor(q), result, *caches, visits(index), row, begin, rows, chunk_len, scale, sums)
        out[:] = array(result)
        if lse is not None:
            lse[:] = array(sums)

    def sample(
        self,
        logits: np.ndarray,
        counts: np.ndarray,
        mask: np.ndarray,
        masked: np.ndarray,
        bias: np.ndarray,
        biased: np.ndarray,
        repetition_penalty: np.ndarray,
        frequency_penalty: np.ndarray,
        presence_penalty: np.ndarray,
        temperature: np.ndarray,
        min_p: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
        steps: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        counted, advanced = tensor(counts.view(np.int16)), tensor(steps.astype(np.int64))
        ids, logprobs = ops.sample(
            tensor(logits),
            counted,
            tensor(mask.view(np.int32)),
            tensor(masked.astype(np.uint8)),
            tensor(bias),
            tensor(biased.astype(np.uint8)),
            tensor(repetition_penalty),
            tensor(frequency_penalty),
            tensor(presence_penalty),
            tensor(temperature),
            tensor(min_p),
            _int32(top_k),
            tensor(top_p),
            tensor(seeds.astype(np.int64)),
            advanced,
        )
        counts[:], steps[:] = array(counted).view(np.uint16), array(advanced)
        return array(ids), array(logprobs)

    def top_logprobs(
        self, logits: np.ndarray, ids: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        top_ids, top, logprobs, ranks = map(array, ops.top_logprobs(tensor(logits), tensor(ids.astype(np.int64)), k))
        return top_ids, top, logprobs, ranks

    def _stored(self, numbers: np.ndarray) -> paddle.Tensor:
        return tensor(numbers, self.storage)


Face = Union[OracleFace, OpFace]
FACES = (OracleFace(), OpFace())


def _int32(numbers: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(numbers, dtype=np.int32))


def error(result: np.ndarray, expected: np.ndarray) -> float:
    """Largest deviation relative to the largest expected magnitude; infinite where the result is not finite."""
    assert result.shape == expected.shape
    if not np.isfinite(result).all():
        return float("inf")
    return float(np.abs(result - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-30))
