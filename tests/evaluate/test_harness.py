"""lm-evaluation-harness with the model of this package: in process, and its own clients against the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evaluations import serve

from paddle_qwen1m import cli

ABOUT = "The grass is green. The access code for {} is {}. The sky is blue.\nWhat is the access code for {}?"
CODES = {"jade": "64931", "amber": "12345", "comet": "90817", "raven": "55120"}
STORY = " ".join(["The river bends past the old mill and on toward the sea. Bread was dear that winter."] * 30)


def test_without_the_package_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "paddle_qwen1m.evaluate.harness", raising=False)
    assert cli.main(["lm-eval", "--model", "paddle_qwen1m"]) == 2
    assert "pip install 'paddle-qwen1m[lm-eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def harness() -> Any:
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'paddle-qwen1m[lm-eval]'"
    )
    from paddle_qwen1m.evaluate import harness

    return harness


@pytest.fixture(scope="module")
def model(harness: Any, needle_checkpoint: Path) -> Iterator[Any]:
    made = harness.PaddleQwen1M(str(needle_checkpoint), max_model_len=512, batch_size=3)
    yield made
    made._llm.shutdown()


@pytest.fixture(scope="module")
def engine(needle_checkpoint: Path) -> Any:
    from paddlenlp.transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(needle_checkpoint)).engine


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def logprobs(engine: Any, ids: list[int]) -> np.ndarray:
    """Of each token but the first, and whether it is the likeliest, [2, n - 1]."""
    logits = engine.logits(np.asarray(ids, np.int64), range(len(ids) - 1)).astype(np.float64)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return np.stack([chosen - np.log(np.exp(logits).sum(-1)), chosen == logits.max(-1)])


@pytest.mark.parametrize("most_rows", [256, 2])
def test_loglikelihood_is_the_sum_over_the_continuation(
    harness: Any, model: Any, engine: Any, monkeypatch: pytest.MonkeyPatch, most_rows: int
) -> None:
    """By rows of logits, and, where there are many, by the log-probabilities of the prompt."""
    monkeypatch.setattr(harness, "MOST_ROWS", most_rows)
    pairs = [(ABOUT.format(*pair, pair[0]), f" It is {pair[1]}.") for pair in CODES.items()]
    pairs += [("", " The sky is blue."), (pairs[0][0], "\nNo.")]
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, found):
        before = model.tok_encode(context) or [model.prefix_token_id]
        ids = (model.tok_encode(context) and model.tok_encode(context + continuation)) or [
            *before,
            *model.tok_encode(continuation),
        ]
        expected = logprobs(engine, ids)[:, len(before) - 1 :]
        assert logprob == pytest.approx(expected[0].sum(), rel=1e-4)
        assert greedy == bool(expected[1].all())


def test_a_rolling_loglikelihood_counts_each_token_once(model: Any, engine: Any) -> None:
    """In windows of the model's length: the last one has a whole window of context."""
    ids = model.tok_encode(STORY)
    window = model.max_length - 1
    assert window < len(ids) < 2 * window
    (found,) = model.loglikelihood_rolling(requests((STORY,)), disable_tqdm=True)
    first = logprobs(engine, [model.prefix_token_id, *ids[:window]])[0].sum()
    rest = len(ids) - window
    second = logprobs(engine, ids[-window - 1 :])[0][-rest:].sum()
    assert found == pytest.approx(first + second, rel=1e-4)


def test_answers_end_before_a_stop_and_come_in_order(model: Any) -> None:
    chat = [
        model.apply_chat_template([{"role": "user", "content": ABOUT.format(*one, one[0])}]) for one in CODES.items()
    ]
    whole = model.generate_until(
        requests(*((one, {"until": [], "max_gen_toks": 32}) for one in chat)), disable_tqdm=True
    )
    for code, answer in zip(CODES.values(), whole):
        assert code in answer
    cut = model.generate_until(requests(*((one, {"until": [" is"], "do_sample": False}) for one in chat)))
    assert cut == [answer[: answer.index(" is")] for answer in whole]
    short = model.generate_until(requests((chat[0], {"max_gen_toks": 2})), disable_tqdm=True)
    assert whole[0].startswith(short[0]) and len(short[0]) < len(whole[0])


def test_the_beginning_of_an_answer_is_gone_on_with(model: Any) -> None:
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The access"}]
    assert model.apply_chat_template(history, add_generation_prompt=False).endswith("<|im_start|>assistant\nThe access")
    assert "<|im_start|>" in model.chat_template(True)


def test_a_tokenizer_without_a_chat_template_is_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="needle has no chat template: leave out --apply_chat_template"):
        model.apply_chat_template([{"role": "user", "content": "Hello"}])


def test_the_entry_point_names_the_model(harness: Any) -> None:
    """By which releases of harness that scan them find it."""
    (point,) = entry_points(group="lm_eval.models", name=harness.NAME)
    assert point.load() is harness.PaddleQwen1M


def test_its_command_knows_the_model(harness: Any, needle_checkpoint: Path, tmp_path: Path) -> None:
    """As a user calls it, with a task of the user's own; results are where harness writes them."""
    (tmp_path / "story.jsonl").write_text(json.dumps({"text": STORY}), encoding="utf-8")
    (tmp_path / "story.yaml").write_text(
        f"task: story\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/story.jsonl\ntest_split: train\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: byte_perplexity}]\n"
    )
    options = f"--model paddle_qwen1m --model_args pretrained={needle_checkpoint},max_model_len=512 --tasks story"
    command = [sys.executable, "-m", "paddle_qwen1m", "lm-eval", *options.split()]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text(encoding="utf-8"))["results"]["story"]
    assert 1 < found["byte_perplexity,none"] < 2, "it was trained on these sentences"


def test_what_is_too_long_is_cut_at_its_beginning_and_told(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    ((found, likeliest),) = model.loglikelihood(requests((STORY, " The sky")), disable_tqdm=True)
    cut = model.tok_encode(STORY + " The sky")[-model.max_length :]
    begin = len(model.tok_encode(STORY)) - len(model.tok_encode(STORY + " The sky")) + model.max_length
    expected = model._score(cut[:begin], cut[begin:])
    assert (pytest.approx(found, rel=1e-6), likeliest) == expected, "up to what rows beside others are rounded to"
    assert "are more than fit max_model_len, 512" in caplog.text


@pytest.mark.slow
def test_tasks_of_ruler_score_the_same_through_the_plug_in_and_through_the_server(
    harness: Any, needle_checkpoint: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """Its own tasks, on documents that it makes without a network: 500 of each, of which two are asked.

    The example of ruler_vt and the words of ruler_cwe do not fit the lengths that it has for them in the checkpoint's
    tokens, which are short: there a word counts as a token.
    """
    for needed in ("transformers", "nltk", "wonderwords"):
        pytest.importorskip(needed, reason=f"its ruler tasks need {needed}: pip install 'paddle-qwen1m[lm-eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    tokens = dict.fromkeys(("niah_single_1", "niah_multikey_2", "ruler_fwe"), str(needle_checkpoint))
    tokens |= dict.fromkeys(("ruler_vt", "ruler_cwe"), str(tmp_path))
    tasks = []
    for name, directory in tokens.items():
        manager = TaskManager(metadata={"tokenizer": directory, "max_seq_lengths": [4096]})
        tasks += manager.load_task_or_group([name]).values()

    def evaluate(name: str, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        found = simple_evaluate(name, model_args=arguments, tasks=tasks, limit=2)
        asked = {
            task: [(one["arguments"], one["resps"]) for one in of_task] for task, of_task in found["samples"].items()
        }
        return found["results"], asked

    here, answers = evaluate(harness.NAME, pretrained=str(needle_checkpoint), max_model_len=32768)
    with serve(needle_checkpoint, tokenizer, max_model_len=32768) as server:
        there, others = evaluate(
            "local-completions", model="needle", base_url=f"{server.url}/v1/completions", max_length=32768,
            tokenizer_backend="remote",
        )  # fmt: skip
    assert set(here) == set(tokens)
    assert all("4096,none" in scores for scores in here.values())
    assert here == there
    assert answers == others
    said = {answer for of_task in answers.values() for _, ((answer,),) in of_task}
    assert len(said) > len(tokens), "the checkpoint was not trained on this, but goes on in some way after each prompt"


def test_a_task_scores_the_same_through_the_plug_in_and_through_the_server(
    harness: Any, needle_checkpoint: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [
        {"text": ABOUT.format(name, code, name), "choices": [f" It is {code}.", f" It is {code[::-1]}."], "code": code}
        for name, code in CODES.items()
    ]
    (tmp_path / "codes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/codes.jsonl\ntest_split: train\n"
    (tmp_path / "choice.yaml").write_text(
        f"task: choice\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{text}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: 0\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "text.yaml").write_text(
        f"task: text\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n"
        "metric_list: [{metric: byte_perplexity}]\n"
    )
    (tmp_path / "answer.yaml").write_text(
        f"task: answer\n{common}output_type: generate_until\ndoc_to_text: '{{{{text}}}}\n\nThe access code for'\n"
        "doc_to_target: '{{code}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 24}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def evaluate(name: str, chat: bool = False, **arguments: Any) -> Any:
        tasks = ["answer"] if chat else ["choice", "text", "answer"]
        found = simple_evaluate(
            name, model_args=arguments, tasks=tasks, task_manager=manager, apply_chat_template=chat
        )  # fmt: skip
        samples = {task: [one["filtered_resps"] for one in found["samples"][task]] for task in found["samples"]}
        return found["results"], samples

    here, answers = evaluate(harness.NAME, pretrained=str(needle_checkpoint), max_model_len=1024)
    _, chat = evaluate(harness.NAME, chat=True, pretrained=str(needle_checkpoint), max_model_len=1024)
    with serve(needle_checkpoint, tokenizer, max_model_len=1024) as server:
        _, chat_there = evaluate(
            "local-chat-completions", chat=True, model="needle", base_url=f"{server.url}/v1/chat/completions",
            tokenizer_backend=None,
        )  # fmt: skip
        there, others = evaluate(
            "local-completions", model="needle", base_url=f"{server.url}/v1/completions", max_length=1024,
            tokenizer_backend="remote",
        )  # fmt: skip
    assert here["choice"]["acc,none"] == there["choice"]["acc,none"]
    assert here["text"]["byte_perplexity,none"] == pytest.approx(there["text"]["byte_perplexity,none"], rel=1e-5)
    assert answers["answer"] == others["answer"]
    assert chat["answer"] == chat_there["answer"] != answers["answer"]
    for one, other in zip(answers["choice"], others["choice"]):
        assert [pair[1] for pair in one] == [pair[1] for pair in other]
        np.testing.assert_allclose([pair[0] for pair in one], [pair[0] for pair in other], rtol=1e-4)
