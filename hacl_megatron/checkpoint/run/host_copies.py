"""Host memory that copies of a rank's tensors go to, and that every save reuses.

Copies from a GPU want page-locked memory, and torch rounds each allocation of it up to a power of two: a LLaMA-7B's
parts, one by one, would take 1.39 times their bytes. So they lie side by side in few slabs whose sizes are powers of
two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_SLAB = 2**30
_ALIGNMENT = 512
"""Of each tensor in its slab, in bytes: what copies by GPUs and reads by disks like."""


def empty_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised host tensors of the same shapes and dtypes; page-locked for those on a GPU."""
    copies = [torch.empty(0 if tensor.is_cuda else tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    on_gpu = [index for index, tensor in enumerate(tensors) if tensor.is_cuda]
    for index, memory in zip(on_gpu, side_by_side([tensors[index].nbytes for index in on_gpu]), strict=True):
        copies[index] = memory.view(tensors[index].dtype).view(tensors[index].shape)
    return copies


def side_by_side(sizes: Sequence[int], *, pinned: bool = True) -> list[Tensor]:
    """uint8 [size] for each of `sizes`, in as few slabs."""
    slabs, places = slabs_for(sizes)
    memory = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in slabs]
    return [memory[slab][start : start + size] for (slab, start), size in zip(places, sizes, strict=True)]


def slabs_for(sizes: Sequence[int], largest: int = LARGEST_SLAB) -> tuple[list[int], list[tuple[int, int]]]:
    """Bytes of each slab, all powers of two, and each piece's (slab, first byte).

    The largest pieces first, each into the first slab that has room. A slab is as large as the bytes that are left, the
    largest piece among them, and `largest` demand.
    """
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    left = sorted(range(len(sizes)), key=lambda index: -padded[index])
    slabs: list[int] = []
    places = [(0, 0)] * len(sizes)
    while left:
        total = max(sum(padded[index] for index in left), _ALIGNMENT)
        needed = max(padded[left[0]], _ALIGNMENT)
        slab = max(min(1 << (total.bit_length() - 1), largest), 1 << (needed - 1).bit_length())
        start, too_many = 0, []
        for index in left:
            if start + padded[index] > slab:
                too_many.append(index)
                continue
            places[index] = (len(slabs), start)
            start += padded[index]
        slabs.append(slab)
        left = too_many
    return slabs, places
