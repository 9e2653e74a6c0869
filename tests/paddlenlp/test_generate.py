"""generate() and forward() of the PaddleNLP class, on the demo checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from paddlenlp.generation import GenerationConfig, TextIteratorStreamer, TextStreamer
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer

from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM

GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
ORACLE = Path(__file__).parents[1] / "data" / "needle_oracle"


@pytest.fixture(scope="module")
def prompt() -> np.ndarray:
    """The oracle's prompt, int64 [1, 928]; it asks for an access code."""
    return np.load(ORACLE / "oracle.npz")["input_ids"].reshape(1, -1).astype(np.int64)


@pytest.fixture(scope="module")
def answer() -> str:
    return json.loads((ORACLE / "oracle.json").read_text(encoding="utf-8"))["answer"]


@pytest.fixture
def short() -> np.ndarray:
    return np.array([[746, 445, 198, 39, 72, 747, 198, 746, 286, 198]])


def continued(model: Qwen2OneMForCausalLM, ids: Any, **options: Any) -> list[int]:
    return model.generate(ids, trunc_input=True, **options)[0].numpy()[0].tolist()


def test_prompt_and_answer_are_returned_and_the_answer_is_hugging_faces(
    needle: Qwen2OneMForCausalLM, prompt: np.ndarray
) -> None:
    expected = np.load(ORACLE / "oracle.npz")["greedy_ids"].reshape(-1).tolist()
    ids, scores = needle.generate(paddle.to_tensor(prompt), max_new_tokens=len(expected), **GREEDY)
    assert ids.dtype == paddle.int64
    assert ids.numpy()[0, : prompt.shape[1]].tolist() == prompt[0].tolist()
    assert ids.numpy()[0, prompt.shape[1] :].tolist() == expected
    assert scores.shape == [1, 1]
    assert scores.dtype == paddle.float32
    assert -0.5 < float(scores) <= 0


def test_trunc_input_gives_paddlenlps_form(needle: Qwen2OneMForCausalLM, short: np.ndarray) -> None:
    whole = needle.generate(short, max_new_tokens=6, eos_token_id=[], **GREEDY)[0].numpy()
    new = needle.generate(short, max_new_tokens=6, eos_token_id=[], trunc_input=True, **GREEDY)[0].numpy()
    assert whole.shape == (1, 16)
    np.testing.assert_array_equal(whole[:, 10:], new)
    given = GenerationConfig(max_new_tokens=6, eos_token_id=[])
    np.testing.assert_array_equal(needle.generate(short, given)[0].numpy(), whole)


def test_the_models_generation_config_may_ask_for_paddlenlps_form(
    needle: Qwen2OneMForCausalLM, short: np.ndarray
) -> None:
    needle.generation_config.trunc_input = True
    try:
        assert needle.generate(short, max_new_tokens=2, eos_token_id=[])[0].shape == [1, 2]
    finally:
        needle.generation_config.trunc_input = False


def test_generation_config_json_gives_the_defaults(needle: Qwen2OneMForCausalLM) -> None:
    config = needle.generation_config
    assert (config.temperature, config.top_k, config.top_p, config.repetition_penalty) == (0.7, 20, 0.8, 1.05)
    assert config.eos_token_id == [747, 745]
    assert config.decode_strategy == "sampling"


def test_greedy_does_not_depend_on_any_seed(needle: Qwen2OneMForCausalLM, short: np.ndarray) -> None:
    paddle.seed(1)
    first = continued(needle, short, max_new_tokens=8, do_sample=False)
    paddle.seed(2)
    assert continued(needle, short, max_new_tokens=8, decode_strategy="greedy_search") == first
    assert continued(needle, short, max_new_tokens=8, temperature=0.0) == first


def test_sampling_follows_paddle_seed_or_the_seed_given(needle: Qwen2OneMForCausalLM, short: np.ndarray) -> None:
    options = {"max_new_tokens": 12, "temperature": 5.0, "top_k": 0, "top_p": 1.0, "eos_token_id": []}

    def after(seed: int) -> list[int]:
        paddle.seed(seed)
        return continued(needle, short, **options)

    assert after(1) == after(1)
    assert after(1) != after(2)
    paddle.seed(1)
    first = continued(needle, short, **options)
    assert continued(needle, short, **options) != first
    assert continued(needle, short, seed=7, **options) == continued(needle, short, seed=7, **options)


def test_greedy_leaves_paddles_generator_alone(needle: Qwen2OneMForCausalLM, short: np.ndarray) -> None:
    paddle.seed(3)
    expected = paddle.rand([2]).numpy()
    paddle.seed(3)
    needle.generate(short, max_new_tokens=2, do_sample=False)
    np.testing.assert_array_equal(paddle.rand([2]).numpy(), expected)


@pytest.mark.parametrize(
    "options", [GREEDY, {"seed": 11, "temperature": 3.0, "top_k": 0, "top_p": 0.9}], ids=["greedy", "sampled"]
)
def test_a_row_of_a_padded_batch_is_what_it_is_alone(
    needle: Qwen2OneMForCausalLM, prompt: np.ndarray, short: np.ndarray, options: dict[str, Any]
) -> None:
    rows = [prompt[0], short[0], prompt[0, :400]]
    width = max(map(len, rows))
    ids = np.array([np.pad(row, (width - len(row), 0), constant_values=745) for row in rows])
    mask = np.array([np.arange(width) >= width - len(row) for row in rows]).astype(np.int64)
    together, scores = needle.generate(ids, attention_mask=mask, max_new_tokens=10, **options)
    for row, alone_ids in enumerate(rows):
        alone, alone_score = needle.generate(alone_ids, max_new_tokens=10, **options)
        new = alone.numpy()[0, len(alone_ids) :].tolist()
        got = together.numpy()[row, width:].tolist()
        assert got[: len(new)] == new
        assert set(got[len(new) :]) <= {745}
        np.testing.assert_allclose(scores.numpy()[row], alone_score.numpy()[0], atol=1e-5)


def test_generation_stops_at_any_of_several_end_tokens(needle: Qwen2OneMForCausalLM, short: np.ndarray) -> None:
    free = continued(needle, short, max_new_tokens=12, eos_token_id=[], **GREEDY)
    third, first_seen = free[3], free.index(free[3])
    assert continued(needle, short, max_new_tokens=12, eos_token_id=[745, third], **GREEDY) == free[: first_seen + 1]
    longer = continued(needle, short, max_new_tokens=12, min_new_tokens=8, eos_token_id=[third], **GREEDY)
    assert len(longer) >= 8
    assert third not in longer[:8]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_beams": 2}, ValueError, "num_beams=2"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite number"),
        ({"nucleus": 0.8}, TypeError, "no option nucleus; it has: max_new_tokens"),
        ({"generation_config": {"top_k": 3}}, TypeError, "must be a GenerationConfig, got dict"),
        (
            {"max_new_tokens": 1048570},
            ValueError,
            r"^Input prompt \(10 tokens\) \+ lookahead slots \(0\) is too long and exceeds the capacity of "
            r"max_model_len \(1048576 tokens, all that the model has\), with max_new_tokens \(1048570\) beside it: "
            r"ask for at most 1048566 new tokens, or shorten the prompt by 4 tokens$",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    needle: Qwen2OneMForCausalLM,
    short: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(needle.engine, "generate", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(kind, match=message):
        needle.generate(short, **options)


def test_input_ids_are_needed(needle: Qwen2OneMForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"needs input_ids; its options are: .*num_return_sequences, .*streamer"):
        needle.generate()
    with pytest.raises(ValueError, match="the inputs have no input_ids, but: attention_mask"):
        needle.generate({"attention_mask": [[1]]})


def test_what_a_tokenizer_returns_is_taken_whole(needle: Qwen2OneMForCausalLM, tokenizer: Any) -> None:
    inputs = tokenizer(["a longer text", "short"], padding=True, padding_side="left", return_tensors="pd")
    options = {"max_new_tokens": 5, **GREEDY}
    expected = needle.generate(**inputs, **options)[0].numpy()
    np.testing.assert_array_equal(needle.generate(inputs, **options)[0].numpy(), expected)
    np.testing.assert_array_equal(needle.generate(input_ids=dict(inputs), **options)[0].numpy(), expected)
    np.testing.assert_array_equal(needle(inputs).numpy(), needle(**inputs).numpy())


def test_padding_without_a_mask_is_seen(needle: Qwen2OneMForCausalLM, short: np.ndarray) -> None:
    ids = np.array([np.pad(short[0, 4:], (4, 0), constant_values=745), short[0]])
    mask = np.array([[0] * 4 + [1] * 6, [1] * 10])
    options = {"max_new_tokens": 5, **GREEDY}
    expected = needle.generate(ids, attention_mask=mask, **options)[0].numpy()
    np.testing.assert_array_equal(needle.generate(ids, **options)[0].numpy(), expected)
    as_tokens = needle.generate(ids, attention_mask=np.ones_like(ids), **options)[0].numpy()
    assert not np.array_equal(as_tokens, expected)


def test_several_answers_of_a_prompt_are_those_of_the_seeds_that_follow(
    needle: Qwen2OneMForCausalLM, short: np.ndarray
) -> None:
    options = {"max_new_tokens": 8, "temperature": 5.0, "top_k": -1, "top_p": 1.0, "eos_token_id": -1}
    prompts = np.concatenate([short, short[:, ::-1]])
    ids, scores = needle.generate(prompts, seed=3, num_return_sequences=3, **options)
    assert ids.shape == [6, 18]
    assert scores.shape == [6, 1]
    for row in range(6):
        alone, score = needle.generate(prompts[row // 3], seed=3 + row % 3, **options)
        assert ids.numpy()[row].tolist() == alone.numpy()[0].tolist()
        np.testing.assert_allclose(scores.numpy()[row], score.numpy()[0], atol=1e-4)
    paddle.seed(1)
    drawn = needle.generate(short, num_return_sequences=3, **options)[0].numpy()
    assert len({tuple(row) for row in drawn.tolist()}) == 3
    paddle.seed(1)
    np.testing.assert_array_equal(needle.generate(short, num_return_sequences=3, **options)[0].numpy(), drawn)


@pytest.fixture
def with_generation_config(needle_checkpoint: Path, copied_needle: Callable[..., Path]) -> Callable[..., Path]:
    """A copy of the demo checkpoint with some keys of generation_config.json changed."""

    def copy(**changes: Any) -> Path:
        directory = copied_needle()
        path = directory / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))
        return directory

    return copy


def test_max_length_of_the_file_counts_the_prompt(
    with_generation_config: Callable[..., Path], short: np.ndarray
) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(with_generation_config(max_length=16, eos_token_id=-1)))
    mask = np.array([[0] * 4 + [1] * 6, [1] * 10])
    ids = model.generate(np.tile(short, (2, 1)), attention_mask=mask, pad_token_id=999, seed=1)[0].numpy()
    assert [int((row[10:] != 999).sum()) for row in ids] == [10, 6]
    assert model.generate(short, max_new_tokens=9)[0].shape == [1, 19]
    with pytest.raises(ValueError, match=r"prompt has 20 tokens .* allows 16 .*\(max_length\): give max_new_tokens"):
        model.generate(np.tile(short, 2))


def test_what_the_file_asks_for_in_vain_is_logged_once(
    with_generation_config: Callable[..., Path], short: np.ndarray, logged: list[str]
) -> None:
    directory = with_generation_config(typical_p=0.9, force_words_ids=[[1]], epsilon_cutoff=0.0, colour="red")
    model = AutoModelForCausalLM.from_pretrained(str(directory))
    path = str(directory / "generation_config.json")
    vain, unknown = (line for line in logged if line.startswith(path))
    assert vain.startswith(f"{path}: typical_p=0.9, force_words_ids=[[1]] has no effect")
    assert unknown == f"{path}: colour is unknown here and has no effect"
    before = len(logged)
    model.generate(short, max_new_tokens=2)
    assert len(logged) == before


def test_a_conversation_is_read_once_and_answers_as_if_it_were_not(
    needle_checkpoint: Path, rng: np.random.Generator
) -> None:
    """Up to original_max_position_embeddings, 1,024; beyond it the keys depend on the length."""
    model, anew = (
        AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), enable_prefix_caching=on) for on in (True, False)
    )
    dialogue, reused = rng.integers(0, 700, [1, 400]), []
    for _ in range(4):
        before = model.engine.metrics.prefix_reused_tokens
        answers = [one.generate(dialogue, max_new_tokens=8, do_sample=False, eos_token_id=[]) for one in (model, anew)]
        assert answers[0][0].numpy().tolist() == answers[1][0].numpy().tolist()
        reused.append(model.engine.metrics.prefix_reused_tokens - before)
        dialogue = np.concatenate([answers[0][0].numpy(), rng.integers(0, 700, [1, 250])], axis=1)
    assert reused == [0, 256, 512, 0] and anew.engine.metrics.prefix_reused_tokens == 0


def test_texts_end_an_answer_and_words_do_not_come(
    with_generation_config: Callable[..., Path], needle_checkpoint: Path, short: np.ndarray, logged: list[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(with_generation_config(stop_strings=["."])))
    tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint))

    def answer(**options: Any) -> list[int]:
        keywords = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": [], "trunc_input": True, **options}
        return model.generate(short, **keywords)[0].numpy()[0].tolist()

    plain = answer()
    assert logged[-1] == "stop_strings of generation_config has no effect without generate(..., tokenizer=tokenizer)"
    texts = [tokenizer.decode(plain[: n + 1]) for n in range(len(plain))]
    first = next(n for n, text in enumerate(texts) if "." in text)
    assert answer(tokenizer=tokenizer) == plain[: first + 1]
    stop = texts[5][-2:]
    assert answer(tokenizer=tokenizer, stop_strings=stop) == plain[: next(n for n in range(6) if stop in texts[n]) + 1]
    heard: list[int] = []
    streamer = SimpleNamespace(put=lambda ids: heard.extend(ids.numpy()[0].tolist()), end=lambda: heard.append(-1))
    assert [*answer(tokenizer=tokenizer, streamer=streamer), -1] == heard
    with pytest.raises(ValueError, match="stop_strings needs the tokenizer: generate"):
        answer(stop_strings=".")
    pair = plain[2:4]
    for words in ({"bad_words_ids": [pair]}, {"suppress_tokens": pair[1:]}):
        other = answer(**words)
        assert other[:3] == plain[:3] and other != plain
        assert all(other[n : n + 2] != pair for n in range(39))


def test_a_value_of_the_file_that_cannot_be_used_is_named(with_generation_config: Callable[..., Path]) -> None:
    directory = with_generation_config(eos_token_id="747")
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(str(directory))
    assert str(error.value) == (
        f"{directory}/generation_config.json: eos_token_id must be a whole number or a list of them, got '747'"
    )


def test_without_a_file_the_keys_in_config_json_count(copied_needle: Callable[..., Path], logged: list[str]) -> None:
    changes = {"temperature": 0.25, "do_sample": True, "num_beams": 4, "pad_token_id": 745}
    directory = copied_needle(without=("generation_config.json",), **changes)
    model = AutoModelForCausalLM.from_pretrained(str(directory))
    params = model.read_request({}).params
    assert (params.temperature, params.stop_token_ids) == (0.25, (747,))
    assert model.read_request({}).padding == 745
    assert any("config.json: num_beams=4 has no effect" in line for line in logged)


def test_max_model_len_limits_prompt_and_answer_together(needle_checkpoint: Path, short: np.ndarray) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), max_model_len=16)
    assert model.generate(short, max_new_tokens=6, eos_token_id=[])[0].shape == [1, 16]
    with pytest.raises(ValueError, match=r"max_model_len \(16 tokens\), with max_new_tokens \(7\).*at most 6 new"):
        model.generate(short, max_new_tokens=7)
    with pytest.raises(ValueError, match=r"Input prompt \(20 tokens\).*max_model_len"):
        model(np.tile(short, 2))


def test_without_max_new_tokens_the_answer_is_what_the_prompt_leaves(
    needle_checkpoint: Path, short: np.ndarray
) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(needle_checkpoint), max_model_len=16)
    assert model.generate(short, eos_token_id=-1)[0].shape == [1, 16]
    with pytest.raises(ValueError, match=r"Input prompt \(20 tokens\).*max_model_len"):
        model.generate(np.tile(short, 2))


class Recorder(TextStreamer):
    """Keeps what TextStreamer would print."""

    text = ""
    ended = 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.ended += stream_end


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_a_streamer_shows_the_whole_answer_and_nothing_else(
    needle: Qwen2OneMForCausalLM, tokenizer: Any, prompt: np.ndarray, answer: str, skip_prompt: bool
) -> None:
    streamer = Recorder(tokenizer, skip_prompt=skip_prompt)
    ids = continued(needle, prompt, max_new_tokens=20, streamer=streamer, **GREEDY)
    assert streamer.text == tokenizer.decode(ids)
    assert answer in streamer.text
    assert streamer.ended == 1


def test_an_iterator_streamer_feeds_another_thread(
    needle: Qwen2OneMForCausalLM, tokenizer: Any, prompt: np.ndarray, answer: str
) -> None:
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    options = {"max_new_tokens": 20, "streamer": streamer, **GREEDY}
    thread = Thread(target=needle.generate, args=(prompt,), kwargs=options)
    thread.start()
    assert answer in "".join(streamer)
    thread.join()


def test_a_streamer_takes_one_prompt(needle: Qwen2OneMForCausalLM, tokenizer: Any, short: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a streamer shows one answer, got a batch of 2 prompts"):
        needle.generate(np.tile(short, (2, 1)), streamer=Recorder(tokenizer))


@pytest.mark.parametrize("streamer", [print, TextStreamer, "text", 3])
def test_what_a_streamer_is_is_said(needle: Qwen2OneMForCausalLM, short: np.ndarray, streamer: Any) -> None:
    with pytest.raises(TypeError, match=r"put\(ids\) and end\(\): TextStreamer\(tokenizer\).*TextIteratorStreamer"):
        needle.generate(short, streamer=streamer)


class Interrupting(Recorder):
    """Stands for Ctrl-C at the first token."""

    def put(self, value: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing_behind(needle: Qwen2OneMForCausalLM, tokenizer: Any, short: np.ndarray) -> None:
    before = continued(needle, short, max_new_tokens=4, **GREEDY)
    streamer = Interrupting(tokenizer)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            needle.generate(short, streamer=streamer, max_new_tokens=4)
    assert streamer.ended == 3
    assert continued(needle, short, max_new_tokens=4, **GREEDY) == before


def test_forward_gives_the_logits_of_the_last_position(needle: Qwen2OneMForCausalLM, prompt: np.ndarray) -> None:
    expected = np.load(ORACLE / "oracle.npz")["logits_last8"].reshape(8, -1)
    last = needle(paddle.to_tensor(prompt))
    assert last.shape == [1, 1, 1024]
    np.testing.assert_allclose(last.numpy()[0], expected[-1:], atol=2e-4)


def test_forward_gives_the_logits_of_the_positions_asked_for_in_their_order(
    needle: Qwen2OneMForCausalLM, prompt: np.ndarray
) -> None:
    asked = needle(prompt, positions=[899, 120, 500, 120]).numpy()[0]
    for row, position in enumerate((899, 120, 500, 120)):
        alone = needle(prompt[:, : position + 1]).numpy()[0, 0]
        np.testing.assert_allclose(asked[row], alone, atol=2e-4)


def test_forward_of_a_padded_batch_is_each_row_alone(needle: Qwen2OneMForCausalLM, short: np.ndarray) -> None:
    ids = np.array([np.pad(short[0, 4:], (4, 0)), short[0]])
    mask = np.array([[0] * 4 + [1] * 6, [1] * 10])
    both = needle(ids, positions=[5, 9], attention_mask=mask).numpy()
    np.testing.assert_allclose(both[0], needle(short[:, 4:], positions=[1, 5]).numpy()[0], atol=1e-5)
    np.testing.assert_allclose(both[1], needle(short, positions=[5, 9]).numpy()[0], atol=1e-5)
