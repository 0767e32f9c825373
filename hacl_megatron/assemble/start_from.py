"""What a run starts from, by its flags: which checkpoint, whose model's sizes, adapters, tokenizer and processor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hacl_megatron.checkpoint.convert.export_check import check_export
from hacl_megatron.checkpoint.hf.assets.write import ChatTemplate
from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.checkpoint.hf.modules import clean_config
from hacl_megatron.checkpoint.run.choose import choose_checkpoint
from hacl_megatron.checkpoint.run.folder import assets_of, find_checkpoint, read_run_config
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.console import notify
from hacl_megatron.config.flags import LoraFlags, ModelFlags
from hacl_megatron.config.lora import settle_lora
from hacl_megatron.config.run import RunConfig, with_architecture
from hacl_megatron.config.tiles import tiles_of
from hacl_megatron.data.templates import find_template, template_names
from hacl_megatron.data.templates.template import with_blank_behind_images
from hacl_megatron.data.tokenizer import load_tokenizer


def checkpoint_to_resume(config: RunConfig) -> Path | None:
    """What `--load` names; its files are looked at later, by one rank for all."""
    load = config.checkpoint.load
    if load is None:
        return None
    try:
        return find_checkpoint(Path(load))
    except ValueError:
        if not config.checkpoint.load_fallback:
            raise
        return choose_checkpoint(Path(load), fallback=True)[0]


def resolve(config: RunConfig, *, planned: bool = False) -> RunConfig:
    """`config` with the model's sizes and adapters, from the checkpoint that is resumed or started from.

    Args:
        planned: weights that are not here yet are no mistake where a `model:` section has the sizes.
    """
    resume_from = checkpoint_to_resume(config)
    sizes = (planned_architecture if planned else resolve_architecture)(config, resume_from)
    config = with_architecture(config, sizes)
    return replace(config, lora=resolve_lora(config, resume_from))


def resolve_architecture(config: RunConfig, resume_from: Path | None) -> ModelConfig:
    """Sizes of the model: the checkpoint's to resume, else the pretrained one's, else the YAML's `model:` section.

    `--mm-projector-type` and `--mm-vision-select-layer` are laid over it by `with_architecture`.
    """
    if resume_from is not None:
        found = read_run_config(resume_from).architecture
        _refuse_other_parts(config.model, found, resume_from, resumes=True)
        return found
    if config.model.pretrained_checkpoint is not None:
        source = Path(config.model.pretrained_checkpoint)
        own = find_checkpoint(source)
        tower = config.model.vision_tower
        if own is not None and tower is not None:
            raise ValueError(f"--pretrained-checkpoint {source} holds its vision tower; leave --vision-tower out")
        found = read_run_config(own).architecture if own is not None else read_model_config(source, tower)
        _refuse_other_sizes(config, found, source)
        grids = config.model.image_grid_pinpoints
        if grids is not None and found.tiles is not None and tiles_of(grids, found.vision.image_size) != found.tiles:
            notify(f"note: --image-grid-pinpoints {grids} takes the place of the grids that the model in {source} has.")
        if own is not None:
            _refuse_other_parts(config.model, found, own, resumes=False)
        return found
    assert config.architecture is not None  # check_flags has asked for one of the three
    return config.architecture


def resolve_lora(config: RunConfig, resume_from: Path | None) -> LoraFlags:
    """The flags' adapters, or those of the checkpoint that is resumed or started from where the flags ask for none."""
    source, found = config.model.pretrained_checkpoint, resume_from
    if found is None and source is not None and Path(source).is_dir():
        found = find_checkpoint(Path(source))
    if found is None:
        return config.lora
    return settle_lora(config.lora, read_run_config(found).lora, str(found), resumes=resume_from is not None)


def planned_architecture(config: RunConfig, resume_from: Path | None) -> ModelConfig:
    """As `resolve_architecture`, but the YAML's `model:` section is enough where the weights are not here yet."""
    folders = [config.model.pretrained_checkpoint, config.model.vision_tower]
    missing = [folder for folder in folders if folder is not None and not Path(folder).is_dir()]
    if resume_from is None and (missing or config.model.pretrained_checkpoint is None):
        if config.architecture is None:
            found = f"{missing[0]}: no such folder" if missing else "there is no --pretrained-checkpoint"
            raise ValueError(
                f"{found}, and the --config file has no `model:` section; give one of them, for the model's sizes"
            )
        return config.architecture
    return resolve_architecture(config, resume_from)


def assets_folder(config: RunConfig, resume_from: Path | None) -> Path:
    """Where the run's tokenizer and image-processor files are. Raises ValueError where no flag leads to any."""
    for source in (resume_from, config.model.pretrained_checkpoint, config.model.tokenizer):
        if source is not None:
            return assets_of(Path(source))
    raise ValueError("no tokenizer: give --tokenizer FOLDER, since there is no --pretrained-checkpoint to take it from")


def chat_template(
    config: RunConfig, tokenizer: Path, *, trained: bool, checks_only: bool = False
) -> ChatTemplate | None:
    """What exports of the run get of its `--version`; None where that has no such thing, or is not known here.

    Rendered and tokenized by transformers it gives the very rows that training saw.

    Args:
        tokenizer: folder of the run's.
        trained: whether it has made a step, or will have.
        checks_only: nothing will be exported, so that the tokenizer, which takes its time, is read only where that may
            raise.

    Raises:
        ValueError: it is not for this tokenizer.
    """
    if config.data.version not in template_names():  # a template of one's own, which may be elsewhere by now
        return None
    template = find_template(config.data.version)
    if template.chat_template is None:
        return None
    stops: list[str] = []
    jinja, has_needs = template.chat_template, bool(template.needed_tokens or template.renders is not None)
    has_tokenizer = any((tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if has_needs or (has_tokenizer and not checks_only):
        found = load_tokenizer(str(tokenizer))
        if has_needs:
            template.check(found)
            stops = found.backend.convert_ids_to_tokens(template.stop_ids(found))
        if template.renders is None and found.eats_dummy_space:
            jinja = with_blank_behind_images(jinja)
    return ChatTemplate(
        version=template.name,
        jinja=jinja,
        is_tokenizers=template.renders is not None,
        replaces=template.name not in ("plain", data_flags(config.architecture).version),
        trained=trained and template.name != "plain",
        stop_tokens=tuple(stops),
    )


def refuse_without_export(config: RunConfig, resume_from: Path | None) -> list[str]:
    """ValueError where what the run trains could not be exported; else lines to know about its export."""
    assets = assets_folder(config, resume_from)
    template = chat_template(config, Path(config.model.tokenizer or assets), trained=True, checks_only=True)
    return check_export(config, assets, template)


def starts_from_hf(config: RunConfig, resume_from: Path | None) -> bool:
    """Whether the weights come from a Hugging Face folder, which then holds tensors that exports will need."""
    source = config.model.pretrained_checkpoint
    return resume_from is None and source is not None and find_checkpoint(Path(source)) is None


def _refuse_other_parts(flags: ModelFlags, found: ModelConfig, checkpoint: Path, *, resumes: bool) -> None:
    # Loading would not notice: a linear connector is the first layer of an MLP, and the rest would be left out.
    asked = flags.mm_projector_type
    if asked is not None and asked != found.projector_type:
        raise ValueError(
            f"--mm-projector-type is {asked}, but the connector in checkpoint {checkpoint} is {found.projector_type}; "
            "leave the flag out"
        )
    grids = flags.image_grid_pinpoints
    if resumes and grids is not None and tiles_of(grids, found.vision.image_size) != found.tiles:
        raise ValueError(
            f"--image-grid-pinpoints is {grids}, but the model in checkpoint {checkpoint} has "
            f"{'no tiles' if found.tiles is None else 'other grids'}; leave the flag out"
        )
    if flags.vision_backend not in (None, found.vision.backend):
        raise ValueError(
            f"--vision-backend is {flags.vision_backend}, but the vision tower in checkpoint {checkpoint} is "
            f"{found.vision.backend}'s; leave the flag out, or export the checkpoint and start from that"
        )


def _refuse_other_sizes(config: RunConfig, found: ModelConfig, source: Path) -> None:
    asked, found = config.architecture, with_architecture(config, found).architecture
    for part in ("language", "vision", "image", "qformer", "tiles"):
        if asked is not None and _stated(getattr(asked, part)) != _stated(getattr(found, part)):
            raise ValueError(
                f"the YAML's model.{part} is {getattr(asked, part)}, but --pretrained-checkpoint {source} holds "
                f"{getattr(found, part)}; leave the `model:` section out"
            )


def _stated(part: Any) -> Any:
    """`part` with every field of its transformers configuration: a YAML may leave those out that are the defaults."""
    hf = getattr(part, "hf", None)
    if not hf or "model_type" not in hf:
        return part
    try:
        return replace(part, hf=clean_config(hf))
    except Exception:  # transformers 5 validates with exceptions of several libraries; the comparison says the rest
        return part
