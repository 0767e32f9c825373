"""Hugging Face `config.json` and processor settings -> `ModelConfig`; `hf_config_write` goes back.

Three families are read, told apart by their keys, not by `model_type` (LLaVA's own checkpoints carry `llava` as well as
`llava_llama`):

    hf      LlavaForConditionalGeneration: `text_config`, `vision_config`, `vision_feature_layer`, `image_token_index`
    llava   the original layout (LlavaLlamaForCausalLM): LLaMA's keys and `mm_*` ones; the tower is named, not described
    parts   a bare LLaMA beside a CLIP folder, with a connector yet to be trained

What the model cannot do is refused here, by name, before any weight is read.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, VisionConfig

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


def read_model_config(folder: str | Path, vision_tower: str | Path | None = None) -> ModelConfig:
    """Sizes of the model in a Hugging Face folder.

    Args:
        folder: a folder of one of the three families above.
        vision_tower: folder of the CLIP tower, for `llava` and `parts`. Default: where `mm_vision_tower` points, if
            that is a folder, or the sizes of the tower that it names.

    Raises:
        ValueError: no or broken config.json, an unknown family, or something the model does not support.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    family = config_family(config, folder)
    where = folder / "config.json"
    if family == "hf" and vision_tower is not None:
        raise ValueError(f"{folder} holds its vision tower; leave {vision_tower} out")
    if family == "hf":
        text = config.get("text_config") or {}
        vision = config.get("vision_config") or {**LARGE_TOWER, "image_size": 336}  # LlavaConfig's own default
        tower, connector, image_folder = None, _hf_connector(config, where), folder
    else:
        text = config
        tower = find_vision_tower(folder, config, vision_tower)
        connector = _llava_connector(config, where) if family == "llava" else ("mlp2x_gelu", -2)
        vision, image_folder = _tower_config(folder, config, tower), tower
    language_config = _language_config(text, where, tie=config.get("tie_word_embeddings"))
    vision_config = _vision_config(vision, where)
    processor = read_image_processor(image_folder)
    model_config = ModelConfig(
        language=language_config,
        vision=vision_config,
        image=_image_config(processor, vision_config),
        projector_type=connector[0],
        vision_select_layer=connector[1],
        extra=_extra_facts(family, config, text, vision, tower, processor),
    )
    if not 1 <= model_config.num_vision_layers_built <= vision_config.num_layers:
        raise ValueError(
            f"{where}: the selected vision layer is {connector[1]}, but the tower has {vision_config.num_layers} "
            f"layers; it must lie in 1..{vision_config.num_layers} or -{vision_config.num_layers}..-1"
        )
    return model_config


def config_family(config: dict[str, Any], folder: Path) -> Literal["hf", "llava", "parts"]:
    """Which of the three families a `config.json` belongs to; ValueError for any other."""
    if "text_config" in config and config.get("model_type") == "llava":
        return "hf"
    if "mm_vision_tower" in config and config.get("model_type") in ("llava", "llava_llama", "llama"):
        return "llava"
    if config.get("model_type") == "llama":
        return "parts"
    raise ValueError(
        f"{folder}/config.json: found model_type {config.get('model_type')!r} ({_first(config.get('architectures'))}), "
        "expected LlavaForConditionalGeneration, LLaVA's own LlavaLlamaForCausalLM (with mm_vision_tower) or a LLaMA"
    )


# -------------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; one-line ValueError for a missing, cut or other file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a Hugging Face model folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)}); the file may be cut") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def one_line(error: BaseException | str) -> str:
    """The message of an exception without its line breaks, cut to what fits an error line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "..."


def _first(names: list[str] | None) -> str:
    return names[0] if names else "no architectures"


def _refuse_unless(where: Path, values: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    for key, choices in allowed.items():
        if key in values and values[key] not in choices:
            expected = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"{where}: {key} is {values[key]!r}; this trainer supports {expected} only")


def _parse(config_class: type, values: dict[str, Any], where: Path) -> Any:
    """Fill transformers' defaults, which old config files leave out (llava-1.5-7b-hf does not even state its width)."""
    try:
        return config_class.from_dict(dict(values))
    except Exception as error:  # transformers 5 validates with exceptions of several libraries
        raise ValueError(f"{where}: {config_class.__name__} cannot be read: {one_line(error)}") from None


def _language_config(values: dict[str, Any], where: Path, tie: bool | None) -> LanguageConfig:
    _refuse_unless(where, {"text_config.model_type": values.get("model_type", "llama")}, {
        "text_config.model_type": ("llama", "llava", "llava_llama"),
    })  # fmt: skip
    _refuse_unless(where, values, {
        "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
        "attention_dropout": (0, 0.0, None), "quantization_config": (None,),
    })  # fmt: skip
    from transformers import LlamaConfig  # a second that an export need not spend

    parsed = _parse(LlamaConfig, {key: value for key, value in values.items() if not key.startswith("rope_")}, where)
    rotary_base, rope_scaling = _rotary(values, where)
    heads, groups = parsed.num_attention_heads, parsed.num_key_value_heads
    if heads % groups:
        raise ValueError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if parsed.hidden_size % 4:
        raise ValueError(f"{where}: hidden_size {parsed.hidden_size} is not a multiple of 4, as contrastive heads need")
    # Only what the file states counts: without `head_dim` the width follows from the number of heads.
    head_dim = values.get("head_dim")
    if head_dim is None and parsed.hidden_size % heads:
        raise ValueError(f"{where}: hidden_size {parsed.hidden_size} is not a multiple of num_attention_heads {heads}")
    if head_dim == parsed.hidden_size // heads and parsed.hidden_size % heads == 0:
        head_dim = None
    return LanguageConfig(
        num_layers=parsed.num_hidden_layers,
        hidden_size=parsed.hidden_size,
        ffn_hidden_size=parsed.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=parsed.vocab_size,
        kv_channels=head_dim,
        norm_epsilon=parsed.rms_norm_eps,
        rotary_base=rotary_base,
        rope_scaling=rope_scaling,
        max_position_embeddings=parsed.max_position_embeddings,
        # transformers ties when either level says so (LlavaConfig.__post_init__).
        tie_word_embeddings=bool(tie or values.get("tie_word_embeddings", False)),
    )


def _rotary(values: dict[str, Any], where: Path) -> tuple[float, dict[str, Any] | None]:
    """Base and Llama-3 scaling, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4.x).

    Where both stand, `rope_scaling` wins and `rope_theta` fills in, as transformers 5 reads them.
    """
    merged = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    base = merged.pop("rope_theta", None)
    base = values.get("rope_theta") if base is None else base
    kind = merged.pop("rope_type", None) or merged.pop("type", None) or "default"
    merged.pop("type", None)
    if kind == "default":
        return float(10000.0 if base is None else base), None
    if kind != "llama3":
        raise ValueError(f"{where}: rope type is {kind!r}; this trainer supports 'default' and 'llama3' only")
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in needed if key not in merged]:
        raise ValueError(f"{where}: llama3 rope scaling lacks {', '.join(missing)}")
    return float(10000.0 if base is None else base), {"rope_type": "llama3", **{key: merged[key] for key in needed}}


def _vision_config(values: dict[str, Any], where: Path) -> VisionConfig:
    _refuse_unless(where, {"vision_config.model_type": values.get("model_type", "clip_vision_model")}, {
        "vision_config.model_type": ("clip_vision_model",),
    })  # fmt: skip
    from transformers import CLIPVisionConfig

    parsed = _parse(CLIPVisionConfig, values, where)
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


def _hf_connector(config: dict[str, Any], where: Path) -> tuple[str, int]:
    _refuse_unless(where, config, {
        "projector_hidden_act": ("gelu",), "vision_feature_select_strategy": ("default",),
        "multimodal_projector_bias": (True,), "quantization_config": (None,),
    })  # fmt: skip
    layer = config.get("vision_feature_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"{where}: vision_feature_layer is {layer!r}; this trainer takes features from one layer only")
    return "mlp2x_gelu", layer


def _llava_connector(config: dict[str, Any], where: Path) -> tuple[str, int]:
    _refuse_unless(where, config, {
        "mm_vision_select_feature": ("patch",), "mm_patch_merge_type": ("flat", None),
        "mm_use_im_start_end": (False, None), "s2": (False, None),
    })  # fmt: skip
    kind = config.get("mm_projector_type", "linear")  # LLaVA's own default, build_vision_projector
    if kind != "linear" and not re.fullmatch(r"mlp[1-9]\d*x_gelu", str(kind)):
        raise ValueError(f"{where}: mm_projector_type is {kind!r}; expected linear or mlpNx_gelu")
    layer = config.get("mm_vision_select_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"{where}: mm_vision_select_layer is {layer!r}; expected one layer number")
    return kind, layer


def find_vision_tower(folder: Path, config: dict[str, Any], given: str | Path | None) -> Path | None:
    """Folder of the CLIP tower: `given`, else where `mm_vision_tower` points (from `folder` or here), else None."""
    if given is not None:
        if not (Path(given) / "config.json").is_file():
            raise ValueError(f"vision tower {given}: no config.json there; expected the folder of a CLIP model")
        return Path(given)
    named = config.get("mm_vision_tower")
    if not named:
        return None
    # An absolute name replaces the folder; the last is where an export of ours puts it, moved since or not.
    for candidate in (Path(folder) / named, Path(named), Path(folder) / TOWER_FOLDER):
        if (candidate / "config.json").is_file():
            return candidate
    return None


def _tower_config(folder: Path, config: dict[str, Any], tower: Path | None) -> dict[str, Any]:
    if tower is not None:
        values = read_json(tower / "config.json")
        if values.get("model_type") == "clip":
            values = {**(values.get("vision_config") or {}), **(values.get("vision_config_dict") or {})}
        values.setdefault("model_type", "clip_vision_model")
    elif config.get("mm_vision_tower") in KNOWN_TOWERS:
        values = {"model_type": "clip_vision_model", **KNOWN_TOWERS[config["mm_vision_tower"]]}
    elif "mm_vision_tower" in config:
        raise ValueError(
            f"{folder}/config.json: mm_vision_tower is {config['mm_vision_tower']!r}, neither a folder here nor one "
            f"of {', '.join(KNOWN_TOWERS)}; give the folder of the CLIP tower"
        )
    else:
        raise ValueError(f"{folder} holds a LLaMA without a vision tower; give the folder of a CLIP tower beside it")
    expected = config.get("mm_hidden_size", values.get("hidden_size"))
    if values.get("hidden_size", 768) != expected:
        raise ValueError(
            f"{folder}/config.json: mm_hidden_size is {expected}, but the tower's is {values.get('hidden_size')}"
        )
    return values


def read_image_processor(folder: Path | None) -> dict[str, Any]:
    """Image-processor settings of a folder: `preprocessor_config.json`, or inside `processor_config.json`, or {}."""
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if folder is not None and (folder / "processor_config.json").is_file():
        return read_json(folder / "processor_config.json").get("image_processor") or {}
    return {}


def _image_config(processor: dict[str, Any], vision: VisionConfig) -> ImageConfig:
    size = processor.get("crop_size", processor.get("size", vision.image_size))
    if isinstance(size, dict):
        if size.get("height") != size.get("width"):
            raise ValueError(f"the image processor crops to {size}; expected a square of {vision.image_size}")
        size = size.get("height", size.get("shortest_edge"))
    if size != vision.image_size:
        raise ValueError(f"the image processor gives images of {size} pixels, but the tower takes {vision.image_size}")
    defaults = ImageConfig(size=size)
    mean, std = (
        tuple(float(value) for value in processor.get(key) or default)
        for key, default in (("image_mean", defaults.mean), ("image_std", defaults.std))
    )
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"the image processor's mean {mean} and std {std} must have three values, std above 0")
    return ImageConfig(size=size, mean=mean, std=std)


def _extra_facts(
    family: str,
    config: dict[str, Any],
    text: dict[str, Any],
    vision: dict[str, Any],
    tower: Path | None,
    processor: dict[str, Any],
) -> dict[str, Any]:
    """What the way back needs and the model does not; plain JSON values, so that run_config.yaml can hold them."""
    facts: dict[str, Any] = {"layout": family}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key) if text.get(key) is None else text[key]
        if value is not None:
            facts[key] = value
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    if dtype is not None:
        facts["dtype"] = str(dtype).removeprefix("torch.")
    if "projection_dim" in vision:
        facts["vision_projection_dim"] = vision["projection_dim"]
    if family == "hf":
        # transformers 5 reads both names, and writes the first.
        facts["image_token_index"] = config.get("image_token_index", config.get("image_token_id", 32000))
        facts["image_aspect_ratio"] = "pad" if processor.get("do_pad") else "square"
    else:
        facts["image_aspect_ratio"] = config.get("image_aspect_ratio") or "square"
        facts["mm_vision_tower"] = config.get("mm_vision_tower", str(tower))
        facts["vision_tower_folder"] = None if tower is None else str(tower)
    return facts
