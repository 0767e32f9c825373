"""What a host asks of its device, whatever that is: to take a copy; how long work took, how much memory, its name."""

import time

import psutil
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of the host on `device`; on a GPU from pinned memory, behind what the current stream has to do.

    A copy from ordinary memory would first wait for all that the stream still has to do, `non_blocking` or not.
    torch keeps pinned memory from being used anew before its copies are done.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Stopwatch:
    """Adds up the time between `start` and `stop`; on a GPU between events of the current stream, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._started: float | torch.cuda.Event | None = None

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        assert self._started is not None, "not started"
        self._laps.append((self._started, self._now()))
        self._started = None

    def take(self) -> float:
        """Seconds since the last `take`; waits for the GPU to reach the last `stop`."""
        laps, self._laps = self._laps, []
        if not self._on_gpu:
            return sum(end - begin for begin, end in laps)
        if laps:
            laps[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in laps) / 1000


def memory_in_use(device: torch.device) -> tuple[str, int]:
    """What is measured, and its bytes: the most that tensors ever took on the GPU, or this process's resident set."""
    if device.type == "cuda":
        return "mem-max-allocated-bytes", torch.cuda.max_memory_allocated(device)
    return "mem-resident-bytes", psutil.Process().memory_info().rss


def device_name(device: torch.device) -> str | None:
    """The GPU's name as the driver has it; None on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
