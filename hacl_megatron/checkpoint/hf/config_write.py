"""`ModelConfig` -> the JSON files of a Hugging Face folder, in HF's or in the original LLaVA layout."""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from hacl_megatron.checkpoint.hf.tiled_models import (
    original_tiles_json,
    tiled_model_of,
    tiles_json,
    usual_version_of_tiles,
    why_no_tiled_model,
)
from hacl_megatron.checkpoint.hf.tower_config import IMAGE_FLAGS, RESAMPLE
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.families import language_family

Layout = Literal["hf", "llava"]


class Vocabulary(NamedTuple):
    """Rows and special tokens of a folder of some layout."""

    size: int
    image_token: int | None
    """None in the original layout, whose prompts mark an image by -200, outside the vocabulary."""
    pad_token: int | None


def vocabulary_of_layout(
    config: ModelConfig,
    layout: Layout,
    num_tokens: int | None = None,
    special: tuple[int, int] | None = None,
) -> Vocabulary:
    """The vocabulary that a folder of that layout has.

    Within one layout nothing changes. From the original layout to HF's, `<image>` and `<pad>` get the ids that the
    tokenizer has or gives them, the first ones behind its own; where the rows do not reach as far as all its ids they
    are rounded up to 64 (32000 -> 32064, as the published conversions have it). The other way, the rows from there on
    are cut (32064 -> 32000) when they are such a tail; a vocabulary that holds `<image>` within itself, or among the
    tokenizer's own pieces, keeps it.

    Args:
        num_tokens: length of the tokenizer that goes along, to the original layout without what was added to it.
            Default: as many as rows, and to the original layout any.
        special: ids of `<image>` and of the token to pad with in that tokenizer, both below `num_tokens`. Default:
            behind it.
    """
    rows, extra = config.language.vocab_size, config.extra
    image, pad = extra.get("image_token_index"), extra.get("pad_token_id")
    if layout == "hf":
        if image is not None:
            return Vocabulary(_rows_for(rows, (pad or 0) + 1), image, pad)
        if special is not None:
            return Vocabulary(_rows_for(rows, num_tokens), *special)
        image = num_tokens or rows
        return Vocabulary(_rows_for(rows, image + 2), image, image + 1)
    behind = max(rows - 64, num_tokens or 0)
    if image is None or image < behind:
        return Vocabulary(rows, None, pad)
    if pad is not None and pad >= behind:
        image = min(image, pad)
    return Vocabulary(image, None, 0)


def _rows_for(rows: int, num_tokens: int) -> int:
    """`rows`, or where they are too few for the ids below `num_tokens` the next multiple of 64."""
    return rows if num_tokens <= rows else (num_tokens + 63) // 64 * 64


VERSION_KEY = "conversation_template"
"""In an exported `config.json`: the `--version` that it was trained with, where that is not the usual one."""


def usual_version(config: ModelConfig) -> str:
    """The `--version` of published models of this kind."""
    if config.tiles is not None:
        return usual_version_of_tiles(config.language)
    return "v1" if config.qformer is None else "minigpt4"


def to_config_json(
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: str,
    image_aspect_ratio: str | None = None,
    vocabulary: Vocabulary | None = None,
    vision_tower: str | None = None,
    carries_tower: bool = True,
) -> dict[str, Any]:
    """The `config.json` of an exported folder.

    Args:
        dtype: of the weights, as `bfloat16`.
        image_aspect_ratio: `pad` or `square`; default as the model came.
        vocabulary: default `vocabulary_of_layout`.
        vision_tower: `mm_vision_tower` of the original layout; default as the model came.
        carries_tower: whether the original layout's weight files hold the vision tower too.

    Raises:
        ValueError: no model of that layout has such a connector or tower.
    """
    vocab_size, image_token, pad = vocabulary or vocabulary_of_layout(config, layout)
    extra, language, vision = config.extra, config.language, config.vision
    family = language_family(language.family)
    tokens = {**{key: extra.get(key, default) for key, default in family.special_tokens.items()}, "pad_token_id": pad}
    text = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        **family.write(replace(language, vocab_size=vocab_size), tokens),
    }
    data: dict[str, Any] = {
        key: extra[key] for key, (default, _) in IMAGE_FLAGS.items() if extra.get(key, default) != default
    }
    if (version := extra.get(VERSION_KEY) or usual_version(config)) != usual_version(config):
        data[VERSION_KEY] = version
    if layout == "llava":
        if not family.llava_model_types:
            raise ValueError(why_not_layout(config, layout))
        return {
            **text,
            "model_type": family.llava_model_types[0],
            "architectures": [family.llava_architecture],
            "torch_dtype": dtype,
            "use_cache": True,
            "mm_projector_type": config.projector_type,
            "mm_hidden_size": vision.hidden_size,
            "mm_vision_tower": vision_tower or tower_name(config),
            "mm_vision_select_layer": config.vision_select_layer,
            "mm_vision_select_feature": "patch",
            "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            # Makes LLaVA build the tower before the weights are read, so that they fill it.
            "unfreeze_mm_vision_tower": carries_tower,
            "image_aspect_ratio": image_aspect_ratio or extra.get("image_aspect_ratio", "pad"),
            **({} if config.tiles is None else original_tiles_json(config.tiles)),
            **data,
        }
    if why := why_not_layout(config, layout):
        raise ValueError(why)
    if config.qformer is not None:
        return {
            "model_type": "blip-2",
            "architectures": ["Blip2ForConditionalGeneration"],
            "torch_dtype": dtype,
            "text_config": text,
            "vision_config": tower_config_json(config),
            "qformer_config": config.qformer.hf,
            "num_query_tokens": config.qformer.num_query_tokens,
            "image_token_index": image_token,
            **data,
        }
    tiled = tiled_model_of(config)
    return {
        "model_type": "llava" if tiled is None else tiled.model_type,
        "architectures": ["LlavaForConditionalGeneration" if tiled is None else tiled.model_class],
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": tower_config_json(config),
        "image_token_index": image_token,
        "image_seq_length": config.visual_tokens,
        **({} if tiled is None else tiles_json(config)),
        "pad_token_id": pad,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision_select_layer,
        "vision_feature_select_strategy": vision.kind.select_strategy,
        "tie_word_embeddings": language.tie_word_embeddings,
        **data,
    }


def why_not_layout(config: ModelConfig, layout: Layout) -> str | None:
    """Why there is no folder of that layout for a model with these parts, or None."""
    tower, family = config.vision.kind, language_family(config.language.family)
    if config.tiles is not None and (why := why_no_tiled_model(config, layout)):
        return why
    if layout == "llava":
        part = None
        if config.qformer is not None:
            part = "connector is a Q-Former"
        elif "original" not in tower.stands_in:
            part = f"vision tower is a {tower.model_type}"
        elif not family.llava_model_types:
            part = f"language model is a {family.title}"
        return part and f"the {part}, which the original LLaVA layout has no place for; export the layout hf instead"
    if config.qformer is not None:
        if "blip-2" not in tower.stands_in:
            return f"the vision tower is a {tower.model_type}, but Blip2ForConditionalGeneration has its own ViT only"
        return None
    if "llava" not in tower.stands_in:
        return (
            f"the connector is {config.projector_type} over {tower.origin}'s vision tower, which is in no model of "
            "transformers: Blip2ForConditionalGeneration has a Q-Former, LlavaForConditionalGeneration another tower"
        )
    if config.projector_type != "mlp2x_gelu":
        instead = "" if why_not_layout(config, "llava") else "; export the original layout (llava) instead"
        return (
            f"the connector is {config.projector_type}, but LlavaForConditionalGeneration has mlp2x_gelu only{instead}"
        )
    return None


def tower_config_json(config: ModelConfig) -> dict[str, Any]:
    """The vision tower's part: `vision_config` in HF's layout, `config.json` of a CLIP folder."""
    vision, megatron = config.vision, config.vision.kind.megatron
    return vision.hf if megatron is None else megatron.write(vision, config.extra)


def tower_name(config: ModelConfig) -> str | None:
    """`mm_vision_tower`: what the source called it, else the published tower with these very sizes, else None."""
    vision, kind = config.vision, config.vision.kind
    if named := config.extra.get("mm_vision_tower"):
        return named
    for name, values in kind.published.items():
        if all(getattr(vision, ours) == values[theirs] for ours, theirs in kind.sizes.items()):
            return name
    return None


def to_preprocessor_json(config: ModelConfig, *, image_aspect_ratio: str | None = None) -> dict[str, Any]:
    """`preprocessor_config.json`: LLaVA's own when images are padded to squares, CLIP's when they are cut to squares,
    BLIP-2's or SigLIP's when both sides are resized, and that of a model that cuts them into tiles."""
    image, aspect = config.image, image_aspect_ratio or config.extra.get("image_aspect_ratio")
    square = {"height": image.size, "width": image.size}
    if tiled := tiled_model_of(config):
        return {
            "image_processor_type": tiled.image_processor,
            "processor_class": tiled.processor_class,
            "image_grid_pinpoints": tiles_json(config)["image_grid_pinpoints"],
            "do_pad": True,  # of a batch's pictures, to one number of tiles
            "do_resize": True,
            "size": square if tiled.pools else {"shortest_edge": image.size},
            **({} if tiled.pools else {"do_center_crop": True, "crop_size": square}),
            **_levels(config),
        }
    kinds = {"pad": "LlavaImageProcessor", "stretch": config.vision.kind.resizing_processor}
    crops = {"do_center_crop": True, "crop_size": square}
    return {
        "image_processor_type": kinds.get(aspect, "CLIPImageProcessor"),
        "processor_class": processor_class(config),
        **({"do_pad": True} if aspect == "pad" else {}),
        "do_resize": True,
        "size": square if aspect == "stretch" else {"shortest_edge": image.resized},
        **(crops if aspect != "stretch" else {}),
        **_levels(config),
    }


def _levels(config: ModelConfig) -> dict[str, Any]:
    """What every image processor does with the levels of a picture."""
    return {
        "resample": RESAMPLE[config.image.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image.mean),
        "image_std": list(config.image.std),
        "do_convert_rgb": config.extra.get("do_convert_rgb", True),
    }


def to_video_processor_json(config: ModelConfig) -> dict[str, Any] | None:
    """`video_preprocessor_config.json`, which `AutoProcessor` wants of LLaVA-OneVision; None of other models.

    This trainer never sees a video: sizes and levels are the images', as in the published checkpoints.
    """
    tiled = tiled_model_of(config)
    if tiled is None or not tiled.pools:
        return None
    size = {"height": config.image.size, "width": config.image.size}
    return {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "processor_class": tiled.processor_class,
        "do_resize": True,
        "size": size,
        **_levels(config),
    }


def to_processor_json(config: ModelConfig, image_text: str = "<image>") -> dict[str, Any]:
    """`processor_config.json` of HF's layout, whose tokenizer marks images by `image_text`."""
    if config.qformer is not None:
        return {"processor_class": processor_class(config), "num_query_tokens": config.qformer.num_query_tokens}
    tiled = tiled_model_of(config)
    if tiled is not None and tiled.pools:
        return {
            "processor_class": tiled.processor_class,
            "image_token": image_text,
            # with the class token, which the strategy takes off again
            "num_image_tokens": config.visual_tokens + config.vision.kind.has_class_token,
            "vision_feature_select_strategy": config.vision.kind.select_strategy,
            "vision_aspect_ratio": tiles_json(config)["vision_aspect_ratio"],
        }
    return {
        "processor_class": processor_class(config),
        "image_token": image_text,
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": config.vision.kind.select_strategy,
        # the class token, which the strategy takes off again, and registers, which it leaves
        "num_additional_image_tokens": config.vision.kind.has_class_token + config.vision.num_registers,
    }


def processor_class(config: ModelConfig) -> str:
    if tiled := tiled_model_of(config):
        return tiled.processor_class
    return "LlavaProcessor" if config.qformer is None else "Blip2Processor"
