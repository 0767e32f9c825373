"""What fields of `transformer:` and the run's flags ask of each other; of the machine: `platform.requirements`."""

from hacl_megatron.config.checks.require import require as _require
from hacl_megatron.config.run import RunConfig

RECOMPUTED = ("core_attn", "mlp", "layernorm")
"""Parts of a dense layer that `transformer.recompute_modules` may name."""

_OF_FP8 = (
    "fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad", "tp_only_amax_red",
    "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
    "disable_parameter_transpose_cache",
)  # fmt: skip
_OF_DELAYED_SCALING = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad")


def check_sections(config: RunConfig) -> None:
    """ValueError of one line for fields that would do nothing, or that megatron-core finds wrong only as it runs."""
    _check_fp8(config)
    _check_recompute(config)


def _check_fp8(config: RunConfig) -> None:
    fields = config.transformer
    if not fields.get("fp8"):
        idle = next((name for name in _OF_FP8 if name in fields), None)
        _require(
            idle is None, f"transformer.{idle} is given without transformer.fp8", "add fp8: hybrid, or leave it out"
        )
        return
    _require(
        config.model.bf16,
        "transformer.fp8 is given without --bf16",
        "add --bf16: fp32 runs take layers that multiply in fp32",
    )
    recipe = fields.get("fp8_recipe", "delayed")
    _require(
        recipe != "custom",
        "transformer.fp8_recipe is custom, which needs a Python function",
        "expected delayed, tensorwise, blockwise or mxfp8",
    )
    idle = next((name for name in _OF_DELAYED_SCALING if name in fields and recipe != "delayed"), None)
    _require(
        idle is None,
        f"transformer.{idle} is given with fp8_recipe {recipe}",
        "it is of the recipe delayed alone: leave it out",
    )
    in_bf16 = fields.get("first_last_layers_bf16", False)
    _require(
        not (in_bf16 and recipe == "delayed"),
        "transformer.first_last_layers_bf16 is given with fp8_recipe delayed, which scales all layers at once",
        "add fp8_recipe: tensorwise (or blockwise, mxfp8)",
    )
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        _require(
            in_bf16 or name not in fields,
            f"transformer.{name} is given without first_last_layers_bf16",
            "add first_last_layers_bf16: true",
        )
    _require(
        fields.get("mlp_chunks_for_training", 1) == 1,
        "transformer.mlp_chunks_for_training is given with fp8, whose products take rows by the 8",
        "leave one of them out",
    )


def _check_recompute(config: RunConfig) -> None:
    fields = config.transformer
    granularity = fields.get("recompute_granularity")
    for name in ("recompute_method", "recompute_num_layers", "distribute_saved_activations"):
        _require(
            granularity == "full" or not fields.get(name),
            f"transformer.{name} is given with recompute_granularity {granularity or 'none'}",
            "it is of the granularity full alone: set that, or leave it out",
        )
    modules = fields.get("recompute_modules")
    _require(
        modules is None or granularity == "selective",
        f"transformer.recompute_modules is given with recompute_granularity {granularity or 'none'}",
        "it is of the granularity selective alone: set that, or leave it out",
    )
    unknown = next((name for name in modules or () if name not in RECOMPUTED), None)
    _require(
        unknown is None,
        f"transformer.recompute_modules names {unknown!r}, which a dense layer does not have",
        f"expected some of {', '.join(RECOMPUTED)}",
    )
    _require(
        not (fields.get("distribute_saved_activations") and config.parallel.sequence_parallel),
        "transformer.distribute_saved_activations is given with --sequence-parallel, which splits them already",
        "leave it out",
    )
