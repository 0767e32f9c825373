"""A safetensors file written tensor by tensor, so that no more than two of them are ever in memory.

The format (https://github.com/huggingface/safetensors#format): the header's length as a little-endian u64, the header
as JSON padded with spaces to 8 bytes, then all bytes end to end. Since the header stands first, shapes and dtypes are
given beforehand.
"""

import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from hacl_megatron.checkpoint.hf.file_blocks import BlockWriter, bytes_of

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class SafetensorsWriter:
    """Context manager over one file; on a clean exit every announced tensor has been written and reached the disk."""

    def __init__(self, path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]):
        """Args: tensors: name -> (dtype, shape), in the order of the file."""
        self._offsets: dict[str, int] = {}
        self._tensors = tensors
        self._path = path
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._offsets[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._prefix = len(text).to_bytes(8, "little") + text
        self._pending = set(tensors)
        self.num_bytes = len(self._prefix) + end

    def __enter__(self) -> "SafetensorsWriter":
        self._file = BlockWriter(self._path).__enter__()
        self._file.write(0, [self._prefix])
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[int] | None = None
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place; any order. It is written while the caller makes the next one."""
        dtype, shape = self._tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{name}: {tensor.dtype} {tuple(tensor.shape)}"
        self._pending.remove(name)
        content = bytes_of(tensor.detach().cpu().contiguous())
        self._wait()
        self._last = self._pool.submit(self._file.write, len(self._prefix) + self._offsets[name], [content])

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()
            self._last = None

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._wait()
                assert not self._pending, f"{self._path}: never written: {sorted(self._pending)[:5]}"
        except BaseException as failure:
            kind = type(failure)
            raise
        finally:
            self._pool.shutdown()
            self._file.__exit__(kind, error, traceback)
