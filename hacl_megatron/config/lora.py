"""LoRA as the flags ask for it, and the one table of what it may stand beside.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685): beside W x stands
alpha / rank * B A dropout(x), with A [rank, in] and B [out, rank], where B starts at zero. Every matrix of Hugging
Face's LLaMA has its own pair, as in `peft`, although ours hold several of them fused.
"""

from dataclasses import dataclass
from typing import Literal

from hacl_megatron.config.architecture import LanguageConfig
from hacl_megatron.config.families import language_family
from hacl_megatron.config.flags import LoraFlags
from hacl_megatron.config.names import did_you_mean

FUSED: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
"""Our linear layers, and what LLaMA calls the matrices in each of them, in its order; so they are called in every
family, whatever its own names are."""

TARGETS: tuple[str, ...] = tuple(target for targets in FUSED.values() for target in targets)
"""What `--lora-target-modules` may name."""

SUFFIX = "_lora"
"""`self_attention.linear_qkv_lora.q_proj_A` belongs to `self_attention.linear_qkv.weight`."""

Split = Literal["column", "row"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapters of a model."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    """Some of `TARGETS`, in its order."""

    @classmethod
    def of(cls, flags: LoraFlags) -> "Lora | None":
        """What checked flags ask for; None without `--lora-rank`."""
        if flags.lora_rank is None:
            return None
        wanted = flags.lora_target_modules or TARGETS
        return cls(
            rank=flags.lora_rank,
            alpha=2.0 * flags.lora_rank if flags.lora_alpha is None else flags.lora_alpha,
            dropout=flags.lora_dropout,
            targets=tuple(target for target in TARGETS if target in wanted),
        )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def __str__(self) -> str:
        return f"LoRA of rank {self.rank}, alpha {self.alpha:g}, on {' '.join(self.targets)}"


def split_of(target: str) -> Split:
    """How tensor parallelism cuts a target's matrix: by rows of the output (B is cut) or of the input (A is cut)."""
    return "row" if target in ("o_proj", "down_proj") else "column"


def target_shapes(language: LanguageConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every target's matrix in the whole model."""
    sources = {row.ours: row.sources for row in language_family(language.family).layer}
    return {
        target: source.shape(language.letters)
        for linear, targets in FUSED.items()
        for target, source in zip(targets, sources[f"{linear}.weight"], strict=True)
    }


def adapter_name(layer: int, target: str, kind: str) -> str:
    """Our name, in the whole model, of A or B (`kind`) beside the matrix `target` of a language layer."""
    linear = next(linear for linear, targets in FUSED.items() if target in targets)
    return f"language_model.decoder.layers.{layer}.{linear}{SUFFIX}.{target}_{kind}"


def is_lora(parameter: str) -> bool:
    """Whether the parameter of this name belongs to an adapter."""
    return any(f"{linear}{SUFFIX}." in parameter for linear in FUSED)


def check_lora(flags: LoraFlags) -> None:
    """ValueError for targets that are not there, and for LoRA flags without `--lora-rank`. (Numbers: `LIMITS`.)"""
    for target in flags.lora_target_modules:
        if target not in TARGETS:
            advice = did_you_mean(target, TARGETS, f"expected some of {' '.join(TARGETS)}")
            raise ValueError(f"--lora-target-modules {target}: no linear layer of the language model; {advice}")
    defaults = LoraFlags()
    for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
        if flags.lora_rank is None and getattr(flags, name) != getattr(defaults, name):
            raise ValueError(f"--{name.replace('_', '-')} is given without --lora-rank; add it, or leave the flag out")


def settle_lora(asked: LoraFlags, saved: LoraFlags, checkpoint: str, *, resumes: bool) -> LoraFlags:
    """The adapters of a run that starts from a checkpoint: its own where the flags ask for none.

    Args:
        resumes: `--load`, with the optimiser's state; else `--pretrained-checkpoint`, beside which new ones may start.

    Raises:
        ValueError: the flags ask for others than the checkpoint's.
    """
    there, wanted = Lora.of(saved), Lora.of(asked)
    if wanted is None:
        return saved
    if there is None:
        if resumes:
            raise ValueError(
                f"--lora-rank is {wanted.rank}, but the run in {checkpoint} has no LoRA; leave the flag out to resume "
                "it, or start a new run with --pretrained-checkpoint"
            )
        return asked
    if (there.rank, there.alpha, there.targets) != (wanted.rank, wanted.alpha, wanted.targets):
        raise ValueError(
            f"the flags ask for {wanted}, but checkpoint {checkpoint} has {there}; leave the --lora flags out to go on "
            "with it, or merge it first (tools/convert_megatron_to_hf.py) and start from the export"
        )
    return asked
