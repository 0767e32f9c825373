"""Gradients of a tower and a connector that saw a part of the images on each tensor-parallel rank: their sum.

Once a step, when data-parallel ranks have reduced theirs, in DDP's own buffer, which holds most of such parameters one
behind the other. With the distributed optimiser only this rank's slice of the buffer is of use; so is the sum.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor, nn


def finalize_shared_image_grads(model: list[DistributedDataParallel], *arguments: Any, **options: Any) -> None:
    """megatron-core's `finalize_model_grads`, and the sums over tensor-parallel ranks; every one of them calls it."""
    finalize_model_grads(model, *arguments, **options)
    for chunk in model:
        stage = chunk.module
        for span in _spans(stage.parameters(), {*stage.parameters_of_own_images()}):
            dist.all_reduce(span, group=stage.groups.tp)


def _spans(parameters: Iterable[nn.Parameter], wanted: set[nn.Parameter]) -> Iterator[Tensor]:
    """The gradients of `wanted`, those that are neighbours in a buffer (but for its padding) as one tensor."""
    trained = [(parameter, parameter.main_grad) for parameter in parameters if parameter.requires_grad]
    buffers: dict[int, int] = {}  # numbered as they are met, since addresses differ from rank to rank
    for _, gradient in trained:
        buffers.setdefault(gradient.untyped_storage().data_ptr(), len(buffers))
    trained.sort(key=lambda both: (buffers[both[1].untyped_storage().data_ptr()], both[1].storage_offset()))
    first = last = None
    for parameter, gradient in trained:
        assert gradient.is_contiguous()
        is_wanted = parameter in wanted
        if first is not None and not (is_wanted and _share_storage(first, gradient)):
            yield _from_to(first, last)
            first = None
        if is_wanted:
            first, last = (gradient if first is None else first), gradient
    if first is not None:
        yield _from_to(first, last)


def _share_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.dtype == other.dtype


def _from_to(first: Tensor, last: Tensor) -> Tensor:
    start, stop = first.storage_offset(), last.storage_offset() + last.numel()
    return first.as_strided((stop - start,), (1,), start)
