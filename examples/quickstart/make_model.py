"""Writes the quickstart's tiny LLaVA: a Hugging Face folder with tokenizer and processor, ready for pretrain.

    python examples/quickstart/make_model.py --data output/quickstart/data --output output/quickstart/model

LLaVA starts from parts that know something: a CLIP tower that has seen images, a LLaMA that has read text. So do
we, within about a minute and a half on two cores:

    tokenizer        LLaMA's kind (BPE, byte fallback), trained on the drawn sentences
    vision tower     a CLIP ViT that learns to tell colour and shape in every patch from hidden state -2, which is
                     what LLaVA reads, and the contents of the whole image from the class token
    language model   a LLaMA that learns the sentences by next-token prediction

The connector stays random: pretrain trains it, and the contrastive heads, from nothing.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from draw import COLOURS, SHAPES
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizerFast,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

IMAGE_SIZE, PATCH_SIZE = 48, 8
VISION = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
LANGUAGE = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VICUNA_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}" + VICUNA_PROMPT.split(" USER:")[0] + "{% for message in messages %}"
    "{% if message['role'] == 'user' %} USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


# --- tokenizer --------------------------------------------------------------------------------------------------


def train_tokenizer(sentences: list[str]) -> LlamaTokenizerFast:
    """A BPE with byte fallback in LLaMA's pipeline; ids 0-2 are <unk>, <s>, </s>, the last two <image>, <pad>.

    A space is prepended and spaces become '▁', as LLaMA does. The training text is cut into words and signs, so
    that no merge crosses them and 'star' is the same token before a full stop.
    """
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=specials + byte_tokens, show_progress=False)
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    text = (f"▁{word}" for line in [*sentences, VICUNA_PROMPT] for word in line.split())
    learner.train_from_iterator((piece for word in text for piece in re.findall(r"▁?\w+|\W", word)), trainer)

    trained = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    model = models.BPE(vocab=trained["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([*specials, "<image>", "<pad>"])
    return LlamaTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        model_max_length=2048, padding_side="left", extra_special_tokens={"image_token": "<image>"}, legacy=False,
    )  # fmt: skip


# --- vision tower -----------------------------------------------------------------------------------------------


def square_pixels(image: Image.Image, size: int) -> Tensor:
    """[3, size, size] normalised pixels: padded to a square with CLIP's mean colour, resized, as LLaVA-1.5 does."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in CLIP_MEAN))
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    square = square.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    return (pixels / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def patch_labels(scene: dict, grid: int) -> Tensor:
    """[grid * grid] int64: 0 where a patch's centre shows no thing, else 1 + colour * number of shapes + shape."""
    side = max(scene["width"], scene["height"])
    shift_x, shift_y = (side - scene["width"]) // 2, (side - scene["height"]) // 2
    labels = torch.zeros(grid, grid, dtype=torch.long)
    centres = (torch.arange(grid) + 0.5) * side / grid
    for thing in scene["things"]:
        left, top, right, bottom = thing["box"]
        columns = (centres >= left + shift_x) & (centres <= right + shift_x)
        rows = (centres >= top + shift_y) & (centres <= bottom + shift_y)
        colour = list(COLOURS).index(thing["colour"])
        labels[rows[:, None] & columns[None, :]] = 1 + colour * len(SHAPES) + SHAPES.index(thing["shape"])
    return labels.flatten()


def split_label(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(colour, shape) of patch labels, 0 meaning none in both."""
    some = labels > 0
    return (
        torch.where(some, (labels - 1) // len(SHAPES) + 1, 0),
        torch.where(some, (labels - 1) % len(SHAPES) + 1, 0),
    )


def load_scenes(data: Path, prefix: str, size: int) -> tuple[Tensor, Tensor]:
    """(pixels [B, 3, size, size], patch labels [B, grid * grid]) of the images whose name starts with `prefix`."""
    pixels, labels = [], []
    for line in (data / "scenes.jsonl").read_text().splitlines():
        scene = json.loads(line)
        if scene["image"].startswith(prefix):
            with Image.open(data / "images" / scene["image"]) as image:
                pixels.append(square_pixels(image, size))
            labels.append(patch_labels(scene, size // PATCH_SIZE))
    return torch.stack(pixels), torch.stack(labels)


class TowerTask(nn.Module):
    """What the tower learns from: colour and shape of every patch, and which coloured shapes the image holds."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        hidden = tower.config.hidden_size
        self.colour, self.shape = nn.Linear(hidden, len(COLOURS) + 1), nn.Linear(hidden, len(SHAPES) + 1)
        self.contents = nn.Linear(hidden, len(COLOURS) * len(SHAPES) + 1)

    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, accuracy): accuracy is the share of a thing's patches whose colour and shape are both right."""
        states = self.tower(pixels, output_hidden_states=True)
        patches = F.layer_norm(states.hidden_states[-2][:, 1:], (self.tower.config.hidden_size,))
        colour, shape = self.colour(patches), self.shape(patches)
        true_colour, true_shape = split_label(labels)
        held = torch.zeros(labels.shape[0], self.contents.out_features).scatter_(1, labels, 1.0)
        loss = F.cross_entropy(colour.flatten(0, 1), true_colour.flatten())
        loss = loss + F.cross_entropy(shape.flatten(0, 1), true_shape.flatten())
        loss = loss + F.binary_cross_entropy_with_logits(self.contents(states.pooler_output), held)
        right = (colour.argmax(-1) == true_colour) & (shape.argmax(-1) == true_shape)
        return loss, right[labels > 0].float().mean()


def batches(number: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` index batches that go through shuffled epochs."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while order.numel() < size:
            order = torch.cat([order, torch.randperm(number, generator=generator)])
        yield order[:size]
        order = order[size:]


def fit(model: nn.Module, loss_of, steps: int, lr: float, description: str) -> None:
    """AdamW with a short warm-up and a cosine decay; `loss_of(step)` gives (loss, what to show)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 1) + 1, pct_start=0.1)
    with tqdm(range(steps), desc=description, unit="step") as bar:
        for step in bar:
            loss, shown = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 10 == 0 or step == steps - 1:
                bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items()})


def train_tower(tower: nn.Module, data: Path, steps: int, seed: int) -> float:
    """Trains `tower` in place on the training drawings; returns the accuracy on the held-out ones."""
    size = tower.config.image_size
    task = TowerTask(tower)
    if steps:
        pixels, labels = load_scenes(data, "train", size)
        index = list(batches(len(pixels), 64, steps, seed))
        generator = torch.Generator().manual_seed(seed)
        grid = size // PATCH_SIZE

        def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
            x, y = pixels[index[step]], labels[index[step]]
            if torch.rand((), generator=generator) < 0.5:  # a mirror image shows the same things
                x, y = x.flip(-1), y.view(-1, grid, grid).flip(-1).flatten(1)
            loss, accuracy = task(x, y)
            return loss, {"loss": loss.item(), "patches right": accuracy.item()}

        fit(task, loss_of, steps, 1.5e-3, "vision tower")
    with torch.no_grad():
        return task(*load_scenes(data, "valid", size))[1].item()


if __name__ == "__main__":
    import sys
    d = Path("/tmp/qs/data")
    tok = train_tokenizer((d / "corpus.txt").read_text().splitlines())
    print(len(tok), tok.tokenize("There is a large green star on the right. xyz"), tok("A star.").input_ids)
    torch.manual_seed(0)
    from transformers import CLIPVisionModel
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE))
    t = time.time()
    print(train_tower(tower, d, int(sys.argv[1]), 0), time.time()-t)
