"""Whether transformers' LLaVA or BLIP-2 computes what ours does: logits on a random batch of images and text, in fp32.

`image_agreement` looks at the pixels of pictures.

Both models are held whole in this one process, so a check of a 7B needs some 60 GB of memory.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hacl_megatron.assemble.module import build_module
from hacl_megatron.assemble.processes import joined_processes
from hacl_megatron.batch import PackedBatch, SegmentLengths
from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.hf.adapters.folder import ADAPTER_FILES
from hacl_megatron.checkpoint.hf.adapters.settings import ADAPTER_CONFIG
from hacl_megatron.checkpoint.hf.config_write import to_config_json
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE, SourceTensors
from hacl_megatron.checkpoint.hf.json_files import one_line, read_json
from hacl_megatron.checkpoint.hf.spellings import NEWLINE
from hacl_megatron.checkpoint.run.folder import read_run_config
from hacl_megatron.checkpoint.run.load import load_checkpoint
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.connectors import connector_depth
from hacl_megatron.config.console import exit_with_error
from hacl_megatron.config.families import language_family
from hacl_megatron.config.flags import ParallelFlags
from hacl_megatron.config.run import RunConfig
from hacl_megatron.evaluation.image_agreement import compare_pixels
from hacl_megatron.evaluation.random_dialogues import images_for_transformers, random_batch

TOLERANCE = 2e-4
"""Largest difference of two logits, for logits of order 1; more for larger ones in proportion."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close two models' logits are."""

    largest_difference: float
    largest_logit: float
    same_argmax: float
    """Share of rows whose most likely token is the same."""
    num_rows: int

    @property
    def holds(self) -> bool:
        return self.largest_difference <= TOLERANCE * max(1.0, self.largest_logit) and self.same_argmax == 1.0

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest_difference:.2e} (logits up to {self.largest_logit:.1f}), same "
            f"arg-max on {self.same_argmax:.2%} of {self.num_rows} rows"
        )


def report_agreement(
    checkpoint: Path,
    hf_folder: Path,
    sources: SourceTensors | None = None,
    *,
    dtype: torch.dtype | None = None,
    adapters: Path | None = None,
    image_aspect_ratio: str | None = None,
) -> None:
    """Print how a checkpoint agrees with a Hugging Face folder, logits and pixels; leave with an error if it does not.

    Args:
        image_aspect_ratio: that the folder was written with; default the checkpoint's.
        sources: what the checkpoint was converted from, where it is more or other than `hf_folder` alone can give
            transformers: the original layout, two parts, an adapter.
        dtype: that a conversion rounded the weights to; both models' are, for the comparison.
        adapters: folder that the conversion laid over `hf_folder`; its LoRA is merged by `peft` here.
    """
    agreement = compare_models(checkpoint, hf_folder, sources, dtype=dtype, adapters=adapters)
    print(f"verify: {agreement}")
    if not agreement.holds:
        exit_with_error(f"{checkpoint} and {hf_folder} do not agree: {agreement}")
    run = read_run_config(checkpoint)
    tower = run.architecture.extra.get("vision_tower_folder") if sources is not None else None
    pixels = compare_pixels(
        run.architecture,
        Path(tower) if tower else hf_folder,
        aspect_ratio=image_aspect_ratio or run.data.image_aspect_ratio,
    )
    if pixels is None:
        print(f"verify: no pixels compared, for {tower or hf_folder} describes no image processor")
        return
    print(f"verify: {pixels}")
    if not pixels.holds:
        exit_with_error(f"{checkpoint} and {tower or hf_folder} do not see the same pictures: {pixels}")


@torch.no_grad()
def compare_models(
    checkpoint: Path,
    hf_folder: Path,
    sources: SourceTensors | None = None,
    *,
    dtype: torch.dtype | None = None,
    adapters: Path | None = None,
) -> Agreement:
    """Logits of every text row of two dialogues with images (`random_batch`); arguments as for `report_agreement`."""
    reader = ShardedReader(checkpoint)
    config = reader.model_config
    settings = read_json(hf_folder / "config.json")
    batch = random_batch(config, settings.get("image_token_index", settings.get("image_token_id")))
    theirs = transformers_logits(hf_folder, config, sources, reader, batch, dtype, adapters)
    with warnings.catch_warnings():  # megatron-core names every library that a machine does not have
        warnings.simplefilter("ignore")
        ours = our_logits(reader, batch, dtype)
    # Rows of special tokens that an export adds are in one of the models alone.
    rows = min(config.language.vocab_size, theirs.shape[1])
    ours, theirs = ours[:, :rows], theirs[:, :rows]
    return Agreement(
        largest_difference=float((ours - theirs).abs().max()),
        largest_logit=float(theirs.abs().max()),
        same_argmax=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        num_rows=theirs.shape[0],
    )


# ------------------------------------------------------------------------------------------------------- transformers


def transformers_logits(
    folder: Path,
    config: ModelConfig,
    sources: SourceTensors | None,
    reader: ShardedReader,
    batch: PackedBatch,
    dtype: torch.dtype | None,
    adapters: Path | None = None,
) -> Tensor:
    """Logits [target rows, vocabulary] of transformers' model, dialogue by dialogue."""
    layout, stated = config.extra.get("layout"), "image_token_index" in config.extra
    whole = sources is None or layout == "hf"
    if whole:
        model = _whole(folder, config, sources, adapters)
    else:
        model = _assembled(folder, config, sources, reader, adapters)
    by_ids = sources is None or (whole and stated)
    _round(model, dtype)
    model.eval()
    logits = []
    for dialogue in range(2):
        start, stop = batch.cu_seqlens[dialogue : dialogue + 2].tolist()
        ids = batch.token_ids[start:stop].clone()
        inside = (batch.image_rows >= start) & (batch.image_rows < stop)
        text = torch.ones(stop - start, dtype=torch.bool)
        text[batch.image_rows[inside] - start] = False
        images = images_for_transformers(config, batch, dialogue)
        if by_ids:
            ids[~text] = model.config.image_token_id
            logits.append(model(input_ids=ids[None], **images, use_cache=False).logits[0][text])
            continue
        features = model.get_image_features(**images)
        # By embeddings, for these vocabularies have no row for the image's token.
        hidden = model.get_input_embeddings()(ids)
        hidden[~text] = torch.cat([*features.pooler_output]).to(hidden.dtype)
        language, head = _language_parts(model)
        output = language(inputs_embeds=hidden[None], use_cache=False).last_hidden_state[0]
        logits.append(head(output[text]))
    return torch.cat(logits).float()


def _language_parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The language model inside a LLaVA or BLIP-2, and its LM head."""
    inside = model.language_model.model if hasattr(model, "qformer") else model.model.language_model
    return inside, model.get_output_embeddings()


def _whole(folder: Path, config: ModelConfig, sources: SourceTensors | None, adapters: Path | None = None) -> nn.Module:
    """transformers' own reading of `folder`, with the adapter over its connector where `sources` has one."""
    import transformers

    blip2 = config.qformer is not None
    (model_class,) = to_config_json(config, "hf", dtype="float32")["architectures"]
    model = getattr(transformers, model_class).from_pretrained(folder, dtype=torch.float32)
    if adapters is not None:
        model = _with_lora(model, adapters, sources)
    own = {str(folder), HEADS_FILE, *(str(adapters / name) for name in ADAPTER_FILES if adapters is not None)}
    if sources is not None and set(sources.files) - own:
        if blip2:
            linears = {"projector.0.": model.language_projection}
        else:
            connector = model.model.multi_modal_projector
            linears = {"projector.0.": connector.linear_1, "projector.2.": connector.linear_2}
        for prefix, linear in linears.items():
            for name, parameter in linear.named_parameters():
                parameter.copy_(sources.read(prefix + name))
        if config.tiles is not None:
            model.model.image_newline.copy_(sources.read(NEWLINE))
    return model


def _with_lora(model: nn.Module, adapters: Path, sources: SourceTensors) -> nn.Module:
    """`model` with the LoRA of `adapters` merged in by peft, rounded as a conversion that merges rounds it.

    Raises:
        ValueError: peft is not installed, or finds no place for a tensor.
    """
    if not (adapters / ADAPTER_CONFIG).is_file():
        return model
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError("--verify of adapters needs the package peft: pip install -e '.[lora]'") from None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(model, adapters)
    if missed := [str(one.message) for one in caught if "missing adapter keys" in str(one.message)]:
        raise ValueError(f"{adapters}: --verify cannot have peft read it over this base ({one_line(missed[0])})")
    beside = [name for name, module in wrapped.get_base_model().named_modules() if hasattr(module, "lora_A")]
    merged = wrapped.merge_and_unload()
    for name in beside if sources.kept is None else ():
        weight = merged.get_submodule(name).weight
        weight.copy_(weight.to(sources.dtype(sources.table.canonical(f"{name}.weight"))))
    return merged


def _language_in(folder: Path, config: ModelConfig) -> nn.Module:
    """The language model of a folder in the original layout, or of a plain one, as transformers reads it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config_class = CONFIG_MAPPING[language_family(config.language.family).model_type]
    return _loaded(AutoModelForCausalLM, folder, config_class)


def _tower_in(folder: Path, config: ModelConfig, settings: dict[str, Any]) -> nn.Module:
    """The vision tower of its own folder, or of weight files in the original layout, as transformers reads it.

    Args:
        settings: of the tower, for a `folder` whose config.json describes the language model.
    """
    import transformers

    kind = config.vision.kind
    config_class, model_class = transformers.CONFIG_MAPPING[kind.model_type], getattr(transformers, kind.model_class)
    if "mm_vision_tower" not in read_json(folder / "config.json"):
        return _loaded(model_class, folder, config_class)
    described = config_class(**{key: value for key, value in settings.items() if key != "model_type"})
    names = {r"^model\.vision_tower\.vision_tower\.": ""}
    return _loaded(model_class, folder, config_class, config=described, key_mapping=names)


def _loaded(kind: Any, folder: Path, config_class: Any, **options: Any) -> nn.Module:
    """`kind.from_pretrained(folder)` without what it says of tensors and settings that are other parts' of the model.

    Args:
        config_class: reads the folder's config.json, whatever type of model that names, unless `options` has a config.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if "config" not in options:
            options["config"] = config_class.from_pretrained(folder)
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder}: transformers' {type(model).__name__} finds no {missing[0]} there")
    return model


def _assembled(
    folder: Path, config: ModelConfig, sources: SourceTensors, reader: ShardedReader, adapters: Path | None
) -> nn.Module:
    """A model of transformers from its parts' folders; connector and Q-Former are the source's own tensors, or, where
    these are fresh, the checkpoint's."""
    import transformers

    blip2 = config.qformer is not None
    settings = to_config_json(config if blip2 else replace(config, projector_type="mlp2x_gelu"), "hf", dtype="float32")
    settings["text_config"].update(num_hidden_layers=1, pad_token_id=None)  # a stand-in, until the real one comes
    config_class = transformers.CONFIG_MAPPING[settings["model_type"]]
    model_class = getattr(transformers, settings["architectures"][0])
    if blip2:
        model = model_class(config_class.from_dict(settings)).float()
        width = config.qformer.hidden_size
    else:
        settings_of = folder if adapters is None or not (adapters / "config.json").is_file() else adapters
        layer = read_json(settings_of / "config.json").get("mm_vision_select_layer", -2)
        model = model_class(config_class.from_dict({**settings, "vision_feature_layer": layer})).float()
        files, name = next(found for name, found in sources.found.items() if name.startswith("vision."))
        model.model.vision_tower = _tower_in(files.file_of(name).parent, config, settings["vision_config"])
        width = config.vision.hidden_size
    linears: list[nn.Module] = []
    for _ in range(connector_depth(config.projector_type)):
        linears += [nn.Linear(width, config.language.hidden_size), nn.GELU()]
        width = config.language.hidden_size
    connector = nn.Sequential(*linears[:-1])
    language = _language_in(folder, config)
    if adapters is not None:
        language = _with_lora(language, adapters, sources)
    if blip2:
        model.language_model = language
    else:
        model.model.language_model, model.lm_head = language.base_model, language.get_output_embeddings()
    modules = {"projector.": connector}
    if blip2:
        model.language_projection = connector
        modules |= {"vision.": model.vision_model, "qformer.query_tokens": model, "qformer.": model.qformer}
    else:
        model.model.multi_modal_projector = connector
        modules = {NEWLINE: model.model, **modules}
    fresh = {source: tensor for rule in reader.table.rules.values() if rule.ours.startswith("connector.")
             for source, tensor in rule.to_sources(reader.read(rule.ours))}  # fmt: skip
    for canonical in [*sources.table.expected, *sources.table.carried]:
        prefix = next((prefix for prefix in modules if canonical.startswith(prefix)), None)
        if prefix is not None:
            found = sources.read(canonical) if canonical in sources.found else fresh.get(canonical)
            if found is None:  # a tower cut behind its selected layer
                continue
            name = canonical.removeprefix(prefix) or prefix.rpartition(".")[2]  # where the whole is a parameter
            modules[prefix].get_parameter(name).copy_(found)
    return model


def _round(model: nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


# --------------------------------------------------------------------------------------------------------------- ours


def our_logits(reader: ShardedReader, batch: PackedBatch, dtype: torch.dtype | None) -> Tensor:
    """Logits [target rows, padded vocabulary] of `HaclModel`, loaded by megatron-core as a run loads it."""
    # Padded as it is stored, whatever layout left it.
    parallel = ParallelFlags(device="cpu", make_vocab_size_divisible_by=reader.num_vocabulary_rows)
    lora = read_run_config(reader.folder).lora
    config = RunConfig(parallel=parallel, lora=lora, architecture=reader.model_config)
    with joined_processes(config, world_size=1) as run:
        module = build_module(config, run.groups, run.device)
        wanted = {name: part for name, part in module.sharded_state_dict().items() if not name.endswith("_extra_state")}
        module.load_state_dict(load_checkpoint({"model": wanted}, reader.folder)["model"], strict=False)
        _round(module, dtype)
        return module.eval()(batch, SegmentLengths.of(batch)).logits.float()
