"""`python -m hacl_megatron.platform`: what this machine has, and what a run on it will use."""

import platform

import torch

import hacl_megatron
from hacl_megatron.platform.accelerators import (
    LOCAL_IN_FP32,
    NAMES,
    adam_library,
    attention_kernel,
    find_accelerators,
    find_library,
    layer_library,
)
from hacl_megatron.platform.processes import select_device


def table() -> list[tuple[str, str]]:
    """Rows (subject, finding) of the report."""
    found, device = find_accelerators(), select_device()
    rows = [("Python", platform.python_version()), ("torch", torch.__version__)]
    rows += [(finding.title, str(finding)) for finding in map(find_library, ("megatron_core", "transformers"))]
    rows.append(("hacl_megatron", hacl_megatron.__version__))
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        rows.append(("GPU", f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"))
    else:
        rows.append(("GPU", "none: CPU and gloo"))
    optional = {name: find_library(name) for name in ("transformer_engine", "flash_attn", "apex", "dali")}
    rows += [(finding.title, str(finding)) for finding in optional.values()]
    decode = "Pillow"
    if optional["dali"].usable:
        decode = "DALI, mixed (nvJPEG)" if device.type == "cuda" else "DALI, CPU"
    rows.append(("will use: backend", "nccl" if device.type == "cuda" else "gloo"))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        library = layer_library(device, dtype, found)
        norms = "TENorm" if library == "transformer_engine" else "hacl_megatron RMSNorm, LayerNorm (torch)"
        exact = device.type == "cuda" and found.transformer_engine and library == "local"
        rows += [
            (f"will use: layers ({name})", NAMES[library] + (f" ({LOCAL_IN_FP32})" if exact else "")),
            (f"will use: norms ({name})", norms),
            (f"will use: attention ({name})", NAMES[attention_kernel(device, dtype, found)]),
        ]
    rows += [("will use: image decode", decode), ("will use: Adam", NAMES[adam_library(device, found)])]
    return rows


def main() -> None:
    rows = table()
    width = max(len(label) for label, _ in rows)
    for label, finding in rows:
        print(f"{label:<{width}}  {finding}")


if __name__ == "__main__":
    main()
