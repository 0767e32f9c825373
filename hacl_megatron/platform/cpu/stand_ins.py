"""Lets megatron-core run on a CPU with gloo, by giving the CUDA names it uses their host meanings.

megatron-core names CUDA directly: `torch.cuda.current_device()`, `device="cuda"` in tensor factories, streams,
`Tensor.cuda()`, the string of `Tensor.type()`. `install` maps exactly those names to the CPU, once per process.
`torch.cuda.is_available()` is left alone, so nobody is told that there is a GPU. The wrappers cost a fraction
of a microsecond per tensor that is created and nothing per operation on it.
"""

import contextlib
import functools

import torch
import torch.utils._device

from hacl_megatron.platform.cpu.kernels import swiglu

_FACTORIES = (
    "empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "linspace", "eye",
    "rand", "randn", "randint", "randperm",
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_strided",
)  # fmt: skip

_installed = False


class _HostStream:
    """A stream on a device that executes in order: there is nothing to wait for."""

    def __init__(self, *args, **kwargs) -> None: ...
    def wait_stream(self, stream) -> None: ...
    def wait_event(self, event) -> None: ...
    def record_event(self, event=None) -> "_HostEvent":
        return event or _HostEvent()

    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def __enter__(self) -> "_HostStream":
        return self

    def __exit__(self, *exc_info) -> None: ...


class _HostEvent:
    def __init__(self, *args, **kwargs) -> None: ...
    def record(self, stream=None) -> None: ...
    def wait(self, stream=None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _on_host(factory):
    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None:
            kind = getattr(device, "type", device)  # a torch.device, or a string such as "cuda" or "cuda:0"
            if isinstance(kind, str) and kind.startswith("cuda"):
                kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapper


def _host_type(original):
    """`Tensor.type()` with the string that megatron-core's optimisers look for."""

    @functools.wraps(original)
    def type_(self, dtype=None, *args, **kwargs):
        if dtype is None and self.device.type == "cpu":
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))  # not torch.manual_seed, which calls back into torch.cuda


def install() -> None:
    """Put the host meanings in place. Idempotent; only for processes that compute on the CPU."""
    global _installed
    if _installed:
        return
    _installed = True
    cpu = torch.device("cpu")
    stream = _HostStream()
    cuda = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream, cuda.Event = _HostStream, _HostEvent
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = _manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # `with torch.device(...)` knows the factories by identity and looks them up once: let it see the real ones.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_host(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.Tensor.type = _host_type(torch.Tensor.type)
    _host_random_states()
    _host_activation()
    _host_optimizer_kernels()


def _host_activation() -> None:
    """megatron-core's fused SwiGLU is compiled by torch.compile, for minutes; the CPU has one of its own."""
    from megatron.core.transformer import mlp

    fused = mlp.bias_swiglu_impl

    def bias_swiglu(both, bias, fp8_input_store=False, cpu_offload_input=False):
        if bias is None and not fp8_input_store:
            return swiglu(both)
        return fused(both, bias, fp8_input_store, cpu_offload_input)

    mlp.bias_swiglu_impl = bias_swiglu


def _host_random_states() -> None:
    """megatron-core's random-state tracker reaches into CUDA's generators; here the CPU has the only one."""
    from megatron.core.tensor_parallel import random

    def get_state(device="cuda", clone: bool = False, graph_safe: bool = False):
        return torch.get_rng_state()

    def set_state(new_state, device=-1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


def _host_optimizer_kernels() -> None:
    """With Transformer Engine or Apex installed, megatron-core has their kernels for norms and copies of gradients."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None  # from 0.19 on
