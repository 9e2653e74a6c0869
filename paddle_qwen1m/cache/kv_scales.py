"""The frame that int8 keys are kept in: powers of two of rotation pairs and centres, made from keys, in a file.

A key is divided by 2^exponent, one for the two dims that a rotation mixes, and the centre is taken off before it is
rounded; whoever reads it puts both back, so that nothing else of the model changes. Some pairs are far larger than the
others, and biases leave the slow ones an offset that all keys share: either would use up the 127 steps of a token.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.fileio.durable import write_whole

FORMAT = 1
PLACES = 32
"""Positions over a DCA chunk that a frame is made for: a text of some thousand tokens sees its beginning alone."""
DIGEST_BYTES = 8


@dataclass(frozen=True, eq=False)
class KVScales:
    """exponents: int8 [layers, G, D / 2]; centres: float32 [layers, G, D] of keys divided by 2^exponent. weights: the
    digest of the checkpoint that they were made for, "" for any.
    """

    exponents: np.ndarray
    centres: np.ndarray
    weights: str = ""

    def __post_init__(self) -> None:
        layers, kv_heads, half = self.exponents.shape
        assert self.exponents.dtype == np.int8 and self.centres.dtype == np.float32
        assert self.centres.shape == (layers, kv_heads, 2 * half)

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
        return digest.hexdigest()

    def frame(self, layer: int) -> np.ndarray:
        """What an int8 cache's ops take: float32 [2, G, D], powers of two and centres."""
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
        return KVScales(exponents, centres, self.weights)

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
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}, this version of the package reads {FORMAT}")
            exponents, centres = np.asarray(found["exponents"]), np.asarray(found["centres"], np.float32)
            if exponents.ndim != 3 or exponents.dtype.kind != "i" or np.abs(exponents).max() > 127:
                raise ValueError("exponents are not whole numbers of a byte, [layers, KV heads, head size / 2]")
            if centres.shape != (*exponents.shape[:2], 2 * exponents.shape[2]) or not np.isfinite(centres).all():
                raise ValueError(f"centres must be {(*exponents.shape[:2], 2 * exponents.shape[2])} finite numbers")
            return cls(exponents.astype(np.int8), centres, str(found["weights"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no scales of an int8 cache: {error!r:.200}") from None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Makes the file, whole or not at all."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "weights": self.weights,
            "exponents": self.exponents.tolist(),
            "centres": [[[float(f"{x:.9g}") for x in head] for head in layer] for layer in self.centres],
        }
        write_whole(Path(path), json.dumps(content).encode())


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
