"""A LLaVA-1.5 of tiny sizes, as llava-hf publishes the real one."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from language_model import SIZES, llama_config
from safetensors.torch import load_file, save_file
from scenes import CLIP_MEAN, CLIP_STD, IMAGE_SIZE, PATCH_SIZE, Aspect
from tokenizer import LLAVA_TOKENS, VICUNA_PROMPT
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaTokenizerFast,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

try:  # transformers 5 without torchvision: the Pillow class under its own name, which spares the user a warning
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

PROMPT, NAMED_TOKENS = VICUNA_PROMPT, LLAVA_TOKENS
DIALOGUE = (VICUNA_PROMPT.removesuffix("ASSISTANT:"), "\n", " ASSISTANT:")
"""What stands before an image, between it and the question, and between question and answer."""
ASPECT: Aspect = "pad"
VISION = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 4}
CHAT_TEMPLATE = (
    "{{ bos_token }}" + VICUNA_PROMPT.split(" USER:")[0] + "{% for message in messages %}"
    "{% if message['role'] == 'user' %} USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build(
    tokenizer: LlamaTokenizerFast, seed: int, vision: Mapping[str, int] = VISION, language: Mapping[str, int] = SIZES
) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 of tiny sizes with random weights."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **vision, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, hidden_act="quick_gelu", initializer_range=0.1
        ),
        text_config=llama_config(tokenizer, language),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    config.pad_token_id = tokenizer.pad_token_id
    return LlavaForConditionalGeneration(config)


def vision_tower(model: LlavaForConditionalGeneration) -> nn.Module:
    return model.model.vision_tower


def language_parts(model: LlavaForConditionalGeneration) -> nn.ModuleList:
    """[LlamaModel, its head]."""
    return nn.ModuleList([model.model.language_model, model.lm_head])


def make_processor(tokenizer: LlamaTokenizerFast) -> LlavaProcessor:
    """The processor of llava-hf's LLaVA-1.5 checkpoints, at our image size."""
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD),
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH_SIZE, chat_template=CHAT_TEMPLATE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def save(model: LlavaForConditionalGeneration, tokenizer: LlamaTokenizerFast, output: Path) -> None:
    """A folder as llava-hf publishes LLaVA-1.5, which transformers 4 and 5 both read."""
    model.save_pretrained(output)
    weights = load_file(output / "model.safetensors")
    for name in [name for name in weights if name.startswith("vision_tower.")]:  # transformers 5 drops a level
        weights[f"vision_tower.vision_model.{name.removeprefix('vision_tower.').removeprefix('vision_model.')}"] = (
            weights.pop(name)
        )
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    processor = make_processor(tokenizer)
    processor.save_pretrained(output)
    processor.image_processor.save_pretrained(output)  # transformers 5 would put it into processor_config.json alone
    settle_settings(output, "CLIPImageProcessor", NAMED_TOKENS)


def settle_settings(output: Path, image_processor_type: str, named_tokens: dict[str, str]) -> None:
    """What transformers 5 writes of processor and tokenizer, such that transformers 4 reads the same."""
    settings = output / "preprocessor_config.json"
    content = json.loads(settings.read_text())
    content["image_processor_type"] = image_processor_type  # transformers 4 has no class named after Pillow
    settings.write_text(json.dumps(content, indent=2) + "\n")
    # transformers 5 leaves `legacy` out, and 4 would take that for True (a space behind every special token).
    settings = output / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content |= {"legacy": False, "extra_special_tokens": named_tokens}
    settings.write_text(json.dumps(content, indent=2) + "\n")
