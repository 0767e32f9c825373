"""Vision towers as Hugging Face folders describe them: sizes, Q-Former, and the image processor's settings.

A tower stands inside a model's `config.json` (`vision_config`), or in a folder of its own: CLIP's, SigLIP's, or a
BLIP-2 of which the vision tower and the Q-Former are taken.
"""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from hacl_megatron.checkpoint.hf.json_files import one_line, parse, read_config, read_json, refuse_unless
from hacl_megatron.checkpoint.hf.modules import clean_config
from hacl_megatron.checkpoint.hf.tiled_models import TILED_MODELS, TiledModel
from hacl_megatron.config.architecture import ImageConfig, QFormerConfig, VisionConfig
from hacl_megatron.config.checks.sizes import LIMITS
from hacl_megatron.config.families import family_of_model_type
from hacl_megatron.config.towers import CLIP, TOWERS, TowerKind, instead_of, tower_of_whole, tower_origins
from hacl_megatron.config.towers.clip import LARGE_336

TOWER_FOLDER = "vision_tower"
"""Sub-folder that an export in the original layout uses for a tower that no published name describes."""

IMAGE_FLAGS = {"image_transparency": ("drop", "fill"), "image_orientation": ("ignore", "exif")}
"""Choices of the flags that no image processor of transformers has, their defaults first. An export states in its
config.json, where transformers keeps and ignores them, those that the model was not trained with by default."""


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
    def kind(self) -> TowerKind:
        """ValueError for a tower that `config.towers` does not know."""
        found = self.vision["model_type"]
        if found not in list(TOWERS):  # a JSON value of any type
            *others, last = map(repr, TOWERS)
            raise ValueError(
                f"{self.where}: vision_config.model_type is {found!r}; this trainer supports {', '.join(others)} or "
                f"{last} only{instead_of(str(found))}"
            )
        return TOWERS[found]


def tower_in_model(folder: Path, config: dict[str, Any]) -> TowerFacts:
    """Of the folder of a whole model of transformers, which `config_read` names."""
    if kind := tower_of_whole(config["model_type"]):
        return _inside(folder, config, kind)
    tiled = TILED_MODELS.get(config["model_type"])
    usual = {"model_type": CLIP.model_type, **LARGE_336} if tiled is None else tiled.vision
    vision = {"model_type": usual["model_type"], **(config.get("vision_config") or usual)}
    return TowerFacts(where=folder / "config.json", vision=vision, processor=read_image_processor(folder))


def tower_beside(folder: Path, config: dict[str, Any], tower: Path | None) -> TowerFacts:
    """Of the folder `tower`, or of the published tower that the model in `folder` names."""
    if tower is not None:
        values = read_config(tower / "config.json")
        if kind := tower_of_whole(values.get("model_type")):
            return _inside(tower, values, kind)
        vision = {"model_type": CLIP.model_type, **values}
        return TowerFacts(where=tower / "config.json", vision=vision, processor=read_image_processor(tower))
    published = {name: {"model_type": kind.model_type, **values}
                 for kind in TOWERS.values() for name, values in kind.published.items()}  # fmt: skip
    named = config.get("mm_vision_tower")
    if named in published:
        return TowerFacts(where=folder / "config.json", vision=published[named])
    if "mm_vision_tower" in config:
        raise ValueError(
            f"{folder}/config.json: mm_vision_tower is {named!r}, neither a folder here nor one "
            f"of {', '.join(published)}; give the folder of the CLIP tower"
        )
    title = family_of_model_type(config.get("model_type")).title
    raise ValueError(
        f"{folder} holds a {title} without a vision tower; give the folder of one beside it ({tower_origins()})"
    )


def _inside(folder: Path, config: dict[str, Any], kind: TowerKind) -> TowerFacts:
    """Of a whole model that such a tower is a part of, with the Q-Former behind it if it has one."""
    where = folder / "config.json"
    inner = {**(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
    facts = TowerFacts(
        where=where, vision={**inner, "model_type": kind.model_type}, processor=read_image_processor(folder)
    )
    if not kind.with_qformer:
        return facts
    queries = config.get("num_query_tokens", 32)  # Blip2Config's own default
    if isinstance(queries, bool) or not isinstance(queries, int) or queries < 1:
        raise ValueError(f"{where}: num_query_tokens is {queries!r}; expected a number of at least 1")
    qformer = {**(config.get("qformer_config") or {}), "model_type": "blip_2_qformer"}
    return replace(facts, qformer=qformer, num_query_tokens=queries)


def find_vision_tower(folder: Path, config: dict[str, Any], given: str | Path | None) -> Path | None:
    """Folder of the tower: `given`, else where `mm_vision_tower` points (from `folder` or here), else None."""
    if given is not None:
        if not (Path(given) / "config.json").is_file():
            raise ValueError(
                f"vision tower {given}: no config.json there; expected the folder of a {tower_origins()} model"
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
    """Sizes of the tower: where megatron-core has it, it runs it unless `--vision-backend` says hf.

    One that interpolates its positions takes images of the size that the processor beside it makes.
    """
    kind, where, megatron = facts.kind, facts.where, facts.kind.megatron
    if megatron is None:
        values = _clean(facts.vision, where)
    else:
        from transformers import CONFIG_MAPPING  # a second that an export need not spend

        values = parse(CONFIG_MAPPING[kind.model_type], facts.vision, where).to_dict()
    sizes = {ours: values[theirs] for ours, theirs in {**kind.sizes, **kind.traits}.items()}
    sizes |= {ours: derive(values) for ours, derive in kind.derived.items()}
    if megatron is not None and sizes["activation"] not in megatron.activations:
        expected = " or ".join(map(repr, megatron.activations))
        raise ValueError(f"{where}: the vision tower's hidden_act is {sizes['activation']!r}; expected {expected}")
    if values.get("num_channels", 3) != 3:
        raise ValueError(f"{where}: the vision tower takes {values['num_channels']} channels; expected 3")
    image, patch = sizes["image_size"], sizes["patch_size"]
    one_number = isinstance(image, int) and isinstance(patch, int)
    if megatron is None:
        if not one_number or patch > image:
            raise ValueError(
                f"{where}: image_size {image} and patch_size {patch} must be one number each, the patch no larger"
            )
        vision = VisionConfig(**sizes, backend="hf", hf=values)
        if kind.interpolates_positions and facts.processor:
            vision = replace(vision, image_size=_processed_size(facts, vision))
        return vision
    if not one_number or image % patch:
        raise ValueError(f"{where}: image_size {image} must be a multiple of patch_size {patch}, both one number")
    return VisionConfig(**sizes)


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


# ------------------------------------------------------------------------------------------------------ image processor

Pixel = tuple[float, ...]
"""A value for each of red, green and blue."""

RESAMPLE = {"bicubic": 3, "bilinear": 2}
"""Pillow's numbers of `ImageConfig.interpolation`."""


class Usual(NamedTuple):
    """What one of transformers' image processors does where its file does not say."""

    resample: int
    is_square: bool
    """A plain number for `size` is the side of a square; else that of the shorter edge."""
    mean: Pixel
    std: Pixel
    size: int
    crops: bool
    """To the same size, in the middle."""


_OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_USUAL = {
    "CLIPImageProcessor": Usual(3, False, *_OPENAI, 224, True),
    "LlavaImageProcessor": Usual(3, False, *_OPENAI, 224, True),
    "SiglipImageProcessor": Usual(3, False, *_HALF, 224, False),
    "BlipImageProcessor": Usual(3, True, *_OPENAI, 384, False),
    "BitImageProcessor": Usual(3, False, *_OPENAI, 224, True),
    "ViTImageProcessor": Usual(2, True, *_HALF, 224, False),
}
"""Those that do what this trainer does."""
_USUAL_OF_TILES = {
    "LlavaNextImageProcessor": Usual(3, False, *_OPENAI, 224, True),
    "LlavaOnevisionImageProcessor": Usual(3, True, *_OPENAI, 384, False),
}
"""Those of `TILED_MODELS`."""

_PROCESSOR_SUFFIX = re.compile(r"(ImageProcessor(Fast|Pil)|FeatureExtractor)$")
"""How transformers names a processor's several implementations, and named them of old."""


def read_image_processor(folder: Path | None) -> dict[str, Any]:
    """Image-processor settings of a folder, or {}: inside `processor_config.json`, else `preprocessor_config.json`.

    So transformers 5 has it; 4.x reads the other one. Where the two make different pixels, both are refused.
    """
    return {} if folder is None else _image_processor(folder)[0]


def _image_processor(folder: Path) -> tuple[dict[str, Any], Path | None]:
    """The settings, and the file that they stand in."""
    inside, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    if inside.is_file() and (found := read_json(inside).get("image_processor")) is not None:
        if not isinstance(found, dict):
            raise ValueError(f"{inside}: image_processor is {one_line(repr(found))}; expected an object")
        other = read_json(own) if own.is_file() else {}
        for key in (key for key in _OF_PIXELS if key in found and key in other):
            sides = [value if isinstance(value, int) else _side_of(value) for value in (found[key], other[key])]
            alike = type(found[key]) is not type(other[key]) and sides[0] is not None and sides[0] == sides[1]
            if found[key] != other[key] and not alike:
                raise ValueError(
                    f"{own}: {key} is {one_line(repr(other[key]))}, but {inside.name} beside it says "
                    f"{one_line(repr(found[key]))}, and transformers 4 reads the one, 5 the other; expected the same: "
                    "remove the file that does not hold"
                )
        return found, inside
    return (read_json(own), own) if own.is_file() else ({}, None)


_OF_PIXELS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_pad", "do_convert_rgb", "image_grid_pinpoints",
)  # fmt: skip


def _side_of(size: Any) -> Any:
    """Of a square or a shorter edge, which older files have as a plain number; None for anything else."""
    sides = set(size.values()) if isinstance(size, dict) and all(isinstance(n, int) for n in size.values()) else ()
    return sides.pop() if len(sides) == 1 else None


def _usual(processor: dict[str, Any]) -> tuple[str, Usual | None]:
    """Name of an image processor, "" where there is none, and what it usually does, if it is known here."""
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    name = _PROCESSOR_SUFFIX.sub("ImageProcessor", kind)
    return kind, _USUAL.get(name) or _USUAL_OF_TILES.get(name)


def image_config(facts: TowerFacts, vision: VisionConfig, tiled: TiledModel | None = None) -> ImageConfig:
    """Size, mean and standard deviation of the pixels; the tower's usual ones where no image processor says.

    Args:
        tiled: the model that the image processor is of, where pictures are cut into tiles.

    Raises:
        ValueError: a setting that training, evaluation and export do not have.
    """
    processor = facts.processor
    where = _image_processor(facts.where.parent)[1] or facts.where
    switch = (True, False)
    refuse_unless(where, processor, {
        "do_resize": (True,), "resample": tuple(RESAMPLE.values()), "do_rescale": switch, "do_normalize": switch,
        "do_convert_rgb": (True, False, None),
    })  # fmt: skip
    kind, usual = _usual(processor)
    name = _PROCESSOR_SUFFIX.sub("ImageProcessor", kind)
    if tiled is not None and kind and name != tiled.image_processor:
        raise ValueError(
            f"{where}: image_processor_type is {kind!r}, but a {tiled.title}'s is {tiled.image_processor}; expected "
            "that, or no image processor beside the model"
        )
    if tiled is None and kind and name not in _USUAL:
        cuts = f": {name} cuts pictures into tiles, as LLaVA-NeXT and LLaVA-OneVision have them"
        raise ValueError(
            f"{where}: image_processor_type is {kind!r}; this trainer has what {', '.join(_USUAL)} do only"
            + (cuts if name in _USUAL_OF_TILES else instead_of(name))
        )
    resample = processor.get("resample", usual.resample if usual else RESAMPLE["bicubic"])
    interpolation = next(name for name, number in RESAMPLE.items() if number == resample)
    if tiled is None and processor.get("do_pad") and kind and not kind.startswith("LlavaImageProcessor"):
        raise ValueError(
            f"{where}: do_pad is {processor['do_pad']!r} for a {kind}; expected LlavaImageProcessor, which pads to a "
            "square: name that, or leave do_pad out"
        )
    if tiled is None:
        size, shortest = _sizes_of_pixels(processor, vision, where)
    else:
        size, shortest = _size_of_views(processor, vision, where), None
    if size != vision.image_size:
        raise ValueError(
            f"{where}: the image processor gives images of {size} pixels, but the tower takes {vision.image_size}"
        )
    mean, std = (
        _pixel(processor.get(key) or default, key, where)
        for key, default in (("image_mean", (usual or vision.kind).mean), ("image_std", (usual or vision.kind).std))
    )
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"{where}: the image processor's mean {mean} and std {std} must have three values, std above 0"
        )
    pads = processor.get("do_pad") if tiled is None else tiled.aspect_ratio == "pad"
    mean, std = _of_levels_to_1(processor, mean, std, where, pads=bool(pads))
    return ImageConfig(size=size, mean=mean, std=std, interpolation=interpolation, shortest_edge=shortest)


def _processed_size(facts: TowerFacts, vision: VisionConfig) -> int:
    where = _image_processor(facts.where.parent)[1] or facts.where
    size, largest = _sizes_of_pixels(facts.processor, vision, where)[0], LIMITS["image_size"]
    if isinstance(size, bool) or not isinstance(size, int) or not vision.patch_size <= size <= largest:
        raise ValueError(
            f"{where}: the image processor gives images of {one_line(repr(size))} pixels; expected a whole number of "
            f"{vision.patch_size}, a patch of the tower, to {largest:,}"
        )
    return size


def _pixel(value: Any, key: str, where: Path) -> Pixel:
    if not isinstance(value, list | tuple) or not all(type(one) in (int, float) for one in value):
        raise ValueError(f"{where}: {key} is {one_line(repr(value))}; expected three numbers")
    return tuple(map(float, value))


def _of_levels_to_1(
    processor: dict[str, Any], mean: Pixel, std: Pixel, where: Path, *, pads: bool
) -> tuple[Pixel, Pixel]:
    """Mean and deviation by which levels of 0 to 1 become what rescaling and normalising make of 0 to 255.

    `level * factor` is `level / 255 * (255 * factor)`, so both are divided by `255 * factor`.
    """
    if not processor.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"{where}: rescale_factor is {factor!r}; expected a number above 0, as 1/255")
    scale = 1.0 if math.isclose(255 * factor, 1, rel_tol=1e-4) else 255 * factor
    usual = scale == 1 and processor.get("do_normalize", True)
    if pads and not usual:
        raise ValueError(
            f"{where}: do_pad with do_normalize {processor.get('do_normalize', True)} and a rescale_factor of "
            f"{factor:.5g}, which pads with a colour that is not the mean; expected True and 1/255"
        )
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _sizes_of_pixels(processor: dict[str, Any], vision: VisionConfig, where: Path) -> tuple[Any, int | None]:
    """Side of the square that resizing and cropping leave, and the shortest edge before the crop where that is longer.

    A `shortest_edge`, and CLIP's old plain number, leave a picture its proportions until it is cropped.

    Raises:
        ValueError: what is left is no square, or a crop of a stretched picture, or of one that is too small for it.
    """
    usual = _usual(processor)[1]
    crops = processor.get("do_center_crop", usual is None or usual.crops)
    size = processor.get("size", usual.size if usual else vision.image_size)
    crop = processor.get("crop_size", usual.size if usual and crops else None)
    if isinstance(size, dict) and "longest_edge" in size:
        raise ValueError(f"{where}: the image processor resizes to {size}; expected a square, or a shortest_edge alone")
    if isinstance(size, dict):
        keeps_proportions = "height" not in size
    else:
        keeps_proportions = usual is not None and (not usual.is_square if "size" in processor else usual.crops)
    resized, cropped = (_side(value, where) for value in (size, crop))
    if not crops:
        if keeps_proportions:
            raise ValueError(
                f"{where}: do_center_crop is {processor.get('do_center_crop')} after resizing to {size}, which leaves "
                f"pictures of different shapes; expected True, or a size with height and width {vision.image_size}"
            )
        return resized, None
    if crop is None or resized == cropped:
        return resized, None
    if "size" not in processor and usual is None:
        return cropped, None
    numbers = all(isinstance(side, int) for side in (resized, cropped))
    if not keeps_proportions or not numbers or resized < cropped:
        raise ValueError(
            f"{where}: the image processor resizes to {size} and crops to {crop}; this trainer crops what a "
            "shortest_edge of at least that size leaves"
        )
    return cropped, resized


def _size_of_views(processor: dict[str, Any], vision: VisionConfig, where: Path) -> Any:
    """Side of a picture's views, its base view and its tiles, of which nothing is cropped."""
    usual = _usual(processor)[1]
    size = _side(processor.get("size", usual.size if usual else vision.image_size), where)
    crop = processor.get("crop_size", usual.size if usual and usual.crops else None)
    if crop is not None and (found := _side(crop, where)) != size:
        raise ValueError(
            f"{where}: the image processor makes views of {size} pixels and crops them to {found}; expected the same"
        )
    return size


def _side(size: Any, where: Path) -> Any:
    if not isinstance(size, dict):
        return size
    if size.get("height") != size.get("width"):
        raise ValueError(f"{where}: the image processor makes pictures of {size}; expected a square")
    return size.get("height", size.get("shortest_edge"))


def aspect_ratio(processor: dict[str, Any], kind: TowerKind) -> str:
    """`--image-aspect-ratio` as an image processor has it: `pad`, `square` or `stretch`.

    CLIP's resizes the shortest edge and crops, those of SigLIP and BLIP-2 resize both sides; where it does not say, the
    tower does.
    """
    if processor.get("do_pad"):
        return "pad"
    size = processor.get("size")
    if isinstance(size, dict):
        return "stretch" if "height" in size else "square"
    if usual := _usual(processor)[1]:
        return "square" if usual.crops else "stretch"
    return kind.aspect_ratio
