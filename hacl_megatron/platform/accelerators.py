"""Which optional libraries are installed, and what the program will use for each job because of it.

Nothing here imports an accelerator that is not asked for: presence is looked up from package metadata.
"""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

_DISTRIBUTIONS = {
    "transformer_engine": ("transformer-engine", "transformer_engine"),
    "flash_attn": ("flash-attn",),
    "apex": ("apex",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
}


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _has_fused_optimizers() -> bool:
    """Whether the installed `apex` has `apex.optimizers`; looked up beside it, for finding a submodule imports apex."""
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / "optimizers").is_dir() for folder in folders or ())


@dataclass(frozen=True, kw_only=True)
class Accelerators:
    """Versions of the optional libraries, None where absent."""

    transformer_engine: str | None
    flash_attn: str | None
    apex: str | None
    dali: str | None
    torch_varlen: bool
    """torch brings its own varlen flash attention (`torch.nn.attention.varlen`, torch >= 2.10)."""


@cache  # every attention call of a GPU run asks, and a look-up takes half a millisecond
def find_accelerators() -> Accelerators:
    """Look the optional libraries up. The `apex` of the package index is another project and does not count."""
    apex = _version("apex")
    if apex is not None and not _has_fused_optimizers():
        apex = None
    found = {name: _version(*names) for name, names in _DISTRIBUTIONS.items() if name != "apex"}
    torch_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return Accelerators(**found, apex=apex, torch_varlen=torch_varlen)


def attention_kernel(device: torch.device, dtype: torch.dtype, found: Accelerators | None = None) -> str:
    """Kernel for packed attention: `flash_attn`, `torch_varlen` or `sdpa` (one call per segment).

    The two varlen kernels exist on CUDA alone and take half precision alone.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    found = found or find_accelerators()
    if found.flash_attn is not None:
        return "flash_attn"
    return "torch_varlen" if found.torch_varlen else "sdpa"


def layer_library(device: torch.device, found: Accelerators | None = None) -> str:
    """Library of the parallel linear layers and norms: `transformer_engine` on a GPU that has it, else `local`."""
    found = found or find_accelerators()
    return "transformer_engine" if device.type == "cuda" and found.transformer_engine else "local"


def adam_library(device: torch.device, found: Accelerators | None = None) -> str:
    """Where Adam's kernel comes from, in megatron-core's own order: transformer_engine, apex, else `torch`."""
    found = found or find_accelerators()
    if device.type == "cuda":
        if found.transformer_engine:
            return "transformer_engine"
        if found.apex:
            return "apex"
    return "torch"
