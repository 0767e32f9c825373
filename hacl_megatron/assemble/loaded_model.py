"""A checkpoint's model, built and filled to run forward alone, at any layout: for evaluations and plots.

--load ─forward_config→ its folder, RunConfig ─processes.joined_processes→ groups ─load_model→ LoadedModel
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from hacl_megatron.assemble.forward import ForwardOnly
from hacl_megatron.assemble.module import build_module, load_pretrained
from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.checkpoint.run.folder import assets_of, find_checkpoint, read_run_config
from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.flags import ModelFlags, ParallelFlags
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig, with_architecture
from hacl_megatron.data.encoding import EncodingSettings
from hacl_megatron.data.templates import check_template
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hacl_megatron.model.hacl import HaclModel
from hacl_megatron.platform.processes import select_device


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How a checkpoint is run here: the flags of tools/checkpoint_arguments.py by the same names."""

    parallel: ParallelFlags
    """Layout and device; the vocabulary's padding is the run's own."""
    image_folder: Path
    """Folder that image names are relative to."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """float16 is refused. None: bfloat16 on a GPU, unless the run was in fp32, else float32."""
    version: str | None = None
    """Conversation template; None, here and below: the run's own."""
    model_max_length: int | None = None
    """Longest sequence in tokens, an image's rows included."""
    image_backend: Literal["auto", "dali", "pillow"] | None = None
    """What decodes images."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint's model on this rank, in evaluation mode, and how it was trained to see its data."""

    module: HaclModel
    groups: ProcessGroupCollection
    config: RunConfig
    source: Path
    """The checkpoint's own folder."""
    device: torch.device

    @property
    def reads_data(self) -> bool:
        """Whether this rank reads for its replica; the others receive its packs."""
        return self.groups.mp.rank() == 0

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own."""
        return load_tokenizer(str(assets_of(self.source)))

    def settings(self) -> EncodingSettings:
        """How its samples become token rows."""
        return EncodingSettings.of(self.config)

    def forward(self) -> ForwardOnly:
        """Runs packs through it; every rank of the replica takes part."""
        return ForwardOnly(self.module, device=self.device)


def saved_config(load: Path) -> tuple[Path, RunConfig]:
    """The folder that `load` means, and the configuration of the run that left it; defaults for a Hugging Face folder.

    Raises:
        ValueError: it is neither a checkpoint of this trainer nor a Hugging Face LLaVA.
    """
    own = find_checkpoint(load)
    if own is not None:
        return own, read_run_config(own)
    if not (load / "config.json").is_file():
        raise ValueError(
            f"--load {load}: found no checkpoint; give a SAVE folder of a run, one of its iter_* folders, or a Hugging "
            "Face LLaVA or BLIP-2"
        )
    architecture = read_model_config(load)
    config = RunConfig(model=ModelFlags(bf16=True), data=data_flags(architecture))
    return load, with_architecture(config, architecture)


def forward_config(load: Path, settings: LoadSettings) -> tuple[Path, RunConfig]:
    """`saved_config` with the settings laid over it; what only training needs is gone. Raises ValueError."""
    source, saved = saved_config(load)
    asked, dtype = settings.parallel, settings.dtype
    if dtype is None:
        dtype = "bfloat16" if saved.model.bf16 and select_device(asked.device).type == "cuda" else "float32"
    if dtype == "float16":
        raise ValueError("--dtype float16 with --load; give float32 or bfloat16, as models are trained here")
    parallel = replace(
        asked,
        sequence_parallel=asked.sequence_parallel and asked.tensor_model_parallel_size > 1,
        make_vocab_size_divisible_by=saved.parallel.make_vocab_size_divisible_by,
    )
    max_length = settings.model_max_length
    if max_length is None:
        # Converted weights come with the flag's default, which a small model may not reach.
        max_length = min(saved.data.model_max_length, saved.architecture.language.max_position_embeddings)
    data = replace(
        saved.data,
        image_folder=str(settings.image_folder),
        version=settings.version or saved.data.version,
        model_max_length=max_length,
        image_backend=settings.image_backend or saved.data.image_backend,
    )
    check_template(data.version)
    return source, RunConfig(
        model=ModelFlags(pretrained_checkpoint=str(source), bf16=dtype == "bfloat16"),
        lora=saved.lora,
        parallel=parallel,
        data=data,
        objective=saved.objective,
        architecture=saved.architecture,
    )


def load_model(
    source: Path, config: RunConfig, layout: Layout, groups: ProcessGroupCollection, device: torch.device
) -> LoadedModel:
    """Build this rank's stage and fill it from the checkpoint; every rank calls it."""
    check_architecture(config, layout)
    module = build_module(config, groups, device)
    load_pretrained(module, config)
    module.requires_grad_(False)
    return LoadedModel(module=module.eval(), groups=groups, config=config, source=source, device=device)
