"""Which optional libraries work here, and what the program will use for each job because of it.

A library that is installed but does not import (one built for another torch, Transformer Engine without its torch
extension) counts as absent, and is told: see `broken_libraries`. Only an import can tell, and importing these takes
seconds, so that nothing here looks before a GPU run or the report of `python -m hacl_megatron.platform` asks.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from hacl_megatron.config.console import quiet_imports

NAMES = {
    "flash_attn": "flash-attn (varlen)",
    "torch_varlen": "torch's flash kernel (varlen)",
    "sdpa": "torch SDPA, one call per segment",
    "transformer_engine": "Transformer Engine",
    "apex": "Apex (fused)",
    "torch": "hacl_megatron (torch foreach)",
    "local": "megatron-core local layers",
}
"""What `attention_kernel`, `layer_library` and `adam_library` return, in words."""

LOCAL_IN_FP32 = "fp32: Transformer Engine's products are TF32"
"""Why a run in fp32 does without Transformer Engine's layers."""


@dataclass(frozen=True, kw_only=True)
class _Library:
    title: str
    modules: tuple[str, ...]
    """What has to import for the library to be of use; the first is its package."""
    distributions: tuple[str, ...]
    remedy: str


_LIBRARIES = {
    "megatron_core": _Library(
        title="megatron-core",
        modules=("megatron.core",),
        distributions=("megatron-core",),
        remedy="if a library below is broken, mend that one first, else pip install 'megatron-core>=0.16.1,<0.20'",
    ),
    "transformers": _Library(
        title="transformers",
        modules=("transformers",),
        distributions=("transformers",),
        remedy="pip install 'transformers>=4.57'",
    ),
    "flash_attn": _Library(
        title="flash-attn",
        modules=("flash_attn",),
        distributions=("flash-attn",),
        remedy="pip uninstall flash-attn, or build it for this torch: tools/install_gpu.sh",
    ),
    "transformer_engine": _Library(  # behind flash-attn, which it imports
        title="Transformer Engine",
        modules=("transformer_engine", "transformer_engine.pytorch"),
        distributions=("transformer-engine", "transformer-engine-torch"),
        remedy="pip uninstall transformer-engine transformer-engine-torch transformer-engine-cu12 "
        "transformer-engine-cu13, or install all its parts for this torch: tools/install_gpu.sh",
    ),
    "apex": _Library(
        title="Apex",
        modules=("apex", "apex.optimizers", "amp_C"),
        distributions=("apex",),
        remedy="pip uninstall apex, or build it from source with its CUDA extensions (NGC's PyTorch container has it)",
    ),
    "dali": _Library(
        title="DALI",
        modules=("nvidia.dali",),
        distributions=("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        remedy="pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 where the driver has CUDA 12)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What importing an optional library told."""

    title: str
    version: str | None = None
    """None where it is not installed; `unknown version` where nothing says it."""
    fault: str | None = None
    """Why it does not import, one line; None where it does or is not there."""
    remedy: str = ""

    @property
    def usable(self) -> str | None:
        """The version, if the library is there and works."""
        return None if self.fault else self.version

    def __str__(self) -> str:
        if self.fault is None:
            return self.version or "not found"
        return f"{self.version}, broken: {self.fault}; {self.remedy}"


@cache
def find_library(name: str) -> Finding:
    """Import the optional library `name`, a key of the table above."""
    library = _LIBRARIES[name]
    folders = _package_folders(library.modules[0])
    version = _version_by_metadata(library.distributions)
    # The `apex` of the package index is another project: a web library that has no optimisers.
    if name == "apex" and not any((Path(folder) / "optimizers").is_dir() for folder in folders or ()):
        return Finding(title=library.title)
    if folders is None and version is None:
        return Finding(title=library.title)
    fault = None
    with quiet_imports():
        for module in library.modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # ImportError, OSError, FileNotFoundError, AssertionError: all have been seen
                fault = _first_line(error)
                break
    # Unpacked beside the code rather than installed, a library has no metadata.
    version = version or getattr(sys.modules.get(library.modules[0]), "__version__", "unknown version")
    return Finding(title=library.title, version=version, fault=fault, remedy=library.remedy if fault else "")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200].rstrip('.')}"


def _package_folders(package: str) -> list[str] | None:
    """Folders of a package that is there, without importing it; None of one that is not."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # its parent package is not there, or does not import
        return None
    return None if spec is None else list(spec.submodule_search_locations or ())


def _version_by_metadata(distributions: Iterable[str]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def broken_libraries(*names: str) -> list[str]:
    """A line for each of these libraries that is installed but does not import."""
    found = [find_library(name) for name in names]
    return [f"{finding.title} {finding}" for finding in found if finding.fault]


def broken_import(error: BaseException) -> str | None:
    """One line for an exception that megatron-core's import died of because of a broken library, else None.

    megatron-core imports what it finds installed, and lives through the errors that its authors met.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not any(frame.name == "<module>" and "/megatron/core/" in frame.filename for frame in frames):
        return None
    broken = broken_libraries("flash_attn", "transformer_engine", "apex")
    return f"megatron-core cannot be imported ({_first_line(error)}): {'; '.join(broken)}" if broken else None


@dataclass(frozen=True, kw_only=True)
class Accelerators:
    """Versions of the optional libraries that work here, None for the others."""

    transformer_engine: str | None
    flash_attn: str | None
    apex: str | None
    torch_varlen: bool
    """torch brings its own varlen flash attention (`torch.nn.attention.varlen`, torch >= 2.10)."""


@cache  # every attention call of a GPU run asks
def find_accelerators() -> Accelerators:
    """Look by importing them, which takes seconds where they are."""
    usable = {name: find_library(name).usable for name in ("flash_attn", "transformer_engine", "apex")}
    return Accelerators(**usable, torch_varlen=has_torch_varlen())


def has_torch_varlen() -> bool:
    """Whether this torch has varlen attention of its own."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


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


def layer_library(device: torch.device, dtype: torch.dtype, found: Accelerators | None = None) -> str:
    """Library of the parallel linear layers and norms whose parameters are of `dtype`.

    `transformer_engine` in half precision on a GPU that has it, else `local`: Transformer Engine multiplies fp32 in
    TF32 whatever torch is told, which keeps 10 bits of the 23.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "local"
    return "transformer_engine" if (found or find_accelerators()).transformer_engine else "local"


def adam_library(device: torch.device, found: Accelerators | None = None) -> str:
    """Where Adam's kernel comes from, in megatron-core's own order: transformer_engine, apex, else `torch`.

    All three compute in fp32, whatever the layers are.
    """
    if device.type != "cuda":
        return "torch"
    found = found or find_accelerators()
    if found.transformer_engine:
        return "transformer_engine"
    return "apex" if found.apex else "torch"


def describe_choice(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Lines for the start of a run on a GPU: what it computes with, and what is installed but broken. None on a CPU."""
    if device.type != "cuda":
        return []
    layers = NAMES[layer_library(device, dtype)]
    if dtype == torch.float32 and find_accelerators().transformer_engine:
        layers += f" ({LOCAL_IN_FP32})"
    chosen = (
        f"layers: {layers}; attention: {NAMES[attention_kernel(device, dtype)]}; Adam: {NAMES[adam_library(device)]}"
    )
    broken = broken_libraries("flash_attn", "transformer_engine", "apex", "dali")
    return [f"{torch.cuda.get_device_name(device)}, {chosen}", *broken]
