"""What an 8-bit cache is kept by, in a file: the frame of its keys, made from keys, and layers that stay in 16 bits.

A key is divided by 2^exponent, one for the two dims that a rotation mixes, and the centre is taken off before it is
rounded; whoever reads it puts both back, so that nothing else of the model changes. Some pairs are far larger than the
others, and biases leave the slow ones an offset that all keys share: either would use up the 127 steps of a token.
Where a layer's output moves too far even so, its keys and values are not rounded to int8.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.fileio.durable import write_whole

FORMAT = 2
OLDEST_FORMAT = 1
"""Of files that can be read; it has no measurement."""
LARGEST_ERROR = 0.05
"""How far attention's output may move in a layer, relative to its size, where keys and values are rounded to int8."""
PLACES = 32
"""Positions over a DCA chunk that a frame is made for: a text of some thousand tokens sees its beginning alone."""
DIGEST_BYTES = 8


@dataclass(frozen=True, eq=False)
class KVScales:
    """exponents: int8 [layers, G, D / 2]; centres: float32 [layers, G, D] of keys divided by 2^exponent. weights: the
    digest of the checkpoint that they were made for, "" for any. in_16_bits: layers whose keys and values are not
    rounded to int8. errors: by how much of its size each layer's output moves where they are; () if nobody measured it.
    """

    exponents: np.ndarray
    centres: np.ndarray
    weights: str = ""
    in_16_bits: tuple[int, ...] = ()
    errors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        layers, kv_heads, half = self.exponents.shape
        assert self.exponents.dtype == np.int8 and self.centres.dtype == np.float32
        assert self.centres.shape == (layers, kv_heads, 2 * half)
        assert list(self.in_16_bits) == sorted(set(self.in_16_bits) & set(range(layers)))
        assert len(self.errors) in (0, layers)

    @classmethod
    def none(cls, config: ModelConfig) -> KVScales:
        """Keys as they are, rounded: exponents and centres of 0."""
        shape = config.num_layers, config.num_kv_heads
        exponents = np.zeros((*shape, config.head_dim // 2), np.int8)
        return cls(exponents, np.zeros((*shape, config.head_dim), np.float32))

    @classmethod
    def of_layers(cls, exponents: Iterable[np.ndarray], centres: Iterable[np.ndarray]) -> KVScales:
        """Of every layer's `exponents_of` and `centre_of`."""
        stacked = np.stack(list(exponents))
        powers = np.exp2(stacked.astype(np.float32))
        return cls(stacked, np.stack(list(centres)) / np.concatenate([powers, powers], axis=-1))

    @property
    def digest(self) -> str:
        """The same for the same numbers alone."""
        digest = hashlib.blake2b(repr(self.exponents.shape).encode(), digest_size=DIGEST_BYTES)
        digest.update(self.exponents.tobytes())
        digest.update(self.centres.astype("<f4").tobytes())
        if self.in_16_bits:
            digest.update(repr(self.in_16_bits).encode())
        return digest.hexdigest()

    def frame(self, layer: int) -> np.ndarray:
        """What an 8-bit cache's ops take: float32 [2, G, D], powers of two and centres."""
        powers = np.exp2(self.exponents[layer].astype(np.float32))
        return np.stack([np.concatenate([powers, powers], axis=-1), self.centres[layer]])

    @property
    def largest_centre(self) -> float:
        """In units of the model's keys."""
        powers = np.exp2(self.exponents.astype(np.float32))
        return float(np.abs(self.centres * np.concatenate([powers, powers], axis=-1)).max())

    def of_heads(self, heads: Sequence[Sequence[int]]) -> KVScales:
        """Those of some KV heads, as many of each layer, in that order."""
        exponents = np.stack([self.exponents[layer, list(own)] for layer, own in enumerate(heads)])
        centres = np.stack([self.centres[layer, list(own)] for layer, own in enumerate(heads)])
        return replace(self, exponents=exponents, centres=centres)

    def measured(self, errors: Sequence[float], errors_in_16_bits: Sequence[float]) -> KVScales:
        """With what was measured of each layer: those beyond LARGEST_ERROR in int8, and nearer in 16 bits, stay in
        these.
        """
        both = enumerate(zip(errors, errors_in_16_bits))
        kept = tuple(layer for layer, (int8, wide) in both if int8 > LARGEST_ERROR and wide < int8)
        return replace(self, in_16_bits=kept, errors=tuple(errors))

    def summary(self) -> str:
        """Which layers stay in 16 bits, and the error of each, and how large it is in the others: a line to read."""
        if not self.errors:
            return "what int8 does to attention's output was not measured"
        rounded = [error for layer, error in enumerate(self.errors) if layer not in self.in_16_bits]
        moved = "no layer is in int8" if not rounded else f"int8 moves a layer's output by up to {max(rounded):.2%}"
        if not self.in_16_bits:
            return moved
        kept = ", ".join(f"{layer} ({self.errors[layer]:.1%})" for layer in self.in_16_bits)
        return f"{moved}; more than {LARGEST_ERROR:.0%} in these, which stay in 16 bits: {kept}"

    def check_fit(self, config: ModelConfig, weights: str, source: str) -> None:
        """ValueError, naming `source`, for those of another shape or checkpoint than that of the digest `weights`."""
        expected = config.num_layers, config.num_kv_heads, config.head_dim
        if self.centres.shape != expected:
            raise ValueError(
                f"{source}: scales of {self.centres.shape} (layers, KV heads, head size), the model has {expected}: "
                "they are another model's; `paddle-qwen1m calibrate-kv` makes those of this one"
            )
        if self.weights and weights and self.weights != weights:
            raise ValueError(
                f"{source}: made for weights {self.weights[:12]}..., these are {weights[:12]}...: another "
                "checkpoint's; `paddle-qwen1m calibrate-kv` makes those of this one"
            )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> KVScales:
        """ValueError, naming it, for a file that `write` did not make; OSError for one that cannot be read."""
        path = Path(path)
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no scales of an 8-bit cache: {error!r:.200}") from None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Makes the file, whole or not at all."""
        write_whole(Path(path), json.dumps(self.as_json()).encode())

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> KVScales:
        """Of what `as_json` gave, in this version or an earlier one. AttributeError, KeyError, TypeError or ValueError
        for anything else.
        """
        if found["format"] not in range(OLDEST_FORMAT, FORMAT + 1):
            raise ValueError(f"format {found['format']}, this version of the package reads {OLDEST_FORMAT} to {FORMAT}")
        exponents, centres = np.asarray(found["exponents"]), np.asarray(found["centres"], np.float32)
        if exponents.ndim != 3 or exponents.dtype.kind != "i" or np.abs(exponents).max() > 127:
            raise ValueError("exponents are not whole numbers of a byte, [layers, KV heads, head size / 2]")
        if centres.shape != (*exponents.shape[:2], 2 * exponents.shape[2]) or not np.isfinite(centres).all():
            raise ValueError(f"centres must be {(*exponents.shape[:2], 2 * exponents.shape[2])} finite numbers")
        in_16_bits, errors = found.get("in_16_bits", []), np.asarray(found.get("errors", []), np.float64)
        if in_16_bits != [layer for layer in range(len(exponents)) if layer in in_16_bits]:
            raise ValueError(f"in_16_bits must be numbers of layers, ascending, got {in_16_bits!r:.80}")
        if errors.shape not in ((0,), (len(exponents),)) or np.isnan(errors).any():
            raise ValueError(f"errors must be a number for each of {len(exponents)} layers")
        kept = exponents.astype(np.int8), centres, str(found["weights"])
        return cls(*kept, tuple(map(int, in_16_bits)), tuple(errors.tolist()))

    def as_json(self) -> dict[str, Any]:
        """Numbers, texts and lists; float32 with the digits that make them the same again."""
        return {
            "format": FORMAT,
            "weights": self.weights,
            "in_16_bits": list(self.in_16_bits),
            "errors": [float(f"{error:.4g}") for error in self.errors],
            "exponents": self.exponents.tolist(),
            "centres": [[[float(f"{x:.9g}") for x in head] for head in layer] for layer in self.centres],
        }


def centre_of(keys: np.ndarray, inv_freq: np.ndarray, chunk_len: int) -> np.ndarray:
    """The mean over a DCA chunk of one layer's rotated keys, float32 [G, D], from unrotated ones float [tokens, G, D],
    each of which is thought to stand everywhere in it.
    """
    pairs = _as_pairs(keys)
    turned = _turns(inv_freq, chunk_len).mean(axis=0) * pairs.mean(axis=0)
    return np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)


def exponents_of(keys: np.ndarray, centre: np.ndarray, inv_freq: np.ndarray, chunk_len: int) -> np.ndarray:
    """int8 [G, D / 2] of the same keys: how far they come from the centre at most, the two dims of a pair together, is
    the pair's size. Those above the head's median are divided by the power of two that brings them nearest to it.
    """
    pairs, middle = _as_pairs(keys), _as_pairs(centre)
    size = np.zeros(middle.shape)
    for turn in _turns(inv_freq, chunk_len):
        size = np.maximum(size, np.abs(pairs * turn - middle).max(axis=0))
    typical = np.maximum(np.median(size, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return np.clip(np.round(np.log2(np.maximum(size, typical) / typical)), 0, 127).astype(np.int8)


def _as_pairs(keys: np.ndarray) -> np.ndarray:
    """The two dims that a rotation mixes as one complex number: [..., D / 2]."""
    half = keys.shape[-1] // 2
    return keys[..., :half] + 1j * keys[..., half:]


def _turns(inv_freq: np.ndarray, chunk_len: int) -> np.ndarray:
    """Rotations to PLACES positions of a chunk: complex [PLACES, D / 2]."""
    return np.exp(1j * np.linspace(0.0, chunk_len - 1, PLACES)[:, None] * inv_freq.astype(np.float64))
