"""What a run's `transformer:` and `optimizer:` fields ask of this machine."""

import importlib.util

import torch

from hacl_megatron.config.checks.require import require as _require
from hacl_megatron.config.run import RunConfig
from hacl_megatron.platform.accelerators import adam_library, find_library, layer_library


def check_machine(config: RunConfig, device: torch.device) -> None:
    """Check that this machine has what the fields need.

    Raises:
        ValueError: one line for the first field that would crash here, or do nothing.
    """
    fields = config.transformer
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    engine = find_library("transformer_engine") if device.type == "cuda" else None
    has_engine = layer_library(device, dtype) == "transformer_engine"
    missing = "there is no CUDA device" if engine is None else f"Transformer Engine is {engine}"
    if fields.get("fp8"):
        _require(
            has_engine,
            f"transformer.fp8 needs Transformer Engine on a GPU, but {missing}",
            "install it (tools/install_gpu.sh), or leave fp8 out",
        )
        recipe = fields.get("fp8_recipe", "delayed")
        works, reason = fp8_support(recipe)
        _require(
            works,
            f"transformer.fp8 with fp8_recipe {recipe} does not work on {torch.cuda.get_device_name(device)}: {reason}",
            "leave fp8 out" if recipe == "delayed" else "use fp8_recipe: delayed, or leave fp8 out",
        )
    _require(
        has_engine or not fields.get("apply_rope_fusion"),
        "transformer.apply_rope_fusion needs Transformer Engine and --bf16 on a GPU, but "
        + ("--bf16 is not given" if engine is not None and engine.usable else missing),
        "leave it out: it is on where it helps",
    )
    _require(
        not fields.get("gradient_accumulation_fusion") or has_engine or has_fused_gradients(),
        "transformer.gradient_accumulation_fusion needs Transformer Engine's layers (with --bf16) or Apex's extension "
        "fused_weight_gradient_mlp_cuda, on a GPU",
        "leave it out",
    )
    _require(
        "layernorm" not in fields.get("recompute_modules", ()) or bool(engine and engine.usable),
        "transformer.recompute_modules names layernorm, which megatron-core can only recompute beside Transformer "
        f"Engine on a GPU, but {missing}",
        "leave layernorm out, or use recompute_granularity: full",
    )
    _require(
        not config.optimizer_overrides.get("use_precision_aware_optimizer")
        or adam_library(device) == "transformer_engine",
        f"optimizer.use_precision_aware_optimizer needs Transformer Engine's Adam on a GPU, but {missing}",
        "leave it out",
    )


def has_fused_gradients() -> bool:
    """Whether Apex's kernel that adds a weight's gradient to the buffer is here, which local layers need for it."""
    return torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def fp8_support(recipe: str) -> tuple[bool, str]:
    """Whether the current GPU has the recipe's products, by Transformer Engine's own word, and why not."""
    from transformer_engine.pytorch import fp8

    check = {"blockwise": "check_fp8_block_scaling_support", "mxfp8": "check_mxfp8_support"}.get(recipe)
    check = check or "check_fp8_support"
    if not hasattr(fp8, check):
        return False, f"this Transformer Engine has no {check}"
    return getattr(fp8, check)()
