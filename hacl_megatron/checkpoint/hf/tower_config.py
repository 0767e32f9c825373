"""Vision towers as Hugging Face folders describe them: sizes, Q-Former, and the image processor's settings.

A tower stands inside a model's `config.json` (`vision_config`), or in a folder of its own: CLIP's, SigLIP's, or a
BLIP-2 of which the vision tower and the Q-Former are taken.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hacl_megatron.checkpoint.hf.json_files import one_line, parse, read_json
from hacl_megatron.checkpoint.hf.modules import clean_config
from hacl_megatron.config.architecture import ImageConfig, QFormerConfig, VisionConfig

TOWER_FOLDER = "vision_tower"
"""Sub-folder that an export in the original layout uses for a tower that no published name describes."""

LARGE_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**LARGE_TOWER, "image_size": 336},
    "openai/clip-vit-large-patch14": {**LARGE_TOWER, "image_size": 224},
}
"""Towers that original LLaVA checkpoints name without describing them; their published `config.json` values."""

CLIP, SIGLIP, BLIP2 = "clip_vision_model", "siglip_vision_model", "blip_2_vision_model"
"""transformers' `model_type` of a vision tower (`config.towers`)."""
WHOLE_MODELS = {"clip": CLIP, "siglip": SIGLIP, "blip-2": BLIP2}
"""`model_type` of the models that such a tower is a part of."""


@dataclass(frozen=True, kw_only=True)
class TowerFacts:
    """What a `config.json` says about a vision tower, its `model_type` always among it."""

    where: Path
    """The file, for error messages."""
    vision: dict[str, Any]
    qformer: dict[str, Any] | None = None
    num_query_tokens: int = 0
    processor: dict[str, Any] = field(default_factory=dict)
    """Settings of the image processor beside it; {} where there are none."""

    @property
    def kind(self) -> str:
        return self.vision["model_type"]


def tower_in_model(folder: Path, config: dict[str, Any]) -> TowerFacts:
    """Of a `LlavaForConditionalGeneration` or `Blip2ForConditionalGeneration` folder."""
    if config["model_type"] == "blip-2":
        return _blip2_facts(folder, config)
    vision = config.get("vision_config") or {**LARGE_TOWER, "image_size": 336}  # LlavaConfig's own default
    return TowerFacts(
        where=folder / "config.json", vision={"model_type": CLIP, **vision}, processor=read_image_processor(folder)
    )


def tower_beside(folder: Path, config: dict[str, Any], tower: Path | None) -> TowerFacts:
    """Of the folder `tower`, or of the published tower that the model in `folder` names."""
    if tower is not None:
        values = read_json(tower / "config.json")
        if values.get("model_type") == "blip-2":
            facts = _blip2_facts(tower, values)
        else:
            if kind := WHOLE_MODELS.get(values.get("model_type")):
                inner = {**(values.get("vision_config") or {}), **(values.get("vision_config_dict") or {})}
                values = {"model_type": kind, **inner}
            facts = TowerFacts(
                where=tower / "config.json",
                vision={"model_type": CLIP, **values},
                processor=read_image_processor(tower),
            )
    elif config.get("mm_vision_tower") in KNOWN_TOWERS:
        vision = {"model_type": CLIP, **KNOWN_TOWERS[config["mm_vision_tower"]]}
        facts = TowerFacts(where=folder / "config.json", vision=vision)
    elif "mm_vision_tower" in config:
        raise ValueError(
            f"{folder}/config.json: mm_vision_tower is {config['mm_vision_tower']!r}, neither a folder here nor one "
            f"of {', '.join(KNOWN_TOWERS)}; give the folder of the CLIP tower"
        )
    else:
        raise ValueError(
            f"{folder} holds a LLaMA without a vision tower; give the folder of one beside it (CLIP, SigLIP or BLIP-2)"
        )
    return facts


def _blip2_facts(folder: Path, config: dict[str, Any]) -> TowerFacts:
    where = folder / "config.json"
    queries = config.get("num_query_tokens", 32)  # Blip2Config's own default
    if isinstance(queries, bool) or not isinstance(queries, int) or queries < 1:
        raise ValueError(f"{where}: num_query_tokens is {queries!r}; expected a number of at least 1")
    return TowerFacts(
        where=where,
        vision={**(config.get("vision_config") or {}), "model_type": BLIP2},
        qformer={**(config.get("qformer_config") or {}), "model_type": "blip_2_qformer"},
        num_query_tokens=queries,
        processor=read_image_processor(folder),
    )


def find_vision_tower(folder: Path, config: dict[str, Any], given: str | Path | None) -> Path | None:
    """Folder of the tower: `given`, else where `mm_vision_tower` points (from `folder` or here), else None."""
    if given is not None:
        if not (Path(given) / "config.json").is_file():
            raise ValueError(
                f"vision tower {given}: no config.json there; expected the folder of a CLIP, SigLIP or BLIP-2 model"
            )
        return Path(given)
    named = config.get("mm_vision_tower")
    if not named:
        return None
    # An absolute name replaces the folder; the last is where an export of ours puts it, moved since or not.
    for candidate in (Path(folder) / named, Path(named), Path(folder) / TOWER_FOLDER):
        if (candidate / "config.json").is_file():
            return candidate
    return None


# ---------------------------------------------------------------------------------------------------------------- sizes


def vision_config(facts: TowerFacts) -> VisionConfig:
    """Sizes of the tower: CLIP's is megatron-core's unless `--vision-backend` says hf, any other transformers'."""
    if facts.kind == CLIP:
        return _clip_config(facts.vision, facts.where)
    where = facts.where
    if facts.kind not in (SIGLIP, BLIP2):
        raise ValueError(
            f"{where}: vision_config.model_type is {facts.kind!r}; this trainer supports {CLIP!r}, {SIGLIP!r} or "
            f"{BLIP2!r} only"
        )
    values = _clean(facts.vision, where)
    if values.get("num_channels", 3) != 3:
        raise ValueError(f"{where}: the vision tower takes {values['num_channels']} channels; expected 3")
    sides = values["image_size"], values["patch_size"]
    if not all(isinstance(side, int) for side in sides):
        raise ValueError(f"{where}: image_size {sides[0]} and patch_size {sides[1]} must be one number each")
    return VisionConfig(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=values["num_attention_heads"],
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        norm_epsilon=values["layer_norm_eps"],
        activation=values["hidden_act"],
        backend="hf",
        hf=values,
    )


def qformer_config(facts: TowerFacts, vision: VisionConfig) -> QFormerConfig:
    """Sizes of BLIP-2's Q-Former, without the text side that `Blip2ForImageTextRetrieval` gives it."""
    own = {"encoder_hidden_size": vision.hidden_size, "use_qformer_text_input": False}  # as Blip2Config has it
    values = _clean({**facts.qformer, **own}, facts.where)
    return QFormerConfig(num_query_tokens=facts.num_query_tokens, hidden_size=values["hidden_size"], hf=values)


def _clean(values: dict[str, Any], where: Path) -> dict[str, Any]:
    try:
        return clean_config(values)
    except Exception as error:  # transformers 5 validates with exceptions of several libraries
        raise ValueError(f"{where}: its {values['model_type']} cannot be read: {one_line(error)}") from None


def _clip_config(values: dict[str, Any], where: Path) -> VisionConfig:
    from transformers import CLIPVisionConfig

    parsed = parse(CLIPVisionConfig, values, where)
    if parsed.hidden_act not in ("quick_gelu", "gelu"):
        raise ValueError(
            f"{where}: the vision tower's hidden_act is {parsed.hidden_act!r}; expected 'quick_gelu' or 'gelu'"
        )
    if parsed.num_channels != 3:
        raise ValueError(f"{where}: the vision tower takes {parsed.num_channels} channels; expected 3")
    sides = (parsed.image_size, parsed.patch_size)
    if not all(isinstance(side, int) for side in sides) or sides[0] % sides[1]:
        raise ValueError(f"{where}: image_size {sides[0]} must be a multiple of patch_size {sides[1]}, both one number")
    return VisionConfig(
        num_layers=parsed.num_hidden_layers,
        hidden_size=parsed.hidden_size,
        ffn_hidden_size=parsed.intermediate_size,
        num_attention_heads=parsed.num_attention_heads,
        image_size=parsed.image_size,
        patch_size=parsed.patch_size,
        norm_epsilon=parsed.layer_norm_eps,
        activation=parsed.hidden_act,
    )


# ------------------------------------------------------------------------------------------------------ image processor


def read_image_processor(folder: Path | None) -> dict[str, Any]:
    """Image-processor settings of a folder: `preprocessor_config.json`, or inside `processor_config.json`, or {}."""
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if folder is not None and (folder / "processor_config.json").is_file():
        return read_json(folder / "processor_config.json").get("image_processor") or {}
    return {}


def image_config(processor: dict[str, Any], vision: VisionConfig) -> ImageConfig:
    """Size, mean and standard deviation of the pixels; the tower's usual ones where `processor` is {}."""
    size = processor.get("crop_size", processor.get("size", vision.image_size))
    if isinstance(size, dict):
        if size.get("height") != size.get("width"):
            raise ValueError(f"the image processor crops to {size}; expected a square of {vision.image_size}")
        size = size.get("height", size.get("shortest_edge"))
    if size != vision.image_size:
        raise ValueError(f"the image processor gives images of {size} pixels, but the tower takes {vision.image_size}")
    defaults = ImageConfig(size=size)
    if (vision.hf or {}).get("model_type") == SIGLIP:
        defaults = ImageConfig(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    mean, std = (
        tuple(float(value) for value in processor.get(key) or default)
        for key, default in (("image_mean", defaults.mean), ("image_std", defaults.std))
    )
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"the image processor's mean {mean} and std {std} must have three values, std above 0")
    return ImageConfig(size=size, mean=mean, std=std)


def aspect_ratio(processor: dict[str, Any], kind: str) -> str:
    """`--image-aspect-ratio` as an image processor has it: `pad`, `square` or `stretch`.

    CLIP's resizes the shortest edge and crops, those of SigLIP and BLIP-2 resize both sides.
    """
    if processor.get("do_pad"):
        return "pad"
    size = processor.get("size")
    if isinstance(size, dict):
        return "stretch" if "height" in size else "square"
    return "square" if kind == CLIP else "stretch"
