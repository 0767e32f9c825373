"""Where copies of a save's tensors lie in host memory."""

from itertools import pairwise

import pytest
import torch

from hacl_megatron.checkpoint.run.host_copies import empty_copies, side_by_side, slabs_for

HIDDEN, FFN, VOCAB, LAYERS = 4096, 11008, 32000, 32
LAYER = [HIDDEN * 3 * HIDDEN, HIDDEN * HIDDEN, FFN * HIDDEN, FFN * HIDDEN, HIDDEN * FFN, HIDDEN, HIDDEN]
LLAMA_7B = [2 * VOCAB * HIDDEN] + [2 * values for values in LAYER * LAYERS] + [2 * HIDDEN, 2 * VOCAB * HIDDEN]
"""Bytes of its tensors in bf16."""


def test_a_7bs_copies_take_little_more_than_their_bytes() -> None:
    one_by_one = sum(1 << (size - 1).bit_length() for size in LLAMA_7B)
    slabs, _ = slabs_for(LLAMA_7B)
    assert one_by_one / sum(LLAMA_7B) > 1.39
    assert sum(slabs) / sum(LLAMA_7B) < 1.08


def test_slabs_are_as_large_as_what_is_left_fills() -> None:
    """Catches slabs of twice the bytes that go into them, and more of them than it takes."""
    assert slabs_for([512] * 9) == ([4096, 512], [(0, 512 * piece) for piece in range(8)] + [(1, 0)])
    assert slabs_for([512] * 9, largest=2048)[0] == [2048, 2048, 512]
    assert slabs_for([1536, 1])[0] == [2048]
    assert slabs_for([2**12])[0] == [2**12]
    assert slabs_for([512, 4096, 512]) == ([4096, 1024], [(1, 0), (0, 0), (1, 512)]), "the largest first"


@pytest.mark.parametrize(
    "sizes",
    [
        [], [0], [1], [3, 0, 5], [512] * 9, [700, 511, 513, 4096, 1], [2**20 + 1], [2**21, 2**20, 1, 2**20 - 5],
        list(range(0, 60000, 997)), [size // 10000 for size in LLAMA_7B],
    ],
)  # fmt: skip
def test_pieces_lie_side_by_side_in_powers_of_two(sizes: list[int]) -> None:
    slabs, places = slabs_for(sizes, largest=2**20)
    assert all(slab & (slab - 1) == 0 for slab in slabs)
    assert all(slab <= 2**20 or slab < 2 * max(sizes) for slab in slabs)
    taken: dict[int, list[tuple[int, int]]] = {}
    for (slab, start), size in zip(places, sizes, strict=True):
        assert start % 512 == 0 and start + size <= slabs[slab]
        taken.setdefault(slab, []).append((start, start + size))
    for pieces in taken.values():
        pieces.sort()
        assert all(stop <= start for (_, stop), (start, _) in pairwise(pieces))


def test_what_is_written_to_one_copy_is_in_no_other() -> None:
    """By views of slabs of ordinary memory, as page-locked memory needs a GPU."""
    tensors = [torch.full((n, 3), float(n), dtype=dtype) for n in range(6) for dtype in (torch.bfloat16, torch.float64)]
    memory = side_by_side([tensor.nbytes for tensor in tensors], pinned=False)
    copies = [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(memory, tensors, strict=True)]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))


def test_copies_of_host_tensors_are_like_them() -> None:
    tensors = [torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(()), torch.zeros(0, 7)]
    copies = empty_copies(tensors)
    assert [(c.shape, c.dtype) for c in copies] == [(t.shape, t.dtype) for t in tensors]
