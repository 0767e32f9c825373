"""Copies from the host to the device that nobody waits for."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of the host on `device`; on a GPU from pinned memory, in the order of the current stream.

    A copy from ordinary memory would first wait for all that the stream still has to do, `non_blocking` or not.
    torch keeps pinned memory from being used anew before its copies are done.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
