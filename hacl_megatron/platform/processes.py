"""Starts one process of a run: picks the device, joins the process group, prepares megatron-core for that device."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from hacl_megatron.platform import adam, host
from hacl_megatron.platform.accelerators import adam_library


def select_device(requested: str = "auto") -> torch.device:
    """The device this process computes on: `auto` takes CUDA if there is one.

    Raises:
        ValueError: `cuda` was asked for and there is none.
    """
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
        host.install()
    if adam_library(device) == "torch":
        adam.use_group_step_adam()


def start_platform(requested: str = "auto", timeout_minutes: int = 30) -> torch.device:
    """Select and prepare the device, and join torchrun's process group (or form one alone without torchrun)."""
    device = select_device(requested)
    prepare_device(device)
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
