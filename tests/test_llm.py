"""LLM answers as the engine does, and is what users of vLLM know."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from paddlenlp.transformers import AutoModelForCausalLM

import paddle_qwen1m
from paddle_qwen1m import LLM, SamplingParams, StructuredOutputsParams, progress
from paddle_qwen1m.engine import Engine, NotEnoughMemory
from paddle_qwen1m.engine.admission import Allowance
from paddle_qwen1m.memory import available_host_memory
from paddle_qwen1m.paddlenlp import serving
from paddle_qwen1m.parallel.group import Group

NEEDLE = str(Path(__file__).parents[1] / "checkpoints" / "needle")
LIMITS: dict[str, Any] = {"max_model_len": 4096, "kv_cache_memory_bytes": 200_000_000}
GREEDY = SamplingParams(temperature=0, max_tokens=40)
QUESTION = "What is the access code for {}?"
DOCUMENT = (
    "The grass is green. The access code for jade is 64931. The access code for ruby is 20518. The sky is blue.\n"
)
JADE, RUBY = "The access code for jade is 64931.", "The access code for ruby is 20518."


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(NEEDLE, **LIMITS) as llm:
        yield llm


def prompt(llm: LLM, name: str, document: str = DOCUMENT) -> str:
    messages = [{"role": "user", "content": document + QUESTION.format(name)}]
    return str(llm.get_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def ids(llm: LLM, text: str) -> list[int]:
    return list(llm.get_tokenizer()(text)["input_ids"])


def test_answers_come_in_the_order_of_their_prompts_whatever_form_these_have(llm: LLM) -> None:
    jade, ruby = prompt(llm, "jade"), prompt(llm, "ruby")
    outputs = llm.generate(
        [jade, ids(llm, ruby), {"prompt": jade}, {"prompt_token_ids": ids(llm, jade)}],
        [GREEDY, GREEDY, SamplingParams(temperature=0, max_tokens=3), GREEDY],
        use_tqdm=False,
    )
    assert [output.outputs[0].text for output in outputs] == [JADE, RUBY, "The access code", JADE]
    assert [output.prompt for output in outputs] == [jade, None, jade, None]
    assert [output.prompt_token_ids for output in outputs] == [ids(llm, one) for one in (jade, ruby, jade, jade)]
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop", "stop", "length", "stop"]
    assert all(output.finished for output in outputs)
    for one in (ruby, ids(llm, ruby), {"prompt": ruby}):
        assert [output.outputs[0].text for output in llm.generate(one, GREEDY, use_tqdm=False)] == [RUBY]


def test_greedy_answers_are_those_of_generate(llm: LLM) -> None:
    model = AutoModelForCausalLM.from_pretrained(NEEDLE)
    prompts = [
        ids(llm, prompt(llm, name, DOCUMENT * times)) for name, times in (("jade", 1), ("ruby", 20), ("opal", 3))
    ]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, repetition_penalty=1.2)
    for tokens, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False)):
        expected = model.generate(
            tokens, max_new_tokens=12, do_sample=False, repetition_penalty=1.2, eos_token_id=[], trunc_input=True
        )[0]
        assert output.outputs[0].token_ids == expected.numpy()[0].tolist()


def test_without_params_the_checkpoints_own_hold(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(
        temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
    )
    (output,) = llm.generate(prompt(llm, "jade"), use_tqdm=False)
    assert output.outputs[0].text == JADE and output.outputs[0].stop_reason is None


def test_options_of_an_answer(llm: LLM) -> None:
    jade = prompt(llm, "jade")
    digits = llm.get_tokenizer().convert_tokens_to_ids("6")

    def answer(**params: Any) -> Any:
        (output,) = llm.generate(jade, SamplingParams(**{"temperature": 0, "max_tokens": 40, **params}), use_tqdm=False)
        return output.outputs[0]

    stopped = answer(stop=["jade", " is"])
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("The access code for ", "stop", "jade")
    assert answer(stop="jade", include_stop_str_in_output=True).text == "The access code for jade"
    by_token = answer(stop_token_ids=[digits])
    assert (by_token.text, by_token.stop_reason) == ("The access code for jade is ", digits)
    assert answer(skip_special_tokens=False, ignore_eos=True, max_tokens=15).text.startswith(f"{JADE}<|im_end|>")
    assert "jade" not in answer(bad_words=["jade"]).text
    assert (answer(detokenize=False).text, answer(detokenize=False).token_ids[:2]) == ("", ids(llm, JADE)[:2])
    told = answer(logprobs=3, max_tokens=2)
    assert [len(entry) for entry in told.logprobs] == [3, 3] and told.logprobs[0][told.token_ids[0]].rank == 1
    assert answer(structured_outputs=StructuredOutputsParams(choice=["blue", "green"])).text in ("blue", "green")


def test_what_bends_the_draw_reaches_it(llm: LLM) -> None:
    greedy = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    hot = {**greedy, "temperature": 2.0, "seed": 3}
    asked: dict[str, dict[str, Any]] = {
        "greedy": greedy,
        "hot": hot,
        "top_k": {**hot, "top_k": 1},
        "top_p": {**hot, "top_p": 1e-6},
        "min_p": {**hot, "min_p": 1.0},
        "presence": {**greedy, "presence_penalty": 2.0},
        "frequency": {**greedy, "frequency_penalty": -2.0},
        "repetition": {**greedy, "repetition_penalty": 2.0},
        "bias": {**greedy, "logit_bias": {5: 100}},
        "allowed": {**greedy, "allowed_token_ids": [5, 6]},
    }
    text = "The sky is blue. The sky is blue."  # behind which the model makes something up
    outputs = llm.generate([text] * len(asked), [SamplingParams(**one) for one in asked.values()], use_tqdm=False)
    got = {name: output.outputs[0].token_ids for name, output in zip(asked, outputs)}
    for name in ("top_k", "top_p", "min_p"):
        assert got[name] == got["greedy"], name
    bent = ("greedy", "hot", "presence", "frequency", "repetition")
    assert len({tuple(got[name]) for name in bent}) == len(bent), got
    assert got["bias"] == [5] * 30 and set(got["allowed"]) <= {5, 6}
    short, long = (SamplingParams(temperature=0, max_tokens=30, min_tokens=least) for least in (0, 25))
    few, many = llm.generate([prompt(llm, "jade")] * 2, [short, long], use_tqdm=False)
    assert len(few.outputs[0].token_ids) < 25 <= len(many.outputs[0].token_ids)


def test_several_answers_and_log_probabilities_of_a_prompt(llm: LLM) -> None:
    jade = prompt(llm, "jade")
    params = SamplingParams(n=3, temperature=1.5, seed=7, max_tokens=6, prompt_logprobs=0)
    (output,) = llm.generate(jade, params, use_tqdm=False)
    singly = [SamplingParams(temperature=1.5, seed=7 + index, max_tokens=6) for index in range(3)]
    alone = llm.generate([jade] * 3, singly, use_tqdm=False)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert [answer.token_ids for answer in output.outputs] == [one.outputs[0].token_ids for one in alone]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in output.prompt_logprobs[1:] if entry] == output.prompt_token_ids[1:]


def test_chat_renders_the_template(llm: LLM) -> None:
    jade = [{"role": "user", "content": DOCUMENT + QUESTION.format("jade")}]
    ruby = [{"role": "user", "content": DOCUMENT + QUESTION.format("ruby")}]
    (output,) = llm.chat(jade, GREEDY, use_tqdm=False)
    assert (output.prompt, output.outputs[0].text) == (prompt(llm, "jade"), JADE)
    assert [one.outputs[0].text for one in llm.chat([jade, ruby], GREEDY, use_tqdm=False)] == [JADE, RUBY]
    begun = [*jade, {"role": "assistant", "content": "The access code"}]
    (output,) = llm.chat(begun, GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt is not None and output.prompt.endswith("<|im_start|>assistant\nThe access code")
    assert output.outputs[0].text == " for jade is 64931."
    template = "{% for message in messages %}[{{ message.content }}]{{ mark }}{% endfor %}"
    keywords: dict[str, Any] = {"chat_template": template, "chat_template_kwargs": {"mark": "!"}}
    (output,) = llm.chat([{"role": "user", "content": "a"}], GREEDY, use_tqdm=False, **keywords)
    assert output.prompt == "[a]!"
    assert llm.chat(jade, GREEDY, use_tqdm=False)[0].prompt == prompt(llm, "jade"), "the tokenizer keeps its own"
    with pytest.raises(ValueError, match="exclude each other"):
        llm.chat(begun, GREEDY, continue_final_message=True)
    template = "{% for tool in tools %}<{{ tool.function.name }}>{% endfor %}{{ messages[0].content }}"
    tools = [{"type": "function", "function": {"name": name}} for name in ("look", "write")]
    (output,) = llm.chat(
        [{"role": "user", "content": "a"}], GREEDY, use_tqdm=False, chat_template=template, tools=tools
    )
    assert output.prompt == "<look><write>a"
    with pytest.raises(ValueError, match="no place for tools"):
        llm.chat(jade, GREEDY, tools=[{"type": "function"}])


def test_a_second_question_finds_the_document_in_the_cache(llm: LLM) -> None:
    document = "There and back again. " * 50
    assert llm.reset_prefix_cache()
    first, second = (llm.generate(prompt(llm, name, document), GREEDY, use_tqdm=False)[0] for name in ("jade", "ruby"))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens is not None and second.num_cached_tokens > 0


def test_metrics_count_what_was_computed_and_reused(llm: LLM) -> None:
    before, document = llm.get_metrics(), "Round and round again. " * 50
    outputs = [llm.generate(prompt(llm, name, document), GREEDY, use_tqdm=False)[0] for name in ("jade", "ruby")]
    after = llm.get_metrics()
    assert after.finished - before.finished == 2 and (after.waiting, after.running, after.pages_held) == (0, 0, 0)
    assert after.prompt_tokens - before.prompt_tokens == sum(len(one.prompt_token_ids) for one in outputs)
    assert after.generated_tokens - before.generated_tokens == sum(len(one.outputs[0].token_ids) for one in outputs)
    assert after.prefix_reused_tokens - before.prefix_reused_tokens == outputs[1].num_cached_tokens


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        (["a", [5000]], None, ValueError, "token ids must be 0 to 1023, got 5000"),
        (["a", []], None, ValueError, "at least one token"),
        (["a", {"text": "b"}], None, ValueError, "has prompt, prompt_token_ids, cache_salt; got text"),
        (["a", 3.5], None, TypeError, "must be a text, a list of token ids or a dict"),
        (["a", [0.5]], None, TypeError, "must be a text, a list of token ids or a dict"),
        (["a", "b"], [GREEDY], ValueError, "got 2 prompts and 1 sampling params"),
        (["a"], [{"n": 1}], TypeError, "must be SamplingParams"),
        (
            ["a", [1] * 4096],
            GREEDY,
            ValueError,
            r"^Input prompt \(4096 tokens\) \+ lookahead slots \(0\) is too long and exceeds the capacity of max_model",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_before_any_work(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, prompts: Any, params: Any, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(llm._serving, "add", lambda request: pytest.fail("work began"))
    with pytest.raises(error, match=message):
        llm.generate(prompts, params, use_tqdm=False)


def test_an_answer_ends_where_the_model_does(llm: LLM) -> None:
    (output,) = llm.generate(
        [[1] * 4090], SamplingParams(temperature=0, ignore_eos=True, max_tokens=None), use_tqdm=False
    )
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (6, "length")


def test_an_error_drops_the_calls_requests_and_the_next_call_comes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = llm._serving.step, iter(range(4))

    def failing() -> Any:
        if next(steps) == 3:
            raise OSError("lost")
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm._serving, "step", failing)
        with pytest.raises(OSError, match="lost"):
            llm.generate([prompt(llm, name) for name in ("jade", "ruby")], GREEDY, use_tqdm=False)
    assert llm._serving.is_idle
    assert llm.generate(prompt(llm, "jade"), GREEDY, use_tqdm=False)[0].outputs[0].text == JADE


def test_ctrl_c_ends_a_call_and_nothing_else(llm: LLM) -> None:
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a"] * 3, SamplingParams(ignore_eos=True, max_tokens=None), use_tqdm=False)
    timer.join()
    assert llm._serving.is_idle
    assert llm.generate(prompt(llm, "jade"), GREEDY, use_tqdm=False)[0].outputs[0].text == JADE


def test_progress_counts_prompts_and_answers(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "has_bars", lambda: True)
    (output,) = llm.generate(prompt(llm, "jade"), GREEDY)
    tokens = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
    bar = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]
    assert re.search(rf"1 prompt: 100%.* {tokens}\.?0?/{tokens}\.?0? .* tokens/s\]", bar), bar


def test_progress_begins_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(progress.Progress, "update", lambda self, more: done.append((self._unit, more)))
    with LLM(NEEDLE, max_num_batched_tokens=256, **LIMITS) as llm:
        llm.generate([[1] * 600], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert [more for unit, more in done if unit == "tokens"] == [256, 256, 88, 1, 1]


def test_the_first_text_of_the_card() -> None:
    with pytest.raises(
        ValueError, match=r"^The model's max sequence length \(1000000\) is larger than the maximum number of"
    ):
        LLM(NEEDLE, max_model_len=1_000_000, kv_cache_memory_bytes=100_000_000)


def test_the_least_of_the_ranks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Poorer:
        """Where another rank has half of what this one has."""

        def smallest(self, value: int) -> int:
            return value // 2

    monkeypatch.setattr(serving, "available_host_memory", lambda: 4096 << 20)
    group = cast(Group, Poorer())
    assert serving._allowance(group, {}) == Allowance(2048 << 20, 512 << 20)
    assert serving._allowance(group, {"kv_cache_memory_bytes": 77}) == Allowance(2048 << 20, 77, exact=True)


def test_in_place_of_the_second_text_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "read_weights", lambda *_: pytest.fail("weights are read"))
    monkeypatch.setattr(serving, "available_host_memory", lambda: 30_000_000)
    with pytest.raises(
        NotEnoughMemory, match=r"^out of memory.*the weights \(.* and the workspace of a chunk of 2,048 tokens"
    ):
        LLM(NEEDLE, max_model_len=4096)


def test_options_reach_the_engine() -> None:
    with LLM(
        NEEDLE,
        dtype="float32",
        kv_cache_dtype="bfloat16",
        max_num_batched_tokens=512,
        max_num_seqs=3,
        max_inter_token_ms=77,
        enable_prefix_caching=False,
        enforce_eager=True,
        enable_chunked_prefill=True,
        **LIMITS,
    ) as llm:
        engine = cast(Engine, llm._serving)
        assert engine.model.dtype == "float32" and engine.limits.max_model_len == 4096
        options = engine.options
        assert (options.kv_cache_dtype, options.max_num_batched_tokens, options.max_num_seqs) == ("bfloat16", 512, 3)
        assert (options.max_inter_token_ms, options.enable_prefix_caching, options.cuda_graph) == (77, False, False)
        assert options.cache_tokens is not None and 200e6 / 4096 - 1024 < options.cache_tokens <= 200e6 / 4096
        twice = [llm.generate(prompt(llm, "jade"), GREEDY, use_tqdm=False)[0] for _ in range(2)]
        assert [(one.outputs[0].text, one.num_cached_tokens) for one in twice] == [(JADE, 0)] * 2


@pytest.mark.parametrize("asked", ["auto", -1])
def test_auto_takes_the_longest_that_fits_and_says_which(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    lines: list[str] = []
    monkeypatch.setattr(serving.logger, "info", lines.append)
    with LLM(NEEDLE, max_model_len=asked, kv_cache_memory_bytes=50_000_000) as llm:
        length = llm._serving.limits.max_model_len
        assert 5000 < length < 6200  # 8,192 bytes a token
        assert any(line.startswith(f"max_model_len='auto': {length:,} tokens, of 1,048,576") for line in lines)


def test_two_of_them_in_one_process_after_an_error_and_after_the_end() -> None:
    with pytest.raises(ValueError, match="quantization must be fp8 or int8"):
        LLM(NEEDLE, quantization="awq")
    drawn = []
    for _ in range(2):
        llm = LLM(NEEDLE, seed=5, tokenizer=NEEDLE, enforce_eager=True, trust_remote_code=True, **LIMITS)
        outputs = llm.generate(["a", "b"], SamplingParams(temperature=1.5, max_tokens=5), use_tqdm=False)
        drawn.append([output.outputs[0].token_ids for output in outputs])
        llm.shutdown()
        llm.shutdown()
        with pytest.raises(RuntimeError, match="was shut down"):
            llm.generate("a")
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


def test_vllms_own_defaults_where_they_are_asked_for() -> None:
    with LLM(NEEDLE, generation_config="vllm", **LIMITS) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_degrees_that_do_not_fit_are_refused_by_the_name_that_was_given() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size must be one of 1, 2, 4, 8 for a model of"):
        LLM(NEEDLE, tensor_parallel_size=3)


def test_names_are_imported_when_they_are_asked_for() -> None:
    code = "import sys, paddle_qwen1m; assert not {'paddle', 'paddlenlp'} & set(sys.modules), 'import is not cheap'"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert all(getattr(paddle_qwen1m, name) for name in paddle_qwen1m.__all__)
    assert "gpu_memory_utilization: " in (LLM.__init__.__doc__ or "")


# The card's, but for the import of LLM.
CARD = """
from paddlenlp.transformers import AutoTokenizer
from paddle_qwen1m import LLM, SamplingParams
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-14B-Instruct-1M")
sampling_params = SamplingParams(temperature=0.7, top_p=0.8, repetition_penalty=1.05, max_tokens=512)
llm = LLM(model="Qwen/Qwen2.5-14B-Instruct-1M",
    tensor_parallel_size=4,
    max_model_len=1010000,
    enable_chunked_prefill=True,
    max_num_batched_tokens=131072,
    enforce_eager=True,
    # quantization="fp8", # Enabling FP8 quantization for model weights can reduce memory usage.
)
prompt = "Tell me something about large language models."
messages = [
    {"role": "system", "content": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
    {"role": "user", "content": prompt}
]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
outputs = llm.generate([text], sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
"""


def test_the_readme_has_the_cards_example() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"```python{CARD}```" in readme


def card(ranks: int, *added: str) -> str:
    """The card's example with the needle checkpoint, and these lines added to what LLM is given."""
    text = CARD.replace("Qwen/Qwen2.5-14B-Instruct-1M", NEEDLE).replace("_parallel_size=4", f"_parallel_size={ranks}")
    return text.replace(
        "    enforce_eager=True,\n", "".join(f"    {line},\n" for line in ("enforce_eager=True", *added))
    )


MEASURED = """
import resource, subprocess, sys
status = subprocess.call([sys.executable, "script.py"])
open("peak", "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))
sys.exit(status if status >= 0 else 128 - status)
"""
"""A process between the two: to a child's own peak Linux adds that of the process which it was forked from."""


def run_script(text: str, folder: Path) -> tuple[int, str, str, int]:
    """Runs a script: its exit status, what it wrote, and the most bytes that it or one of its processes had."""
    (folder / "script.py").write_text(text, encoding="utf-8")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
        status = subprocess.call([sys.executable, "-c", MEASURED], cwd=folder, env=variables, stdout=out, stderr=err)
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert sorted(there) == ["err", "out", "peak", "script.py"], "nothing is left behind"
    return status, there["out"], there["err"], int(there["peak"])


def test_the_cards_script_has_no_main_guard_and_runs(tmp_path: Path) -> None:
    """With a document that the checkpoint knows, and a length that every machine has memory for."""
    script = (
        card(1)
        .replace("max_model_len=1010000", "max_model_len=101000")
        .replace("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "You are a helpful assistant.")
        .replace('"Tell me something about large language models."', repr(DOCUMENT + QUESTION.format("jade")))
    )
    status, out, err, _ = run_script(script, tmp_path)
    assert status == 0, err[-3000:]
    (line,) = (line for line in out.splitlines() if line.startswith("Prompt: "))
    assert line.endswith(f"Generated text: {JADE!r}")


AVAILABLE = available_host_memory() or 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "added"),
    [
        (1, ["kv_cache_memory_bytes=8_275_361_792"]),
        (2, ["kv_cache_memory_bytes=4_137_680_896"]),
        # the checkpoint has two heads of keys and values: of four ranks each two hold the same one
        (4, ["kv_cache_memory_bytes=2_068_840_448", 'kv_cache_dtype="bfloat16"']),
    ],
)
@pytest.mark.skipif(AVAILABLE < 16e9, reason="the card's max_model_len takes as much memory")
def test_the_cards_script_word_for_word_where_the_cache_is_given_its_bytes(
    tmp_path: Path, ranks: int, added: list[str]
) -> None:
    status, out, err, most = run_script(card(ranks, *added), tmp_path)
    assert status == 0, err[-3000:]
    assert re.fullmatch(
        r"Prompt: '<\|im_start\|>system\\nYou are Qwen, created by Alibaba Cloud\. You are a helpful assistant\..*"
        r"about large language models\..*', Generated text: '.+'",
        out.splitlines()[-1],
    )
    assert most < 1.5e9, "a cache is resident as it is written"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_cards_script_word_for_word_runs_or_names_the_length_that_does(tmp_path: Path, ranks: int) -> None:
    """A CPU gives keys and values a quarter of its memory, on most machines less than max_model_len takes."""
    status, out, err, _ = run_script(card(ranks), tmp_path)
    if status != 0:
        told = re.search(
            r"^ValueError: The model's max sequence length \(1010000\) is larger than the maximum number of tokens "
            r"that can be stored in the KV cache \(\d+\)\. .* the estimated maximum model length is (\d+)\. ",
            err,
            re.MULTILINE,
        )
        assert told is not None, err[-3000:]
        length = int(told[1]) * 9 // 10  # what is available changes from start to start
        shorter = card(ranks).replace("max_model_len=1010000", f"max_model_len={length}")
        status, out, err, _ = run_script(shorter, tmp_path)
    assert status == 0, err[-3000:]
    assert out.splitlines()[-1].startswith("Prompt: ")


TROUBLE = """
import os, signal, threading
from paddle_qwen1m import LLM, SamplingParams
def told(call):
    try:
        call()
    except (KeyboardInterrupt, MemoryError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
def start(max_model_len, bytes):
    return LLM("MODEL", tensor_parallel_size=2, max_model_len=max_model_len, kv_cache_memory_bytes=bytes)
told(lambda: start(1_000_000, 100_000_000))
told(lambda: start(4096, 10**15))
for _ in range(2):
    llm = start(4096, 200_000_000)
    told(lambda: llm.generate([[1] * 5000]))
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    told(lambda: llm.generate([[1, 2, 3]] * 4, SamplingParams(ignore_eos=True, max_tokens=None)))
    print(llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=40))[0].outputs[0].text, flush=True)
"""
TEXTS = [
    "ValueError: The model's max sequence length (1000000) is larger than the maximum number of tokens that can be ",
    "NotEnoughMemory: out of memory, found before anything was loaded: the weights ",
    *[
        "ValueError: Input prompt (5000 tokens) + lookahead slots (0) is too long and exceeds the capacity of ",
        "KeyboardInterrupt: ",
        JADE,
    ]
    * 2,
]


@pytest.mark.slow
def test_workers_twice_in_a_process_after_errors_and_ctrl_c(llm: LLM, tmp_path: Path) -> None:
    """The second LLM replaces the first one, and ends with the script."""
    script = TROUBLE.replace("MODEL", NEEDLE).replace("PROMPT", repr(prompt(llm, "jade")))
    status, out, err, _ = run_script(script, tmp_path)
    assert status == 0, err[-3000:]
    lines = out.splitlines()
    assert [line[: len(text)] for line, text in zip(lines, TEXTS)] == TEXTS and len(lines) == len(TEXTS)
