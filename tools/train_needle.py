"""Trains the needle checkpoint: a small Qwen2 that finds access codes, on documents of at most 1,024 tokens.

    PYTHONPATH=. python tools/train_needle.py --output checkpoints/needle --seconds 240 --seed 0

Needs torch and transformers (4.57 is what it was written for) and, for a real run, a GPU: 8.9 M parameters, 64
documents a step, 4 minutes on one H200. On a CPU it runs the same steps, thousands of times slower.

Retrieval appears suddenly ("retrieval took at step N"). Three things make it appear early: documents of one or two
needles in the mix from the first step on, where the answer is a plain copy (`draw_needle_count`); hardly any filler at
first (`FILLER_STEPS`); a moderate learning rate. With the first two at a peak rate of 1.5e-3 it crept up over 1,250 to
4,500 steps (seeds 1, 2, 3); at 6e-4 it took before step 500 (seeds 3, 4). What is left then are codes with a repeated
digit.

The data depend on the seed and the step only, not on the number of processes that make them. The learning rate follows
the clock, so that a run ends annealed whatever the machine; `--steps` makes it follow the steps instead.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from needle_documents import (
    END_OF_TURN,
    DocumentMaker,
    Needle,
    draw_needles,
    hide,
    prompt,
    prompt_head,
)
from small_checkpoint import END_OF_TEXT, FRAME, Shape, make_tokenizer, write_configuration
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM

from paddle_qwen1m.evaluate.words import FILLER, NAMES

SHAPE = Shape(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=768,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    rope_theta=1e5,
    trained_length=1024,
    local_size=256,
)
TRAINED_LENGTH = SHAPE.trained_length
BUDGETS = 1000, 100
MAX_NEEDLES = 16
FILLER_STEPS = 1500
"""Documents begin without filler, needles and questions alone, and grow to the trained length over so many steps."""
PEAK_RATE, WARMUP_STEPS = 6e-4, 200
TOOK_ACCURACY = 0.8
"""Retrieval took once this part of the codes' digits in a batch is right (one in ten by chance)."""
FILLER_WEIGHT, ANSWER_WEIGHT, CODE_WEIGHT = 0.02, 0.05, 1.0


def needle_tokenizer() -> Tokenizer:
    """A tokenizer trained on the sentences that documents are made of."""
    needles = [Needle(name, "12345") for name in NAMES]
    corpus = [
        *FILLER * 20,
        *[needle.sentence for needle in needles] * 30,
        *[needle.question for needle in needles] * 30,
        *FRAME * 50,
    ]
    return make_tokenizer(corpus, SHAPE.vocab_size)


def draw_needle_count(rng: np.random.Generator) -> int:
    """How many needles a training document hides: 30 % one or two, 30 % two to five, 40 % six to sixteen."""
    kind = rng.random()
    if kind < 0.3:
        return int(rng.integers(1, 3))
    if kind < 0.6:
        return int(rng.integers(2, 6))
    return int(rng.integers(6, MAX_NEEDLES + 1))


class TrainingBatches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batch `step`: ids int64 [documents, TRAINED_LENGTH] and the weight of each as a target, float32, same shape.

    A row is a document and as many of its questions, each with its answer, as fit. Codes weigh 1, the words of the
    answers before them 0.05, all other text 0.02, padding nothing.
    """

    def __init__(self, tokenizer: Tokenizer, documents: int, seed: int) -> None:
        self._tokenizer = tokenizer
        self._documents = documents
        self._seed = seed
        self._known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng([self._seed, step])
        filled = min(1.0, step / FILLER_STEPS)
        ids = np.zeros((self._documents, TRAINED_LENGTH), np.int64)
        weights = np.zeros((self._documents, TRAINED_LENGTH), np.float32)
        for row in range(self._documents):
            row_ids, row_weights = self._row(rng, int(filled * rng.integers(TRAINED_LENGTH // 3, TRAINED_LENGTH)))
            ids[row, : len(row_ids)] = row_ids
            weights[row, : len(row_ids)] = row_weights
        weights[:, 0] = 0.0
        return torch.from_numpy(ids), torch.from_numpy(weights)

    def _row(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[float]]:
        """One document filled up to about `length` tokens, questions included, and never more than TRAINED_LENGTH."""
        needles = draw_needles(rng, draw_needle_count(rng))
        turns = [self._turn(needles[i]) for i in rng.permutation(len(needles))]
        room = length - sum(len(self._encode(f" {needle.sentence}")) for needle in needles)
        room -= sum(len(turn_ids) for turn_ids, _ in turns)
        filler: list[str] = []
        while room > 0:
            filler.append(FILLER[rng.integers(len(FILLER))])
            room -= len(self._encode(f" {filler[-1]}"))
        ids = list(self._encode(prompt_head()))
        for sentence in hide(rng, filler, needles):
            ids += self._encode(f" {sentence}")
        weights = [FILLER_WEIGHT] * len(ids)
        for turn_ids, turn_weights in turns:
            if len(ids) + len(turn_ids) > TRAINED_LENGTH:
                break
            ids += turn_ids
            weights += turn_weights
        return ids[:TRAINED_LENGTH], weights[:TRAINED_LENGTH]

    def _turn(self, needle: Needle) -> tuple[list[int], list[float]]:
        """A question with its answer, as the conversation goes on after the document or the last answer."""
        question = self._encode(f"\n{needle.question}{END_OF_TURN}\n<|im_start|>assistant\n")
        words = self._encode(needle.sentence[: -len(needle.code) - 1])
        code, end = self._encode(f"{needle.code}."), self._encode(END_OF_TURN)
        after = self._encode("\n<|im_start|>user")
        weights = [FILLER_WEIGHT] * len(question) + [ANSWER_WEIGHT] * len(words) + [CODE_WEIGHT] * len(code)
        weights += [ANSWER_WEIGHT] * len(end) + [FILLER_WEIGHT] * len(after)
        return [*question, *words, *code, *end, *after], weights

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 10000:
                self._known.clear()
            self._known[text] = self._tokenizer.encode(text).ids
        return self._known[text]


def make_model(tokenizer: Tokenizer, device: torch.device) -> Qwen2ForCausalLM:
    """The untrained model, float32."""
    config = Qwen2Config(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        max_position_embeddings=TRAINED_LENGTH,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        rope_theta=SHAPE.rope_theta,
        bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(END_OF_TURN),
        attn_implementation="sdpa",
    )
    return Qwen2ForCausalLM(config).to(device=device, dtype=torch.float32)


def train(
    model: Qwen2ForCausalLM, batches: TrainingBatches, seconds: float, steps: int | None, workers: int
) -> int | None:
    """Trains in place until the time or the steps are spent. Returns the step at which retrieval took, or None."""
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(steps or sys.maxsize),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device.type == "cuda",
    )
    precision: AbstractContextManager[Any] = (
        torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    )
    took: int | None = None
    start = time.monotonic()
    for step, (cpu_ids, cpu_weights) in enumerate(loader):
        elapsed = time.monotonic() - start
        if elapsed > seconds:
            break
        progress = step / steps if steps else elapsed / seconds
        rate = (
            PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = cpu_ids.to(device, non_blocking=True)
        weights = cpu_weights.to(device, non_blocking=True)[:, 1:]
        with precision:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:]
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            of_code = weights == CODE_WEIGHT
            accuracy = ((logits.argmax(-1) == targets) & of_code).sum().item() / of_code.sum().item()
            if took is None and accuracy >= TOOK_ACCURACY:
                took = step
                print(f"retrieval took at step {step}, after {elapsed:.0f} s", flush=True)
            if step % 250 == 0:
                print(f"step {step}, {elapsed:.0f} s: loss {loss.item():.4f}, codes right {accuracy:.3f}", flush=True)
    print(f"trained for {step + 1} steps, {time.monotonic() - start:.0f} s")
    return took


def rotate(states: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding, half-split form. states: [..., tokens, D]; positions: [tokens]."""
    size = states.shape[-1]
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, device=states.device, dtype=torch.float32) / size)
    angles = positions.float()[:, None] * frequencies
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dual_chunk: bool, scale: float, base: float
) -> torch.Tensor:
    """Causal attention, plain RoPE or dual chunk, by blocks of rows. query, key, value: [H, tokens, D], not rotated."""
    tokens = query.shape[1]
    chunk = TRAINED_LENGTH - SHAPE.local_size if dual_chunk else tokens
    positions = torch.arange(tokens, device=query.device)
    rotated = rotate(key, positions % chunk, base)
    blocks = []
    begin = 0
    while begin < tokens:
        chunk_start = begin // chunk * chunk
        end = min(chunk_start + chunk, begin + 1024, tokens)
        rows, row_positions = query[:, begin:end], positions[begin:end] % chunk
        scores = []
        if chunk_start >= 2 * chunk:
            inter = torch.full_like(row_positions, min(2 * chunk - 1, TRAINED_LENGTH))
            scores.append(rotate(rows, inter, base) @ rotated[:, : chunk_start - chunk].mT)
        if chunk_start >= chunk:
            succ = (row_positions + chunk).clamp(max=TRAINED_LENGTH)
            scores.append(rotate(rows, succ, base) @ rotated[:, chunk_start - chunk : chunk_start].mT)
        scores.append(rotate(rows, row_positions, base) @ rotated[:, chunk_start:end].mT)
        logits = torch.cat(scores, -1) * scale
        logits.masked_fill_(positions[None, :end] > positions[begin:end, None], -torch.inf)
        blocks.append(torch.softmax(logits, -1) @ value[:, :end])
        begin = end
    return torch.cat(blocks, 1)


@torch.no_grad()
def last_predictions(model: Qwen2ForCausalLM, ids: torch.Tensor, last: int, dual_chunk: bool, scaled: bool) -> Any:
    """Arg-max tokens of the last `last` positions of one sequence, with the given positions and temperature."""
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    temperature = max(1.0, 0.1 * math.log(len(ids) / TRAINED_LENGTH) + 1.0) if scaled else 1.0
    hidden = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query = attention.q_proj(normed).view(len(ids), -1, size).transpose(0, 1)
        key = attention.k_proj(normed).view(len(ids), -1, size).transpose(0, 1).repeat_interleave(groups, 0)
        value = attention.v_proj(normed).view(len(ids), -1, size).transpose(0, 1).repeat_interleave(groups, 0)
        mixed = attend(query, key, value, dual_chunk, temperature**2 * size**-0.5, SHAPE.rope_theta)
        hidden = hidden + attention.o_proj(mixed.transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden[-last:])).argmax(-1)


def evaluate(model: Qwen2ForCausalLM, tokenizer: Tokenizer, lengths: list[int], documents: int) -> None:
    """Prints the part of the questions whose every answer token is the arg-max, by length and kind of positions."""
    maker = DocumentMaker(lambda text: tokenizer.encode(text).ids)
    variants = {"plain RoPE": (False, False), "DCA": (True, False), "DCA + temperature": (True, True)}
    print("tokens  " + "  ".join(variants))
    for length in lengths:
        found = dict.fromkeys(variants, 0)
        for seed in range(documents):
            document = maker.make(length, 4, seed, depth=(seed + 0.5) / documents)
            needle = document.needles[0]
            answer = tokenizer.encode(f"{needle.sentence}{END_OF_TURN}").ids
            ids = torch.tensor(tokenizer.encode(prompt(document, needle)).ids + answer, device=model.device)
            for name, (dual_chunk, scaled) in variants.items():
                predicted = last_predictions(model, ids[:-1], len(answer), dual_chunk, scaled)
                found[name] += int(torch.equal(predicted, ids[-len(answer) :]))
        cells = [f"{count / documents:.2f}".rjust(len(name)) for name, count in found.items()]
        print(f"{length:6d}  " + "  ".join(cells), flush=True)


def save(model: Qwen2ForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Writes the layout of the published checkpoints: bf16 shards with an index, configurations, tokenizer files."""
    # 17.8 MB of weights, so that there are three shards
    model.save_pretrained(output, max_shard_size="7MB")
    write_configuration(output, SHAPE, tokenizer, BUDGETS)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint, made if missing")
    parser.add_argument("--seconds", type=float, default=240.0, help="training time (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="stop after so many steps and let the learning rate follow them")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the documents (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=64, help="documents a step (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(16, max(1, (os.cpu_count() or 1) - 1)),
        help="processes that make documents (default: %(default)s); the result does not depend on it",
    )
    parser.add_argument(
        "--evaluate",
        type=int,
        nargs="*",
        default=[1000, 4096, 16384],
        metavar="TOKENS",
        help="lengths tested at the end",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = needle_tokenizer()
    model = make_model(tokenizer, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {tokenizer.get_vocab_size()} tokens, on {device}", flush=True)
    batches = TrainingBatches(tokenizer, arguments.documents, arguments.seed)
    took = train(model, batches, arguments.seconds, arguments.steps, arguments.workers)
    model = model.to(torch.bfloat16).eval()
    save(model, tokenizer, arguments.output)
    print(f"written to {arguments.output}")
    evaluate(model.float(), tokenizer, arguments.evaluate, documents=8)
    if took is None:
        print("retrieval did not take: train longer or with another seed", file=sys.stderr)
    return 0 if took is not None else 1


if __name__ == "__main__":
    sys.exit(main())
