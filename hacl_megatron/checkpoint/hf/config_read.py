"""Hugging Face `config.json` and processor settings -> `ModelConfig`; `config_write` goes back.

Three layouts are read, told apart by their keys, not by `model_type` (LLaVA's own checkpoints carry `llava` as well as
`llava_llama`):

    hf      LlavaForConditionalGeneration: `text_config`, `vision_config`, `vision_feature_layer`, `image_token_index`;
            LLaVA-NeXT's and LLaVA-OneVision's, which add how pictures are cut into tiles (`tiled_models`);
            or Blip2ForConditionalGeneration with a LLaMA: `qformer_config`, `num_query_tokens`
    llava   the original layout (LlavaLlamaForCausalLM): LLaMA's keys and `mm_*` ones; the tower is named, not
            described; LLaVA-1.5's and LLaVA-NeXT's
    parts   a bare LLaMA beside the folder of a tower, with a connector yet to be trained

Language models of every family in `config.families` are read where this says LLaMA, and towers of every kind in
`config.towers`. What the model cannot do is refused here, by name, before any weight is read.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from hacl_megatron.checkpoint.hf.adapters.settings import refuse_adapter_folder
from hacl_megatron.checkpoint.hf.config_write import VERSION_KEY, usual_version
from hacl_megatron.checkpoint.hf.json_files import parse, read_config, refuse_unless, values_of_any_type
from hacl_megatron.checkpoint.hf.spellings import canonical_name
from hacl_megatron.checkpoint.hf.tiled_models import (
    LLAVA_NEXT,
    TILED_MODELS,
    USUAL_VIDEO_TOKEN,
    VIDEO_TOKEN,
    TiledModel,
    check_tiles_of,
    read_original_tiles,
    read_tiles,
)
from hacl_megatron.checkpoint.hf.tower_config import (
    IMAGE_FLAGS,
    TowerFacts,
    aspect_ratio,
    find_vision_tower,
    image_config,
    qformer_config,
    tower_beside,
    tower_in_model,
    vision_config,
)
from hacl_megatron.checkpoint.hf.weight_files import WeightFiles, has_weights
from hacl_megatron.config.architecture import LanguageConfig, ModelConfig
from hacl_megatron.config.connectors import mlp_depth
from hacl_megatron.config.families import FAMILIES, LLAMA, family_of_model_type, language_family
from hacl_megatron.config.flags import DataFlags
from hacl_megatron.config.towers import TowerKind

Connector = tuple[str, int]
"""`projector_type`, and the selected vision layer."""

ROWS_AT_ONCE = 8192
"""Of the LM head and the embedding, which are compared in such blocks: some 130 MB for a 7B."""


def read_model_config(
    folder: str | Path, vision_tower: str | Path | None = None, *, weights: Path | None = None
) -> ModelConfig:
    """Sizes of the model in a Hugging Face folder.

    Args:
        folder: a folder of one of the three layouts above.
        vision_tower: folder of the tower, for `llava` (CLIP alone) and `parts` (`config.towers`). Default: where
            `mm_vision_tower` points, if that is a folder, or the sizes of the tower that it names.
        weights: folder of the weights, where `folder` holds adapters beside its config.json.

    Raises:
        ValueError: adapters without `weights`, no or broken config.json, an unknown layout, or something the model does
            not support.
    """
    folder = Path(folder)
    if weights is None:
        refuse_adapter_folder(folder)
    with values_of_any_type(folder / "config.json"):
        return _read_model_config(folder, vision_tower, weights)


def _read_model_config(folder: Path, vision_tower: str | Path | None, weights: str | Path | None) -> ModelConfig:
    config = read_config(folder / "config.json")
    layout = layout_of(config, folder)
    where = folder / "config.json"
    tiled = TILED_MODELS.get(config["model_type"]) if layout == "hf" else None
    if layout == "hf" and vision_tower is not None:
        raise ValueError(f"{folder} holds its vision tower; leave {vision_tower} out")
    if layout == "hf":
        text, tower, facts = config.get("text_config") or {}, None, tower_in_model(folder, config)
        if tiled is not None:
            text = {"model_type": tiled.language, **text}
    else:
        text, tower = config, find_vision_tower(folder, config, vision_tower)
        facts = tower_beside(folder, config, tower)
    vision = vision_config(facts)
    if config.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ValueError(
            f"{where}: mm_hidden_size is {config['mm_hidden_size']}, but the tower's is {vision.hidden_size}"
        )
    projector_type, layer = _connector(layout, config, facts, where, tiled)
    image = image_config(facts, vision, tiled)
    if tiled is not None:
        tiles = read_tiles(tiled, config, facts.processor, where)
    else:
        tiles = read_original_tiles(config, where) if layout == "llava" else None
    language = language_config(text, where, tie=says_tied(config))
    model_config = ModelConfig(
        language=language,
        vision=vision,
        image=image,
        projector_type=projector_type,
        vision_select_layer=layer,
        qformer=qformer_config(facts, vision) if projector_type == "qformer" else None,
        tiles=tiles,
        extra=_extra_facts(layout, config, text, facts, tower, rows=language.vocab_size, tiled=tiled),
    )
    check_tiles_of(model_config, where)
    if not 1 <= model_config.num_vision_layers_built <= vision.num_layers:
        raise ValueError(
            f"{where}: the selected vision layer is {layer}, but the tower has {vision.num_layers} layers; it must lie "
            f"in 1..{vision.num_layers} or -{vision.num_layers}..-1"
        )
    if model_config.language.tie_word_embeddings and has_own_head(model_config, weights or folder):
        model_config = replace(model_config, language=replace(model_config.language, tie_word_embeddings=False))
    return model_config


def layout_of(config: dict[str, Any], folder: Path) -> Literal["hf", "llava", "parts"]:
    """Which of the three layouts a `config.json` belongs to; ValueError for any other."""
    model_type = config.get("model_type")
    plain = [family.model_type for family in FAMILIES.values()]
    *others, last = [family.title for family in FAMILIES.values()]
    titles = f"a {', '.join(others)} or {last}"
    if ("text_config" in config and model_type == "llava") or model_type in [*TILED_MODELS]:
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
        f"LlavaForConditionalGeneration, {', '.join(one.model_class for one in TILED_MODELS.values())}, "
        f"Blip2ForConditionalGeneration, LLaVA's own {original} (with mm_vision_tower) or {titles}"
    )


def data_flags(config: ModelConfig) -> DataFlags:
    """How a model out of a Hugging Face folder was trained to see its data: image shape, and the dialogue template."""
    return DataFlags(
        image_aspect_ratio=config.extra.get("image_aspect_ratio") or "pad",
        **{key: config.extra[key] for key in IMAGE_FLAGS if key in config.extra},
        version=config.extra.get(VERSION_KEY) or usual_version(config),
    )


# ------------------------------------------------------------------------------------------------------ tied embeddings
#
# transformers 5 compares the files' tensors and ties only equal ones; 4.x, and LLaVA's own code, drop the head whatever
# it holds. The head that was saved is what the model computed with, so it is kept, as 5 does; `open_sources` says so.


def says_tied(config: dict[str, Any]) -> bool:
    """Whether a `config.json` ties them: either level may say so, but `Blip2Config`'s own has no voice in it."""
    levels = [config.get("text_config") or {}]
    if config.get("model_type") != "blip-2":
        levels.append(config)
    return any(level.get("tie_word_embeddings") for level in levels)


def has_own_head(config: ModelConfig, folder: Path) -> bool:
    """Whether the weight files of `folder` hold an LM head that differs from the embedding.

    Args:
        config: of the model in `folder`, tied or not.

    Raises:
        ValueError: see `WeightFiles`. A folder without weights is none: it has no head.
    """
    if not has_weights(folder):
        return False
    weights, family = WeightFiles.of_folder(folder), language_family(config.language.family)
    names = {canonical_name(config, name, tower_folder=False): name for name in weights}
    head, embedding = (names.get(f"text.{name}") for name in (family.lm_head, family.embedding))
    if head is None or embedding is None:
        return False
    shape = weights.shape(head)
    if shape != weights.shape(embedding):
        return True
    dtype = torch.promote_types(weights.dtype(head), weights.dtype(embedding))
    for start in range(0, shape[0], ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, shape[0]))
        if not torch.equal(*(weights.read(name, rows).to(dtype) for name in (head, embedding))):
            return True
    return False


# -------------------------------------------------------------------------------------------------------------- reading


def _connector(
    layout: str, config: dict[str, Any], facts: TowerFacts, where: Path, tiled: TiledModel | None
) -> Connector:
    if facts.qformer is not None and layout != "llava":
        refuse_unless(where, config, {"quantization_config": (None,)})
        return "qformer", -1
    if layout == "hf":
        return _hf_connector(config, facts.kind, where, tiled)
    if layout == "parts":
        return "mlp2x_gelu", -2
    if "original" not in facts.kind.stands_in:
        raise ValueError(
            f"{facts.where}: the vision tower is a {facts.kind.model_type}, but the original LLaVA layout in "
            f"{where.parent} has CLIP's alone; give the folder of its own tower"
        )
    return llava_connector(config, where)


def language_config(values: dict[str, Any], where: Path, tie: bool) -> LanguageConfig:
    """Sizes of the language model that `values`, a `config.json` or its `text_config`, describes; or a ValueError."""
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
    return LanguageConfig(family=family.name, **{**sizes, "tie_word_embeddings": tie})


def _hf_connector(config: dict[str, Any], kind: TowerKind, where: Path, tiled: TiledModel | None) -> Connector:
    usual = ("default", -2) if tiled is None else (tiled.select_strategy, tiled.select_layer)
    strategy = config.get("vision_feature_select_strategy", usual[0])
    if strategy == "default" != kind.select_strategy:
        raise ValueError(
            f"{where}: vision_feature_select_strategy is 'default', which drops the first feature, but a "
            f"{kind.model_type} has no class token there; expected 'full'"
        )
    refuse_unless(where, {**config, "vision_feature_select_strategy": strategy}, {
        "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,), "quantization_config": (None,),
        "vision_feature_select_strategy": (kind.select_strategy,),
    })  # fmt: skip
    layer = config.get("vision_feature_layer", usual[1])
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"{where}: vision_feature_layer is {layer!r}; this trainer takes features from one layer only")
    return "mlp2x_gelu", layer


def llava_connector(config: dict[str, Any], where: Path) -> Connector:
    """Of a `config.json` in the original layout."""
    refuse_unless(where, config, {
        "mm_vision_select_feature": ("patch",), "mm_use_im_start_end": (False, None), "s2": (False, None),
        "image_aspect_ratio": ("pad", "square", "stretch", None, "anyres"),
        # that of anyres is for `read_original_tiles` to look at
        **({} if config.get("image_aspect_ratio") == "anyres" else {"mm_patch_merge_type": ("flat", None)}),
    })  # fmt: skip
    kind = config.get("mm_projector_type", "linear")  # LLaVA's own default, build_vision_projector
    if mlp_depth(str(kind)) is None:
        raise ValueError(f"{where}: mm_projector_type is {kind!r}; expected linear or mlpNx_gelu")
    layer = config.get("mm_vision_select_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"{where}: mm_vision_select_layer is {layer!r}; expected one layer number")
    return kind, layer


def _extra_facts(
    layout: str,
    config: dict[str, Any],
    text: dict[str, Any],
    tower_facts: TowerFacts,
    tower: Path | None,
    *,
    rows: int,
    tiled: TiledModel | None,
) -> dict[str, Any]:
    """What the way back needs and the model does not; plain JSON values, so that run_config.yaml can hold them."""
    facts: dict[str, Any] = {"layout": layout}
    if isinstance(config.get(VERSION_KEY), str):
        facts[VERSION_KEY] = config[VERSION_KEY]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key) if text.get(key) is None else text[key]
        # A null is no silence: of that the family's class has a default.
        if value is not None or (key in text and key != "pad_token_id"):
            facts[key] = value
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    if dtype is not None:
        facts["dtype"] = str(dtype).removeprefix("torch.")
    for key, choices in IMAGE_FLAGS.items():
        refuse_unless(tower_facts.where.parent / "config.json", config, {key: choices})
        if key in config:
            facts[key] = config[key]
    kind, processor = tower_facts.kind, tower_facts.processor
    if kind.megatron is not None:
        there = {ours: key for ours, key in kind.megatron.kept.items() if key in tower_facts.vision}
        facts |= {ours: tower_facts.vision[key] for ours, key in there.items()}
    if not processor.get("do_convert_rgb", True):
        facts["do_convert_rgb"] = processor["do_convert_rgb"]  # training converts; of RGB pictures it is the same
    if layout == "hf":
        # transformers 5 reads both names, and writes the first. An old BLIP-2 has no such token.
        keys = ("image_token_index", "image_token_id")
        key, image_token = next(((key, config[key]) for key in keys if config.get(key) is not None), (keys[0], None))
        if image_token is None and tower_facts.qformer is None:
            image_token = 32000 if tiled is None else tiled.image_token  # LlavaConfig's own default, or its own
        if image_token is not None:
            _refuse_image_token_without_row(key, image_token, rows, tower_facts.where)
            facts["image_token_index"] = image_token
        facts["image_aspect_ratio"] = aspect_ratio(processor, kind) if tiled is None else tiled.aspect_ratio
        if tiled is not None and tiled.pools:
            facts[VIDEO_TOKEN] = _video_token(config, tower_facts.where)
    else:
        own = config.get("image_aspect_ratio")
        if own == "anyres":  # its base view is stretched
            own = LLAVA_NEXT.aspect_ratio
        # LLaVA's own default is square, whatever a CLIP's processor says.
        square = "original" in kind.stands_in
        facts["image_aspect_ratio"] = own or ("square" if square else aspect_ratio(processor, kind))
        facts["mm_vision_tower"] = config.get("mm_vision_tower", str(tower))
        facts["vision_tower_folder"] = None if tower is None else str(tower)
    return facts


def _video_token(config: dict[str, Any], where: Path) -> int:
    # transformers 5 reads both names; the mark need not have a row in the vocabulary, for no text has it.
    key = next((key for key in (VIDEO_TOKEN, "video_token_id") if config.get(key) is not None), None)
    if key is None:
        return USUAL_VIDEO_TOKEN
    if type(config[key]) is not int or config[key] < 0:
        raise ValueError(f"{where}: {key} is {config[key]!r}; expected an id")
    return config[key]


def _refuse_image_token_without_row(key: str, token: Any, rows: int, where: Path) -> None:
    """transformers looks up the embedding of every id, the image's too, before it puts the features there."""
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < rows:
        raise ValueError(
            f"{where}: {key} is {token!r}, but the vocabulary has {rows} rows; expected an id in 0..{rows - 1}: give "
            "<image> such a one in config.json and tokenizer, or add rows (transformers' resize_token_embeddings)"
        )
