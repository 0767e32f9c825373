"""What a resumed run does otherwise than the run that its checkpoint is of, in lines for the user."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hacl_megatron.checkpoint.run.folder import read_run_config
from hacl_megatron.checkpoint.run.load import load_common_state
from hacl_megatron.config.flags import TrainingFlags
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig
from hacl_megatron.training.state import Progress

_STARTS = ("pretrained_checkpoint", "pretrain_mm_mlp_adapter", "vision_tower")
"""Where weights come from at a run's start, and at no other time."""
_COMPARED = ("model", "lora", "data", "objective", "preference", "optimizer", "training")
_OF_NO_ACCOUNT = {
    *_STARTS,
    # The sampler compares what is in the files.
    "data_path", "contrastive_data_path", "valid_data_path", "data_cache_dir",
    "data_cache_gb", "num_workers", "io_threads", "prefetch_steps", "max_bad_fraction",
    # The global batch is compared as it comes out of them.
    "global_batch_size", "micro_batch_size", "micro_batch_tokens", "balance_micro_batches",
    "exit_interval", "exit_duration_in_mins", "eval_interval", "eval_iters", "eval_tasks", "max_skipped_steps",
    "print_config", "dry_run", "world_size", "dry_run_rank",
}  # fmt: skip
"""Flags of these groups that do not change what is trained on or how."""


def what_differs(folder: Path, config: RunConfig, layout: Layout) -> list[str]:
    """A line on flags that are not as they were in the run of checkpoint `folder`, and one on weights not read."""
    saved = read_run_config(folder)
    pairs = [("global_batch_size", _saved_batch(folder, saved), layout.global_batch_size)]
    for group in _COMPARED:
        before, now = (asdict(getattr(some, group)) for some in (saved, config))
        # A flag of the model that is not given means the checkpoint's.
        pairs += [
            (name, before[name], now[name])
            for name in now
            if name not in _OF_NO_ACCOUNT and not (group == "model" and now[name] is None)
        ]
    if config.objective.contrastive_negatives == "micro-batch":  # then it decides what is contrasted
        pairs.append(("micro_batch_size", saved.training.micro_batch_size, config.training.micro_batch_size))
    changes = [f"{_flag(name)} {_shown(now)} (was {_shown(before)})" for name, before, now in pairs if before != now]
    changes += [
        f"the YAML's section {section}:"
        for section, before, now in (
            ("transformer", saved.transformer, config.transformer),
            ("optimizer", saved.optimizer_overrides, config.optimizer_overrides),
        )
        if before != now
    ]
    lines = [f"not as in the run that is resumed: {', '.join(changes)}"] if changes else []
    ignored = [name for name in _STARTS if _is_elsewhere(getattr(config.model, name), getattr(saved.model, name))]
    if ignored:
        others = ", ".join(
            f"{_flag(name)} {getattr(config.model, name)} (was {_shown(getattr(saved.model, name))})"
            for name in ignored
        )
        lines.append(
            f"not read: {others}; weights come from the checkpoint in --load: leave --load out to start from others"
        )
    return lines


def nothing_left(flags: TrainingFlags, progress: Progress, num_samples: int) -> str:
    """The line of a run that is started again after its end."""
    asked = f"--train-iters {flags.train_iters}"
    if flags.train_iters is None:
        asked = f"--num-train-epochs {flags.num_train_epochs:g} of {num_samples} samples"
    return (
        f"nothing is left to train or to save: {progress.iteration} iterations have drawn {progress.drawn_samples} "
        f"samples, and {asked} asks for no more; raise it to go on"
    )


def _saved_batch(folder: Path, saved: RunConfig) -> int:
    tensor_pipeline_data = load_common_state(folder)["layout"]
    return saved.training.global_batch_size or saved.training.micro_batch_size * tensor_pipeline_data[2]


def _is_elsewhere(path: str | None, saved: str | None) -> bool:
    return path not in (None, saved) and (saved is None or Path(path).resolve() != Path(saved).resolve())


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return "not given" if value is None else f"{value}"
