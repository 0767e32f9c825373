"""Kinds of connectors between vision tower and language model, by `--mm-projector-type`."""

import re
from pathlib import Path

CONNECTOR_FILES = ("mm_projector.bin", "llama_proj.pth")
"""A connector alone, as LLaVA and MiniGPT-4 call it."""


def connector_file(path: Path) -> Path:
    """What `--pretrain-mm-mlp-adapter` means: the file, or the one in that folder; it need not be there."""
    there = (path / name for name in CONNECTOR_FILES if (path / name).is_file())
    return next(there, path)


def mlp_depth(projector_type: str) -> int | None:
    """Linear layers of LLaVA's connectors: 1 for `linear`, N for `mlpNx_gelu`; None for anything else."""
    if projector_type == "linear":
        return 1
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", projector_type)
    return None if match is None else int(match[1])


def connector_depth(projector_type: str) -> int:
    """Linear layers of any connector: LLaVA's as in `mlp_depth`, and the one that stands behind a `qformer`.

    Raises:
        ValueError: there is no such connector.
    """
    depth = 1 if projector_type == "qformer" else mlp_depth(projector_type)
    if depth is None:
        raise ValueError(
            f"--mm-projector-type is {projector_type!r}; expected linear, mlp2x_gelu or another mlpNx_gelu, or qformer"
        )
    return depth
