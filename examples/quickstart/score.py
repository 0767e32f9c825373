"""Exported models read by transformers alone: what they make of images and captions, and what they say of images.

LLaVA      BOS, Vicuna's prompt, image, EOS      the image's global representation is the state at this EOS
MiniGPT-4  BOS, ###Human: <Img>, image, EOS
both       BOS, caption, EOS                     the caption's
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from draw import Facts, true_sentences
from PIL import Image
from safetensors.torch import load_file
from tokenizer import VICUNA_PROMPT
from torch import Tensor
from transformers import AutoProcessor, Blip2ForConditionalGeneration, LlavaForConditionalGeneration

PROMPT = VICUNA_PROMPT.removesuffix("ASSISTANT:")
MINIGPT4_PREFIX, MINIGPT4_END = "###Human: <Img>", "###"
REQUEST = "Write a short caption."


def padded_to_square(image: Image.Image, mean: list[float]) -> Image.Image:
    """LLaVA-1.5's `expand2square`: the mean colour around an image that is not square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class ExportedLlava:
    """`LlavaForConditionalGeneration` of a folder, and how LLaVA-1.5 feeds it."""

    prefix = PROMPT
    """What precedes the image in a dialogue."""

    def __init__(self, hf_dir: Path) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(hf_dir).eval()
        self.processor = AutoProcessor.from_pretrained(hf_dir)
        vision = self.model.config.vision_config
        self.visual_tokens = (vision.image_size // vision.patch_size) ** 2
        self.image_id = self.model.config.image_token_id

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """[B, 3, S, S]: padded to squares."""
        processor = self.processor.image_processor
        squares = [padded_to_square(image.convert("RGB"), processor.image_mean) for image in images]
        return processor(images=squares, return_tensors="pt")["pixel_values"]

    def text_ids(self, text: str, bos: bool = True) -> list[int]:
        tokenizer = self.processor.tokenizer
        return [tokenizer.bos_token_id] * bos + tokenizer(text, add_special_tokens=False)["input_ids"]

    def last_state(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        """[hidden]: the state behind the final norm at the last of `ids` [1, L]."""
        images = {} if pixels is None else {"pixel_values": pixels}
        return self.model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).last_hidden_state[0, -1]

    def request_ids(self) -> list[int]:
        """The dialogue up to the answer to `REQUEST`."""
        content = [{"type": "image"}, {"type": "text", "text": REQUEST}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        tokenizer = self.processor.tokenizer  # which adds BOS
        prompt = prompt.removeprefix(tokenizer.bos_token).replace("<image>", "<image>" * self.visual_tokens)
        return tokenizer(prompt)["input_ids"]

    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """[B, L, vocabulary] of ids [B, L], which are padded behind if at all."""
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits

    def answers(self, ids: Tensor, pixels: Tensor) -> list[str]:
        """What it says greedily behind `ids` [B, L], until it ends."""
        images = {"pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
        said = self.model.generate(input_ids=ids, **images, max_new_tokens=40, do_sample=False)[:, ids.shape[1] :]
        return self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)


class ExportedMiniGPT4(ExportedLlava):
    """`Blip2ForConditionalGeneration` of a folder, and how MiniGPT-4 feeds it."""

    prefix = MINIGPT4_PREFIX

    def __init__(self, hf_dir: Path) -> None:
        self.model = Blip2ForConditionalGeneration.from_pretrained(hf_dir).eval()
        self.processor = AutoProcessor.from_pretrained(hf_dir)
        self.visual_tokens, self.image_id = self.model.config.num_query_tokens, self.model.config.image_token_index

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """[B, 3, S, S]: stretched to squares."""
        images = [image.convert("RGB") for image in images]
        return self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def last_state(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        """[hidden]: the state behind the final norm at the last of `ids` [1, L]."""
        if pixels is None:
            return self.model.language_model.model(input_ids=ids).last_hidden_state[0, -1]
        out = self.model(pixel_values=pixels, input_ids=ids, output_hidden_states=True)
        return out.language_model_outputs.hidden_states[-1][0, -1]

    def request_ids(self) -> list[int]:
        """The dialogue up to the answer to `REQUEST`; each text around the image is tokenized on its own."""
        image = [self.image_id] * self.visual_tokens
        after = self.text_ids(f"</Img> {REQUEST} ###Assistant: ", bos=False)
        return [*self.text_ids(self.prefix), *image, *after]

    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """[B, L, vocabulary] of ids [B, L], which are padded behind if at all."""
        return self.model(input_ids=ids, pixel_values=pixels).logits

    def answers(self, ids: Tensor, pixels: Tensor) -> list[str]:
        """What it says greedily behind `ids` [B, L], until `MINIGPT4_END`."""
        tokenizer = self.processor.tokenizer
        said = self.model.generate(
            pixel_values=pixels, input_ids=ids, max_new_tokens=40, do_sample=False, stop_strings=[MINIGPT4_END],
            tokenizer=tokenizer,
        )[:, ids.shape[1] :]  # fmt: skip
        return [text.split(MINIGPT4_END)[0] for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


def read_export(hf_dir: Path) -> ExportedLlava:
    """The exported folder as what its configuration says it is."""
    model_type = json.loads((hf_dir / "config.json").read_text(encoding="utf-8"))["model_type"]
    return {"llava": ExportedLlava, "blip-2": ExportedMiniGPT4}[model_type](hf_dir)


@dataclass(frozen=True)
class Represented:
    """Global representations of N image-caption pairs: unit rows, float32 [N, D]."""

    images: Tensor
    captions: Tensor
    hallucinated: Tensor
    """Of each caption's (first) hallucinated twin."""


@torch.no_grad()
def represent(hf_dir: Path, samples: list[dict[str, Any]], image_folder: Path, prompt: str | None) -> Represented:
    """v, t and u of each sample, by transformers on an exported folder with `hacl_heads.safetensors`.

    A global representation is the last hidden state, after the final norm, at an EOS token: behind the image's tokens,
    or behind BOS and a text. What precedes the image is nothing with `--contrastive-image-context image`; with
    `prompt` it is BOS and the template's text, "" in stage 1 and `read_export(...).prefix` in stage 2.
    """
    exported = read_export(hf_dir)
    heads = load_file(hf_dir / "hacl_heads.safetensors")
    eos = exported.processor.tokenizer.eos_token_id

    def at_eos(token_ids: list[int], head: str, pixels: Tensor | None = None) -> Tensor:
        state = exported.last_state(torch.tensor([[*token_ids, eos]]), pixels)
        return F.normalize(F.linear(state, heads[f"{head}.weight"], heads[f"{head}.bias"]).float(), dim=-1)

    context = [] if prompt is None else exported.text_ids(prompt)
    context += [exported.image_id] * exported.visual_tokens
    rows = []
    for sample in samples:
        twin = sample["Hallucination caption"]
        twin = twin if isinstance(twin, str) else twin[0]
        v = at_eos(context, "vision_projector", exported.pixels([Image.open(image_folder / sample["image"])]))
        rows.append((v, *(at_eos(exported.text_ids(text), "text_projector") for text in (sample["text"], twin))))
    return Represented(*(torch.stack(column) for column in zip(*rows, strict=True)))


def retrieval_accuracy(pairs: Represented, captions: list[str], among: int = 64) -> float:
    """Share of the images that find their caption, or one that equals it, among each `among` pairs in turn."""
    right = 0
    for start in range(0, len(captions), among):
        group = slice(start, start + among)
        nearest = (pairs.images[group] @ pairs.captions[group].T).argmax(-1).tolist()
        right += sum(captions[start + k] == captions[start + best] for k, best in enumerate(nearest))
    return right / len(captions)


def read_images(samples: list[dict[str, Any]], image_folder: Path) -> list[Image.Image]:
    images = []
    for sample in samples:
        with Image.open(image_folder / sample["image"]) as image:
            images.append(image.convert("RGB"))
    return images


@torch.no_grad()
def describe(exported: ExportedLlava, samples: list[dict[str, Any]], image_folder: Path) -> list[str]:
    """What the exported model answers, greedily, when asked to describe each image; by transformers alone."""
    pixels = exported.pixels(read_images(samples, image_folder))
    ids = torch.tensor([exported.request_ids()]).expand(len(samples), -1)
    return [answer.strip() for answer in exported.answers(ids, pixels)]


@torch.no_grad()
def likelier(exported: ExportedLlava, samples: list[dict[str, Any]], image_folder: Path) -> float:
    """The share of samples whose caption is a likelier answer to `REQUEST` than its (first) twin."""
    pixels, asked = exported.pixels(read_images(samples, image_folder)), exported.request_ids()
    scores = []
    for key in ("text", "Hallucination caption"):
        texts = [sample[key] if isinstance(sample[key], str) else sample[key][0] for sample in samples]
        answers = [torch.tensor(exported.text_ids(text, bos=False)) for text in texts]
        targets = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100)
        ids = torch.cat([torch.tensor([asked]).expand(len(samples), -1), targets.clamp(min=0)], dim=1)
        logits = exported.logits(ids, pixels)[:, len(asked) - 1 : -1]
        scores.append(-F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(-1))
    return float((scores[0] > scores[1]).float().mean())


def facts_by_image(data: Path) -> dict[str, Facts]:
    """What each image shows."""
    scenes = map(json.loads, (data / "scenes.jsonl").read_text(encoding="utf-8").splitlines())
    return {scene["image"]: scene["facts"] for scene in scenes}


def true_of(answers: list[str], scenes: list[Facts]) -> list[bool]:
    """Whether each answer is one of the sentences that are true of its scene."""
    return [answer in true_sentences(scene) for answer, scene in zip(answers, scenes, strict=True)]
