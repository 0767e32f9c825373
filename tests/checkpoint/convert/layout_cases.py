"""Rank functions: a converted checkpoint loaded as a run loads it, at any layout, computed with and saved again."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.model.parity_batches import PADDED_VOCAB, make_batches
from tests.model.parity_cases import Layout, build, run_schedule


def load_compute_save(reference: Path, converted: Path, save: Path, layout: Layout) -> dict[str, float]:
    """Largest differences from transformers' outputs on this rank ({} before the last stage); saves to `save`."""
    from hacl_megatron.assemble.module import load_pretrained
    from hacl_megatron.checkpoint.run.folder import ASSETS_FOLDER, copy_assets, find_checkpoint, read_run_config
    from hacl_megatron.checkpoint.run.load import state_metadata
    from hacl_megatron.checkpoint.run.save import CheckpointSaver
    from hacl_megatron.config.run import to_yaml
    from hacl_megatron.platform.processes import start_platform

    device = start_platform("cpu")
    module, architecture, _ = build(reference / "weights", layout, device)
    run = read_run_config(find_checkpoint(converted))
    run.model.pretrained_checkpoint = str(converted)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))  # whatever is not loaded shows
    load_pretrained(module, run)

    expected = torch.load(reference / "expected.pt", weights_only=True)
    shard = PADDED_VOCAB // layout.tp
    differences: dict[str, float] = {}
    batches = make_batches(layout.tp if layout.sp else 1, architecture.visual_tokens)
    if not module.pre_process:
        from dataclasses import replace

        batches = [replace(batch, pixel_values=batch.pixel_values.to("meta")) for batch in batches]
    outputs = run_schedule(Wrapped(module), batches, forward_only=True)
    if module.post_process:
        first = module.groups.tp.rank() * shard
        for index, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
            theirs["logits"] = theirs["logits"][:, first : first + shard]
            ours["logits"] = ours["logits"][:, : theirs["logits"].shape[1]]
            for key, value in theirs.items():
                if value.numel():
                    differences[f"{key} {index}"] = float((ours[key] - value).abs().max())

    saver = CheckpointSaver(save, asynchronous=False)
    saver.save(
        1, lambda: {"model": module.sharded_state_dict(metadata=state_metadata())}, run_config=to_yaml(run),
        write_assets=partial(copy_assets, find_checkpoint(converted) / ASSETS_FOLDER),
    )  # fmt: skip
    assert saver.wait() is None
    saver.close()
    return differences


class Wrapped(torch.nn.Module):
    """What the schedule expects around a model, without gradient buffers."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module, self.config = module, module.config

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    def set_input_tensor(self, tensor: Any) -> None:
        self.module.set_input_tensor(tensor)


def load_compute_save_all(jobs: list[tuple[Path, Path, Path, Layout]]) -> list[dict[str, float]]:
    """`load_compute_save` for every job of this world size, one after another."""
    results = []
    for job in jobs:
        assert job[-1].world_size == dist.get_world_size()
        results.append(load_compute_save(*job))
    return results


def agreements(jobs: list[tuple[Path, Path, bool]]) -> list[tuple[bool, float]]:
    """`compare_models` of (checkpoint, Hugging Face folder, by the source's tensors): (holds, largest difference)."""
    from hacl_megatron.checkpoint.hf.config_read import read_model_config
    from hacl_megatron.checkpoint.hf.import_weights import open_sources
    from hacl_megatron.checkpoint.run.folder import find_checkpoint
    from hacl_megatron.evaluation.agreement import compare_models

    results = []
    for converted, folder, by_tensors in jobs:
        sources = open_sources(folder, read_model_config(folder)) if by_tensors else None
        found = compare_models(find_checkpoint(converted), folder, sources)
        results.append((found.holds, found.largest_difference))
    return results


def initial_parts(reference: Path, seed: int) -> dict[str, torch.Tensor]:
    """Connector and heads of a freshly built model."""
    from hacl_megatron.platform.processes import start_platform

    module, _, _ = build(reference / "weights", Layout(), start_platform("cpu"), seed=seed)
    return {name: p.detach() for name, p in module.named_parameters() if name.startswith(("connector.", "heads."))}
