"""Hugging Face `config.json` and processor settings -> `ModelConfig`; `config_write` goes back.

Three families are read, told apart by their keys, not by `model_type` (LLaVA's own checkpoints carry `llava` as well as
`llava_llama`):

    hf      LlavaForConditionalGeneration: `text_config`, `vision_config`, `vision_feature_layer`, `image_token_index`;
            or Blip2ForConditionalGeneration with a LLaMA: `qformer_config`, `num_query_tokens`
    llava   the original layout (LlavaLlamaForCausalLM): LLaMA's keys and `mm_*` ones; the tower is named, not described
    parts   a bare LLaMA beside the folder of a tower, with a connector yet to be trained

What the model cannot do is refused here, by name, before any weight is read.
"""

import re
from pathlib import Path
from typing import Any, Literal

from hacl_megatron.checkpoint.hf.json_files import parse, read_json, refuse_unless
from hacl_megatron.checkpoint.hf.tower_config import (
    BLIP2,
    CLIP,
    SIGLIP,
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
from hacl_megatron.config.flags import DataFlags

Connector = tuple[str, int]
"""`projector_type`, and the selected vision layer."""


def read_model_config(folder: str | Path, vision_tower: str | Path | None = None) -> ModelConfig:
    """Sizes of the model in a Hugging Face folder.

    Args:
        folder: a folder of one of the three families above.
        vision_tower: folder of the tower, for `llava` (CLIP alone) and `parts` (CLIP, SigLIP, BLIP-2). Default: where
            `mm_vision_tower` points, if that is a folder, or the sizes of the tower that it names.

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
        text, tower, facts = config.get("text_config") or {}, None, tower_in_model(folder, config)
    else:
        text, tower = config, find_vision_tower(folder, config, vision_tower)
        facts = tower_beside(folder, config, tower)
    vision = vision_config(facts)
    if config.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ValueError(
            f"{where}: mm_hidden_size is {config['mm_hidden_size']}, but the tower's is {vision.hidden_size}"
        )
    projector_type, layer = _connector(family, config, facts, where)
    # Blip2Config has no opinion of its own on tied embeddings, LlavaConfig has.
    tie = None if projector_type == "qformer" else config.get("tie_word_embeddings")
    model_config = ModelConfig(
        language=_language_config(text, where, tie=tie),
        vision=vision,
        image=image_config(facts.processor, vision),
        projector_type=projector_type,
        vision_select_layer=layer,
        qformer=qformer_config(facts, vision) if projector_type == "qformer" else None,
        extra=_extra_facts(family, config, text, facts, tower),
    )
    if not 1 <= model_config.num_vision_layers_built <= vision.num_layers:
        raise ValueError(
            f"{where}: the selected vision layer is {layer}, but the tower has {vision.num_layers} layers; it must lie "
            f"in 1..{vision.num_layers} or -{vision.num_layers}..-1"
        )
    return model_config


def config_family(config: dict[str, Any], folder: Path) -> Literal["hf", "llava", "parts"]:
    """Which of the three families a `config.json` belongs to; ValueError for any other."""
    if "text_config" in config and config.get("model_type") == "llava":
        return "hf"
    if config.get("model_type") == "blip-2":
        text = (config.get("text_config") or {}).get("model_type", "opt")  # Blip2Config's own default
        if text == "llama":
            return "hf"
        raise ValueError(
            f"{folder}/config.json: a BLIP-2 whose language model is {text!r}; expected a LLaMA: give this folder as "
            "the vision tower beside one"
        )
    if "mm_vision_tower" in config and config.get("model_type") in ("llava", "llava_llama", "llama"):
        return "llava"
    if config.get("model_type") == "llama":
        return "parts"
    found = (config.get("architectures") or ["no architectures"])[0]
    raise ValueError(
        f"{folder}/config.json: found model_type {config.get('model_type')!r} ({found}), expected "
        "LlavaForConditionalGeneration, Blip2ForConditionalGeneration, LLaVA's own LlavaLlamaForCausalLM (with "
        "mm_vision_tower) or a LLaMA"
    )


def data_flags(config: ModelConfig) -> DataFlags:
    """How a model out of a Hugging Face folder was trained to see its data: image shape, and the dialogue template."""
    return DataFlags(
        image_aspect_ratio=config.extra.get("image_aspect_ratio") or "pad",
        version="v1" if config.qformer is None else "minigpt4",
    )


# -------------------------------------------------------------------------------------------------------------- reading


def _connector(family: str, config: dict[str, Any], facts: TowerFacts, where: Path) -> Connector:
    if facts.qformer is not None and family != "llava":
        refuse_unless(where, config, {"quantization_config": (None,)})
        return "qformer", -1
    if family == "hf":
        return _hf_connector(config, facts.kind, where)
    if family == "parts":
        return "mlp2x_gelu", -2
    if facts.kind != CLIP:
        raise ValueError(
            f"{facts.where}: the vision tower is a {facts.kind}, but the original LLaVA layout in {where.parent} has "
            "CLIP's alone; give the folder of its own tower"
        )
    return _llava_connector(config, where)


def _language_config(values: dict[str, Any], where: Path, tie: bool | None) -> LanguageConfig:
    refuse_unless(where, {"text_config.model_type": values.get("model_type", "llama")}, {
        "text_config.model_type": ("llama", "llava", "llava_llama"),
    })  # fmt: skip
    refuse_unless(where, values, {
        "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
        "attention_dropout": (0, 0.0, None), "quantization_config": (None,),
    })  # fmt: skip
    from transformers import LlamaConfig  # a second that an export need not spend

    parsed = parse(LlamaConfig, {key: value for key, value in values.items() if not key.startswith("rope_")}, where)
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


def _hf_connector(config: dict[str, Any], kind: str, where: Path) -> Connector:
    strategy = config.get("vision_feature_select_strategy", "default")
    if kind == SIGLIP and strategy == "default":
        raise ValueError(
            f"{where}: vision_feature_select_strategy is 'default', which drops the first feature, but a {kind} has no "
            "class token there; expected 'full'"
        )
    refuse_unless(where, config, {
        "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,), "quantization_config": (None,),
        "vision_feature_select_strategy": ("full",) if kind == SIGLIP else ("default",),
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
    if kind != "linear" and not re.fullmatch(r"mlp[1-9]\d*x_gelu", str(kind)):
        raise ValueError(f"{where}: mm_projector_type is {kind!r}; expected linear or mlpNx_gelu")
    layer = config.get("mm_vision_select_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"{where}: mm_vision_select_layer is {layer!r}; expected one layer number")
    return kind, layer


def _extra_facts(
    family: str, config: dict[str, Any], text: dict[str, Any], tower_facts: TowerFacts, tower: Path | None
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
    kind, processor = tower_facts.kind, tower_facts.processor
    if kind == CLIP and "projection_dim" in tower_facts.vision:
        facts["vision_projection_dim"] = tower_facts.vision["projection_dim"]
    if family == "hf":
        # transformers 5 reads both names, and writes the first. An old BLIP-2 has no such token.
        image_token = config.get("image_token_index", config.get("image_token_id"))
        image_token = 32000 if image_token is None and kind != BLIP2 else image_token
        if image_token is not None:
            facts["image_token_index"] = image_token
        facts["image_aspect_ratio"] = aspect_ratio(processor, kind)
    else:
        own = config.get("image_aspect_ratio")
        facts["image_aspect_ratio"] = own or ("square" if kind == CLIP else aspect_ratio(processor, kind))
        facts["mm_vision_tower"] = config.get("mm_vision_tower", str(tower))
        facts["vision_tower_folder"] = None if tower is None else str(tower)
    return facts
