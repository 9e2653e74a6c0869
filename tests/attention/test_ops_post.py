"""Posts and uploads on a CPU: what tensors held when the post was made, and what is written where."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from paddle_qwen1m import ops


def test_a_post_holds_what_tensors_held_when_it_was_made(rng: np.random.Generator) -> None:
    """Of any type and size, in their order; nothing that happens to the tensors or to other posts changes it."""
    values = [
        rng.integers(-(2**62), 2**62, 3),
        rng.standard_normal((5, 7)).astype(np.float32),
        rng.integers(0, 99, (1, 2, 3)).astype(np.int32),
        rng.integers(0, 256, 1).astype(np.uint8),
    ]
    tensors = [ops.tensor(one) for one in values]
    post = ops.Post(tensors)
    for tensor, one in zip(tensors, values):
        ops.upload(tensor, np.zeros_like(one))
    others = [ops.Post(tensors) for _ in range(3)]
    assert post.is_ready() and post.wait(0.0) and post.done
    for got, expected in zip(post.result(), values):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert not any(array.any() for other in others for array in other.result())


def test_results_outlive_their_post() -> None:
    tensor = ops.tensor(np.arange(1000))
    (kept,) = ops.Post([tensor]).result()
    for _ in range(10):
        ops.Post([ops.tensor(np.zeros(1000, np.int64))]).result()
    np.testing.assert_array_equal(kept, np.arange(1000))


def test_an_upload_fills_a_row_of_a_tensor() -> None:
    """A view of whole rows is a place in the tensor."""
    table = ops.tensor(np.zeros((4, 3), np.int32))
    ops.upload(table[2:3], np.array([[7, 8, 9]], np.int32))
    np.testing.assert_array_equal(table.numpy(), [[0, 0, 0], [0, 0, 0], [7, 8, 9], [0, 0, 0]])


def test_a_tensor_is_made_where_tensors_are_made() -> None:
    made = ops.tensor(np.array([[1.5, 2.5]], np.float32))
    assert made.place.is_cpu_place() and made.dtype == paddle.float32 and made.tolist() == [[1.5, 2.5]]


@pytest.mark.parametrize("offset", [-8, 8])
def test_a_copy_that_does_not_fit_is_refused(offset: int) -> None:
    parcel = ops.post.Parcel(64, gpu=False)
    with pytest.raises(ValueError, match=rf"post: 64 bytes at {offset} do not fit the parcel of 64"):
        ops.library.call("post", paddle.zeros([8], "int64"), parcel.address, offset)
