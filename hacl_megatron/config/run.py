"""`RunConfig`: everything a run was asked to do, from flags and YAML, and back to YAML.

    FILE.yaml ─┬─ flat entries ──→ defaults of the parser ─┐
               │                          argv ────────────┴→ flag groups ─┐
               ├─ model: ──────────────→ ModelConfig ──────────────────────┼→ RunConfig ─ to_yaml → run_config.yaml
               └─ transformer:, ddp:, optimizer: ──→ checked mappings ─────┘

A file may hold any subset; what `to_yaml` writes is complete and a valid `--config` file itself.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hacl_megatron.config import flags
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.console import exit_with_error
from hacl_megatron.config.image_sharing import shares_images
from hacl_megatron.config.parser import COMMAND_LINE_ONLY, GROUPS, FlagParser
from hacl_megatron.config.sections import check_section
from hacl_megatron.config.tiles import tiles_of
from hacl_megatron.config.towers import TOWERS
from hacl_megatron.config.yaml_files.text import Document, dump_yaml, load_yaml, read_yaml_text
from hacl_megatron.config.yaml_files.typed import build_record

LOSSES = ("generation", "contrastive", "preference")
"""The three parts of a run's loss."""


@dataclass(kw_only=True)
class RunConfig:
    """One run: a group of flags per concern, the sizes of the model once they are known, megatron-core's overrides."""

    model: flags.ModelFlags = field(default_factory=flags.ModelFlags)
    lora: flags.LoraFlags = field(default_factory=flags.LoraFlags)
    parallel: flags.ParallelFlags = field(default_factory=flags.ParallelFlags)
    data: flags.DataFlags = field(default_factory=flags.DataFlags)
    objective: flags.ObjectiveFlags = field(default_factory=flags.ObjectiveFlags)
    preference: flags.PreferenceFlags = field(default_factory=flags.PreferenceFlags)
    optimizer: flags.OptimizerFlags = field(default_factory=flags.OptimizerFlags)
    training: flags.TrainingFlags = field(default_factory=flags.TrainingFlags)
    checkpoint: flags.CheckpointFlags = field(default_factory=flags.CheckpointFlags)
    logging: flags.LoggingFlags = field(default_factory=flags.LoggingFlags)
    architecture: ModelConfig | None = None
    """YAML `model:`. None until `with_architecture` fills it from the checkpoint."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """YAML `transformer:`, values as YAML has them; `sections.megatron_fields` gives megatron-core's."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """YAML `ddp:`, likewise."""
    optimizer_overrides: dict[str, Any] = field(default_factory=dict)
    """YAML `optimizer:`, likewise."""
    vision_parallel_is_chosen: bool = False
    """Whether `parallel.vision_parallel` is what the plan chose for this layout, rather than what was asked for."""

    @property
    def language_model_is_frozen(self) -> bool:
        """Whether the language model's own weights stay as they are; with LoRA they do."""
        return self.model.freeze_LM or self.lora.lora_rank is not None

    @property
    def language_model_is_constant(self) -> bool:
        """Whether nothing in the language model trains, LoRA included: what it makes of a text never changes."""
        return self.model.freeze_LM and self.lora.lora_rank is None

    @property
    def shares_images(self) -> bool:
        """Whether tensor-parallel ranks share images out (`--vision-parallel`)."""
        return shares_images(self.architecture, self.parallel)

    @property
    def recomputes_layers(self) -> bool:
        """Whether backward runs whole layers of the language model once more, all or (`block`) some of them."""
        return self.transformer.get("recompute_granularity") == "full"

    @property
    def recomputes_tower(self) -> bool:
        """Whether backward runs each layer of the vision tower once more: trained, with the language model's layers."""
        return not self.model.freeze_ViT and self.recomputes_layers

    @property
    def losses_that_train(self) -> frozenset[str]:
        """Of `generation`, `contrastive` and `preference` those with a weight; dialogues, pairs and twins train."""
        preference = 0 if self.preference.preference_loss == "none" else self.preference.preference_weight
        weights = (self.preference.generation_weight, self.objective.contrastive_weight, preference)
        return frozenset(name for name, weight in zip(LOSSES, weights, strict=True) if weight)


def with_architecture(config: RunConfig, architecture: ModelConfig) -> RunConfig:
    """`config` with the model's sizes, over which flags are laid.

    These are `--mm-projector-type` (another connector leaves a Q-Former out), `--mm-vision-select-layer`,
    `--image-grid-pinpoints` and `--vision-backend`. Raises ValueError where the last has no such tower, or the grids
    cannot be read.
    """
    if config.model.vision_backend is not None:
        architecture = replace(architecture, vision=architecture.vision.on(config.model.vision_backend))
    connector = config.model.mm_projector_type
    if connector is not None:
        qformer = architecture.qformer if connector == "qformer" else None
        architecture = replace(architecture, projector_type=connector, qformer=qformer)
    if config.model.mm_vision_select_layer is not None:
        architecture = replace(architecture, vision_select_layer=config.model.mm_vision_select_layer)
    if config.model.image_grid_pinpoints is not None:
        tiles = tiles_of(config.model.image_grid_pinpoints, architecture.vision.image_size)
        architecture = replace(architecture, tiles=tiles)
    return replace(config, architecture=architecture)


def parse_run_config(argv: Sequence[str] | None = None) -> RunConfig:
    """The configuration that a command line asks for: `--config FILE.yaml`, then flags, which beat the file.

    `argv` defaults to the process's own, without the program's name. A mistake in either ends the process with
    status 2 and one line on stderr; `--help` with status 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        _, files = FlagParser().read(argv)
        if len(files) > 1:
            raise ValueError(f"--config was given {len(files)} times ({', '.join(files)}); give one file")
        document = load_yaml(read_yaml_text(Path(files[0]), f"--config {files[0]}"), files[0]) if files else None
        return _assemble(argv, document)
    except ValueError as error:
        exit_with_error(error)


def from_yaml(text: str, source: str = "run_config.yaml") -> RunConfig:
    """The configuration that `to_yaml` wrote, or any `--config` file's; ValueError names `source` and the line."""
    return _assemble([], load_yaml(text, source))


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, a comment per group of flags; `from_yaml` gives back an equal one, but for a
    `--vision-parallel` that was chosen: that is a comment, and whoever takes the file has it chosen anew.
    """
    parts = []
    for name, group in GROUPS.items():
        values = asdict(getattr(config, name))
        values = {key: value for key, value in values.items() if key not in COMMAND_LINE_ONLY}
        text = dump_yaml(values)
        if name == "parallel" and config.vision_parallel_is_chosen:
            way = values["vision_parallel"]
            text = text.replace(f"vision_parallel: {way}\n", f"vision_parallel: null  # {way} is chosen here\n")
        parts.append(f"# {group.__doc__}\n{text}")
    architecture = None if config.architecture is None else asdict(config.architecture)
    parts.append("# Sizes of the model's parts.\n" + dump_yaml({"model": architecture}))
    overrides = {"transformer": config.transformer, "ddp": config.ddp, "optimizer": config.optimizer_overrides}
    parts.append("# Fields of megatron-core's own configurations.\n" + dump_yaml(overrides))
    return "\n".join(parts)


def _assemble(argv: Sequence[str], document: Document | None) -> RunConfig:
    parser = FlagParser()
    sections = parser.set_from_file(document, argv) if document else {}
    groups, _ = parser.read(argv)

    def checked(name: str) -> dict[str, Any]:
        return check_section(name, sections[name], document.where(name)) if name in sections else {}

    config = RunConfig(
        **groups, transformer=checked("transformer"), ddp=checked("ddp"), optimizer_overrides=checked("optimizer")
    )
    if sections.get("model") is None:
        return config
    return with_architecture(config, _read_architecture(sections["model"], f"{document.where('model')}: model"))


def _read_architecture(values: Any, where: str) -> ModelConfig:
    """The `model:` section; `image` defaults to the tower's size, and its colours to what such towers have."""
    vision = values.get("vision") if isinstance(values, dict) else None
    if isinstance(vision, dict) and isinstance(image := values.get("image", {}), dict):
        default = {"size": vision.get("image_size", vision.get("image-size"))} if not image else {}
        module = vision.get("hf")
        if isinstance(module, dict) and (kind := TOWERS.get(str(module.get("model_type")))) is not None:
            default |= {"mean": list(kind.mean), "std": list(kind.std)}
        values = {**values, "image": {**default, **image}}
    return build_record(ModelConfig, values, where)


assert {item.name for item in fields(RunConfig)} == {
    *GROUPS, "architecture", "transformer", "ddp", "optimizer_overrides", "vision_parallel_is_chosen"
}  # fmt: skip
