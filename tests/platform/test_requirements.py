"""What fields need that this machine may not have."""

import os
from dataclasses import replace

import pytest
import torch

from hacl_megatron.config.run import from_yaml
from hacl_megatron.platform import requirements
from hacl_megatron.platform.accelerators import Finding
from hacl_megatron.platform.processes import check_launch_order, select_device
from hacl_megatron.platform.requirements import check_machine

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ENGINE = Finding(title="Transformer Engine", version="2.20.2")


def refusal(text: str, device: torch.device) -> str:
    with pytest.raises(ValueError) as error:
        check_machine(from_yaml(f"bf16: true\n{text}\n"), device)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("transformer: {fp8: hybrid}", ["transformer.fp8", "there is no CUDA device", "leave fp8 out"]),
        ("transformer: {apply_rope_fusion: true}", ["apply_rope_fusion", "there is no CUDA device", "leave it out"]),
        ("transformer: {gradient_accumulation_fusion: true}", ["gradient_accumulation_fusion", "leave it out"]),
        ("optimizer: {use_precision_aware_optimizer: true}", ["use_precision_aware_optimizer", "leave it out"]),
    ],
)
def test_a_cpu_has_none_of_it(text, expected):
    message = refusal(text, CPU)
    assert all(part in message for part in expected), message
    check_machine(from_yaml("bf16: true\n" + text.replace("true", "false").replace("hybrid", "null")), CPU)


@pytest.fixture
def engine_is_broken(monkeypatch):
    """A GPU machine whose Transformer Engine does not import: there is neither here."""
    broken = replace(ENGINE, fault="ImportError: undefined symbol", remedy="mend it")
    monkeypatch.setattr(requirements, "find_library", lambda name: broken)
    monkeypatch.setattr(requirements, "layer_library", lambda device, dtype: "local")
    monkeypatch.setattr(requirements, "adam_library", lambda device: "torch")


def test_a_gpu_without_a_working_transformer_engine_says_what_is_wrong_with_it(engine_is_broken):
    for text in (
        "transformer: {fp8: hybrid}",
        "transformer: {apply_rope_fusion: true}",
        "transformer: {recompute_granularity: selective, recompute_modules: [layernorm]}",
        "optimizer: {use_precision_aware_optimizer: true}",
    ):
        assert "2.20.2, broken: ImportError: undefined symbol; mend it" in refusal(text, CUDA)


def test_recomputed_norms_need_transformer_engine():
    """megatron-core dies of a NameError in the backward pass otherwise, and on a CPU inside Transformer Engine."""
    text = "transformer: {recompute_granularity: selective, recompute_modules: [core_attn, layernorm]}"
    assert "recompute_modules names layernorm" in refusal(text, CPU)
    check_machine(from_yaml(text.replace(", layernorm", "")), CPU)


def test_a_gpu_without_fp8_is_told_apart_by_transformer_engine_itself(monkeypatch):
    monkeypatch.setattr(requirements, "find_library", lambda name: ENGINE)
    monkeypatch.setattr(requirements, "layer_library", lambda device, dtype: "transformer_engine")
    monkeypatch.setattr(requirements, "fp8_support", lambda recipe: (recipe != "mxfp8", "capability 10.0 required"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    message = refusal("transformer: {fp8: hybrid, fp8_recipe: mxfp8}", CUDA)
    assert "does not work on NVIDIA H100: capability 10.0 required; use fp8_recipe: delayed" in message
    check_machine(from_yaml("bf16: true\ntransformer: {fp8: hybrid}\n"), CUDA)


def test_tensor_and_context_parallelism_order_launches_unless_the_user_says_otherwise(monkeypatch):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    hopper, blackwell = (9, 0), (10, 0)
    monkeypatch.delenv(name, raising=False)
    select_device("cpu")
    assert name not in os.environ
    select_device("cpu", tensor_parallel=2)
    assert os.environ[name] == "1"
    check_launch_order(2, 1, hopper)
    monkeypatch.delenv(name)
    select_device("cpu", context_parallel=2)
    assert os.environ[name] == "1"

    monkeypatch.setenv(name, "8")
    select_device("cpu", tensor_parallel=2)
    assert os.environ[name] == "8"
    check_launch_order(2, 2, blackwell)
    check_launch_order(1, 1, hopper)
    with pytest.raises(ValueError, match=rf"{name} is 8 in the environment, but --tensor-model-parallel-size 2 .* 9.0"):
        check_launch_order(2, 1, hopper)
    with pytest.raises(ValueError, match=rf"{name} is 8 in the environment, but --context-parallel-size 4 .* 9.0"):
        check_launch_order(1, 4, hopper)
