"""`ModelConfig` -> the JSON files of a Hugging Face folder, in HF's or in the original LLaVA layout."""

from typing import Any, Literal, NamedTuple

from hacl_megatron.checkpoint.hf_config import KNOWN_TOWERS
from hacl_megatron.config.architecture import ModelConfig

Layout = Literal["hf", "llava"]


class Vocabulary(NamedTuple):
    """Rows and special tokens of a folder of some layout."""

    size: int
    image_token: int | None
    """None in the original layout, whose prompts mark an image by -200, outside the vocabulary."""
    pad_token: int | None


def vocabulary_of_layout(config: ModelConfig, layout: Layout, num_tokens: int | None = None) -> Vocabulary:
    """The vocabulary that a folder of that layout has.

    Within one layout nothing changes. From the original layout to HF's, `<image>` and `<pad>` get the first ids behind
    the tokenizer's; where the rows do not reach that far they are rounded up to 64 (32000 -> 32064, as the published
    conversions have it). The other way, the rows from there on are cut (32064 -> 32000) when they are such a tail; a
    vocabulary that holds `<image>` within itself keeps it.

    Args:
        num_tokens: length of the tokenizer that goes along. Default: as many as rows.
    """
    rows, extra = config.language.vocab_size, config.extra
    image, pad = extra.get("image_token_index"), extra.get("pad_token_id")
    if layout == "hf":
        if image is not None:
            return Vocabulary(rows, image, pad)
        image = min(rows, num_tokens or rows)
        return Vocabulary(rows if image + 2 <= rows else (image + 2 + 63) // 64 * 64, image, image + 1)
    if image is None or rows - image > 64:
        return Vocabulary(rows, None, pad)
    if pad is not None and rows - pad <= 64:
        image = min(image, pad)
    return Vocabulary(image, None, 0)


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
        ValueError: the connector does not exist in Hugging Face's LLaVA.
    """
    vocab_size, image_token, pad = vocabulary or vocabulary_of_layout(config, layout)
    extra, language, vision = config.extra, config.language, config.vision
    scaling = language.rope_scaling
    text = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "head_dim": language.head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": language.max_position_embeddings,
        "rms_norm_eps": language.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": language.tie_word_embeddings,
        "bos_token_id": extra.get("bos_token_id", 1),
        "eos_token_id": extra.get("eos_token_id", 2),
        "pad_token_id": pad,
        # Both spellings: transformers 4.x knows the first two, 5.x the third.
        "rope_theta": language.rotary_base,
        **({"rope_scaling": scaling} if scaling else {}),
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rotary_base, **(scaling or {})},
    }
    if layout == "llava":
        return {
            **text,
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaForCausalLM"],
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
        }
    if config.projector_type != "mlp2x_gelu":
        raise ValueError(
            f"the connector is {config.projector_type}, but LlavaForConditionalGeneration has mlp2x_gelu only; "
            "export the original layout (llava) instead"
        )
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": tower_config_json(config),
        "image_token_index": image_token,
        "image_seq_length": vision.num_patches,
        "pad_token_id": pad,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision_select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": language.tie_word_embeddings,
    }


def tower_config_json(config: ModelConfig) -> dict[str, Any]:
    """The vision tower's part: `vision_config` in HF's layout, `config.json` of a CLIP folder."""
    vision = config.vision
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_epsilon,
        "projection_dim": config.extra.get("vision_projection_dim", 768),
    }


def tower_name(config: ModelConfig) -> str | None:
    """`mm_vision_tower`: what the source called it, else the published tower with these very sizes, else None."""
    vision = config.vision
    if named := config.extra.get("mm_vision_tower"):
        return named
    for name, sizes in KNOWN_TOWERS.items():
        same = (vision.num_layers, vision.hidden_size, vision.image_size, vision.patch_size) == tuple(
            sizes[key] for key in ("num_hidden_layers", "hidden_size", "image_size", "patch_size")
        )
        if same and vision.ffn_hidden_size == sizes["intermediate_size"]:
            return name
    return None


def to_preprocessor_json(config: ModelConfig, *, image_aspect_ratio: str | None = None) -> dict[str, Any]:
    """`preprocessor_config.json`: CLIP's processor, or LLaVA's own when images are padded to squares."""
    image, pad = config.image, (image_aspect_ratio or config.extra.get("image_aspect_ratio")) == "pad"
    return {
        "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **({"do_pad": True} if pad else {}),
        "do_resize": True,
        "size": {"shortest_edge": image.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }
