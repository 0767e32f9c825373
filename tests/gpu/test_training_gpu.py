"""The tiny model on one CUDA device, against transformers in fp32 on the CPU and against its own fp32 run."""

import itertools
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.model.parity_batches import make_batches
from tests.model.parity_cases import Layout, Variant, build, compare, load, run_schedule, wrap, write_reference
from tests.tiny import LLAMA3_ROPE_SCALING

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VARIANTS = {
    "plain": Variant(),
    "llama3 rope": Variant({"rope_scaling": LLAMA3_ROPE_SCALING}),
    "tied": Variant({"tie": True}),
    "last vision layer": Variant({"select_layer": -1}, trains_vision=True),
}
STEPS = 3


def start(requested: str) -> torch.device:
    """Leave the gloo group that `run_distributed` made for the one that a run on this device forms (NCCL on a GPU)."""
    from hacl_megatron.platform.processes import start_platform

    torch.distributed.destroy_process_group()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(sock.getsockname()[1])
    device = start_platform(requested)
    # TF32 keeps 10 bits: these comparisons are of fp32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def compare_in_fp32(folders: list[str], device: torch.device) -> list[dict[str, Any]]:
    return [compare(Path(folder), Layout(), device) for folder in folders]


def _plain(name: str) -> str:
    """A norm's name where it stands on its own: Transformer Engine, in bf16, has it in the layer behind it."""
    for fused, alone in (
        ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
        ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ):
        name = name.replace(fused, alone)
    return name


def run_both(folders: list[str], requested: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """In one process: what is imported for a GPU takes a good part of a minute."""
    device = start(requested)
    return compare_in_fp32(folders, device), run_in_bf16(folders[0], device)


def run_in_bf16(folder: str, device: torch.device) -> dict[str, Any]:
    """Outputs and gradients in bf16 and fp32, then a few optimiser steps in bf16 by this project's own Adam."""
    from hacl_megatron.platform.adam import GroupStepAdam

    weights = Path(folder) / "weights"
    seen: dict[str, Any] = {"device": device.type, "backend": torch.distributed.get_backend()}
    outputs, gradients = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        module, architecture, groups = build(weights, Layout(), device, dtype=dtype)
        load(module, weights, architecture, Layout(), groups)
        module.freeze(language_model=False, vision_tower=True)
        batches = [batch.to(device) for batch in make_batches()]
        model = wrap(module, groups)
        outputs[dtype] = run_schedule(model, batches)
        gradients[dtype] = {_plain(n): p.main_grad.clone() for n, p in module.named_parameters() if p.requires_grad}
    seen["devices"] = {p.device.type for p in module.parameters()}
    seen["outputs"] = {
        f"{key} {index}": float((half[key].float() - full[key]).norm() / full[key].norm())
        for index, (half, full) in enumerate(zip(outputs[torch.bfloat16], outputs[torch.float32], strict=True))
        for key in half
        if half[key].numel()
    }
    seen["gradients"] = {
        name: float(torch.cosine_similarity(half.flatten(), gradients[torch.float32][name].flatten(), dim=0))
        for name, half in gradients[torch.bfloat16].items()
    }
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    masters = [p.detach().float().clone() for _, p in trained]
    adam = GroupStepAdam([{"params": masters}], lr=1e-3)
    losses = []
    for _ in range(STEPS):
        model.zero_grad_buffer()
        collected = run_schedule(model, batches)
        losses.append(sum(_loss_without_weights(out) for out in collected))
        for master, (_, parameter) in zip(masters, trained, strict=True):
            master.grad = parameter.main_grad
        adam.step()
        with torch.no_grad():
            for master, (_, parameter) in zip(masters, trained, strict=True):
                parameter.copy_(master)
    seen["losses"] = losses
    return seen


def _loss_without_weights(output: dict[str, torch.Tensor]) -> float:
    """The test's loss once more, from the collected outputs."""
    from tests.model.parity_batches import VOCAB, loss_weights

    batches = make_batches()
    index = 0 if output["image"].numel() else 1
    weights = loss_weights(index, batches[index])
    values = {key: value.float().cpu() for key, value in output.items()}
    values["logits"] = values["logits"][:, :VOCAB]
    return float(sum((values[key] * weights[key]).sum() for key in values))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in VARIANTS}
    for name, folder in folders.items():
        write_reference(folder, VARIANTS[name])
    return folders


@pytest.fixture(scope="module")
def seen(folders) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return run_distributed(run_both, 1, [str(folder) for folder in folders.values()], "cuda")[0]


@pytest.fixture(scope="module")
def in_fp32(seen, folders) -> dict[str, dict[str, Any]]:
    return dict(zip(folders, seen[0], strict=True))


@pytest.fixture(scope="module")
def in_bf16(seen) -> dict[str, Any]:
    return seen[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_outputs_and_gradients_are_those_of_transformers_on_the_host(in_fp32, variant):
    outputs, gradients = in_fp32[variant]["outputs"], in_fp32[variant]["gradients"]
    assert set(outputs) == {"logits 0", "image 0", "caption 0", "hallucinated 0", "logits 1"}
    assert max(outputs.values()) <= 2e-4, outputs
    worst = max(gradients, key=gradients.get)
    assert gradients[worst] <= 1e-3, (worst, gradients[worst])  # sums in another order, atomics in index_add


def test_initial_values_are_those_of_a_cpu_run(in_fp32, folders):
    """Connector and heads are drawn on the host: a GPU run starts from the same numbers."""
    from hacl_megatron.checkpoint.hf.config_read import read_model_config
    from hacl_megatron.model.connector import Connector
    from hacl_megatron.model.init import cpu_generator

    architecture = read_model_config(folders["plain"] / "weights")
    connector = Connector(
        architecture.projector_type, architecture.vision.hidden_size, architecture.language.hidden_size,
        generator=cpu_generator(1), dtype=torch.float32,
    )  # fmt: skip
    for name, value in connector.named_parameters():
        assert in_fp32["plain"]["initial"][f"connector.{name}"] == value.detach().numpy().tobytes(), name


def test_the_model_runs_on_the_device_over_nccl(in_bf16):
    assert in_bf16["device"] == "cuda" and in_bf16["devices"] == {"cuda"} and in_bf16["backend"] == "nccl"


def test_bf16_outputs_and_gradients_point_where_fp32_points(in_bf16):
    """8 bits of mantissa through 4 layers forward and back."""
    assert max(in_bf16["outputs"].values()) < 0.05, in_bf16["outputs"]
    assert min(in_bf16["outputs"].values()) > 1e-4, "that was not bfloat16"
    gradients = in_bf16["gradients"]
    worst = min(gradients, key=gradients.get)
    assert gradients[worst] > 0.97, (worst, gradients[worst])


def test_steps_in_bf16_lower_the_loss(in_bf16):
    losses = in_bf16["losses"]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
