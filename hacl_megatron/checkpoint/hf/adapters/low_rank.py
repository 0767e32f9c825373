"""LoRA beside one matrix: A and B as a file has them, and what they add to any slice of it."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hacl_megatron.checkpoint.hf.weight_files import WeightFiles
from hacl_megatron.config.lora import FUSED, Lora


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A [rank, in] and B [out, rank] of one matrix [out, in], not read yet."""

    a: tuple[WeightFiles, str]
    b: tuple[WeightFiles, str]
    scale: float

    def read(self, kind: str) -> Tensor:
        """A or B, whole."""
        weights, name = self.a if kind == "A" else self.b
        return weights.read(name)

    def dtype(self, kind: str) -> torch.dtype:
        weights, name = self.a if kind == "A" else self.b
        return weights.dtype(name)

    def shape(self, kind: str) -> tuple[int, ...]:
        weights, name = self.a if kind == "A" else self.b
        return weights.shape(name)

    def laid_into(self, part: Tensor, rows: slice, columns: slice) -> Tensor:
        """`(W + scale * B A)[rows, columns]`, where `part` is W's; in fp32, or fp64 where W is: yet to be rounded."""
        (files, name), (_, name_a) = self.b, self.a
        wide = torch.promote_types(part.dtype, torch.float32)
        added = files.read(name, rows).to(wide) @ self.a[0].read(name_a, slice(None), columns).to(wide)
        return torch.add(part.to(wide), added, alpha=self.scale)


@dataclass(frozen=True, kw_only=True)
class KeptLora:
    """Adapters that stay adapters."""

    lora: Lora
    pairs: dict[str, LowRank]
    """By canonical name of the matrix: each target of `lora`, in every layer."""


def lora_targets(ours: str, sources: tuple[str, ...]) -> dict[str, str]:
    """`text.layers.3.self_attn.q_proj.weight` -> `q_proj`, and so on; {} for what is no matrix of a language layer.

    Args:
        ours: our name of a parameter.
        sources: canonical names of what it is made of (`names.Rule`).
    """
    layer = re.fullmatch(r"language_model\.decoder\.layers\.\d+\.(.*)\.weight", ours)
    fused = FUSED.get(layer[1], ()) if layer else ()
    return dict(zip(sources, fused, strict=True)) if fused else {}
