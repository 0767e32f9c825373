"""Starts one process of a run: picks the device, joins the process group, prepares megatron-core for that device."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from hacl_megatron.platform import adam
from hacl_megatron.platform.accelerators import adam_library
from hacl_megatron.platform.cpu import stand_ins

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = (10, 0)


def select_device(requested: str = "auto", tensor_parallel: int = 1) -> torch.device:
    """The device this process computes on: `auto` takes CUDA if there is one.

    With tensor parallelism CUDA is told to start kernels in the order of their launches, unless the environment has
    told it something already, see `check_launch_order`. CUDA reads that when it is initialised: select first.

    Raises:
        ValueError: `cuda` was asked for and there is none.
    """
    if tensor_parallel > 1:
        os.environ.setdefault(_CONNECTIONS, "1")
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device was found; use --device cpu, or check the driver (nvidia-smi)")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def prepare_device(device: torch.device) -> None:
    """Make `device` the one that megatron-core uses in this process. Idempotent."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # fp32 means fp32 (the contrastive similarities above all); whoever wants speed trains in bf16.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    else:
        stand_ins.install()
    if adam_library(device) == "torch":
        adam.use_group_step_adam()


def check_launch_order(tensor_parallel: int, capability: tuple[int, int]) -> None:
    """Refuse an environment in which tensor parallelism does not overlap, as Megatron-LM does.

    megatron-core launches a communication, then the product that is to hide it; over several connections the product
    may get the GPU first.

    Args:
        capability: the GPU's compute capability. From Blackwell on the order is kept over any number of connections.

    Raises:
        ValueError: the environment variable has another value than 1.
    """
    found = os.environ.get(_CONNECTIONS)
    if tensor_parallel > 1 and capability < _BLACKWELL and found != "1":
        raise ValueError(
            f"{_CONNECTIONS} is {found} in the environment, but --tensor-model-parallel-size {tensor_parallel} on a "
            f"GPU of compute capability {capability[0]}.{capability[1]} needs 1; unset it: the trainer sets it"
        )


def start_platform(requested: str = "auto", timeout_minutes: int = 30, tensor_parallel: int = 1) -> torch.device:
    """Select and prepare the device, and join torchrun's process group (or form one alone without torchrun)."""
    device = select_device(requested, tensor_parallel)
    prepare_device(device)
    if device.type == "cuda":
        check_launch_order(tensor_parallel, torch.cuda.get_device_capability(device))
    if not dist.is_initialized():
        if "RANK" not in os.environ:  # plain `python -m`: a group of one
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                port = sock.getsockname()[1]
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        backend = "nccl" if device.type == "cuda" else "gloo"
        options = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **options)
    return device
