"""Fields of `transformer:` that do not go together, or not with the flags."""

import pytest

from hacl_megatron.config.checks.sections import check_sections
from hacl_megatron.config.run import from_yaml

FULL = "recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("fp8_recipe: tensorwise", ["fp8_recipe is given without transformer.fp8", "add fp8: hybrid"]),
        ("fp8_margin: 1", ["fp8_margin is given without transformer.fp8"]),
        ("fp8: null, tp_only_amax_red: true", ["tp_only_amax_red is given without transformer.fp8"]),
        ("fp8: hybrid, fp8_recipe: custom", ["Python function", "delayed, tensorwise"]),
        ("fp8: hybrid, fp8_recipe: tensorwise, fp8_amax_history_len: 16", ["fp8_amax_history_len", "delayed alone"]),
        ("fp8: hybrid, first_last_layers_bf16: true", ["delayed", "fp8_recipe: tensorwise"]),
        ("fp8: hybrid, fp8_recipe: mxfp8, num_layers_at_start_in_bf16: 1", ["add first_last_layers_bf16: true"]),
        ("recompute_num_layers: 1", ["recompute_granularity none", "full"]),
        ("recompute_granularity: selective, recompute_method: uniform", ["recompute_granularity selective", "full"]),
        ("recompute_modules: [mlp]", ["recompute_granularity none", "selective"]),
        (f"{FULL}, recompute_modules: [mlp]", ["recompute_granularity full", "selective"]),
        ("recompute_granularity: selective, recompute_modules: [moe_act]", ["'moe_act'", "core_attn, mlp, layernorm"]),
        (f"{FULL}, distribute_saved_activations: true", ["--sequence-parallel", "leave it out"]),
    ],
)
def test_fields_that_do_not_go_together(fields, expected):
    config = from_yaml(f"bf16: true\nsequence-parallel: true\ntransformer: {{{fields}}}\n")
    with pytest.raises(ValueError) as error:
        check_sections(config)
    for part in ["transformer.", *expected]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_fp8_needs_bf16():
    with pytest.raises(ValueError, match=r"transformer.fp8 is given without --bf16; add --bf16"):
        check_sections(from_yaml("transformer: {fp8: hybrid}\n"))


@pytest.mark.parametrize(
    "fields",
    [
        "fp8: hybrid",
        "fp8: e4m3, fp8_margin: 1, fp8_amax_history_len: 16, fp8_amax_compute_algo: max, tp_only_amax_red: true",
        "fp8: hybrid, fp8_recipe: blockwise, first_last_layers_bf16: true, num_layers_at_end_in_bf16: 2",
        FULL,
        "recompute_granularity: selective",
        "recompute_granularity: selective, recompute_modules: [core_attn, mlp, layernorm]",
    ],
)
def test_fields_that_go_together(fields):
    check_sections(from_yaml(f"bf16: true\ntransformer: {{{fields}}}\n"))
