"""A vocabulary of any size is shared among any ranks: what the model of one rank of several holds of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from parallel_ranks import NEEDLE, write_checkpoint

from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.parallel.group import Group
from paddle_qwen1m.weights import load_checkpoint


class RankOf(Group):
    def __init__(self, rank: int, degree: int) -> None:
        self.rank, self.degree = rank, degree


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("vocabulary", [997, 1001, 1000, 5, 3])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_ranks_shares_are_the_vocabulary_and_zeros_behind_it(
    tmp_path: Path, degree: int, vocabulary: int, tied: bool
) -> None:
    changes = {"num_hidden_layers": 1, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    directory = write_checkpoint(tmp_path / "model", 1, **changes)
    config = ModelConfig.from_dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    whole = Qwen2OneM(config, "float32")
    load_checkpoint(directory, whole.slots())
    for name in ("embedding", "head"):
        shares = []
        for rank in range(degree):
            model = Qwen2OneM(config, "float32", RankOf(rank, degree))
            load_checkpoint(directory, model.slots())
            shares.append(getattr(model, name).numpy())
        assert len({share.shape for share in shares}) == 1
        joined = np.concatenate(shares)
        np.testing.assert_array_equal(joined[:vocabulary], getattr(whole, name).numpy())
        assert (joined[vocabulary:] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_behind_the_vocabulary_are_zeros_in_every_type(dtype: str) -> None:
    described = json.loads((NEEDLE / "config.json").read_text(encoding="utf-8"))
    config = dataclasses.replace(ModelConfig.from_dict(described), num_layers=1, vocab_size=151_665)
    last = Qwen2OneM(config, dtype, RankOf(3, 4)).embedding
    assert last.shape[0] == 37_917 and last.dtype == getattr(paddle, dtype)
    assert (last[-3:].astype("float32").numpy() == 0).all()
