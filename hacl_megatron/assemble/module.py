"""The model of one rank, built from a configuration and filled from a checkpoint; nothing frozen or wrapped yet."""

from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from hacl_megatron.checkpoint.convert.hf_to_megatron import drawn_by_conversion
from hacl_megatron.checkpoint.hf.import_weights import load_adapter, load_hf_weights
from hacl_megatron.checkpoint.run.choose import agree_on_checkpoint
from hacl_megatron.checkpoint.run.folder import find_checkpoint, read_run_config
from hacl_megatron.checkpoint.run.load import load_checkpoint
from hacl_megatron.config.checks.architecture import padded_vocab_size
from hacl_megatron.config.lora import Lora, is_lora
from hacl_megatron.config.run import RunConfig
from hacl_megatron.config.sections import megatron_fields, refusals_of
from hacl_megatron.model.connector import NEWLINE
from hacl_megatron.model.hacl import HaclModel
from hacl_megatron.model.transformer_configs import language_transformer_config, vision_transformer_config


def pad_multiple(config: RunConfig) -> int:
    """Packs are padded to a multiple of this: what context and sequence parallelism split, and the 32 rows of FP8
    products."""
    parallel = config.parallel
    rows = parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    return rows * 32 if config.transformer.get("fp8") else rows


def build_module(config: RunConfig, groups: ProcessGroupCollection, device: torch.device) -> HaclModel:
    """This rank's stage with initial weights, nothing loaded, frozen or wrapped yet."""
    architecture = config.architecture
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    return HaclModel(
        architecture,
        language_config=language_config(config, device),
        vision_config=vision_transformer_config(
            architecture, config.parallel, device=device, dtype=dtype, recompute=config.recomputes_tower
        ),
        padded_vocab_size=padded_vocab_size(architecture.language.vocab_size, config.parallel),
        initial_temperature=config.objective.initial_temperature,
        same_heads=config.objective.heads_init == "same",
        seed=config.training.seed,
        device=device,
        groups=groups,
        lora=Lora.of(config.lora),
        shares_images=config.shares_images,
        recompute_tower=config.recomputes_tower,
    )


def language_config(config: RunConfig, device: torch.device) -> TransformerConfig:
    """megatron-core's configuration of the language model; ValueError of one line if it refuses the YAML's fields."""
    with refusals_of("transformer"):
        return language_transformer_config(
            config.architecture,
            config.parallel,
            device=device,
            dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
            overrides=megatron_fields("transformer", config.transformer),
        )


def parts_of_transformers(config: RunConfig) -> list[str]:
    """A line for the user on each part that transformers builds, on how ranks run the tower, and on tiles."""
    flags, vision, qformer = config.model, config.architecture.vision, config.architecture.qformer
    lines, ranks = [], config.parallel.tensor_model_parallel_size
    how = "shares images out over" if config.shares_images else "split over"
    over_ranks = "" if ranks == 1 else f", {how} {ranks} tensor-parallel ranks"
    if vision.backend == "hf":
        lines.append(
            f"vision tower: transformers' {vision.kind.model_type}, {'frozen' if flags.freeze_ViT else 'trained'}, "
            f"without dropout{over_ranks}"
        )
    elif over_ranks:
        lines.append(f"vision tower: megatron-core's{over_ranks}")
    if qformer is not None:
        lines.append(
            f"connector: Q-Former of {qformer.num_query_tokens} query tokens an image, "
            f"{'frozen' if flags.freeze_qformer else 'trained'}, without dropout; its projection trains"
        )
    if tiles := config.architecture.tiles:
        features = config.architecture.visual_tokens
        lines.append(f"images: {tiles.described(vision.image_size)}; {features} features a view")
    return lines


def load_pretrained(module: HaclModel, config: RunConfig) -> str:
    """Fill `module` from `--pretrained-checkpoint` and `--pretrain-mm-mlp-adapter`; returns a line for the user."""
    source, own, has_lora, architecture = config.model.pretrained_checkpoint, None, False, config.architecture
    lines = []
    if source is None:
        lines.append("random weights")
    elif (own := find_checkpoint(Path(source))) is not None:
        # Or say which file is cut.
        _, note = agree_on_checkpoint(own, fallback=False, flag="--pretrained-checkpoint")
        # Extra states are FP8 scales: Transformer Engine's alone, and of the optimiser's kind, so they start fresh.
        has_lora = read_run_config(own).lora.lora_rank is not None
        # What no Hugging Face file held starts by this run's --seed and flags, as from the Hugging Face folder itself.
        drawn = [*drawn_by_conversion(own)]
        if architecture.tiles is not None and read_run_config(own).architecture.tiles is None:
            drawn.append(NEWLINE)

        def starts_fresh(name: str) -> bool:
            return name.endswith("_extra_state") or (is_lora(name) and not has_lora) or name in drawn

        state = module.sharded_state_dict(metadata={})
        wanted = {name: part for name, part in state.items() if not starts_fresh(name)}
        found = module.load_state_dict(load_checkpoint({"model": wanted}, own)["model"], strict=False)
        assert all(starts_fresh(name) for name in found.missing_keys) and not found.unexpected_keys, found
        lines.append(f"weights from {own}" + (f"; fresh: {', '.join(drawn)}" if drawn else ""))
        lines += [] if note is None else [note]
    else:
        report = load_hf_weights(
            module,
            source,
            architecture,
            tp_rank=module.groups.tp.rank(),
            tp_size=module.groups.tp.size(),
            whole=("vision_tower.",) if module.shares_images else (),
            layer_offset=get_transformer_layer_offset(module.config, None, module.groups.pp.rank()),
            padded_vocab_size=padded_vocab_size(architecture.language.vocab_size, config.parallel),
            adapter=config.model.pretrain_mm_mlp_adapter,
        )
        lines.append(report.summary())
    adapter = config.model.pretrain_mm_mlp_adapter
    if adapter is not None and (source is None or own is not None):
        notes = load_adapter(module, adapter, architecture)
        lines += [f"connector from {adapter}", *notes]
    if (lora := Lora.of(config.lora)) is not None:
        lines.append(f"{lora}, {'from there too' if has_lora else 'fresh'}")
    return "; ".join(lines)
