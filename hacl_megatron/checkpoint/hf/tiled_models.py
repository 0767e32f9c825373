"""transformers' models that see pictures in tiles, LLaVA-NeXT and LLaVA-OneVision: what their JSON files say of it.

`config.tiles` is what a picture becomes. Here is which model does that, the defaults of its classes, which files leave
out, and the original layout's words for the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hacl_megatron.checkpoint.hf.json_files import one_line, refuse_unless
from hacl_megatron.config.architecture import LanguageConfig, ModelConfig
from hacl_megatron.config.checks.architecture import check_tiles
from hacl_megatron.config.tiles import TilesConfig, tiles_of
from hacl_megatron.config.towers.clip import LARGE_336

Pinpoints = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class TiledModel:
    """One of the two; defaults are those of its configuration class."""

    model_type: str
    model_class: str
    title: str
    processor_class: str
    image_processor: str
    language: str
    """`model_type` of its language model."""
    vision: Mapping[str, Any]
    """`vision_config` of one that has none."""
    image_token: int
    select_layer: int
    select_strategy: str
    pinpoints: Pinpoints
    pools: bool
    """`vision_aspect_ratio` is `anyres_max_N`, and an image among several is one view (`TilesConfig`)."""
    aspect_ratio: Literal["stretch", "pad"]
    """`--image-aspect-ratio`: what is done to a picture that is one view, as the base view is always stretched."""


LLAVA_NEXT = TiledModel(
    model_type="llava_next",
    model_class="LlavaNextForConditionalGeneration",
    title="LLaVA-NeXT",
    processor_class="LlavaNextProcessor",
    image_processor="LlavaNextImageProcessor",
    language="llama",
    vision={"model_type": "clip_vision_model", **LARGE_336},
    image_token=32000,
    select_layer=-2,
    select_strategy="default",
    pinpoints=tiles_of("next", 336).pinpoints,
    pools=False,
    aspect_ratio="stretch",
)
LLAVA_ONEVISION = TiledModel(
    model_type="llava_onevision",
    model_class="LlavaOnevisionForConditionalGeneration",
    title="LLaVA-OneVision",
    processor_class="LlavaOnevisionProcessor",
    image_processor="LlavaOnevisionImageProcessor",
    language="qwen2",
    vision={
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14,
        "image_size": 384, "num_hidden_layers": 26, "num_attention_heads": 16, "vision_use_head": False,
    },
    image_token=151646,
    select_layer=-1,
    select_strategy="full",
    pinpoints=tiles_of("onevision", 384).pinpoints,
    pools=True,
    aspect_ratio="pad",
)  # fmt: skip
TILED_MODELS = {model.model_type: model for model in (LLAVA_NEXT, LLAVA_ONEVISION)}
VIDEO_TOKEN = "video_token_index"
"""In config.json and `ModelConfig.extra`: LLaVA-OneVision's mark of a video, which this trainer never sees."""
USUAL_VIDEO_TOKEN = 151647
"""Of LlavaOnevisionConfig."""
LLAMA_3_ROWS = 128_256
"""A LLaMA's vocabulary is Llama 3's from there on."""


def tiled_model_of(config: ModelConfig) -> TiledModel | None:
    """Which of the two a model is, by its tiles; None where neither cuts pictures so, or it has no tiles."""
    if config.tiles is None:
        return None
    pools = config.tiles.max_tiles is not None
    return next((one for one in TILED_MODELS.values() if one.pools == pools == config.tiles.only_alone), None)


def usual_version_of_tiles(language: LanguageConfig) -> str:
    """The `--version` of published LLaVA-NeXT and LLaVA-OneVision by their language model: Vicuna, Llama 3, Mistral or
    Qwen. (LLaVA-NeXT's 34B, of a Yi, had chatml: its config.json has to say so.)"""
    if language.family == "llama":
        return "llama_3" if language.vocab_size >= LLAMA_3_ROWS else "v1"
    return {"mistral": "mistral"}.get(language.family, "chatml")


# -------------------------------------------------------------------------------------------------------------- reading


def read_tiles(model: TiledModel, config: dict[str, Any], processor: dict[str, Any], where: Path) -> TilesConfig:
    """Tiles of one of transformers' models.

    Args:
        processor: settings of the image processor beside it; {} where there are none.
        where: the config.json, for messages.

    Raises:
        ValueError: a grid that is no list of pairs, or another than the image processor has.
    """
    refuse_unless(where, config, {"use_image_newline_parameter": (True, None)})
    refuse_unless(where, processor, {"aspect_ratio_setting": ("anyres", None)})
    key = "image_grid_pinpoints"
    pinpoints = _pinpoints(config, where) or model.pinpoints
    if processor and (theirs := _pinpoints(processor, where) or model.pinpoints) != pinpoints:
        raise ValueError(
            f"{where}: {key} is {one_line(str(_lists(pinpoints)))}, but the image processor beside it cuts by "
            f"{one_line(str(_lists(theirs)))}; expected the same: mend the file that does not hold"
        )
    if not model.pools:
        return TilesConfig(pinpoints=pinpoints)
    return TilesConfig(pinpoints=pinpoints, max_tiles=_max_tiles(config, where), only_alone=True)


def read_original_tiles(config: dict[str, Any], where: Path) -> TilesConfig | None:
    """Tiles of a `config.json` in LLaVA's original layout, LLaVA-NeXT's (liuhaotian/llava-v1.6-…); None without.

    Its pairs are (width, height), transformers' (height, width). Of equally good grids both take the first one, and so
    does what this makes of them. (The hub's conversions to transformers' layout copied the list as it was: of a square
    as small as a tile these take a wide grid, where the original takes a tall one.) Where the picture's proportions
    fall on a feature's border up to rounding, transformers cuts padding as if exactly, the original by chance.

    Raises:
        ValueError: tiles whose features are laid out otherwise than transformers' LLaVA-NeXT has them.
    """
    if config.get("image_aspect_ratio") != "anyres":
        return None
    if (merge := config.get("mm_patch_merge_type", "flat")) != "spatial_unpad":
        raise ValueError(
            f"{where}: image_aspect_ratio is 'anyres' and mm_patch_merge_type {merge!r}; this trainer lays the views "
            "of a picture out by 'spatial_unpad' only"
        )
    pinpoints = _pinpoints(config, where)
    if pinpoints is None:
        raise ValueError(f"{where}: image_aspect_ratio is 'anyres', but image_grid_pinpoints are missing")
    return TilesConfig(pinpoints=tuple((height, width) for width, height in pinpoints))


def says_tiles(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is of a model that cuts pictures into tiles."""
    return config.get("model_type") in TILED_MODELS or config.get("mm_patch_merge_type") not in (None, "flat")


def check_tiles_of(config: ModelConfig, where: Path) -> None:
    """ValueError, naming the file, for tiles that the model's tower or connector cannot have."""
    try:
        check_tiles(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    facts = config.vision.hf or {}
    if config.tiles is not None and facts.get("image_size", config.vision.image_size) != config.vision.image_size:
        raise ValueError(
            f"{where}: views are of {config.vision.image_size} pixels by the image processor, but of "
            f"{facts['image_size']} by vision_config, by which transformers counts tiles; expected the same"
        )


def _pinpoints(values: dict[str, Any], where: Path) -> Pinpoints | None:
    found = values.get("image_grid_pinpoints")
    if found is None:
        return None
    pairs = isinstance(found, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(side) is int for side in pair) for pair in found
    )
    if not pairs or not found:
        raise ValueError(
            f"{where}: image_grid_pinpoints is {one_line(repr(found))}; expected a list of pairs of pixels, as "
            "[[336, 672], [672, 336]]"
        )
    return tuple((first, second) for first, second in found)


def _max_tiles(config: dict[str, Any], where: Path) -> int:
    found = config.get("vision_aspect_ratio", "anyres_max_9")
    number = found.removeprefix("anyres_max_") if isinstance(found, str) else ""
    if number == found or not (number.isascii() and number.isdecimal()) or len(number) > 4 or int(number) < 1:
        raise ValueError(
            f"{where}: vision_aspect_ratio is {one_line(repr(found))}; expected anyres_max_ and a number of tiles, as "
            "anyres_max_9"
        )
    return int(number)


# -------------------------------------------------------------------------------------------------------------- writing


def why_no_tiled_model(config: ModelConfig, layout: Literal["hf", "llava"]) -> str | None:
    """Why no model of that layout cuts pictures as this one, which has tiles, or None."""
    tiles, model = config.tiles, tiled_model_of(config)
    if model is None:
        return (
            f"pictures are cut with max_tiles {tiles.max_tiles} and only_alone {tiles.only_alone}, as in no model of "
            "transformers: LLaVA-NeXT has null and false, LLaVA-OneVision a number and true"
        )
    if layout == "llava" and model is not LLAVA_NEXT:
        return f"it is a {model.title}, which the original LLaVA layout has no place for; export the layout hf instead"
    return None


def tiles_json(config: ModelConfig) -> dict[str, Any]:
    """Of transformers' `config.json`."""
    settings: dict[str, Any] = {"image_grid_pinpoints": _lists(config.tiles.pinpoints)}
    if tiled_model_of(config).pools:
        settings["vision_aspect_ratio"] = f"anyres_max_{config.tiles.max_tiles}"
        settings[VIDEO_TOKEN] = config.extra.get(VIDEO_TOKEN, USUAL_VIDEO_TOKEN)
    return settings


def original_tiles_json(tiles: TilesConfig) -> dict[str, Any]:
    """Of a `config.json` in the original layout, or beside a connector alone."""
    return {
        "image_aspect_ratio": "anyres" if tiles.max_tiles is None else f"anyres_max_{tiles.max_tiles}",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[width, height] for height, width in tiles.pinpoints],
    }


def _lists(pinpoints: Pinpoints) -> list[list[int]]:
    return [list(pair) for pair in pinpoints]
