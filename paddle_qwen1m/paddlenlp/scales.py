"""Where the scales of an 8-bit cache come from: a file, or the model's own keys of a text of the package."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from paddlenlp.transformers import AutoTokenizer
from paddlenlp.utils.log import logger

from paddle_qwen1m.cache.kv_scales import KVScales
from paddle_qwen1m.config import CONFIGS, ModelConfig
from paddle_qwen1m.dtypes import FP8, INT8, QUANTIZATIONS
from paddle_qwen1m.engine import Engine
from paddle_qwen1m.engine.calibration import calibrate
from paddle_qwen1m.paddlenlp.hub import Checkpoint

KV_SCALES = "kv_scales.json"
TEXT = CONFIGS / "kv_calibration.txt"
FP8_LOSES = (
    "a number keeps 3 bits of mantissa. On a needle checkpoint whose keys have outliers as Qwen2.5's have, it moves a "
    "layer's output by up to 7.4 % of its size, int8 by 1.3 %, and finds 96.1 % of the hidden codes, int8 98.4 %"
)
"""By tools/outlying_keys.py: docs/performance.md."""
MOST_TOKENS = 4096
"""Of a text that scales are made from."""


def kept_scales(weights: str) -> Path:
    """Where scales are kept that were made for the weights of that digest."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(folder) / "paddle_qwen1m" / "kv_scales" / f"{weights}.json"


def find_scales(checkpoint: Checkpoint, config: ModelConfig, explicit: Any, weights: str) -> KVScales | None:
    """`explicit`, a file or scales, else the file beside the weights, else those kept since an earlier load, else None.

    weights: the checkpoint's digest. ValueError for scales of another model and OSError for a file that cannot be read,
    explicit ones and those beside the weights; kept ones that cannot be used are as good as none, with a line.
    """
    if isinstance(explicit, KVScales):
        explicit.check_fit(config, weights, "kv_scales")
        return explicit
    named = checkpoint.extra_file(KV_SCALES) if explicit is None else Path(explicit)
    path = named or kept_scales(weights)
    if named is None and not path.is_file():
        return None
    try:
        scales = KVScales.from_file(path)
        scales.check_fit(config, weights, str(path))
    except (OSError, ValueError) as error:
        if named is not None:
            raise
        logger.warning(f"the scales of the int8 cache are made anew: {error}")
        return None
    return scales


def use_scales(engine: Engine, checkpoint: Checkpoint, found: KVScales | None, weights: str) -> None:
    """Gives an engine whose weights are read the scales that its cache needs; where there are none they are made, and
    kept for the next load. Every rank calls it; what rank 0 has found counts.
    """
    if engine.kv_cache_dtype not in QUANTIZATIONS:
        return
    group = engine.model.group
    if not group.share(found is not None):
        text = TEXT.read_text(encoding="utf-8")
        found = make_scales(engine, AutoTokenizer.from_pretrained(str(checkpoint.fetch_tokenizer())), text, weights)
        if group.rank == 0:
            _keep(found, kept_scales(weights))
    elif group.degree > 1:
        found = KVScales.from_json(group.share(None if found is None else found.as_json()))
    assert found is not None
    engine.use_scales(found)
    if group.rank == 0:
        logger.info(f"keys and values: {found.summary()}")
        if engine.kv_cache_dtype == FP8:
            logger.warning(f"kv_cache_dtype={FP8}: {FP8_LOSES}; {INT8} takes as much memory")


def make_scales(engine: Engine, tokenizer: Any, text: str, weights: str) -> KVScales:
    """From the keys of the first MOST_TOKENS tokens of a text. ValueError for one that is too short."""
    ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int64)
    most = min(MOST_TOKENS, engine.model.config.dual_chunk.chunk_len)
    return replace(calibrate(engine.model, ids[:most]), weights=weights)


def _keep(scales: KVScales, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scales.write(path)
        logger.info(f"the scales of the int8 cache are kept in {path}")
    except OSError as error:
        logger.warning(f"the scales of the int8 cache are made anew at each load: {path} {error.strerror}")
