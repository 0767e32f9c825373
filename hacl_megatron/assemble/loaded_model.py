"""A checkpoint's model, built and filled to run forward alone, at any layout: for evaluations and plots.

--load ─forward_config→ its folder, RunConfig ─processes.joined_processes→ Run ─load_model→ HaclModel
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hacl_megatron.assemble.module import build_module, load_pretrained
from hacl_megatron.assemble.run import Run
from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.checkpoint.run.folder import find_checkpoint, read_run_config
from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.flags import ModelFlags, ParallelFlags
from hacl_megatron.config.run import RunConfig, with_architecture
from hacl_megatron.data.templates import check_template
from hacl_megatron.model.hacl import HaclModel
from hacl_megatron.platform.processes import select_device


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How a checkpoint is run here: the flags of tools/checkpoint_arguments.py by the same names."""

    parallel: ParallelFlags
    """Layout and device; the vocabulary's padding is the run's own."""
    image_folder: str | Path
    """Folder, or URL, that image names are relative to."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """float16 is refused. None: bfloat16 on a GPU, unless the run was in fp32, else float32."""
    version: str | None = None
    """Conversation template; None, here and below: the run's own."""
    model_max_length: int | None = None
    """Longest sequence in tokens, an image's rows included."""
    image_backend: Literal["auto", "dali", "pillow"] | None = None
    """What decodes images."""


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


def load_model(source: Path, run: Run) -> HaclModel:
    """This rank's stage of the checkpoint in `source`, in evaluation mode; every rank calls it."""
    check_architecture(run.config, run.layout)
    module = build_module(run.config, run.groups, run.device)
    load_pretrained(module, run.config)
    return module.requires_grad_(False).eval()
