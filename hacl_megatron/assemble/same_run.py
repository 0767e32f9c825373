"""What has to be the same on all ranks, by the names that a user knows; `platform.agreement` compares it.

Left out is what differs between the nodes of one run by right: folders that each node has a copy of (their content is
compared instead, where that costs no look at every byte), and numbers of threads. Not compared are the bytes of images
and of weights (files' names and sizes are).
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hacl_megatron.assemble.start_from import checkpoint_to_resume
from hacl_megatron.checkpoint.run.folder import find_checkpoint
from hacl_megatron.config.parser import COMMAND_LINE_ONLY, GROUPS
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.tokenizer import Tokenizer

PACKAGE = Path(__file__).parents[1]
_OF_THE_NODE = ("data_cache_dir", "data_cache_gb", "num_workers", "io_threads", "prefetch_steps")
"""Flags that change nothing but time and place."""
_OF_RANK_0 = ("tensorboard_dir", "wandb_project")
_PATHS = (
    "data_path", "contrastive_data_path", "valid_data_path", "image_folder",
    "tokenizer", "pretrained_checkpoint", "vision_tower", "pretrain_mm_mlp_adapter",
)  # fmt: skip
"""Flags whose files may lie elsewhere on another node: only how many are given is compared."""
_WEIGHTS = ("pretrained_checkpoint", "vision_tower", "pretrain_mm_mlp_adapter")
_LIBRARIES = (
    "torch", "megatron-core", "transformers", "tokenizers", "transformer-engine", "flash-attn", "flash-attn-3", "apex",
    "numpy", "pyarrow", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "triton", "nvidia-nccl-cu12",
    "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
_VARIABLES = ("NVTE_", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
"""Beginnings of environment variables that choose kernels."""


def facts_of(config: RunConfig) -> dict[str, str]:
    """Name -> value of the resolved configuration, the weights' files, the libraries and this program's source."""
    return {**_flags(config), **_weights(config), **_libraries(), **_source()}


def data_facts(config: RunConfig, tokenizer: Tokenizer, digests: Iterable[str]) -> dict[str, str]:
    """The same of what a rank reads: content of its samples and of its tokenizer.

    Args:
        digests: `Manifest.digest` of --data-path and --contrastive-data-path.
    """
    names = ("--data-path", "--contrastive-data-path")
    facts = {f"content of {name}": digest for name, digest in zip(names, digests, strict=True)}
    data = config.data
    if data.valid_data_path and config.training.eval_interval:
        manifest = Manifest.read(data.valid_data_path, version=data.version, cache_dir=data.data_cache_dir)
        facts["content of --valid-data-path"] = manifest.digest
    for name, content in sorted(tokenizer.files.items()):
        facts[f"content of the tokenizer's {name}"] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return facts


def _flags(config: RunConfig) -> dict[str, str]:
    facts = {}
    for group in GROUPS:
        for name, value in asdict(getattr(config, group)).items():
            if name in (*_OF_THE_NODE, *_OF_RANK_0, *COMMAND_LINE_ONLY):
                continue
            flag = f"--{name.replace('_', '-')}"
            if name in _PATHS:
                number = len(value) if isinstance(value, list) else int(value is not None)
                facts[f"number of {flag}"] = str(number)
            else:
                facts[flag] = _shown(value)
    architecture = None if config.architecture is None else asdict(config.architecture)
    sections = {
        "model": architecture, "transformer": config.transformer, "ddp": config.ddp,
        "optimizer": config.optimizer_overrides,
    }  # fmt: skip
    for name, values in sections.items():
        facts |= {key: _shown(value) for key, value in _leaves(values or {}, name)}
    return facts


def _leaves(values: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.{key}")
        else:
            yield f"{name}.{key}", value


def _shown(value: Any) -> str:
    return "not given" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _weights(config: RunConfig) -> dict[str, str]:
    """Names and sizes of the files that a start reads weights from; a resumed run reads none of them."""
    if checkpoint_to_resume(config) is not None:
        return {}
    facts = {}
    for name in _WEIGHTS:
        if (given := getattr(config.model, name)) is None:
            continue
        path = Path(given)
        folder = (find_checkpoint(path) or path) if path.is_dir() else path.parent
        files = folder.iterdir() if path.is_dir() else [path]
        weights = sorted(f"{file.name} {file.stat().st_size}" for file in files if file.is_file() and _holds(file.name))
        digest = hashlib.blake2b("\n".join(weights).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        facts[f"files of --{name.replace('_', '-')}"] = f"{len(weights)} of names and sizes {digest}"
    return facts


def _holds(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pth", ".pt", ".distcp"))


def _libraries() -> dict[str, str]:
    facts = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in _LIBRARIES:
        try:
            facts[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    chosen = (name for name in os.environ if name.startswith(_VARIABLES))
    return facts | {f"environment variable {name}": os.environ[name] for name in chosen}


def _source() -> dict[str, str]:
    """A digest of each file of this package: whoever mends a file mends it on every node."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {
        f"source {file.relative_to(PACKAGE.parent)}": hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
        for file in files
    }
