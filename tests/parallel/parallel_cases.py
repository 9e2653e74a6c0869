"""Runs of a model that the tests do on one rank and, as a script under the launcher, on several.

parallel_cases.py JOB OUT    JOB is a JSON list of loads (see `run`); rank k writes OUT/rank-k.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

Results = dict[str, np.ndarray]
INDEX_FIELDS = ("blocks", "counts", "listed", "columns", "column_counts")
OF_ROW_BLOCKS = ("blocks", "counts", "listed")
"""Those that have a part for each row block."""
SAMPLED = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}


def run(loads: list[dict[str, Any]], degree: int) -> Results:
    """What every run of every load gives, under "load/run/what".

    load: name, model (directory), document (directory of a tokenizer: prompts are texts, not random tokens), sparse
    ([columns, diagonals] at least of a head; [] for the checkpoint's own budgets; null for none), runs.
    run: name, tokens, positions (for logits) or new_tokens with sampling parameters, replay ([file, key]: the index
    sets of that run on one rank are used instead of chosen ones), beside (tokens of further prompts, answered at once).
    """
    import paddle_qwen1m.paddlenlp.loading as module
    from paddle_qwen1m.engine import SamplingParams
    from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

    results: Results = {}
    load_checkpoint = module.load_checkpoint
    for load in loads:

        def measured(*arguments: Any, _name: str = load["name"], **options: Any) -> int:
            before = asked_bytes()
            asked = load_checkpoint(*arguments, **options)
            results[f"{_name}/asked"] = np.array([asked, asked_bytes() - before])
            return asked

        module.load_checkpoint = measured
        config = json.loads((Path(load["model"]) / "config.json").read_text(encoding="utf-8"))
        options: dict[str, Any] = {"sparse": load["sparse"] is not None, "sparse_threshold": 256}
        if load["sparse"]:
            options["sparse_budgets"] = uneven_budgets(config, *load["sparse"])
        model = Qwen2OneMForCausalLM.from_pretrained(
            load["model"], tensor_parallel_degree=degree, dtype=load.get("dtype", "float32"), **options
        )
        engine, placement, rank = model.engine, model.model.placement, model.model.group.rank
        results[f"{load['name']}/heads"] = np.array(
            [placement.query_heads(layer, rank) for layer in range(config["num_hidden_layers"])]
        )
        for one in load["runs"]:
            key = f"{load['name']}/{one['name']}"
            if "document" in load:
                prompt = document(Path(load["document"]), one["tokens"])
            else:
                prompt = tokens(one["tokens"], config["vocab_size"])
            seen: list[Any] = []
            engine.observe(lambda layer, piece, index, seen=seen: seen.append((layer, piece.begin, *index)))
            with replayed(results[f"{load['name']}/heads"], *one.get("replay", [])):
                if "positions" in one:
                    results[f"{key}/logits"] = engine.logits(prompt, one["positions"])
                else:
                    params = SamplingParams(max_tokens=one["new_tokens"], **one.get("params", {}))
                    others = [tokens(count, config["vocab_size"]) for count in one.get("beside", [])]
                    completions = engine.generate([prompt, *others], params)
                    results[f"{key}/tokens"] = np.concatenate([one.token_ids for one in completions])
                    results[f"{key}/logprobs"] = np.concatenate([one.logprobs for one in completions])
            for number, (layer, begin, *index) in enumerate(seen):
                results[f"{key}/index/{number}/place"] = np.array([layer, begin])
                for field, values in zip(INDEX_FIELDS, index):
                    results[f"{key}/index/{number}/{field}"] = values.numpy()
    module.load_checkpoint = load_checkpoint
    return results


class replayed:
    """Within it, the engine takes the index sets of its heads [layers, H] from a results file, in the order they were
    recorded.
    """

    def __init__(self, heads: np.ndarray, file: str | None = None, key: str = "") -> None:
        self._heads, self._file, self._key = heads, file, key

    def __enter__(self) -> None:
        import paddle

        from paddle_qwen1m import ops
        from paddle_qwen1m.attention.selector import Selector

        self._selector, self._choose = Selector, Selector.choose
        if self._file is None:
            return
        recorded = np.load(self._file)
        number = iter(range(1 << 30))

        def choose(selector: Any, sparse: Any, *_given: Any, **_more: Any) -> Any:
            own = self._heads[selector.layer]
            prefix = f"{self._key}/index/{next(number)}"
            assert recorded[f"{prefix}/place"].tolist() == [selector.layer, sparse.piece.begin]
            whole = ops.SparseIndex(*(recorded[f"{prefix}/{field}"][own] for field in INDEX_FIELDS))

            class Recorded:
                all_columns = whole.columns.size

                def visits(self, first_block: int = 0, num_blocks: int = sparse.piece.row_blocks) -> Any:
                    end = first_block + num_blocks
                    own_rows = {field: getattr(whole, field)[:, first_block:end] for field in OF_ROW_BLOCKS}
                    return ops.SparseIndex(*map(paddle.to_tensor, whole._replace(**own_rows)))

            if selector.observer is not None:
                selector.observer(selector.layer, sparse.piece, Recorded().visits())
            return Recorded()

        Selector.choose = choose

    def __exit__(self, *_error: object) -> None:
        self._selector.choose = self._choose


def uneven_budgets(config: dict[str, Any], columns: int, diagonals: int) -> Any:
    """Budgets of a config.json's heads, no two neighbours alike, of so many columns and diagonals at least."""
    from paddle_qwen1m.config import SparseBudgets

    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    spread = np.arange(layers * heads, dtype=np.int32).reshape(layers, heads)
    return SparseBudgets(columns + 7 * spread % 50, diagonals + 11 * spread % 60)


def tokens(count: int, vocab_size: int) -> np.ndarray:
    """A prompt, the same everywhere: random, with a passage of it that comes again."""
    rng = np.random.default_rng(count)
    ids = rng.integers(0, vocab_size, count)
    ids[count // 2 : count // 2 + count // 8] = ids[: count // 8]
    return ids


def document(model: Path, count: int) -> np.ndarray:
    """A text of the kind that the needle checkpoint was trained on, and a question about it; about `count` tokens."""
    from needle_documents import DocumentMaker
    from needle_documents import prompt as ask
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = DocumentMaker(lambda text: tokenizer.encode(text).ids).make(count, 4, seed=0)
    return np.asarray(tokenizer.encode(ask(text, text.needles[0])).ids, np.int64)


def asked_bytes() -> int:
    """Bytes that this process has asked of files so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def index_sets(results: Results, key: str) -> dict[tuple[int, ...], tuple[bytes, ...]]:
    """What every head of the model visits from every block of rows: {(piece, head, row block): its set}."""
    import oracle

    own = results[f"{key.partition('/')[0]}/heads"]
    sets: dict[tuple[int, ...], tuple[bytes, ...]] = {}
    number = 0
    while f"{key}/index/{number}/place" in results:
        tables = oracle.IndexTables(*(results[f"{key}/index/{number}/{field}"] for field in INDEX_FIELDS))
        blocks, columns, counts = oracle.listed_columns(tables)
        layer = results[f"{key}/index/{number}/place"][0]
        for head in range(len(counts)):
            for row, count in enumerate(counts[head]):
                sets[number, int(own[layer, head]), row] = (
                    blocks[head, row, : count[:3].sum()].tobytes(),
                    columns[head, row, : count[3:].sum()].tobytes(),
                )
        number += 1
    return sets


def main() -> None:
    job, out = sys.argv[1:]
    import paddle_qwen1m  # noqa: F401
    from paddle_qwen1m.parallel.job import launched_rank, launched_ranks

    results = run(json.loads(Path(job).read_text(encoding="utf-8")), launched_ranks())
    np.savez(Path(out) / f"rank-{launched_rank()}.npz", **results)


if __name__ == "__main__":
    main()
