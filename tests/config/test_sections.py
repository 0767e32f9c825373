"""`transformer:`, `ddp:` and `optimizer:` against the installed megatron-core."""

import dataclasses

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from hacl_megatron.config.parser import HINTS
from hacl_megatron.config.run import from_yaml
from hacl_megatron.config.sections import OWNED, SECTIONS, check_section, field_hints, megatron_fields

RECORDS = {"transformer": TransformerConfig, "ddp": DistributedDataParallelConfig, "optimizer": OptimizerConfig}


def test_fields_are_those_of_megatron_core():
    assert set(RECORDS) == set(SECTIONS)
    for section, record in RECORDS.items():
        public = {field.name for field in dataclasses.fields(record) if not field.name.startswith("_")}
        assert set(field_hints(section)) == public


def test_owned_fields_exist_and_their_flags_too():
    """A name that megatron-core does not know, or a flag that this program does not have, is a typo in the table.

    A few fields came or went between the supported versions.
    """
    not_in_every_version = {"use_custom_fsdp", "gradient_reduce_div_fusion"}
    for section, owners in OWNED.items():
        names = [name for fields in owners.values() for name in fields]
        assert len(names) == len(set(names))
        assert set(names) - set(field_hints(section)) <= not_in_every_version
        for advice in owners:
            flags = [word.strip(",") for word in advice.split() if word.startswith("--")]
            assert flags or not advice.startswith("use")
            for flag in flags:
                assert flag[2:].replace("-", "_") in HINTS


def test_every_megatron_field_that_is_a_flag_is_owned():
    """Else a run could say two things about one setting."""
    for section in SECTIONS:
        owned = {name for fields in OWNED[section].values() for name in fields}
        assert set(field_hints(section)) & set(HINTS) <= owned


def test_valid_sections_build_megatron_configurations():
    config = from_yaml(
        "transformer: {recompute-granularity: full, recompute_method: uniform, recompute_num_layers: 1,\n"
        "              init_method_std: 1e-3, attention_backend: flash, fp32_residual_connection: true}\n"
        "ddp: {bucket_size: 4e7, grad_reduce_in_fp32: true}\n".replace("4e7", "40000000")
        + "optimizer: {use_precision_aware_optimizer: false, exp_avg_dtype: fp32, loss_scale: 128}\n"
    )
    transformer = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, **megatron_fields("transformer", config.transformer)
    )
    assert transformer.recompute_granularity == "full" and transformer.recompute_num_layers == 1
    assert transformer.init_method_std == 1e-3 and transformer.attention_backend is AttnBackend.flash
    assert DistributedDataParallelConfig(**megatron_fields("ddp", config.ddp)).bucket_size == 40_000_000
    optimizer = OptimizerConfig(lr=1e-3, **megatron_fields("optimizer", config.optimizer_overrides))
    assert optimizer.exp_avg_dtype is torch.float32 and optimizer.loss_scale == 128.0
    assert megatron_fields("optimizer", {"exp_avg_dtype": "bf16"}) == {"exp_avg_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("transformer: {recompute_granularty: full}", ["no field 'recompute_granularty'", "recompute_granularity"]),
        ("ddp: {bucket_sise: 1}", ["DistributedDataParallelConfig has no field", "did you mean bucket_size"]),
        ("optimizer: {exp_avg_dtyp: bf16}", ["OptimizerConfig has no field", "exp_avg_dtype"]),
        ("transformer: {_cpu_offloading_context: 1}", ["no field '_cpu_offloading_context'"]),
        ("transformer: {zzz: 1}", ["no field 'zzz'", "see megatron-core's TransformerConfig"]),
        ("transformer: {tensor_model_parallel_size: 2}", ["cannot be set here", "use --tensor-model-parallel-size"]),
        ("transformer: {tensor-model-parallel-size: 2}", ["cannot be set here", "use --tensor-model-parallel-size"]),
        ("transformer: {hidden_size: 8}", ["transformer.hidden_size", "the checkpoint"]),
        ("transformer: {bf16: true}", ["use --bf16"]),
        ("transformer: {params_dtype: bf16}", ["use --bf16"]),
        ("transformer: {variable_seq_lengths: false}", ["the trainer sets it"]),
        ("transformer: {calculate_per_token_loss: true}", ["the trainer sets it"]),
        ("transformer: {context_parallel_size: 2}", ["not supported for now"]),
        ("transformer: {virtual_pipeline_model_parallel_size: 2}", ["not supported for now"]),
        ("ddp: {overlap_grad_reduce: true}", ["use --overlap-grad-reduce"]),
        ("ddp: {average_in_collective: true}", ["the trainer sets it"]),
        ("optimizer: {lr: 1e-3}", ["optimizer.lr", "use --lr"]),
        ("optimizer: {adam_beta1: 0.9}", ["use --adam-beta1"]),
        ("optimizer: adam", ["'adam'", "expected a mapping"]),
        ("transformer: {recompute_granularity: half}", ["'half'", "full, selective", "null"]),
        ("transformer: {recompute_num_layers: 1.5}", ["recompute_num_layers", "1.5", "a whole number"]),
        ("transformer: {attention_backend: fast}", ["'fast'", "flash"]),
        ("transformer: {fp32_residual_connection: 1}", ["found 1", "true or false"]),
        ("transformer: {init_method: normal}", ["'normal'", "YAML cannot express"]),
        ("optimizer: {exp_avg_dtype: bf17}", ["'bf17'", "bf16"]),
        ("transformer: {a-b: 1, a_b: 2}", ["given twice"]),
        ("transformer: {3: 1}", ["found the key 3"]),
    ],
)
def test_wrong_sections(text, expected):
    with pytest.raises(ValueError) as error:
        from_yaml("seed: 1\n" + text, "run.yaml")
    for part in ["run.yaml, line 2", *expected]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_empty_sections_are_none():
    config = from_yaml("transformer:\nddp: {}\n")
    assert config.transformer == config.ddp == config.optimizer_overrides == {}
    assert check_section("ddp", None, "here") == {}
