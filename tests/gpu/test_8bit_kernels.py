"""8-bit keys and values on a GPU: what is written, what pages stand for, and decode beside float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import attention_cases as cases  # noqa: E402  (it needs PyTorch)
from attention_cases import Context, Tensor, poisoned  # noqa: E402

BOUND = 1e-2
LARGEST = {"int8": 127.0, "e4m3": 448.0}
STORED = {"int8": torch.int8, "e4m3": torch.uint8}
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
each_kind = pytest.mark.parametrize("kind", ["int8", "e4m3"])


@dataclass
class Context8:
    """A context whose keys and values, float64, are what 8-bit pages stand for. Scales are NaN where no token lies.

    numbers [2, P, page_size, G, D], int8 or uint8 that hold E4M3, and scales float16 [2, P, page_size, G], of keys and
    of values; frame float32 [2, G, D].
    """

    real: Context
    numbers: Tensor
    scales: Tensor
    frame: Tensor

    @property
    def cache(self) -> dict[str, Any]:
        """The fields of qwen1m_cache."""
        fields = {**self.real.cache, "key": self.numbers[0], "value": self.numbers[1]}
        fields["dtype"] = "int8" if self.numbers.dtype == torch.int8 else "e4m3"
        names = ("key_scale", "value_scale", "power", "centre")
        return {**fields, "frame": dict(zip(names, (*self.scales, *self.frame)))}


def random_frame(generator: torch.Generator, kv_heads: int, head_dim: int) -> Tensor:
    """Powers from 1/4 to 256, the same for the two dims of a rotation pair, and centres of the size of keys."""
    exponents = torch.randint(-2, 9, (kv_heads, head_dim // 2), generator=generator, device="cuda")
    centres = 5 * torch.randn(kv_heads, head_dim, generator=generator, device="cuda")
    return torch.stack([torch.exp2(exponents.float()).repeat(1, 2), centres])


def quantised(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Bytes and float16 scales of rows [..., D]."""
    scales = (x.abs().amax(-1) / LARGEST[kind]).half()
    numbers = (x / scales[..., None].double()).nan_to_num().clamp(-LARGEST[kind], LARGEST[kind])
    if kind == "int8":
        return torch.round(numbers).to(torch.int8), scales
    return numbers.float().to(torch.float8_e4m3fn).view(torch.uint8), scales


def meant(numbers: Tensor) -> Tensor:
    """What bytes stand for, float64."""
    return (numbers if numbers.dtype == torch.int8 else numbers.view(torch.float8_e4m3fn).float()).double()


def context8(
    rng: np.random.Generator, length: int, frame: Tensor | None = None, kind: str = "int8", **shape: Any
) -> Context8:
    """Keys as large as the powers of their frame, around its centre, and queries as small."""
    context = cases.random_context(rng, length, 1, **shape)
    generator = torch.Generator("cuda").manual_seed(int(rng.integers(2**62)))
    kv_heads, head_dim = context.keys.shape[1:]
    frame = random_frame(generator, kv_heads, head_dim) if frame is None else frame
    power, centre = frame.double()
    group = context.q.shape[2] // kv_heads
    q = (context.q.double() / power.repeat_interleave(group, 0)).to(context.q.dtype)
    keys, key_scales = quantised(context.key_pages.double(), kind)
    values, value_scales = quantised(context.value_pages.double(), kind)
    at = context.table.long()

    def unpaged(pages: Tensor) -> Tensor:
        return pages[at].flatten(0, 1)[:length]

    real_keys = (meant(unpaged(keys)) * unpaged(key_scales)[..., None].double() + centre) * power
    real_values = meant(unpaged(values)) * unpaged(value_scales)[..., None].double()
    real = replace(context, q=q, keys=real_keys, values=real_values)
    return Context8(real, torch.stack([keys, values]), torch.stack([key_scales, value_scales]), frame)


def decode(cuda: Any, contexts: Sequence[Context8], empty_rows: int = 0, *, width: int = 1) -> Tensor:
    """out [B, H, D]: the last row of each context, all in one batch over one pool, and rows without a sequence; tables
    are `width` pages long at least.
    """
    batch = len(contexts) + empty_rows
    heads, head_dim = contexts[0].real.q.shape[2:]
    width = max(width, *(len(context.real.table) for context in contexts))
    tables = torch.zeros(batch, width, dtype=torch.int32, device="cuda")
    q = torch.full((3, batch, heads, head_dim), float("nan"), dtype=contexts[0].real.q.dtype, device="cuda")
    offset = 0
    for number, context in enumerate(contexts):
        tables[number, : len(context.real.table)] = context.real.table + offset
        offset += context.numbers.shape[1]
        q[: context.real.q.shape[0], number] = context.real.q[:, -1]
    numbers, scales = (torch.cat([getattr(one, part) for one in contexts], 1) for part in ("numbers", "scales"))
    pool = replace(contexts[0], numbers=numbers, scales=scales)
    out = poisoned(batch, heads, head_dim, dtype=q.dtype)
    lengths = [context.real.length for context in contexts] + [0] * empty_rows
    factors = [context.real.scale for context in contexts] + [1.0] * empty_rows
    cuda(
        "dca_decode",
        q=q,
        out=out,
        cache=pool.cache,
        block_tables=tables,
        lengths=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        scale=torch.tensor(factors, device="cuda"),
        activation=str(q.dtype),
        batch=batch,
        heads=heads,
        table_width=width,
        chunk_len=contexts[0].real.chunk_len,
    )
    torch.cuda.synchronize()
    return out


@each_kind
@each_half
@pytest.mark.parametrize("heads, kv_heads", [(5, 1), (28, 4), (40, 8), (12, 1), (40, 2)])
@pytest.mark.parametrize("length", [1, 63, 64, 1000, 5000])
def test_decode_is_attention_over_what_the_numbers_stand_for(
    cuda: Any, rng: np.random.Generator, length: int, heads: int, kv_heads: int, dtype: torch.dtype, kind: str
) -> None:
    context = context8(rng, length, kind=kind, heads=heads, kv_heads=kv_heads, dtype=dtype)
    assert context.scales.isnan().any()
    for width in (1, 1000):  # of a table that holds no more keys, and of one that could hold many
        assert cases.worst(decode(cuda, [context], width=width), cases.reference(context.real, [0])) <= BOUND, width


@each_half
def test_decode_reads_every_byte_of_fp8_exactly(cuda: Any, rng: np.random.Generator, dtype: torch.dtype) -> None:
    """One key, whose values are all 254 numbers there are, in two KV heads: the output is they, scaled by 1."""
    context = context8(rng, 1, kind="e4m3", heads=2, kv_heads=2, dtype=dtype)
    numbers = torch.tensor([byte for byte in range(256) if byte % 128 != 127] + [0, 0], dtype=torch.uint8)
    at = context.real.table[0]
    context.numbers[1, at, 0] = numbers.view(2, 128).cuda()
    context.scales[1, at, 0] = 1.0
    exact = numbers.view(torch.float8_e4m3fn).float().view(1, 2, 128).cuda()
    assert torch.equal(decode(cuda, [context]).float(), exact)


def test_decode_of_several_at_once(cuda: Any, rng: np.random.Generator) -> None:
    """A batch of lengths in one, two and three stages, and a row that has no sequence."""
    contexts = [context8(rng, 700, heads=28, kv_heads=4)]
    contexts += [context8(rng, length, contexts[0].frame, heads=28, kv_heads=4) for length in (3, 1500)]
    out = decode(cuda, contexts, empty_rows=1)
    assert not out[-1].any()
    for number, context in enumerate(contexts):
        assert cases.worst(out[number : number + 1], cases.reference(context.real, [0])) <= BOUND


def test_decode_of_a_million_keys(cuda: Any, rng: np.random.Generator) -> None:
    context = context8(rng, 1_000_001, heads=10, kv_heads=2, chunk_len=253_952, page_size=256)
    assert cases.worst(decode(cuda, [context]), cases.reference(context.real, [0])) <= BOUND


@each_kind
@each_half
@pytest.mark.parametrize("head_dim, kv_heads, page_size", [(128, 8, 256), (128, 1, 64), (64, 5, 128)])
def test_pages_are_dequantised_in_the_order_asked_for(
    cuda: Any, rng: np.random.Generator, head_dim: int, kv_heads: int, page_size: int, dtype: torch.dtype, kind: str
) -> None:
    shape = {"heads": 2 * kv_heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    context = context8(rng, 1500, kind=kind, **shape)
    pages = context.real.table.flip(0).contiguous()
    keys, values = (poisoned(len(pages) + 1, page_size, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    cuda(
        "dequantize_pages",
        cache=context.cache,
        pages=pages,
        key=keys,
        value=values,
        dtype=str(dtype),
        count=len(pages),
    )
    torch.cuda.synchronize()
    assert keys[-1].isnan().all() and values[-1].isnan().all()
    for got, real in ((keys, context.real.keys), (values, context.real.values)):
        rows = got[:-1].flip(0).flatten(0, 1)[: len(real)].double()
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        assert ((rows - real).abs() <= rounding * real.abs() + 1e-4).all()


@each_kind
@each_half
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(40, 8, 128), (7, 1, 128), (10, 2, 64)])
def test_keys_and_values_are_rounded_to_the_nearest_step(
    cuda: Any, rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, kind: str
) -> None:
    """Of a scale each token and head; slots that no row has, and rows without a slot, leave all as it was."""
    tokens, page_size, pages = 300, 64, 8
    generator = torch.Generator("cuda").manual_seed(int(rng.integers(2**62)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    frame = random_frame(generator, kv_heads, head_dim)
    qkv, bias = normal(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype), normal((heads + 2 * kv_heads) * head_dim)
    bias, angles = bias.to(dtype), 3 * normal(1, tokens, head_dim // 2)
    table = torch.cat([angles.cos(), angles.sin()], -1)
    slots = torch.from_numpy(rng.permutation(pages * page_size)[:tokens]).cuda()
    slots[5] = -1
    numbers = torch.full((2, pages, page_size, kv_heads, head_dim), 99, dtype=STORED[kind], device="cuda")
    scales = torch.full((2, pages, page_size, kv_heads), 7.0, dtype=torch.float16, device="cuda")
    names = ("key_scale", "value_scale", "power", "centre")
    cuda(
        "rotate_and_cache",
        qkv=qkv,
        bias=bias,
        table=table,
        slots=slots,
        q=poisoned(1, tokens, heads, head_dim, dtype=dtype),
        cache={
            "key": numbers[0],
            "value": numbers[1],
            "dtype": kind,
            "page_size": page_size,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "frame": dict(zip(names, (*scales, *frame))),
        },
        activation=str(dtype),
        bias_dtype=str(dtype),
        variants=1,
        tokens=tokens,
        heads=heads,
    )
    torch.cuda.synchronize()
    biased = (qkv.double() + bias.double()).view(tokens, -1, head_dim)
    low, high = biased[:, heads : heads + kv_heads].chunk(2, -1)
    cosine, sine = table[0].double()[:, None].chunk(2, -1)
    keys = torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)
    power, centre = frame.double()
    written = slots >= 0
    at = slots[written]
    for side, exact in enumerate((keys / power - centre, biased[:, heads + kv_heads :])):
        got = meant(numbers[side].flatten(0, 1)[at]) * scales[side].flatten(0, 1)[at][..., None].double()
        steps = exact[written].abs().amax(-1, keepdim=True) / LARGEST[kind]
        if kind == "e4m3":  # of a number's own exponent, of which there are 15
            exponents = torch.floor(torch.log2(exact[written].abs() / steps)).clamp(min=-6)
            steps = steps * torch.exp2(exponents - 3)
        assert ((got - exact[written]).abs() <= 0.5 * steps * (1 + 2.0**-3)).all()
    others = torch.ones(pages * page_size, dtype=torch.bool, device="cuda")
    others[at] = False
    assert (numbers.flatten(1, 2)[:, others] == 99).all() and (scales.flatten(1, 2)[:, others] == 7).all()


def test_a_copied_page_takes_its_scales_along(cuda: Any, rng: np.random.Generator) -> None:
    context = context8(rng, 600, heads=4, kv_heads=2, page_size=64)
    numbers, scales = context.numbers.clone(), context.scales.clone()
    numbers[:, 5, :17], scales[:, 5, :17] = numbers[:, 2, :17], scales[:, 2, :17]
    cuda("copy_page", cache=context.cache, source=2, target=5, rows=17)
    torch.cuda.synchronize()
    assert torch.equal(context.numbers, numbers)
    assert torch.equal(context.scales.view(torch.int16), scales.view(torch.int16))
