"""Two and four CPU ranks under the launcher give what one rank gives, and read their own parts of the files alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import parallel_cases
import pytest
from parallel_ranks import NEEDLE, cut, launch, shapes, write_checkpoint

from paddle_qwen1m.config import ModelConfig, SparseBudgets
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.weights.convert import convert
from paddle_qwen1m.weights.tensors import part_of

CASES = Path(parallel_cases.__file__)
SHORT, LONG = 300, 20_000
LEAST = [40, 120]
"""Columns and diagonals of every head, at least."""
DUAL_CHUNK = {"chunk_size": 128, "local_size": 32, "original_max_position_embeddings": 128}
RANDOM: dict[str, dict[str, Any]] = {
    "eight": {
        "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
        "hidden_size": 256, "intermediate_size": 320, "vocab_size": 1001, "dual_chunk_attention_config": DUAL_CHUNK,
    },
    "replicated": {
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64,
        "hidden_size": 192, "intermediate_size": 256, "vocab_size": 997, "tie_word_embeddings": True,
        "dual_chunk_attention_config": DUAL_CHUNK,
    },
}  # fmt: skip
ROWS = [1, 2, 3, 129, 131, 255, 301]
"""Of prompts, in lanes from 128 on, sparse from 257."""
NAMES = ["needle", *RANDOM]
MODES = ["dense", "sparse"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {"needle": NEEDLE, **{name: write_checkpoint(folder / name, **changes) for name, changes in RANDOM.items()}}


def loads(checkpoints: dict[str, Path], length: int, names: list[str]) -> list[dict[str, Any]]:
    """Every checkpoint dense and sparse: logits, greedy and seeded answers.

    A long prompt of the trained one is a text, and its budgets are its own: random tokens leave rows with next to
    nothing to attend to, whose rounding its layers magnify.
    """
    positions = [0, 1, length // 4, length // 2, length - 100, length - 50]
    texts = {"needle": {"document": str(NEEDLE)}} if length == LONG else {}
    return [
        {
            "name": f"{name}-{mode}",
            "model": str(checkpoints[name]),
            "sparse": ([] if name in texts else LEAST) if mode == "sparse" else None,
            **texts.get(name, {}),
            "runs": [
                {"name": "logits", "tokens": length, "positions": positions},
                {"name": "greedy", "tokens": length, "new_tokens": 24, "params": {"temperature": 0.0}},
                {"name": "sampled", "tokens": length, "new_tokens": 24, "params": parallel_cases.SAMPLED},
                *(
                    {"name": f"{rows} rows", "tokens": rows, "new_tokens": 2, "params": {"temperature": 0.0}}
                    for rows in (ROWS if name == "eight" and length == SHORT else ())
                ),
            ],
        }
        for name in names
        for mode in MODES
    ]


def budgets_of(load: dict[str, Any]) -> SparseBudgets:
    """Those that a checkpoint's sparse load has."""
    described = json.loads((Path(load["model"]) / "config.json").read_text(encoding="utf-8"))
    if "document" not in load:
        return parallel_cases.uneven_budgets(described, *LEAST)
    file = Path(load["model"]) / "sparse_attention_config.json"
    return SparseBudgets.from_file(file, described["num_hidden_layers"], described["num_attention_heads"])


def on_ranks(
    degree: int, jobs: list[dict[str, Any]], folder: Path, alone: parallel_cases.Results, seconds: float
) -> list[parallel_cases.Results]:
    """The same loads on several ranks, from the published layout, from files cut for them, and one checkpoint's from
    PaddleNLP's; what each rank found. The files are cut as even ranks have the heads, which sparse loads have too.

    Sparse logits are computed twice, the second time with the index sets of one rank. So are the long answers of random
    weights, whose scores are full of near ties: one other key in thousands of sets is enough for another token.
    """
    recorded = folder / "alone.npz"
    np.savez(recorded, **alone)
    spread = []
    for load in jobs:
        runs = [dict(one) for one in load["runs"]]
        if load["sparse"] is not None:
            runs.append({**runs[0], "name": "replayed", "replay": [str(recorded), f"{load['name']}/logits"]})
        if load["sparse"] and runs[0]["tokens"] == LONG:
            for one in runs[1:3]:
                one["replay"] = [str(recorded), f"{load['name']}/{one['name']}"]
        spread.append({**load, "runs": runs})
        whole = Path(load["model"])
        ranks = folder / f"{whole.name}-cut"
        if not ranks.exists():
            cut(whole, ranks, degree, budgets_of(load))
        spread.append({**load, "name": f"{load['name']}-cut", "model": str(ranks), "runs": load["runs"][:1]})
        if load["name"] == "eight-sparse":
            convert(whole, folder / "paddlenlp", "paddlenlp", progress=False)
            own = str(folder / "paddlenlp")
            spread.append({**load, "name": f"{load['name']}-paddlenlp", "model": own, "runs": load["runs"][:1]})
    job = folder / "job.json"
    job.write_text(json.dumps(spread), encoding="utf-8")
    status, output = launch(degree, folder / "logs", [CASES, job, folder], seconds)
    assert status == 0, output[-6000:]
    results = []
    for rank in range(degree):
        with np.load(folder / f"rank-{rank}.npz") as found:
            results.append(dict(found))
    return results


@pytest.fixture(scope="session")
def alone(checkpoints: dict[str, Path]) -> parallel_cases.Results:
    return parallel_cases.run(loads(checkpoints, SHORT, NAMES), 1)


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def spread(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    alone: parallel_cases.Results,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[parallel_cases.Results]:
    folder = tmp_path_factory.mktemp(f"degree-{request.param}")
    return on_ranks(request.param, loads(checkpoints, SHORT, NAMES), folder, alone, seconds=400)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(got - expected).max() / np.abs(expected).max()
    print(f"largest error of a logit: {error:.1e} of the largest logit")
    assert got.shape == expected.shape and error <= 1e-5, f"logits are off by {error:.2e} of the largest one"


def differing_sets(ranks: list[parallel_cases.Results], alone: parallel_cases.Results, key: str) -> float:
    """The share of the index sets of all heads that are not those of one rank."""
    expected = parallel_cases.index_sets(alone, key)
    got = {}
    for results in ranks:
        got.update(parallel_cases.index_sets(results, key))
    assert got.keys() == expected.keys() and len(expected) > 0
    return sum(got[place] != one for place, one in expected.items()) / len(expected)


def check(ranks: list[parallel_cases.Results], alone: parallel_cases.Results, load: str) -> None:
    """All that acceptance asks of one load."""
    for results in ranks:
        for cut_or_not in ("", "-cut"):
            if load.endswith("dense"):
                assert_close(results[f"{load}{cut_or_not}/logits/logits"], alone[f"{load}/logits/logits"])
        if load.endswith("sparse"):
            assert_close(results[f"{load}/replayed/logits"], alone[f"{load}/logits/logits"])
        for kind in ("greedy", "sampled"):
            np.testing.assert_array_equal(results[f"{load}/{kind}/tokens"], alone[f"{load}/{kind}/tokens"])
            np.testing.assert_allclose(
                results[f"{load}/{kind}/logprobs"], alone[f"{load}/{kind}/logprobs"], rtol=0, atol=2e-3
            )
        np.testing.assert_array_equal(results[f"{load}/logits/logits"], ranks[0][f"{load}/logits/logits"])
        for form in ("cut", "paddlenlp"):
            if load.endswith("sparse") and f"{load}-{form}/heads" in results:
                np.testing.assert_array_equal(results[f"{load}-{form}/heads"], results[f"{load}/heads"])
                np.testing.assert_array_equal(results[f"{load}-{form}/logits/logits"], results[f"{load}/logits/logits"])
    if load.endswith("sparse"):
        share = differing_sets(ranks, alone, f"{load}/logits")
        print(f"{load}: {share:.3%} of the index sets differ")
        assert share <= 0.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_give_what_one_gives(
    spread: list[parallel_cases.Results], alone: parallel_cases.Results, name: str, mode: str
) -> None:
    """Logits within 1e-5 of the largest, the same tokens greedy and sampled, on every rank, 300 tokens."""
    check(spread, alone, f"{name}-{mode}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows_gives_what_one_rank_gives(
    spread: list[parallel_cases.Results], alone: parallel_cases.Results, rows: int, mode: str
) -> None:
    """Whether ranks and lanes divide them or not."""
    for results in spread:
        key = f"eight-{mode}/{rows} rows"
        np.testing.assert_array_equal(results[f"{key}/tokens"], alone[f"{key}/tokens"])
        np.testing.assert_allclose(results[f"{key}/logprobs"], alone[f"{key}/logprobs"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["", "-cut"], ids=["published", "cut"])
def test_a_rank_reads_its_part_of_the_files_alone(
    spread: list[parallel_cases.Results], checkpoints: dict[str, Path], name: str, layout: str
) -> None:
    config = ModelConfig.from_dict(json.loads((checkpoints[name] / "config.json").read_text(encoding="utf-8")))
    size = 2 if name == "needle" and not layout else 4
    for rank, results in enumerate(spread):
        share = 0
        for tensor, shape in shapes(config).items():
            part = part_of(config, tensor, Placement.published(config, len(spread)), rank)
            share += size * (math.prod(shape) if part is None else part.size * math.prod(shape) // shape[part.axis])
        counted, asked_of_the_system = results[f"{name}-dense{layout}/asked"]
        assert counted == share
        assert share <= asked_of_the_system <= 1.05 * share + 64_000  # headers and indices of small files


def test_heads_of_a_sparse_load_are_placed_anew_and_of_a_dense_one_as_its_files_say(
    spread: list[parallel_cases.Results],
) -> None:
    """So that what is compared above is compared for ranks whose heads are no neighbours."""
    share = 16 // len(spread)
    placed = np.stack([results["eight-sparse/heads"] for results in spread])
    assert (np.diff(placed, axis=2) > 1).any()
    for rank, results in enumerate(spread):
        assert (results["eight-dense/heads"] == np.arange(rank * share, (rank + 1) * share)).all()
        np.testing.assert_array_equal(results["eight-dense-cut/heads"], placed[rank])
        np.testing.assert_array_equal(results["eight-sparse-paddlenlp/heads"], placed[rank])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "needle" else pytest.mark.soak) for name in NAMES],
)
def test_ranks_give_what_one_gives_at_20_000_tokens(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    jobs = loads(checkpoints, LONG, [name])
    alone = parallel_cases.run(jobs, 1)
    for degree in (2, 4):
        folder = tmp_path / str(degree)
        folder.mkdir()
        ranks = on_ranks(degree, jobs, folder, alone, seconds=1200)
        for mode in MODES:
            check(ranks, alone, f"{name}-{mode}")
