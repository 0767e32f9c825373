"""One global batch's losses and whole gradients, at any layout and cut into micro-batches in any way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.optimizer import MegatronOptimizer

from hacl_megatron.assemble.start_from import assets_folder, resolve
from hacl_megatron.batch import PackPlan
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.run import RunConfig, parse_run_config
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.tokenizer import load_tokenizer
from hacl_megatron.platform.processes import start_platform
from hacl_megatron.training import build
from hacl_megatron.training.build import build_trainer, open_loader
from hacl_megatron.training.loop import Trainer
from hacl_megatron.training.optimizer.grad_norm import squared_grad_norms
from hacl_megatron.training.packs import pack_plan
from tests.distributed import leave_groups
from tests.memory import peak_bytes

SAMPLES = 16
"""Of the global batch, if `record` is not told otherwise."""


@dataclass(frozen=True)
class Case:
    """What may change nothing but rounding (`micro_batches`), and what makes another loss."""

    hallucination_negatives: str = "all"
    context: str = "image"
    negatives: str = "global-batch"
    micro_batches: int = 1
    tokens: int | None = None
    """`--micro-batch-tokens` instead of `micro_batches`."""
    preference: str = "none"
    separate: bool = False
    """Rejected answers as segments of their own, instead of branches."""

    def name(self) -> str:
        name = f"{self.hallucination_negatives}-{self.context}-{self.negatives}-{self.tokens or self.micro_batches}"
        return f"{name}-{self.preference}{'-separate' * self.separate}"


def record(
    folder: str, layout: str, flags: list[str], stage: str, cases: list[Case], *, samples: int = SAMPLES
) -> None:
    """Each case's step on this rank; its losses and this rank's shards of the gradients into a file.

    The model is built once and every case starts from its first weights. `layout` is only what the file is named by.
    """
    root = Path(folder)
    trainer, tokenizer = _trainer(root, stage, flags)
    config, checked = trainer.config, trainer.run.layout
    views: list[int] = []
    if trainer.trainee.module.pre_process:
        trainer.trainee.module.vision_tower.register_forward_pre_hook(lambda _, inputs: views.append(len(inputs[0])))
    for case in cases:
        config.objective.hallucination_negatives = case.hallucination_negatives
        config.objective.contrastive_image_context = case.context
        config.objective.contrastive_negatives = case.negatives
        config.training.micro_batch_tokens = case.tokens
        config.preference.preference_loss = case.preference
        size = samples // (checked.dp * case.micro_batches)
        cut = replace(checked, micro_batch_size=size, num_micro_batches=case.micro_batches)
        loader = None
        if tokenizer is not None:
            with mock.patch.object(build, "pack_plan", _separate_plan if case.separate else pack_plan):
                references = _drawn(config) if config.preference.has_reference else None
                loader = open_loader(replace(trainer.run, layout=cut), tokenizer, references=references)
        micro_batches, counts = trainer.step.receive(next(loader) if loader is not None else None)
        if loader is not None:
            loader.close()
        views.clear()
        metrics = trainer.step.forward_backward(
            micro_batches, counts, contrastive_weight=config.objective.contrastive_weight
        ).read()
        torch.save(
            {
                "losses": [metrics.lm_loss, metrics.contrastive_i2t, metrics.contrastive_t2i]
                + [metrics.preference_loss, metrics.preference_margin] * (case.preference != "none"),
                "num_micro_batches": len(micro_batches),
                "gradients": _shards(trainer.trainee.module),
                "norms": _norms(trainer.trainee.optimizer),
                "views": views[:],
                "images": [batch.main.num_images for batch in micro_batches],
            },
            root / f"{stage}_{layout}_{case.name()}_{dist.get_rank()}.pt",
        )
    leave_groups()


def _drawn(config: RunConfig) -> Callable[[int], np.ndarray]:
    """What some other weights make of a sample's twins."""
    paths = (config.data.data_path, config.data.contrastive_data_path)
    manifests = [Manifest.read(some, version=config.data.version) for some in paths]
    samples = [manifest[at] for manifest in manifests for at in range(len(manifest))]

    def drawn(sample_id: int) -> np.ndarray:
        twins = [twin for twin in samples[sample_id].twin_conversations() if twin is not None]
        answers = 3 if config.preference.preference_loss == "mdpo" else 2
        return np.random.default_rng(sample_id).uniform(-40, -20, (len(twins), answers))

    return drawn


def _separate_plan(*arguments: Any, **options: Any) -> PackPlan:
    plan = pack_plan(*arguments, **options)
    return replace(plan, main=replace(plan.main, preferences="segment"))


def _trainer(folder: Path, stage: str, flags: list[str]) -> tuple[Trainer, Any]:
    """A trainer without a loader, and the tokenizer where data is read."""
    config = parse_run_config(["--config", str(folder / f"{stage}.yaml"), "--train-iters", "1", *flags])
    layout = check_flags(config, dist.get_world_size())
    config = resolve(config)
    trainer = build_trainer(config, layout, None, start_platform("cpu"))
    if trainer.loader is None:
        return trainer, None
    trainer.loader.close()
    return trainer, load_tokenizer(str(config.model.tokenizer or assets_folder(config, None)))


def peaks(folder: str, stage: str, counts: list[int], samples: int) -> dict[int, int]:
    """Peak bytes of a step of so many micro-batches with `samples` each, all of the same samples, on one rank."""
    trainer, tokenizer = _trainer(Path(folder), stage, ["--micro-batch-size", str(samples)])
    layout = replace(trainer.run.layout, micro_batch_size=samples, global_batch_size=2 * samples, num_micro_batches=2)
    loader = open_loader(replace(trainer.run, layout=layout), tokenizer)
    (batch, _), _ = trainer.step.receive(next(loader))
    loader.close()
    assert batch.ahead is not None and batch.ahead.image_eos_rows.numel() > 0, "gradients are cached"
    found = {}
    for count in counts:
        micro_batches = [batch] * count
        counted = trainer.step.count(micro_batches)

        def run(micro_batches=micro_batches, counted=counted) -> None:
            trainer.step.forward_backward(
                micro_batches, counted, contrastive_weight=trainer.config.objective.contrastive_weight
            )

        run()
        found[count] = peak_bytes(run)
    leave_groups()
    return found


def _norms(optimizer: MegatronOptimizer) -> tuple[float, float]:
    """The gradients' norm as a step computes it, and by megatron-core itself."""
    optimizer.prepare_grads()
    return float(squared_grad_norms(optimizer, torch.device("cpu"))) ** 0.5, float(optimizer.get_grad_norm())


def _shards(module) -> list[tuple[str, tuple, tuple, torch.Tensor]]:
    """(name, global shape, offset, gradient) of each shard of which this rank holds the first replica."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    values = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.clone()
    state: dict[str, Any] = module.sharded_state_dict(metadata={})
    apply_factories(state)
    found = [
        (entry.key, entry.global_shape, entry.global_offset, entry.data.detach().clone())
        for entry in nested_values(state)
        if isinstance(entry, ShardedTensor)
    ]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    return found


def read(folder: Path, stage: str, layout: str, ranks: int, case: Case) -> dict[str, Any]:
    """Losses, number of micro-batches, images of each, whole gradients (frozen weights as they are), and of each rank
    its norms of them and how many views its tower saw, call by call."""
    parts = [torch.load(folder / f"{stage}_{layout}_{case.name()}_{rank}.pt") for rank in range(ranks)]
    assert all(part["losses"] == parts[0]["losses"] for part in parts), "ranks disagree"
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for part in parts:
        for key, shape, offset, tensor in part["gradients"]:
            target = whole.setdefault(key, torch.zeros(shape))
            covered = seen.setdefault(key, torch.zeros(shape, dtype=torch.bool))
            tensor = tensor.reshape((1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape))
            where = tuple(slice(at, at + size) for at, size in zip(offset, tensor.shape, strict=True))
            if covered[where].all():  # a replica: the same gradient, to the last bit but for the order of sums
                torch.testing.assert_close(target[where], tensor, rtol=1e-4, atol=1e-6)
            target[where] = tensor
            covered[where] = True
    assert all(covered.all() for covered in seen.values())
    return {
        "losses": parts[0]["losses"],
        "num_micro_batches": parts[0]["num_micro_batches"],
        "gradients": whole,
        "norms": [part["norms"] for part in parts],
        "views": [part["views"] for part in parts],
        "images": parts[0]["images"],
    }
