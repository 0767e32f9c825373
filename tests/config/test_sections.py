"""`transformer:`, `ddp:` and `optimizer:` against the installed megatron-core."""

import dataclasses
from fnmatch import fnmatchcase

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from hacl_megatron.config.field_tables import REFUSED, TAKEN
from hacl_megatron.config.parser import HINTS
from hacl_megatron.config.run import from_yaml
from hacl_megatron.config.sections import (
    SECTIONS,
    check_section,
    field_hints,
    megatron_fields,
    reason_to_refuse,
    refusals_of,
)

RECORDS = {"transformer": TransformerConfig, "ddp": DistributedDataParallelConfig, "optimizer": OptimizerConfig}


def test_fields_are_those_of_megatron_core():
    assert set(RECORDS) == set(SECTIONS)
    for section, record in RECORDS.items():
        public = {field.name for field in dataclasses.fields(record) if not field.name.startswith("_")}
        assert set(field_hints(section)) == public


OF_ONE_VERSION = {
    # 0.16
    "async_tensor_model_parallel_allreduce", "preserve_fp32_weights",
    # 0.19
    "use_mup", "mup_*", "tensor_parallel_num_weight_shards", "gtp_weight_remat_size", "use_transformer_engine_op_fuser",
    "fused_residual_rmsnorm", "inference_cuda_graph_scope", "delay_offload_until_cuda_graph", "flash_attention_version",
    "delta_offload_bytes_across_pp_ranks", "activation_offload_fraction", "fp8_output_proj", "moe_grad_scale_func",
    "mtp_grad_scale_func", "experimental_attention_variant_loss_scale_func", "use_grouped_gemm_*",
    "overlap_dispatch_backward_with_experts_wgrad", "high_priority_a2a_comm_stream", "nccl_all_reduce_for_prefill",
    "mlp_chunks_for_training", "param_name_patterns_for_fp32_local_accumulation", "megatron_fsdp_*", "fp4_param_gather",
    "num_buckets", "lion_*", "soap_*", "adaptive_muon_*", "use_layer_wise_distributed_optimizer",
    "grad_norm_skip_threshold", "optimizer_cuda_graph",
}  # fmt: skip
"""Names in the tables that one of the two supported lines lacks."""


def test_every_field_of_this_megatron_core_is_decided_upon():
    """Taken or refused, and once: a field that nobody looked at would crash, or do nothing and not say so."""
    for section, hints in ((section, field_hints(section)) for section in SECTIONS):
        taken = [name for names in TAKEN[section].values() for name in names]
        refused = [name for names in REFUSED[section].values() for name in names]
        assert len(taken) == len(set(taken)) and len(refused) == len(set(refused))
        assert not {name for name in taken for pattern in refused if fnmatchcase(name, pattern)}
        patterns = [*taken, *refused]
        undecided = [name for name in hints if not any(fnmatchcase(name, pattern) for pattern in patterns)]
        assert undecided == [], section
        for name in hints:
            assert (reason_to_refuse(section, name) is None) == (name in taken)


def test_names_in_the_tables_exist_and_their_flags_too():
    """A name that no supported megatron-core has, or a flag that this program does not have, is a typo."""
    for section, reasons in REFUSED.items():
        for reason, names in reasons.items():
            found = [any(fnmatchcase(field, name) for field in field_hints(section)) for name in names]
            absent = {name for name, is_there in zip(names, found, strict=True) if not is_there}
            assert absent <= OF_ONE_VERSION, (section, absent)
            flags = [word.strip(",:;") for word in reason.split() if word.startswith("--")]
            assert flags or not reason.startswith("use")
            for flag in flags:
                assert flag[2:].replace("-", "_") in HINTS
        absent = {name for names in TAKEN[section].values() for name in names} - set(field_hints(section))
        assert absent <= OF_ONE_VERSION, (section, absent)


def test_a_field_of_a_newer_megatron_core_is_refused(monkeypatch):
    monkeypatch.setitem(TAKEN, "ddp", {})
    with pytest.raises(ValueError, match=r"ddp.bucket_size cannot be set here; this megatron-core is newer"):
        check_section("ddp", {"bucket_size": 1}, "run.yaml")


def test_every_megatron_field_that_is_a_flag_is_refused():
    """Else a run could say two things about one setting."""
    for section in SECTIONS:
        assert all(reason_to_refuse(section, name) for name in set(field_hints(section)) & set(HINTS))


def test_what_megatron_core_has_against_a_configuration_is_one_line():
    fields = dict(num_layers=2, hidden_size=8, num_attention_heads=2, recompute_granularity="full")
    with pytest.raises(ValueError) as error, refusals_of("transformer"):
        TransformerConfig(**fields)
    assert str(error.value).startswith("transformer: megatron-core refuses the configuration (")
    assert "recompute_method" in str(error.value) and "\n" not in str(error.value)


def test_valid_sections_build_megatron_configurations():
    config = from_yaml(
        "transformer: {recompute-granularity: full, recompute_method: uniform, recompute_num_layers: 1,\n"
        "              init_method_std: 1e-3, fp8_recipe: tensorwise, batch_p2p_comm: false}\n"
        "ddp: {bucket_size: 4e7, grad_reduce_in_fp32: true}\n".replace("4e7", "40000000")
        + "optimizer: {use_precision_aware_optimizer: false, exp_avg_dtype: fp32}\n"
    )
    transformer = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, **megatron_fields("transformer", config.transformer)
    )
    assert transformer.recompute_granularity == "full" and transformer.recompute_num_layers == 1
    assert transformer.init_method_std == 1e-3 and transformer.batch_p2p_comm is False
    assert transformer.fp8_recipe == "tensorwise"
    assert DistributedDataParallelConfig(**megatron_fields("ddp", config.ddp)).bucket_size == 40_000_000
    optimizer = OptimizerConfig(lr=1e-3, **megatron_fields("optimizer", config.optimizer_overrides))
    assert optimizer.exp_avg_dtype is torch.float32
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
        ("transformer: {context_parallel_size: 2}", ["use --context-parallel-size"]),
        ("transformer: {hybrid_context_parallel: true}", ["not supported for now"]),
        ("transformer: {virtual_pipeline_model_parallel_size: 2}", ["virtual pipeline stages", "not supported"]),
        ("ddp: {overlap_grad_reduce: true}", ["use --overlap-grad-reduce"]),
        ("ddp: {average_in_collective: true}", ["the trainer sets it"]),
        ("optimizer: {lr: 1e-3}", ["optimizer.lr", "use --lr"]),
        ("optimizer: {adam_beta1: 0.9}", ["use --adam-beta1"]),
        ("optimizer: adam", ["'adam'", "expected a mapping"]),
        ("transformer: {recompute_granularity: half}", ["'half'", "full, selective", "null"]),
        ("transformer: {recompute_num_layers: 1.5}", ["recompute_num_layers", "1.5", "a whole number"]),
        ("transformer: {batch_p2p_comm: 1}", ["found 1", "true or false"]),
        ("transformer: {init_method: normal}", ["init_method", "YAML cannot express"]),
        ("transformer: {attention_backend: flash}", ["attention_backend", "this program's own"]),
        ("transformer: {fp32_residual_connection: true}", ["leave --bf16 out for fp32"]),
        ("transformer: {tp_comm_overlap: true}", ["tp_comm_overlap", "packs differ", "--sequence-parallel"]),
        ("transformer: {enable_cuda_graph: true}", ["packs differ in length", "leave it out"]),
        ("transformer: {external_cuda_graph: true}", ["packs differ in length"]),
        ("transformer: {cuda_graph_impl: local}", ["packs differ in length"]),
        ("transformer: {cuda_graph_scope: attn}", ["packs differ in length"]),
        ("transformer: {use_te_rng_tracker: true}", ["CUDA graphs"]),
        ("transformer: {inference_rng_tracker: true}", ["inference"]),
        ("transformer: {cpu_offloading: true}", ["recompute_granularity"]),
        ("transformer: {fp4: e2m1}", ["FP4", "transformer.fp8"]),
        ("transformer: {fp8_param: true}", ["parameters stay in bf16"]),
        ("transformer: {moe_router_topk: 1}", ["dense"]),
        ("transformer: {deterministic_mode: true}", ["nothing here would read it"]),
        ("transformer: {attention_dropout: 0.1}", ["has no dropout", "hidden_dropout"]),
        ("ddp: {fp8_param_gather: true}", ["parameters stay in bf16"]),
        ("ddp: {nccl_ub: true}", ["not supported for now"]),
        ("optimizer: {loss_scale: 128}", ["fp16"]),
        ("optimizer: {muon_momentum: 0.9}", ["Adam"]),
        ("optimizer: {optimizer_cpu_offload: true}", ["--use-distributed-optimizer"]),
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
