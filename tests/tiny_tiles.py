"""Tiny models that see pictures in tiles, LLaVA-NeXT and LLaVA-OneVision: whole folders of random weights.

`tests.tiny` has those of LLaVA-1.5.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from tests.tiny import (
    image_token_id,
    randomise,
    sentencepiece_model,
    tiny_llava_config,
    tiny_siglip_config,
    tiny_tokenizer,
    write_tiny_original_llava,
)

try:  # transformers 5 keeps processors without torchvision under their own names
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil as LlavaNextImageProcessor,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil as LlavaOnevisionImageProcessor,
    )
except ImportError:
    from transformers import LlavaNextImageProcessor, LlavaOnevisionImageProcessor

VIEW = 48
"""Pixels a side of a view, in patches of 8."""
NEXT_PINPOINTS = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]
ONEVISION_PINPOINTS = [[48 * rows, 48 * columns] for rows in range(1, 5) for columns in range(1, 5)]


def tiny_next_config(**sizes: Any) -> LlavaNextConfig:
    """A LLaVA-NeXT of a CLIP; `sizes` as for `tiny_llava_config`."""
    plain = tiny_llava_config(image=VIEW, **sizes)
    return LlavaNextConfig(
        vision_config=plain.vision_config, text_config=plain.text_config, image_grid_pinpoints=NEXT_PINPOINTS,
        image_token_index=plain.image_token_index, vision_feature_layer=plain.vision_feature_layer,
        image_seq_length=36, tie_word_embeddings=plain.tie_word_embeddings,
    )  # fmt: skip


def tiny_onevision_config(
    *, max_tiles: int = 3, tower: dict[str, int] | None = None, **sizes: Any
) -> LlavaOnevisionConfig:
    """A LLaVA-OneVision of a SigLIP without a head and, unless `sizes` say otherwise, a Qwen2; `tower` as for
    `tiny_siglip_config`."""
    text = tiny_llava_config(**{"family": "qwen2", **sizes}).text_config
    vision = tiny_siglip_config(image=VIEW, **(tower or {}))
    vision.vision_use_head = False
    return LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=ONEVISION_PINPOINTS,
        image_token_index=image_token_id(text.vocab_size), video_token_index=image_token_id(text.vocab_size) + 2,
        vision_aspect_ratio=f"anyres_max_{max_tiles}", tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip


def write_tiny_next(folder: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Write a whole LLaVA-NeXT folder and return it; `sizes` as for `tiny_llava_config`."""
    config = tiny_next_config(**sizes)
    _save(LlavaNextForConditionalGeneration(config), folder, seed)
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": VIEW}, crop_size={"height": VIEW, "width": VIEW}, image_grid_pinpoints=NEXT_PINPOINTS
    )
    LlavaNextProcessor(
        image_processor=processor, tokenizer=tiny_tokenizer(config.text_config.vocab_size), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_tiny_onevision(folder: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Write a whole LLaVA-OneVision folder and return it; `sizes` as for `tiny_onevision_config`.

    Its processor's files are as the hub has them: this machine may have no torchvision, which transformers' own video
    processor needs.
    """
    config = tiny_onevision_config(**sizes)
    _save(LlavaOnevisionForConditionalGeneration(config), folder, seed)
    LlavaOnevisionImageProcessor(
        size={"height": VIEW, "width": VIEW}, image_grid_pinpoints=ONEVISION_PINPOINTS, image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)  # fmt: skip
    tokenizer = tiny_tokenizer(config.text_config.vocab_size)
    tokenizer.add_tokens(["<video>", "<|im_start|>", "<|im_end|>"], special_tokens=True)  # Qwen's
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_original_next(folder: Path, **sizes: Any) -> tuple[Path, dict[str, Tensor]]:
    """Write a LLaVA-NeXT in the original layout, as `write_tiny_original_llava` does; its grids are (width, height)."""
    folder, tensors = write_tiny_original_llava(folder, **sizes)
    newline = torch.randn(tensors["lm_head.weight"].shape[1], generator=torch.Generator().manual_seed(4))
    tensors["model.image_newline"] = newline
    file, settings = folder / "model.safetensors", folder / "config.json"
    save_file({**load_file(file), "model.image_newline": newline}, file, metadata={"format": "pt"})
    cut = {
        "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": NEXT_PINPOINTS,
        "image_crop_resolution": 224, "image_split_resolution": 224,
    }  # fmt: skip
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **cut}))
    return folder, tensors


def _save(model: Any, folder: Path, seed: int) -> None:
    rows = model.config.text_config.vocab_size
    folder.mkdir(parents=True, exist_ok=True)
    randomise(model, seed)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=image_token_id(rows) + 1)
    model.save_pretrained(folder)
    shutil.copy(sentencepiece_model(image_token_id(rows)), folder / "tokenizer.model")
