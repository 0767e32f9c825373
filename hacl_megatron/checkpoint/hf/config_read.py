"""Hugging Face `config.json` and processor settings -> `ModelConfig`; `config_write` goes back.

Three layouts are read, told apart by their keys, not by `model_type` (LLaVA's own checkpoints carry `llava` as well as
`llava_llama`):

    hf      LlavaForConditionalGeneration: `text_config`, `vision_config`, `vision_feature_layer`, `image_token_index`;
            or Blip2ForConditionalGeneration with a LLaMA: `qformer_config`, `num_query_tokens`
    llava   the original layout (LlavaLlamaForCausalLM): LLaMA's keys and `mm_*` ones; the tower is named, not described
    parts   a bare LLaMA beside the folder of a tower, with a connector yet to be trained

Language models of every family in `config.families` are read where this says LLaMA, and towers of every kind in
`config.towers`. What the model cannot do is refused here, by name, before any weight is read.
"""

from pathlib import Path
from typing import Any, Literal

from hacl_megatron.checkpoint.hf.json_files import parse, read_json, refuse_unless
from hacl_megatron.checkpoint.hf.tower_config import (
    TowerFacts,
    aspect_ratio,
    find_vision_tower,
    image_config,
    qformer_config,
    tower_beside,
    tower_in_model,
    vision_config,
)
from hacl_megatron.config.architecture import LanguageConfig, ModelConfig
from hacl_megatron.config.connectors import mlp_depth
from hacl_megatron.config.families import FAMILIES, LLAMA, family_of_model_type
from hacl_megatron.config.flags import DataFlags
from hacl_megatron.config.towers import TowerKind

Connector = tuple[str, int]
"""`projector_type`, and the selected vision layer."""


def read_model_config(folder: str | Path, vision_tower: str | Path | None = None) -> ModelConfig:
    """Sizes of the model in a Hugging Face folder.

    Args:
        folder: a folder of one of the three layouts above.
        vision_tower: folder of the tower, for `llava` (CLIP alone) and `parts` (CLIP, SigLIP, BLIP-2). Default: where
            `mm_vision_tower` points, if that is a folder, or the sizes of the tower that it names.

    Raises:
        ValueError: no or broken config.json, an unknown layout, or something the model does not support.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    layout = layout_of(config, folder)
    where = folder / "config.json"
    if layout == "hf" and vision_tower is not None:
        raise ValueError(f"{folder} holds its vision tower; leave {vision_tower} out")
    if layout == "hf":
        text, tower, facts = config.get("text_config") or {}, None, tower_in_model(folder, config)
    else:
        text, tower = config, find_vision_tower(folder, config, vision_tower)
        facts = tower_beside(folder, config, tower)
    vision = vision_config(facts)
    if config.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ValueError(
            f"{where}: mm_hidden_size is {config['mm_hidden_size']}, but the tower's is {vision.hidden_size}"
        )
    projector_type, layer = _connector(layout, config, facts, where)
    # Blip2Config has no opinion of its own on tied embeddings, LlavaConfig has.
    tie = None if projector_type == "qformer" else config.get("tie_word_embeddings")
    model_config = ModelConfig(
        language=_language_config(text, where, tie=tie),
        vision=vision,
        image=image_config(facts.processor, vision),
        projector_type=projector_type,
        vision_select_layer=layer,
        qformer=qformer_config(facts, vision) if projector_type == "qformer" else None,
        extra=_extra_facts(layout, config, text, facts, tower),
    )
    if not 1 <= model_config.num_vision_layers_built <= vision.num_layers:
        raise ValueError(
            f"{where}: the selected vision layer is {layer}, but the tower has {vision.num_layers} layers; it must lie "
            f"in 1..{vision.num_layers} or -{vision.num_layers}..-1"
        )
    return model_config


def layout_of(config: dict[str, Any], folder: Path) -> Literal["hf", "llava", "parts"]:
    """Which of the three layouts a `config.json` belongs to; ValueError for any other."""
    model_type = config.get("model_type")
    plain = [family.model_type for family in FAMILIES.values()]
    titles = " or ".join(f"a {family.title}" for family in FAMILIES.values())
    if "text_config" in config and model_type == "llava":
        return "hf"
    if model_type == "blip-2":
        text = (config.get("text_config") or {}).get("model_type", "opt")  # Blip2Config's own default
        if text in plain:
            return "hf"
        raise ValueError(
            f"{folder}/config.json: a BLIP-2 whose language model is {text!r}; expected {titles}: give this folder as "
            "the vision tower beside one"
        )
    family = family_of_model_type(model_type)
    if family is not None and family.llava_model_types and "mm_vision_tower" in config:
        return "llava"
    if model_type in plain:
        return "parts"
    found = (config.get("architectures") or ["no architectures"])[0]
    original = " or ".join(family.llava_architecture for family in FAMILIES.values() if family.llava_model_types)
    raise ValueError(
        f"{folder}/config.json: found model_type {model_type!r} ({found}), expected "
        f"LlavaForConditionalGeneration, Blip2ForConditionalGeneration, LLaVA's own {original} (with "
        f"mm_vision_tower) or {titles}"
    )


def data_flags(config: ModelConfig) -> DataFlags:
    """How a model out of a Hugging Face folder was trained to see its data: image shape, and the dialogue template."""
    return DataFlags(
        image_aspect_ratio=config.extra.get("image_aspect_ratio") or "pad",
        version="v1" if config.qformer is None else "minigpt4",
    )


# -------------------------------------------------------------------------------------------------------------- reading


def _connector(layout: str, config: dict[str, Any], facts: TowerFacts, where: Path) -> Connector:
    if facts.qformer is not None and layout != "llava":
        refuse_unless(where, config, {"quantization_config": (None,)})
        return "qformer", -1
    if layout == "hf":
        return _hf_connector(config, facts.kind, where)
    if layout == "parts":
        return "mlp2x_gelu", -2
    if "original" not in facts.kind.stands_in:
        raise ValueError(
            f"{facts.where}: the vision tower is a {facts.kind.model_type}, but the original LLaVA layout in "
            f"{where.parent} has CLIP's alone; give the folder of its own tower"
        )
    return _llava_connector(config, where)


def _language_config(values: dict[str, Any], where: Path, tie: bool | None) -> LanguageConfig:
    model_type = values.get("model_type", LLAMA.model_type)
    family = family_of_model_type(model_type)
    if family is None:
        known = sorted(name for one in FAMILIES.values() for name in (one.model_type, *one.llava_model_types))
        refuse_unless(where, {"text_config.model_type": model_type}, {"text_config.model_type": tuple(known)})
    refuse_unless(where, values, dict(family.supported))
    from transformers import CONFIG_MAPPING  # a second that an export need not spend

    config_class = CONFIG_MAPPING[family.model_type]
    # Rotary positions are the family's to read: transformers' versions differ in them.
    parsed = parse(config_class, {key: value for key, value in values.items() if not key.startswith("rope_")}, where)
    sizes = family.read(parsed, values, where)
    # transformers ties when either level says so (LlavaConfig.__post_init__).
    sizes["tie_word_embeddings"] = bool(tie or sizes["tie_word_embeddings"])
    return LanguageConfig(family=family.name, **sizes)


def _hf_connector(config: dict[str, Any], kind: TowerKind, where: Path) -> Connector:
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy == "default" != kind.select_strategy:
        raise ValueError(
            f"{where}: vision_feature_select_strategy is 'default', which drops the first feature, but a "
            f"{kind.model_type} has no class token there; expected 'full'"
        )
    refuse_unless(where, config, {
        "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,), "quantization_config": (None,),
        "vision_feature_select_strategy": (kind.select_strategy,),
    })  # fmt: skip
    layer = config.get("vision_feature_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"{where}: vision_feature_layer is {layer!r}; this trainer takes features from one layer only")
    return "mlp2x_gelu", layer


def _llava_connector(config: dict[str, Any], where: Path) -> Connector:
    refuse_unless(where, config, {
        "mm_vision_select_feature": ("patch",), "mm_patch_merge_type": ("flat", None),
        "mm_use_im_start_end": (False, None), "s2": (False, None),
    })  # fmt: skip
    kind = config.get("mm_projector_type", "linear")  # LLaVA's own default, build_vision_projector
    if mlp_depth(str(kind)) is None:
        raise ValueError(f"{where}: mm_projector_type is {kind!r}; expected linear or mlpNx_gelu")
    layer = config.get("mm_vision_select_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"{where}: mm_vision_select_layer is {layer!r}; expected one layer number")
    return kind, layer


def _extra_facts(
    layout: str, config: dict[str, Any], text: dict[str, Any], tower_facts: TowerFacts, tower: Path | None
) -> dict[str, Any]:
    """What the way back needs and the model does not; plain JSON values, so that run_config.yaml can hold them."""
    facts: dict[str, Any] = {"layout": layout}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key) if text.get(key) is None else text[key]
        if value is not None:
            facts[key] = value
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    if dtype is not None:
        facts["dtype"] = str(dtype).removeprefix("torch.")
    kind, processor = tower_facts.kind, tower_facts.processor
    if kind.megatron is not None:
        there = {ours: key for ours, key in kind.megatron.kept.items() if key in tower_facts.vision}
        facts |= {ours: tower_facts.vision[key] for ours, key in there.items()}
    if layout == "hf":
        # transformers 5 reads both names, and writes the first. An old BLIP-2 has no such token.
        image_token = config.get("image_token_index", config.get("image_token_id"))
        image_token = 32000 if image_token is None and tower_facts.qformer is None else image_token
        if image_token is not None:
            facts["image_token_index"] = image_token
        facts["image_aspect_ratio"] = aspect_ratio(processor, kind)
    else:
        own = config.get("image_aspect_ratio")
        # LLaVA's own default is square, whatever a CLIP's processor says.
        square = "original" in kind.stands_in
        facts["image_aspect_ratio"] = own or ("square" if square else aspect_ratio(processor, kind))
        facts["mm_vision_tower"] = config.get("mm_vision_tower", str(tower))
        facts["vision_tower_folder"] = None if tower is None else str(tower)
    return facts
