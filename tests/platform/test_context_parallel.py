"""Own queries over gathered keys and values, by the CPU's kernels; `tests/gpu` has the GPU's."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hacl_megatron.platform.attention import sdpa_per_segment
from hacl_megatron.platform.context_parallel.placed_rows import placed_rows
from tests.platform.context_cases import LENGTHS, first_ranks_attention
from tests.platform.segment_cases import causal_within_segments, dense_attention, draw


@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 8)], ids=["own kernel", "torch's"])
def test_a_ranks_attention_and_its_gradients_are_those_of_its_rows_among_all(heads: tuple[int, int, int]) -> None:
    """Nothing gathered is kept: it is gathered once more when the backward pass comes to it."""
    q, k, v = draw(sum(LENGTHS), *heads)
    mine, out, gradients, calls = first_ranks_attention(sdpa_per_segment, q, k, v)
    dense = dense_attention(q, k, v, causal_within_segments(LENGTHS))[mine]
    dense.square().sum().backward()
    torch.testing.assert_close(out, dense)
    for found, expected in zip(gradients, (q.grad[mine], k.grad, v.grad), strict=True):
        torch.testing.assert_close(found, expected)
    assert calls == ["gather", "forward is done", "gather", "scatter"]


def test_nothing_that_a_kernel_copies_is_kept_and_every_kernel_takes_the_same_collectives() -> None:
    """Catches a second gather that depends on what the own kernel has saved: with grouped queries some kernels save
    gathered keys and values and some save copies, and ranks on unlike ones would wait for each other for ever."""
    q, k, v = draw(sum(LENGTHS), 6, 2, 8)
    copies, alive = [], []

    def with_copies(q: Tensor, k: Tensor, v: Tensor, segments, scale) -> Tensor:
        keys, values = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
        copies.extend(StorageWeakRef(part.untyped_storage()) for part in (k, v, keys, values))
        out = sdpa_per_segment(q, keys, values, segments, scale)
        out.register_hook(lambda _: alive.append([not copy.expired() for copy in copies[:4]]))  # as backward begins
        return out

    mine, out, gradients, calls = first_ranks_attention(with_copies, q, k, v)
    dense = dense_attention(q, k, v, causal_within_segments(LENGTHS))[mine]
    dense.square().sum().backward()
    for found, expected in zip([out, *gradients], (dense, q.grad[mine], k.grad, v.grad), strict=True):
        torch.testing.assert_close(found, expected)
    assert calls == ["gather", "forward is done", "gather", "scatter"]
    assert alive == [[False] * 4]


def test_gradients_of_placed_rows_are_added_up_row_by_row() -> None:
    """Catches an all-reduce of a transposed gradient, which on a rank with another layout adds up other elements."""
    summed = []
    own = torch.ones(3, 2, requires_grad=True)
    with mock.patch.object(dist, "all_reduce", lambda tensor, group: summed.append(tensor.stride())):
        whole = placed_rows(own, torch.tensor([4, 0, 2]), 5, None)
        whole.backward(torch.arange(10.0).view(2, 5).T)
    assert summed == [(2, 1), (2, 1)]
    assert own.grad.tolist() == [[4, 9], [0, 5], [2, 7]]
