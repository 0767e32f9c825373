"""What a misspelt name probably meant."""

import difflib
from collections.abc import Iterable

NAMES_ELSEWHERE = {
    "model_name_or_path": "pretrained_checkpoint",
    "deepspeed": "use_distributed_optimizer",
    "gradient_accumulation_steps": "global_batch_size",
    "fp16": "bf16",
    "output_dir": "save",
    "resume_from_checkpoint": "load",
    "save_steps": "save_interval",
    "save_total_limit": "save_retain",
    "logging_steps": "log_interval",
    "logging_dir": "tensorboard_dir",
    "max_steps": "train_iters",
    "per_device_train_batch_size": "micro_batch_size",
    "learning_rate": "lr",
    "mm_projector_lr": "connector_lr",
    "mm_vision_tower_lr": "vision_lr",
    "lr_scheduler_type": "lr_decay_style",
    "warmup_ratio": "lr_warmup_fraction",
    "max_grad_norm": "clip_grad",
    "dataloader_num_workers": "num_workers",
    "tokenizer_model": "tokenizer",
    "lora_enable": "lora_rank",
    "lora_r": "lora_rank",
    "tensor_parallel_size": "tensor_model_parallel_size",
    "pipeline_parallel_size": "pipeline_model_parallel_size",
}
"""Flags of LLaVA's (transformers') and other trainers whose names resemble nothing here, and ours for the same."""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of `known` that `name` may have meant, best first; capitals and dashes do not count."""
    by_plain = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    name = name.lower().replace("-", "_")
    found = [by_plain[match] for match in difflib.get_close_matches(name, by_plain, n=3, cutoff=0.6)]
    meant = by_plain.get(NAMES_ELSEWHERE.get(name, ""))
    return [meant, *(candidate for candidate in found if candidate != meant)][:3] if meant else found


def did_you_mean(name: str, known: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """`did you mean a, b or c?`, or `otherwise` when nothing resembles `name`; `prefix` stands before each."""
    found = [prefix + candidate for candidate in nearest(name, known)]
    if not found:
        return otherwise
    return f"did you mean {' or '.join(filter(None, [', '.join(found[:-1]), found[-1]]))}?"
