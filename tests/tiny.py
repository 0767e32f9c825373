"""Tiny but complete models for tests: every file a real folder has, nothing mocked, made in under a second.

`write_tiny_llava` gives a `LlavaForConditionalGeneration` folder (weights, configs, tokenizer, processor);
`write_tiny_original_llava` the same weights in the original LLaVA layout; `write_tiny_blip2` a
`Blip2ForConditionalGeneration` folder with a LLaMA inside. Data for them: `tests/tiny_data.py`.
Weights are drawn so that logits are of order 1 and no two tensors are alike: norms and biases are random too, since a
swapped or forgotten one must show.
"""

import json
import math
import random
import shutil
import tempfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GenerationConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from tests.tiny_data import draw_scene, hallucinate

try:  # transformers 5 keeps processors without torchvision under their own names
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as BlipImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import BlipImageProcessor, CLIPImageProcessor

LLAMA3_ROPE_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Llama-3's scaling with a context short enough that tests of a few dozen tokens feel it."""

FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 24, "tie": True},
    "mistral": {"family": "mistral", "head_dim": 12, "sliding_window": 300},
}
"""Arguments of `write_tiny_llava` for the relatives of LLaMA: heads wider, and as wide, as hidden / heads would be."""

NUM_SPARE_ROWS = 11
"""Embedding rows behind the SentencePiece vocabulary: `<image>`, `<pad>`, then unused ones (as 32064 over 32000)."""

SYSTEM_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: ASSISTANT:"
)


# ---------------------------------------------------------------------------------------------------------------- model


def image_token_id(vocab: int = 331) -> int:
    """Id of `<image>` in a tiny model of that many rows; `<pad>` is the next one."""
    return vocab - NUM_SPARE_ROWS


def tiny_llama_config(
    *,
    heads: int = 6,
    groups: int = 2,
    hidden: int = 48,
    ffn: int = 88,
    layers: int = 4,
    vocab: int = 331,
    tie: bool = False,
    rope_scaling: dict[str, Any] | None = None,
    family: str = "llama",
    **others: Any,
) -> PreTrainedConfig:
    """The language model of all tiny models. `others`: keys that a family has of its own, as `head_dim`."""
    return CONFIG_MAPPING[family](
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocab,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **(rope_scaling or {})},
        tie_word_embeddings=tie,
        pad_token_id=image_token_id(vocab) + 1,
        bos_token_id=1,
        eos_token_id=2,
        **others,
    )


def tiny_llava_config(
    *,
    heads: int = 6,
    groups: int = 2,
    hidden: int = 48,
    ffn: int = 88,
    layers: int = 4,
    vocab: int = 331,
    image: int = 48,
    patch: int = 8,
    vision_hidden: int = 32,
    vision_heads: int = 4,
    vision_layers: int = 4,
    tie: bool = False,
    rope_scaling: dict[str, Any] | None = None,
    select_layer: int = -2,
    **language: Any,
) -> LlavaConfig:
    """Configuration of the tiny model; `rope_scaling` as `LLAMA3_ROPE_SCALING`, without `rope_theta`; `language` as for
    `tiny_llama_config`."""
    text = tiny_llama_config(
        heads=heads, groups=groups, hidden=hidden, ffn=ffn, layers=layers, vocab=vocab, tie=tie,
        rope_scaling=rope_scaling, **language,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=image,
        patch_size=patch,
        projection_dim=16,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id(vocab),
        image_seq_length=(image // patch) ** 2,
        vision_feature_layer=select_layer,
        tie_word_embeddings=tie,
    )


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Draw every parameter anew: matrices with variance 1 / fan-in, norms around 1, biases and the like around 0.

    Each parameter draws from its own generator, seeded by its name, so that order does not matter.
    """
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if "embed" in name and parameter.dim() == 2:  # word and position embeddings: rows of order 1
            parameter.copy_(noise * 0.5)
        elif parameter.dim() >= 2:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        elif "norm" in name.lower() and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)


def write_tiny_llava(
    folder: Path,
    *,
    heads: int = 6,
    groups: int = 2,
    hidden: int = 48,
    ffn: int = 88,
    layers: int = 4,
    vocab: int = 331,
    image: int = 48,
    patch: int = 8,
    vision_hidden: int = 32,
    vision_heads: int = 4,
    vision_layers: int = 4,
    tie: bool = False,
    rope_scaling: dict[str, Any] | None = None,
    select_layer: int = -2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **language: Any,
) -> Path:
    """Write a whole Hugging Face LLaVA folder and return it: weights, config, generation config, tokenizer, processor.

    The defaults are odd on purpose: 6 heads in 2 groups, 331 rows, a feed-forward width that 64 does not divide.
    """
    config = tiny_llava_config(
        heads=heads, groups=groups, hidden=hidden, ffn=ffn, layers=layers, vocab=vocab, image=image, patch=patch,
        vision_hidden=vision_hidden, vision_heads=vision_heads, vision_layers=vision_layers, tie=tie,
        rope_scaling=rope_scaling, select_layer=select_layer, **language,
    )  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = LlavaForConditionalGeneration(config)
    randomise(model, seed)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=image_token_id(vocab) + 1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_processor(vocab=vocab, image=image, patch=patch).save_pretrained(folder)
    shutil.copy(sentencepiece_model(image_token_id(vocab)), folder / "tokenizer.model")
    return folder


def write_tiny_original_llava(
    folder: Path,
    *,
    seed: int = 0,
    projector_type: str = "mlp2x_gelu",
    vision_tower_inside: bool = True,
    pickle: bool = False,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> tuple[Path, dict[str, Tensor]]:
    """Write a folder in the original layout (`LlavaLlamaForCausalLM`) beside `folder.name + "-clip"`, its CLIP tower.

    The names are what `haotian-liu/LLaVA` saves: LLaMA's own, `model.mm_projector.*`, and `CLIPVisionModel`'s under
    `model.vision_tower.vision_tower.vision_model.` unless the tower stays in its own folder (`vision_tower_inside`).
    The vocabulary has no row for an image token: `vocab` counts the SentencePiece pieces (default 320).

    Returns the folder and every tensor written, the tower's own under their names in the original layout too.
    """
    from safetensors.torch import save_file
    from transformers import CLIPVisionModel, LlamaForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = sizes.pop("vocab", 331 - NUM_SPARE_ROWS)
    config = tiny_llava_config(vocab=vocab, **sizes)
    config.text_config.pad_token_id = 0
    llama, clip = LlamaForCausalLM(config.text_config), CLIPVisionModel(config.vision_config)
    width, depth = config.text_config.hidden_size, 1
    if projector_type != "linear":
        depth = int(projector_type.removeprefix("mlp").removesuffix("x_gelu"))
    rest = [part for _ in range(depth - 1) for part in (nn.GELU(), nn.Linear(width, width))]
    first = nn.Linear(config.vision_config.hidden_size, width)
    projector = first if projector_type == "linear" else nn.Sequential(first, *rest)
    for part, part_seed in ((llama, seed), (clip, seed + 1), (projector, seed + 2)):
        randomise(part, part_seed)
        part.to(dtype)

    tower_folder = folder.with_name(folder.name + "-clip")
    clip.save_pretrained(tower_folder)
    tiny_image_processor(config.vision_config.image_size).save_pretrained(tower_folder)
    tensors = {name: value for name, value in llama.state_dict().items()}
    if config.text_config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    tensors.update({f"model.mm_projector.{name}": value for name, value in projector.state_dict().items()})
    tower = {name.removeprefix("vision_model."): value for name, value in clip.named_parameters()}
    tower = {f"model.vision_tower.vision_tower.vision_model.{name}": value.data for name, value in tower.items()}
    written = {**tensors, **tower} if vision_tower_inside else tensors
    written = {name: value.clone().contiguous() for name, value in written.items()}
    if pickle:
        torch.save(written, folder / "pytorch_model.bin")
    else:
        save_file(written, folder / "model.safetensors", metadata={"format": "pt"})

    text = config.text_config.to_dict()
    facts = {key: text[key] for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )}  # fmt: skip
    rope = dict(text["rope_parameters"])
    facts["rope_theta"] = rope.pop("rope_theta")
    facts["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    facts.update(
        architectures=["LlavaLlamaForCausalLM"], model_type="llava_llama",
        torch_dtype=str(dtype).removeprefix("torch."), mm_projector_type=projector_type,
        mm_vision_tower=str(tower_folder), mm_hidden_size=clip.config.hidden_size,
        mm_vision_select_layer=config.vision_feature_layer, mm_vision_select_feature="patch", use_mm_proj=True,
        mm_use_im_start_end=False, mm_use_im_patch_token=False, image_aspect_ratio="pad", freeze_mm_mlp_adapter=False,
        tune_mm_mlp_adapter=False, unfreeze_mm_vision_tower=vision_tower_inside, use_cache=True,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    )
    shutil.copy(sentencepiece_model(vocab), folder / "tokenizer.model")
    tokenizer_config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                        "unk_token": "<unk>", "pad_token": "<unk>", "add_bos_token": True, "legacy": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder, {**tensors, **tower}


def tiny_blip2_config(
    *, queries: int = 5, qformer_layers: int = 3, vision_layers: int = 3, image: int = 48, **language: Any
) -> Blip2Config:
    """BLIP-2 with a LLaMA: what MiniGPT-4 is made of. `language` as for `tiny_llama_config`.

    The tower has 3 heads, which two tensor-parallel ranks could not share; two of the Q-Former's three layers attend to
    the image.
    """
    text = tiny_llama_config(**language)
    return Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=30, intermediate_size=50, num_hidden_layers=vision_layers, num_attention_heads=3,
            image_size=image, patch_size=8, initializer_range=0.1,
        ),
        qformer_config=Blip2QFormerConfig(
            hidden_size=24, intermediate_size=42, num_hidden_layers=qformer_layers, num_attention_heads=2,
            cross_attention_frequency=2, encoder_hidden_size=30, vocab_size=50, initializer_range=0.1,
        ),
        text_config=text,
        num_query_tokens=queries,
        image_token_index=image_token_id(text.vocab_size),
        tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip


def tiny_siglip_config(
    *, image: int = 50, layers: int = 3, hidden: int = 30, ffn: int = 50, heads: int = 3
) -> SiglipVisionConfig:
    """A SigLIP tower: no class token, no pre-norm, tanh GELU, 50 pixels in patches of 8 (36 of them, a rest left)."""
    return SiglipVisionConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=image, patch_size=8,
    )  # fmt: skip


def tiny_dinov2_config(
    *, registers: int | None = None, image: int = 74, layers: int = 3, swiglu: bool = False
) -> Dinov2Config | Dinov2WithRegistersConfig:
    """A DINOv2 of 3 heads, with `registers` or without: 9 x 9 positions, of 74 pixels in patches of 8."""
    sizes = {
        "hidden_size": 30, "num_hidden_layers": layers, "num_attention_heads": 3, "mlp_ratio": 3, "image_size": image,
        "patch_size": 8, "use_swiglu_ffn": swiglu, "drop_path_rate": 0.2,
    }  # fmt: skip
    if registers is None:
        return Dinov2Config(**sizes)
    return Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)


def write_tiny_blip2(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **sizes: Any
) -> Path:
    """Write a whole `Blip2ForConditionalGeneration` folder with a LLaMA inside and return it: weights, config,
    generation config, tokenizer, image processor. `sizes` as for `tiny_blip2_config`."""
    config = tiny_blip2_config(**sizes)
    vocab = config.text_config.vocab_size
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = Blip2ForConditionalGeneration(config)
    randomise(model, seed)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=image_token_id(vocab) + 1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(vocab).save_pretrained(folder)
    tiny_blip_image_processor(config.vision_config.image_size).save_pretrained(folder)
    shutil.copy(sentencepiece_model(image_token_id(vocab)), folder / "tokenizer.model")
    return folder


# ------------------------------------------------------------------------------------------- tokenizer and processor


@cache
def sentencepiece_model(size: int) -> Path:
    """A LLaMA-like `tokenizer.model` (BPE, byte fallback, <unk> <s> </s>) of exactly `size` pieces; trained once."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-tokenizer-"))
    corpus = [SYSTEM_PROMPT] * 4
    for index in range(200):
        scene = draw_scene(random.Random(index))
        corpus += [
            scene["caption"],
            f"USER: What is on the {scene['place']}? ASSISTANT: {hallucinate(scene, random.Random(index))}",
        ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=size, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=1.0, minloglevel=2,
        split_digits=True, normalization_rule_name="identity", num_threads=1, hard_vocab_limit=True,
    )  # fmt: skip
    return folder / "tokenizer.model"


def tiny_tokenizer(vocab: int = 331) -> LlamaTokenizer:
    """The tokenizer of a tiny model with `vocab` rows: SentencePiece pieces, then `<image>` and `<pad>`."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(sentencepiece_model(image_token_id(vocab)), folder)
        facts = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "model_max_length": 2048}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(facts))
        tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [image_token_id(vocab), image_token_id(vocab) + 1]
    return tokenizer


def tiny_image_processor(image: int = 48) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": image}, crop_size={"height": image, "width": image})


def tiny_blip_image_processor(image: int = 48) -> BlipImageProcessor:
    """Stretches to a square, as BLIP-2 and MiniGPT-4 do."""
    return BlipImageProcessor(size={"height": image, "width": image})


def tiny_processor(*, vocab: int = 331, image: int = 48, patch: int = 8) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=tiny_image_processor(image), tokenizer=tiny_tokenizer(vocab), patch_size=patch,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
