"""`python -m hacl_megatron.platform`: what this machine has, and what a run on it will use."""

import importlib.metadata
import platform

import torch

import hacl_megatron
from hacl_megatron.platform.accelerators import adam_library, attention_kernel, find_accelerators, layer_library
from hacl_megatron.platform.processes import select_device

_NAMES = {
    "flash_attn": "flash-attn (varlen)",
    "torch_varlen": "torch's flash kernel (varlen)",
    "sdpa": "torch SDPA, one call per segment",
    "transformer_engine": "Transformer Engine",
    "apex": "Apex (fused)",
    "torch": "hacl_megatron (torch foreach)",
    "local": "megatron-core local layers",
}


def table() -> list[tuple[str, str]]:
    """Rows (subject, finding) of the report."""
    found, device = find_accelerators(), select_device()
    rows = [("Python", platform.python_version())]
    for package in ("torch", "megatron-core", "transformers"):
        rows.append((package, importlib.metadata.version(package)))
    rows.append(("hacl_megatron", hacl_megatron.__version__))
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        rows.append(("GPU", f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"))
    else:
        rows.append(("GPU", "none: CPU and gloo"))
    for label, version in (
        ("Transformer Engine", found.transformer_engine),
        ("flash-attn", found.flash_attn),
        ("Apex", found.apex),
        ("DALI", found.dali),
    ):
        rows.append((label, version or "not found"))
    norms = "TENorm" if layer_library(device) == "transformer_engine" else "hacl_megatron RMSNorm, LayerNorm (torch)"
    decode = "Pillow"
    if found.dali:
        decode = "DALI, mixed (nvJPEG)" if device.type == "cuda" else "DALI, CPU"
    rows += [
        ("will use: backend", "nccl" if device.type == "cuda" else "gloo"),
        ("will use: layers", _NAMES[layer_library(device)]),
        ("will use: attention (bf16)", _NAMES[attention_kernel(device, torch.bfloat16, found)]),
        ("will use: attention (fp32)", _NAMES[attention_kernel(device, torch.float32, found)]),
        ("will use: norms", norms),
        ("will use: image decode", decode),
        ("will use: Adam", _NAMES[adam_library(device, found)]),
    ]
    return rows


def main() -> None:
    rows = table()
    width = max(len(label) for label, _ in rows)
    for label, finding in rows:
        print(f"{label:<{width}}  {finding}")


if __name__ == "__main__":
    main()
