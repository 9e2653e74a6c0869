"""What fits: arithmetic over weights, pages, workspace and what is available, and what is said where it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from paddle_qwen1m.engine import NotEnoughMemory, Request, SamplingParams
from paddle_qwen1m.engine.admission import Allowance, Budget, Capacity, Limits, Need, cache_pages, choose_capacity
from paddle_qwen1m.options import AUTO

PAGE = 1000


@pytest.mark.parametrize(
    "needed, spare, available, expected",
    [
        ([4], 2, 10_000, 6),  # everything fits
        ([4, 3], 2, 100_000, 11),  # more for each of two
        ([4, 3], 2, 9_999, 9),  # as far as memory allows
        ([4, 3], 2, 6_000, 6),  # too little for both at once: they take turns
        ([4, 3], 2, 4_000, 4),
        ([4, 3], 2, None, 11),  # nobody knows: nothing is refused
    ],
)
def test_pages_of_a_cache(needed: list[int], spare: int, available: int | None, expected: int) -> None:
    assert cache_pages(needed, spare, Budget(PAGE, 0, available), page_size=256) == expected


def test_activations_come_first() -> None:
    assert cache_pages([4], 100, Budget(PAGE, 3_500, 10_000), page_size=256) == 6


def test_what_cannot_fit_is_refused_with_every_number() -> None:
    with pytest.raises(NotEnoughMemory) as error:
        cache_pages([2, 4], 1, Budget(int(2e9), int(1e9), int(8.9e9)), page_size=256)
    for part in (
        "1,024 tokens",
        "9.0 GB",
        "8.0 GB of keys and values",
        "1.0 GB of activations",
        "8.9 GB are available",
    ):
        assert part in str(error.value)


GB = 10**9


def need(**changes: Any) -> Need:
    """A model of 10 GB, 1 MB a page of 100 tokens, and 1 GB of workspace and as much again at 100,000 tokens."""
    values = {
        "weights": 10 * GB,
        "page_bytes": 10**6,
        "page_size": 100,
        "workspace": lambda length: GB + length * 10_000,
        "longest": 1_000_000,
        "chunk": 4096,
    }
    return Need(**{**values, **changes})


def test_a_gpu_gets_what_is_free_less_what_the_driver_needs() -> None:
    allowance = Allowance.of_gpu(80 * GB, 85 * GB, None, None)
    assert allowance.total == 78_500_000_000
    capacity = choose_capacity(need(), allowance, 1_000_000)
    assert capacity == Capacity(1_000_000, (78_500 - 10_000 - 11_000) * 100)


def test_a_share_is_of_all_that_the_driver_reports() -> None:
    assert Allowance.of_gpu(80 * GB, 85 * GB, 0.5, None) == Allowance(42_500_000_000)
    with pytest.raises(
        ValueError, match=r"gpu_memory_utilization=0.9 of a GPU's 85.0 GB is 76.5 GB, but only 60.0 GB "
    ):
        Allowance.of_gpu(60 * GB, 85 * GB, 0.9, None)


def test_a_cpu_gives_a_quarter_to_keys_and_values() -> None:
    allowance = Allowance.of_host(60 * GB, None)
    assert choose_capacity(need(), allowance, 100_000) == Capacity(100_000, 15_000 * 100)
    scarce = Allowance.of_host(14 * GB, None)  # 2 GB are left beside weights and workspace
    assert choose_capacity(need(), scarce, 100_000) == Capacity(100_000, 2_000 * 100)


@pytest.mark.parametrize(
    "allowance",
    [
        Allowance.of_gpu(80 * GB, 85 * GB, 0.01, 5 * GB),
        Allowance.of_host(80 * GB, 5 * GB),
        Allowance.of_host(None, 5 * GB),
    ],
)
def test_kv_cache_memory_bytes_is_exact_and_wins(allowance: Allowance) -> None:
    assert choose_capacity(need(), allowance, 100_000) == Capacity(100_000, 5_000 * 100)


def test_without_knowing_the_memory_one_context_fits() -> None:
    assert choose_capacity(need(), Allowance.of_host(None, None), 100_001) == Capacity(100_001, 100_100)


@pytest.mark.parametrize(
    "allowance",
    [Allowance(20 * GB), Allowance(60 * GB, 3 * GB), Allowance(60 * GB, 3 * GB, exact=True), Allowance(12 * GB)],
)
def test_auto_is_the_longest_that_fits(allowance: Allowance) -> None:
    length = choose_capacity(need(), allowance, AUTO).max_model_len
    assert choose_capacity(need(), allowance, length).cache_tokens >= length
    with pytest.raises((ValueError, NotEnoughMemory)):
        choose_capacity(need(), allowance, length + 1)


def test_auto_is_all_that_the_model_has_where_it_fits() -> None:
    assert choose_capacity(need(longest=50_000), Allowance(20 * GB), AUTO).max_model_len == 50_000


def test_the_first_text_of_the_card() -> None:
    with pytest.raises(ValueError) as error:
        choose_capacity(need(), Allowance(20 * GB), 600_000)  # 10 + 7 GB, so 3 GB of 6 are there
    text = str(error.value)
    assert text.startswith(
        "The model's max sequence length (600000) is larger than the maximum number of tokens that can be stored in "
        "the KV cache (300000). "
    )
    for part in (
        "To serve at least one request with the model's max seq len (600000), 5.59 GiB KV cache is needed, which is "
        "larger than the available KV cache memory (2.79 GiB).",
        "the estimated maximum model length is 450000.",
        "Reduce max_model_len",
        "increase tensor_parallel_size, raise gpu_memory_utilization or give "
        "kv_cache_memory_bytes=6000000000, or reduce "
        "max_num_batched_tokens (4096)",
    ):
        assert part in text
    assert choose_capacity(need(), Allowance(20 * GB), 450_000).cache_tokens == 450_000


def test_in_place_of_the_second_text_every_number_before_loading() -> None:
    with pytest.raises(NotEnoughMemory) as error:
        choose_capacity(need(), Allowance(12 * GB), 400_000)
    assert str(error.value) == (
        "out of memory, found before anything was loaded: the weights (10.0 GB) and the workspace of a chunk of 4,096 "
        "tokens (5.00 GB) need 15.0 GB, and 12.0 GB may be used: reduce max_model_len (400000) to at most 50000, or "
        "reduce max_num_batched_tokens or max_num_seqs, or increase tensor_parallel_size, or on a GPU raise "
        "gpu_memory_utilization, on a CPU give dtype='bfloat16', or give quantization='fp8' or 'int8'"
    )
    for length in (AUTO, None, 1):
        with pytest.raises(NotEnoughMemory, match="out of memory"):
            choose_capacity(need(), Allowance(11 * GB), length)


def test_an_exact_cache_beside_which_weights_do_not_fit_is_refused() -> None:
    with pytest.raises(
        NotEnoughMemory, match=r"kv_cache_memory_bytes \(9.00 GB\) need 21.0 GB, .* reduce kv_cache_memory"
    ):
        choose_capacity(need(), Allowance(20 * GB, 9 * GB, exact=True), 100_000)


LIMITS = Limits(max_model_len=1000, max_position_embeddings=5000, vocab_size=50)


def test_the_third_text_of_the_card() -> None:
    with pytest.raises(ValueError) as error:
        LIMITS.check_length(1200)
    assert str(error.value) == (
        "Input prompt (1200 tokens) + lookahead slots (0) is too long and exceeds the capacity of max_model_len (1000 "
        "tokens): shorten the prompt by 200 tokens, or increase max_model_len (--max-model-len) to at most 5000, all "
        "that the model has"
    )


def request(tokens: list[int], max_tokens: int = 1) -> Request:
    return Request("one", np.array(tokens, np.int64), SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize(
    ("limits", "asked", "message"),
    [
        (
            LIMITS,
            request([1] * 999, 2),
            r"with max_new_tokens \(2\) beside it: ask for at most 1 new tokens, or shorten",
        ),
        (replace(LIMITS, cache_tokens=500), request([1] * 501), r"the KV cache \(500 tokens\).* more memory"),
        (LIMITS, request([1, 50]), "token ids must be 0 to 49, got 1 to 50"),
    ],
)
def test_requests_that_can_never_run_are_refused(limits: Limits, asked: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        limits.check(asked)


def test_a_request_that_fits_is_none_of_them() -> None:
    replace(LIMITS, cache_tokens=1000).check(request([49] * 999))
