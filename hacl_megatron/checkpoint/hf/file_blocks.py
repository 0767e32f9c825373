"""Large blocks between tensors and files, without a copy in between and without the GIL: preadv and pwritev.

Reading through a memory map instead faults page by page, which costs a cold file half of the disk's speed.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

MAX_BUFFERS = 1024
"""IOV_MAX of Linux: buffers of one call."""
WRITEBACK_BYTES = 32 << 20


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor of any dtype, not copied."""
    assert tensor.is_contiguous(), f"strides {tensor.stride()} of {tuple(tensor.shape)}"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_block(file: int, offset: int, buffer: memoryview | bytearray) -> None:
    """Fill `buffer` from an open file; EOFError when the file ends before."""
    view, done = memoryview(buffer), 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise EOFError(f"the file ends at byte {offset + done}, {len(view) - done} bytes before the tensor does")
        done += count


class BlockWriter:
    """Context manager over a new file that is written at any offsets; on a clean exit all of it has reached the disk.

    Threads may share it.
    """

    def __init__(self, path: Path):
        self._path = path
        self._unsent = 0

    def __enter__(self) -> "BlockWriter":
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        return self

    def write(self, offset: int, buffers: Iterable[memoryview | bytes]) -> int:
        """Write buffers end to end from `offset` on; returns the offset behind them."""
        left = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while left:
            count = os.pwritev(self._file, left[:MAX_BUFFERS], offset)
            offset += count
            self._unsent += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
        if self._unsent >= WRITEBACK_BYTES:
            self._unsent = 0
            self._send()
        return offset

    def _send(self) -> None:
        """Let the disk begin: left alone, Linux waits until a tenth of memory is dirty, and fsync for all of it."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                os.fsync(self._file)
        finally:
            os.close(self._file)
