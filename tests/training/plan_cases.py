"""Measures on real gloo ranks what `training.plan` predicts: parameters, bytes of state, bytes that autograd keeps."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from hacl_megatron.batch import PackedBatch
from hacl_megatron.config.checks import check_architecture, check_flags
from hacl_megatron.config.run import parse_run_config, with_architecture
from hacl_megatron.objective.generation import generation_loss_sum
from hacl_megatron.platform.processes import start_platform, world_size_from_environment
from hacl_megatron.train import resolve_architecture
from hacl_megatron.training import setup
from hacl_megatron.training.plan.activations import CPU, stage_activations
from hacl_megatron.training.plan.parameters import stage_parameters
from hacl_megatron.training.plan.state import StateBytes, state_bytes
from hacl_megatron.training.plan.workload import PackShape, Segments
from tests.model.parity_cases import VISUAL, _pack

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": FULL,
    "full by 2": {**FULL, "recompute_num_layers": 2},
    "block": {**FULL, "recompute_method": "block"},
    "attention": {"recompute_granularity": "selective"},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors` (on the meta device too, where there are no addresses)."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def state_of(trainee: setup.Trainee) -> StateBytes:
    """Bytes that a rank really holds: storages of parameters, gradient buffers, and the optimiser's own tensors."""
    parameters = list(trainee.module.parameters())
    weights = {p.untyped_storage()._cdata for p in parameters}
    parts = getattr(trainee.optimizer, "chained_optimizers", [trainee.optimizer])
    own = []
    for part in parts:
        inner = part.optimizer
        if inner is None:  # nothing trains on this rank
            continue
        masters = [p for group in inner.param_groups for p in group["params"]]
        states = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
        own += [t for t in (*masters, *states) if t.numel() and t.untyped_storage()._cdata not in weights]
    return StateBytes(
        weights=storage_bytes(parameters),
        gradients=storage_bytes(buffer.grad_data for buffer in trainee.model.buffers),
        optimizer=storage_bytes(own),
    )


def described(module: torch.nn.Module) -> list[tuple[str, tuple[int, ...], bool, int]]:
    return [(name, tuple(p.shape), p.requires_grad, p.element_size()) for name, p in module.named_parameters()]


def state_on_this_rank(commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """For each run: parameters and bytes of state as planned and as they are."""
    found = []
    for arguments in commands:
        config, layout, device, groups = _prepare(arguments)
        module = setup.build_module(config, config.architecture, layout, groups, device)
        trainee = setup.build_trainee(module, config, groups, device, 1)
        stage, dp_rank = groups.pp.rank(), groups.dp.rank()
        planned = stage_parameters(config, config.architecture, stage)
        found.append(
            {
                "planned parameters": [(p.name, p.shape, p.trained, p.bytes_each) for p in planned],
                "parameters": described(module),
                "planned": state_bytes(planned, config, layout, stage=stage, dp_rank=dp_rank),
                "state": state_of(trainee),
            }
        )
        parallel_state.destroy_model_parallel()
    return found


def _prepare(arguments: Sequence[str]):
    config = parse_run_config(arguments)
    layout = check_flags(config, world_size_from_environment())
    config = with_architecture(config, resolve_architecture(config, None))
    check_architecture(config, config.architecture, layout)
    device = start_platform("cpu")
    return config, layout, device, setup.initialize_parallelism(config, layout)


# --------------------------------------------------------------------------------------------------------- activations

PACKS = {
    "pairs": [("dialogue", 49, 0), ("image", VISUAL + 1, 0), ("caption", 7, -1), ("hallucinated", 9, -1),
              ("dialogue", 60, 1), ("image", VISUAL + 1, 1), ("caption", 9, -1)],
    "long": [("dialogue", 161, 0), ("dialogue", 95, -1)],
    "images": [("image", VISUAL + 1, index) for index in range(5)] + [("caption", 6, -1)] * 5,
}  # fmt: skip
"""Micro-batches of different make: segments as `parity_cases._pack` takes them."""


def make_pack(name: str) -> PackedBatch:
    segments = PACKS[name]
    images = 1 + max(image for _, _, image in segments)
    return _pack(segments, images=images, seed=1, multiple=2)


def shape_of(batch: PackedBatch) -> PackShape:
    """The exact `PackShape` of a real micro-batch; all of its rows are followed by autograd."""
    lengths = batch.cu_seqlens.diff().tolist()
    return PackShape(
        segments=tuple(Segments(length, 1, True) for length in lengths),
        images=batch.num_images,
        image_rows=batch.image_rows.numel(),
        target_rows=batch.num_targets,
        pairs=batch.num_pairs,
        hallucinated=batch.hallucinated_eos_rows.numel(),
    )


def kept_by_autograd(module, batch: PackedBatch, vocab_size: int) -> tuple[int, int]:
    """(bytes kept by the model, by the language-model loss): storages that autograd saves, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor  # holding it, so that no other storage gets the address
        return tensor

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = module(batch, tuple(batch.cu_seqlens.diff().tolist()))
        of_model = total()
        if not module.post_process:
            return of_model, 0
        generation_loss_sum(output.logits, batch.target_ids, vocab_size=vocab_size, tp_group=module.groups.tp)
        return of_model, total() - of_model


def activations_on_this_rank(cases: Sequence[tuple[Sequence[str], str, str]]) -> list[dict[str, float]]:
    """For each (run, recompute, pack): what the plan says autograd keeps, and what it keeps."""
    found = []
    for arguments, recompute, pack in cases:
        config, layout, device, groups = _prepare(arguments)
        config.transformer.update(RECOMPUTE[recompute])
        module = setup.build_module(config, config.architecture, layout, groups, device)
        module.freeze(language_model=config.model.freeze_LM, vision_tower=config.model.freeze_ViT)
        batch = make_pack(pack)
        if not module.pre_process:
            rows = batch.num_rows // (layout.tp if config.parallel.sequence_parallel else 1)
            hidden = torch.randn(rows, 1, config.architecture.language.hidden_size).to(module.config.params_dtype)
            module.set_input_tensor([hidden.requires_grad_()])
            batch = replace(batch, pixel_values=batch.pixel_values.to("meta"))
        model_bytes, loss_bytes = kept_by_autograd(module, batch, config.architecture.language.vocab_size)
        planned = stage_activations(config, config.architecture, shape_of(batch), groups.pp.rank(), kernels=CPU)
        found.append({"kept": model_bytes, "planned": planned.kept, "loss": loss_bytes, "planned loss": planned.logits})
        parallel_state.destroy_model_parallel()
    return found
