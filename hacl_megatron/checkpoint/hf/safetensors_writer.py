"""A safetensors file written tensor by tensor, so that no more than one of them is in memory.

The format (https://github.com/huggingface/safetensors#format): the header's length as a little-endian u64, the header
as JSON padded with spaces to 8 bytes, then all bytes end to end. Since the header stands first, shapes and dtypes are
given beforehand.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from hacl_megatron.checkpoint.hf.synced_file import SyncedFile

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class SafetensorsWriter:
    """Context manager over one file; on a clean exit every announced tensor has been written and reached the disk."""

    def __init__(self, path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]):
        """Args: tensors: name -> (dtype, shape), in the order of the file."""
        self._tensors = tensors
        self._path = path
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._prefix = len(text).to_bytes(8, "little") + text
        self._order = iter(tensors)
        self.num_bytes = len(self._prefix) + end

    def __enter__(self) -> "SafetensorsWriter":
        self._file = SyncedFile(self._path)
        self._file.write(self._prefix)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, in the order of the file."""
        dtype, shape = self._tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{name}: {tensor.dtype} {tuple(tensor.shape)}"
        due = next(self._order, None)
        assert name == due, f"{self._path}: {name} came where {due} was due"
        values = tensor.detach().cpu().contiguous()
        self._file.write(bytes_of(values))

    def __exit__(self, kind, error, traceback) -> None:
        self._file.__exit__(kind, error, traceback)
        due = next(self._order, None) if kind is None else None
        assert due is None, f"{self._path}: {due} was never written"


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor of any dtype, not copied."""
    assert tensor.is_contiguous(), f"strides {tensor.stride()} of {tuple(tensor.shape)}"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
