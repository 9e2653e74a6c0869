"""Trains a small Qwen2 on RULER's needles, variables and common words, on documents of at most 4,096 tokens.

    PYTHONPATH=. python tools/train_ruler.py --output checkpoints/ruler --seconds 480

Needs torch, tokenizers and safetensors and, for a real run, a GPU. 11.4 M parameters, 65,536 tokens a step, 22 steps a
second on one H200: needles are at their last level after three minutes, variables after four. Common words did not
take.

Every kind of task begins with its easiest documents (`ruler_documents.py`) and goes one level on once the share of its
answers that are right in every token, teacher-forced, reaches TOOK. The learning rate is constant and falls over the
last quarter of the time. Every `--report` seconds a line tells, of each kind, its level and the shares of tokens and
answers that were right since the last one.

What is in `--output` is gone on with: `training.pt` has all of a run, written every SAVE_SECONDS, at the end, and on
Ctrl-C; without it a checkpoint's weights are a beginning. At the end the checkpoint is written, and its scores at the
trained length are printed, as `paddle-qwen1m eval ruler --score logits` gives them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from multiprocessing import Array
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ruler_documents import (
    KINDS,
    LEVELS,
    MEASURED,
    NO_ANSWER,
    NO_CHOICE,
    TRAINED_LENGTH,
    Documents,
    ruler_tokenizer,
)
from safetensors.torch import load_file, save_file
from small_checkpoint import ChatTokenizer, Shape, write_configuration, write_json
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from paddle_qwen1m.evaluate import ruler
from paddle_qwen1m.evaluate.samples import Prompter, TooShort, score_likeliest

SHAPE = Shape(
    vocab_size=1536,
    hidden_size=512,
    intermediate_size=768,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    rope_theta=1e5,
    trained_length=TRAINED_LENGTH,
    local_size=TRAINED_LENGTH // 4,
)
BUDGETS = 1000, 400
HEAD_SIZE = 128
EPSILON = 1e-6
WARMUP_STEPS, FALLING = 200, 0.25
"""FALLING: the last part of the time, over which the rate falls to nothing."""
TOOK = 0.75
FEWEST_ANSWERS = 100
"""Of a kind, by which its level is decided."""
SAVE_SECONDS = 120.0
SHARD_BYTES = 8_000_000
STATE, INDEX = "training.pt", "model.safetensors.index.json"
SCORED_SEED = 1_000_003


class Layer(nn.Module):
    """One decoder layer; names of parameters are those of the published files."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, queries, keys = shape.hidden_size, shape.num_heads * HEAD_SIZE, shape.num_kv_heads * HEAD_SIZE
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(hidden, queries),
                "k_proj": nn.Linear(hidden, keys),
                "v_proj": nn.Linear(hidden, keys),
                "o_proj": nn.Linear(queries, hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, shape.intermediate_size, bias=False),
                "up_proj": nn.Linear(hidden, shape.intermediate_size, bias=False),
                "down_proj": nn.Linear(shape.intermediate_size, hidden, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(hidden, eps=EPSILON)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=EPSILON)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """hidden [R, T, hidden size]; cos, sin [T, HEAD_SIZE]."""
        normed = self.input_layernorm(hidden)
        query, key, value = (
            self.self_attn[name](normed).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(hidden)
        return hidden + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed))


class Qwen2(nn.Module):
    """A Qwen2 with plain rotary positions, which is what dual chunk attention is up to the trained length."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(shape.vocab_size, shape.hidden_size),
                "layers": nn.ModuleList(Layer(shape) for _ in range(shape.num_layers)),
                "norm": nn.RMSNorm(shape.hidden_size, eps=EPSILON),
            }
        )
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [R, T]; logits [R, T, vocabulary]."""
        places = torch.arange(0, HEAD_SIZE, 2, device=ids.device, dtype=torch.float32)
        frequencies = self.shape.rope_theta ** (-places / HEAD_SIZE)
        angles = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)[:, None] * frequencies
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        hidden = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            hidden = layer(hidden, cos, sin)
        return self.lm_head(self.model["norm"](hidden))


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split form. states [R, heads, T, HEAD_SIZE]."""
    first, second = states.chunk(2, -1)
    return (states * cos + torch.cat([-second, first], -1) * sin).to(states.dtype)


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Batch `step` as tensors, of documents of the levels that are reached when it is made."""

    def __init__(self, documents: Documents, seed: int, levels: Any) -> None:
        self._documents, self._seed, self._levels = documents, seed, levels

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        batch = self._documents.batch(self._seed, step, list(self._levels))
        return {name: torch.from_numpy(array) for name, array in vars(batch).items()}


def loss_and_right(
    logits: torch.Tensor, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted loss; of each answer the share of its tokens that are the likeliest, float32 [A], and their number.

    Where any of several tokens is right, the loss is that of all of them together.
    """
    logits, targets, weights = logits[:, :-1].float(), batch["ids"][:, 1:], batch["weights"][:, 1:]
    answers, choices = batch["answers"][:, 1:], batch["choices"]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    likeliest = logits.argmax(-1)
    right = likeliest == targets
    if len(choices):
        row, place, several = choices[:, 0], choices[:, 1] - 1, choices[:, 2:]
        logprobs = F.log_softmax(logits[row, place], -1).gather(1, several.clamp(min=0))
        together = torch.logsumexp(logprobs.masked_fill(several == NO_CHOICE, -torch.inf), -1)
        losses = losses.index_put((row, place), -together)
        right = right.index_put((row, place), (likeliest[row, place, None] == several).any(-1))
    loss = (losses * weights).sum() / weights.sum()
    part = answers != NO_ANSWER
    counts = torch.zeros(len(batch["kinds"]), device=logits.device)
    tokens = counts.index_add(0, answers[part], torch.ones_like(weights[part]))
    found = counts.index_add(0, answers[part], right[part].float())
    return loss, found / tokens.clamp(min=1), tokens


class Tally:
    """Of each kind since the last report: answers, those right in every token, and the share of tokens right."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, len(KINDS), device=device)

    def add(self, shares: torch.Tensor, kinds: torch.Tensor) -> None:
        for row, values in zip(self._sums, (torch.ones_like(shares), (shares == 1.0).float(), shares)):
            row.index_add_(0, kinds, values)

    def take(self) -> list[tuple[int, float, float]]:
        """Answers, share of them right, share of their tokens right, a kind; nothing is left."""
        counts, right, tokens = self._sums.tolist()
        self._sums.zero_()
        return [(int(n), one / max(n, 1), other / max(n, 1)) for n, one, other in zip(counts, right, tokens)]


class Training:
    """Everything of a run that a file can hold."""

    def __init__(self, model: Qwen2, device: torch.device) -> None:
        self.model, self.device = model.to(device), device
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05, fused=device.type == "cuda"
        )
        self.step, self.seconds = 0, 0.0
        self.levels = Array("i", len(KINDS))
        """Shared with the processes that make documents."""

    def save(self, path: Path) -> None:
        state = {
            "shape": asdict(self.model.shape),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "levels": list(self.levels),
        }
        partial_file = path.with_name(f"{path.name}.part")
        torch.save(state, partial_file)
        os.replace(partial_file, path)

    def restore(self, path: Path) -> None:
        """ValueError for the state of another shape."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["shape"] != asdict(self.model.shape):
            raise ValueError(f"{path} is of a model of another shape, {state['shape']}: give another --output")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.levels[:] = state["levels"]

    def rise(self, tallied: list[tuple[int, float, float]]) -> None:
        """A level more for each kind whose answers are right often enough."""
        for kind, (answers, right, _) in enumerate(tallied):
            if answers >= FEWEST_ANSWERS and right >= TOOK and self.levels[kind] < LEVELS - 1:
                self.levels[kind] += 1


def rate(peak: float, step: int, progress: float) -> float:
    """The learning rate; progress: 0 to 1, of the time or the steps."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, 1.0 - progress) / FALLING)


def train(training: Training, batches: Batches, state: Path, options: argparse.Namespace) -> None:
    """Goes on until the time or the steps are spent; the state is written on the way, and whatever ends it."""
    device, model = training.device, training.model
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(training.step, options.steps or sys.maxsize),
        num_workers=options.workers,
        prefetch_factor=2 if options.workers else None,
        pin_memory=device.type == "cuda",
    )
    precision: AbstractContextManager[Any] = (
        torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    )
    tally, tokens, before = Tally(device), 0, training.seconds
    start = reported = saved = time.monotonic()
    try:
        for arrived in loader:
            now = time.monotonic()
            training.seconds = before + now - start
            if training.seconds >= options.seconds:
                break
            of_all = training.step / options.steps if options.steps else training.seconds / options.seconds
            for group in training.optimizer.param_groups:
                group["lr"] = rate(options.rate, training.step, of_all)
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in arrived.items()}
            with precision:
                logits = model(batch["ids"])
            loss, shares, _ = loss_and_right(logits, batch)
            training.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            training.optimizer.step()
            training.step += 1
            tokens += arrived["ids"].numel()
            tally.add(shares, batch["kinds"])
            if now - reported >= options.report or training.step == options.steps:
                tallied = tally.take()
                pace = tokens / max(time.monotonic() - reported, 1e-9)
                print(
                    f"step {training.step}, {training.seconds:.0f} s, {pace:,.0f} tokens/s: loss {loss.item():.4f}; "
                    + "; ".join(
                        f"{kind} level {level}, tokens {share:.3f}, answers {right:.3f} of {answers}"
                        for kind, level, (answers, right, share) in zip(KINDS, training.levels, tallied)
                    ),
                    flush=True,
                )
                training.rise(tallied)
                reported, tokens = time.monotonic(), 0
            if now - saved >= SAVE_SECONDS:
                training.save(state)
                saved = time.monotonic()
    finally:
        training.save(state)


@torch.no_grad()
def scores(model: Qwen2, tokenizer: Tokenizer, documents: int) -> Iterator[tuple[str, float | None]]:
    """Of each task its score at the trained length; None where the task does not fit it."""
    prompter, device = Prompter(ChatTokenizer(tokenizer)), next(model.parameters()).device
    for task in MEASURED:
        found = []
        try:
            for number in range(documents):
                made = ruler.make(task, model.shape.trained_length, number, prompter, seed=SCORED_SEED)
                (question,) = made.questions
                asked, answer = prompter.ids(question), prompter.encode(question.answer)
                logits = model(torch.tensor([asked + answer], device=device))
                likeliest = logits[0, len(asked) - 1 : -1].argmax(-1).tolist()
                found.append(score_likeliest(likeliest, answer, question, prompter.decode))
        except TooShort:
            yield task, None
            continue
        yield task, sum(found) / len(found)


def write(model: Qwen2, tokenizer: Tokenizer, output: Path) -> None:
    """The layout of the published checkpoints: bf16 shards with an index, configurations, tokenizer files."""
    write_configuration(output, model.shape, tokenizer, BUDGETS)
    tensors = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(one.nbytes for one in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for old in output.glob("model-*.safetensors"):
        old.unlink()
    for file, shard in zip(names, shards):
        save_file(shard, output / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {name: file for file, shard in zip(names, shards) for name in shard}
    write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})


def begin(training: Training, output: Path) -> None:
    """Goes on from what is in `output`: a run's state, or a checkpoint's weights."""
    if (output / STATE).exists():
        training.restore(output / STATE)
        print(f"goes on from step {training.step}, {training.seconds:.0f} s, levels {list(training.levels)}")
    elif (output / INDEX).exists():
        tensors = {
            name: tensor for file in output.glob("model-*.safetensors") for name, tensor in load_file(file).items()
        }
        training.model.load_state_dict(tensors)
        print(f"begins with the weights of {output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint, gone on with if there")
    parser.add_argument("--seconds", type=float, default=480.0, help="training time in all (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="stop after so many steps and let the learning rate follow them")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the documents (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=6e-4, help="the highest learning rate (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=65536, help="a step (default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=TRAINED_LENGTH, help="of the longest documents (default: %(default)s)"
    )
    parser.add_argument("--report", type=float, default=10.0, help="seconds between lines (default: %(default)s)")
    parser.add_argument(
        "--documents", type=int, default=32, help="of each task scored at the end (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(15, max(1, (os.cpu_count() or 1) - 1)),
        help="processes that make documents (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes that make documents are forked from this one
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = ruler_tokenizer(SHAPE.vocab_size)
    shape = replace(SHAPE, trained_length=options.length, local_size=options.length // 4)
    training = Training(Qwen2(shape), device)
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {tokenizer.get_vocab_size()} tokens, on {device}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    begin(training, options.output)
    documents = Documents(tokenizer, options.tokens, options.length)
    train(training, Batches(documents, options.seed, training.levels), options.output / STATE, options)
    write(training.model, tokenizer, options.output)
    print(f"written to {options.output} after {training.step} steps, {training.seconds:.0f} s", flush=True)
    rounded = training.model.to(torch.bfloat16).float().eval()
    print(f"### score, of 100, by logits\n\n| task | {options.length:,} |\n| --- | --- |")
    for task, score in scores(rounded, tokenizer, options.documents):
        print(f"| {task} | {'does not fit' if score is None else f'{100 * score:.1f}'} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
