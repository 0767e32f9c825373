"""Starts one process of a run: picks the device, joins the process group, prepares megatron-core for that device."""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from hacl_megatron.config.console import LaunchError
from hacl_megatron.config.layout import launched_as
from hacl_megatron.platform import adam
from hacl_megatron.platform.accelerators import adam_library
from hacl_megatron.platform.agreement import agree, default_store
from hacl_megatron.platform.cpu import stand_ins

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = (10, 0)
_SET_LATER = {
    # by megatron-core when it makes a language model, which refuses other values
    "NVTE_FLASH_ATTN": "1",
    "NVTE_FUSED_ATTN": "1",
    "NVTE_UNFUSED_ATTN": "1",
    "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "0",  # by extra_states.py when it resumes; 0 says what its absence does
}
"""Environment variables that are set while a run's threads read pictures, and what they may hold from the start.

To take in a new name glibc (before 2.41) moves the environment: whoever looks something up at that moment, as libjpeg
does for every picture, reads freed memory, and the process dies. A name that is there is given another value in place.
"""


def select_device(requested: str = "auto", tensor_parallel: int = 1, context_parallel: int = 1) -> torch.device:
    """The device this process computes on: `auto` takes CUDA if there is one.

    With tensor or context parallelism CUDA is told to start kernels in the order of their launches, unless the
    environment has told it something already, see `check_launch_order`. CUDA reads that when it is initialised: select
    first.

    Raises:
        ValueError: `cuda` was asked for and there is none.
    """
    if tensor_parallel > 1 or context_parallel > 1:
        os.environ.setdefault(_CONNECTIONS, "1")
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device was found; use --device cpu, or check the driver (nvidia-smi)")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise LaunchError(f"LOCAL_RANK is {local}, but this node shows {count} GPUs: start one process a GPU")
    return torch.device("cuda", local)


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


def check_launch_order(tensor_parallel: int, context_parallel: int, capability: tuple[int, int]) -> None:
    """Refuse an environment in which tensor or context parallelism does not overlap, as Megatron-LM does.

    megatron-core launches a communication, then the product that is to hide it; over several connections the product
    may get the GPU first.

    Args:
        capability: the GPU's compute capability. From Blackwell on the order is kept over any number of connections.

    Raises:
        ValueError: the environment variable has another value than 1.
    """
    found = os.environ.get(_CONNECTIONS)
    if max(tensor_parallel, context_parallel) > 1 and capability < _BLACKWELL and found != "1":
        flag = (
            f"--tensor-model-parallel-size {tensor_parallel}"
            if tensor_parallel > 1
            else f"--context-parallel-size {context_parallel}"
        )
        raise ValueError(
            f"{_CONNECTIONS} is {found} in the environment, but {flag} on a "
            f"GPU of compute capability {capability[0]}.{capability[1]} needs 1; unset it: the trainer sets it"
        )


def start_platform(
    requested: str = "auto",
    timeout_minutes: int = 30,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    facts: Mapping[str, str] | None = None,
) -> torch.device:
    """Select and prepare the device, and join torchrun's process group (or form one alone without torchrun).

    Args:
        facts: what has to be the same on all ranks (`agreement.agree`); compared before anything can hang on it.

    Raises:
        ValueError: the device is not there, the launcher's address is of no use, or ranks differ.
    """
    device = select_device(requested, tensor_parallel, context_parallel)
    prepare_device(device)
    if device.type == "cuda":
        check_launch_order(tensor_parallel, context_parallel, torch.cuda.get_device_capability(device))
    facts = None if facts is None else {**facts, "device": device.type}
    if dist.is_initialized():
        if facts is not None:
            agree(default_store(), dist.get_rank(), dist.get_world_size(), "configuration", facts)
        _name_variables()
        return device
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = _meet(timeout)
    if facts is not None:
        agree(store, rank, world_size, "configuration", facts)
    _name_variables()
    backend = "nccl" if device.type == "cuda" else "gloo"
    options = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **options)
    return device


def _name_variables() -> None:
    """Before there are threads that read pictures; after ranks compared the variables that they were started with."""
    for name, value in _SET_LATER.items():
        os.environ.setdefault(name, value)


def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store of all ranks, this process's rank, and their number, as the launcher's environment says.

    A process alone needs no port, which another might take.
    """
    place = launched_as()
    if place is None:
        return dist.HashStore(), 0, 1
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise LaunchError(
                f"{where}: the port is in use by another process on this host; choose a free MASTER_PORT"
            ) from None
        raise LaunchError(
            f"{where}: no rank 0 answers there ({str(error).splitlines()[0][:200]}); see that it runs, and that both "
            "are the same on all ranks"
        ) from None
    store.set_timeout(timeout)
    return dist.PrefixStore("default_pg", store), rank, world_size
