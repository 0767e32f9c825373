"""A MiniGPT-4 of tiny sizes: BLIP-2's vision tower and Q-Former, a linear projection, and LLaMA instead of OPT."""

from pathlib import Path

import torch
from language_model import llama_config
from scenes import CLIP_MEAN, CLIP_STD, IMAGE_SIZE, PATCH_SIZE, Aspect
from tiny_llava import settle_settings
from tokenizer import MINIGPT4_PROMPT
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaTokenizerFast,
)

try:  # transformers 5 without torchvision: the Pillow class under its own name, which spares the user a warning
    from transformers import BlipImageProcessorPil as BlipImageProcessor
except ImportError:
    from transformers import BlipImageProcessor

PROMPT, NAMED_TOKENS = MINIGPT4_PROMPT, {}
DIALOGUE = ("###Human: <Img>", "</Img> ", " ###Assistant: ")
"""What stands before an image, between it and the question, and between question and answer."""
ASPECT: Aspect = "stretch"
VISION = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 4}
QFORMER = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 4}
NUM_QUERY_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
"""A query for every patch (`qformer.py`); BLIP-2 has 32 for 256 patches."""


def build(tokenizer: LlamaTokenizerFast, seed: int) -> Blip2ForConditionalGeneration:
    """A BLIP-2 of tiny sizes with random weights."""
    torch.manual_seed(seed)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, initializer_range=0.1),
        qformer_config=Blip2QFormerConfig(
            **QFORMER, encoder_hidden_size=VISION["hidden_size"], vocab_size=len(tokenizer), initializer_range=0.1
        ),
        text_config=llama_config(tokenizer),
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)  # equal ones, as transformers has them, would learn the same for ever
    return model.eval()  # BLIP-2's dropout is for a Q-Former a thousand times larger


def vision_tower(model: Blip2ForConditionalGeneration) -> nn.Module:
    return model.vision_model


def language_parts(model: Blip2ForConditionalGeneration) -> nn.ModuleList:
    """[LlamaModel, its head]."""
    return nn.ModuleList([model.language_model.model, model.language_model.lm_head])


def save(model: Blip2ForConditionalGeneration, tokenizer: LlamaTokenizerFast, output: Path) -> None:
    """A folder as Salesforce publishes BLIP-2, which transformers 4 and 5 both read."""
    model.save_pretrained(output)
    images = BlipImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    Blip2Processor(images, tokenizer, num_query_tokens=NUM_QUERY_TOKENS).save_pretrained(output)
    images.save_pretrained(output)  # transformers 5 would put it into processor_config.json alone
    settle_settings(output, "BlipImageProcessor", NAMED_TOKENS)
