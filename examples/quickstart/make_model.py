"""Writes the quickstart's tiny LLaVA: a Hugging Face folder with tokenizer and processor, ready for pretrain.

    python examples/quickstart/make_model.py --data output/quickstart/data --output output/quickstart/model

LLaVA starts from parts that know something: a CLIP tower that has seen images, a LLaMA that has read text. So do
we, within about a minute and a half on two cores:

    tokenizer        LLaMA's kind (BPE, byte fallback), trained on the drawn sentences
    vision tower     a CLIP ViT that learns what every patch shows (colour, shape, size, where, background) from
                     hidden state -2, which is what LLaVA reads
    language model   a LLaMA that learns the sentences by next-token prediction, and to put into a sentence what it was
                     told before, at the same time on the other core

The connector stays random: pretrain trains it, and the contrastive heads, from nothing.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from draw import BACKGROUNDS, COLOURS, SHAPES, SIZES, Facts, seen_from_the_other
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizerFast,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.utils import logging as transformers_logging

try:  # transformers 5 without torchvision: the Pillow class under its own name, which spares the user a warning
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

IMAGE_SIZE, PATCH_SIZE = 64, 16
VISION = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 4}
LANGUAGE = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ATTRIBUTES = {
    "colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES,
    "where": ("left", "right", "top", "bottom", "middle", "two", "three"), "background": BACKGROUNDS,
}  # fmt: skip
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
    that no merge crosses them and 'star' is the same token before a full stop. The space before USER is cut off too,
    so that '▁USER' is one piece more than 'USER', as in Vicuna's vocabulary: LLaVA's v1 template counts on it, and
    ignores all labels of a dialogue of several rounds otherwise.
    """
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=specials + byte_tokens, show_progress=False)
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    text = (f"▁{word}" for line in [*sentences, VICUNA_PROMPT] for word in line.split())
    learner.train_from_iterator((piece for word in text for piece in re.findall(r"▁(?=USER)|▁?\w+|\W", word)), trainer)

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
    """[A, grid * grid] int64: for each of `ATTRIBUTES`, what a patch shows; 0 where its centre shows no thing."""
    side = max(scene["width"], scene["height"])
    shift_x, shift_y = (side - scene["width"]) // 2, (side - scene["height"]) // 2
    centres = (torch.arange(grid) + 0.5) * side / grid
    facts = scene["facts"]
    labels = torch.zeros(len(ATTRIBUTES), grid, grid, dtype=torch.long)
    labels[list(ATTRIBUTES).index("background")] = 1 + BACKGROUNDS.index(facts["background"])
    for number, thing in enumerate(scene["things"]):
        left, top, right, bottom = thing["box"]
        columns = (centres >= left + shift_x) & (centres <= right + shift_x)
        rows = (centres >= top + shift_y) & (centres <= bottom + shift_y)
        if "relation" in facts:  # the things are listed from left to right, from top to bottom
            where = (("left", "right") if facts["relation"] in ("left of", "right of") else ("top", "bottom"))[number]
        else:
            where = facts["count"] if "count" in facts else facts["place"].split()[-1]
        for row, value in enumerate((thing["colour"], thing["shape"], thing["size"], where)):
            labels[row, rows[:, None] & columns[None, :]] = 1 + list(ATTRIBUTES.values())[row].index(value)
    return labels.flatten(1)


def load_scenes(data: Path, prefix: str, size: int) -> tuple[Tensor, Tensor]:
    """(pixels [B, 3, size, size], patch labels [B, A, grid * grid]) of the images named `prefix`..."""
    pixels, labels = [], []
    for line in (data / "scenes.jsonl").read_text().splitlines():
        scene = json.loads(line)
        if scene["image"].startswith(prefix):
            with Image.open(data / "images" / scene["image"]) as image:
                pixels.append(square_pixels(image, size))
            labels.append(patch_labels(scene, size // PATCH_SIZE))
    return torch.stack(pixels), torch.stack(labels)


class TowerTask(nn.Module):
    """What the tower learns from: the attributes of every patch, told from hidden state -2.

    The last layer is taken off meanwhile: LLaVA never reads it, so it stays random and costs no time.
    """

    def __init__(self, tower: nn.Module, attributes: Mapping[str, Sequence[str]] = ATTRIBUTES) -> None:
        super().__init__()
        self.tower = tower
        hidden = tower.config.hidden_size
        self.patch_heads = nn.ModuleList(nn.Linear(hidden, 1 + len(values)) for values in attributes.values())

    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, accuracy): accuracy is the share of the things' patches whose colour and shape are both right."""
        encoder = getattr(self.tower, "vision_model", self.tower).encoder  # transformers 4 and 5
        layers, encoder.layers = encoder.layers, encoder.layers[:-1]
        patches = self.tower(pixels).last_hidden_state[:, 1:]
        encoder.layers = layers

        patches = F.layer_norm(patches, patches.shape[-1:])
        loss, right = torch.zeros(()), labels[:, 0] > 0
        number = right.sum()
        for row, head in enumerate(self.patch_heads):
            logits = head(patches)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels[:, row].flatten())
            if row < 2:
                right = right & (logits.argmax(-1) == labels[:, row])
        return loss, right.sum() / number


def mirror(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same scenes seen in a mirror: left is right."""
    grid = math.isqrt(labels.shape[-1])
    labels = labels.unflatten(-1, (grid, grid)).flip(-1).flatten(-2).clone()
    where = labels[:, list(ATTRIBUTES).index("where")]
    where.copy_(torch.where(where == 1, 2, torch.where(where == 2, 1, where)))
    return pixels.flip(-1), labels


def batches(number: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` index batches that go through shuffled epochs."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while order.numel() < size:
            order = torch.cat([order, torch.randperm(number, generator=generator)])
        yield order[:size]
        order = order[size:]


LossOf = Callable[[int], tuple[Tensor, dict[str, float]]]


def fit(model: nn.Module, loss_of: LossOf, steps: int, lr: float, title: str, line: int) -> None:
    """AdamW with a short warm-up and a cosine decay; `loss_of(step)` gives (loss, what the bar shows)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 1) + 1, pct_start=0.1)
    with tqdm(range(steps), desc=title, unit="step", position=line, mininterval=1.0) as bar:
        for step in bar:
            loss, shown = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 10 == 0 or step == steps - 1:
                bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items()}, refresh=False)


def train_tower(tower: nn.Module, data: Path, steps: int, seed: int) -> float:
    """Trains `tower` in place on the training drawings; returns the accuracy on the held-out ones."""
    size = tower.config.image_size
    task = TowerTask(tower)
    if steps:
        pixels, labels = load_scenes(data, "train", size)
        index = list(batches(len(pixels), 32, steps, seed))

        def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
            x, y = pixels[index[step]], labels[index[step]]
            if step % 2:
                x, y = mirror(x, y)
            loss, accuracy = task(x, y)
            return loss, {"loss": loss.item(), "patches right": accuracy.item()}

        fit(task, loss_of, steps, 3e-3, "vision tower", line=0)
    with torch.no_grad():
        return task(*load_scenes(data, "valid", size))[1].item()


# --- language model ---------------------------------------------------------------------------------------------


def recalled_words(facts: Facts) -> dict[str, float]:
    """What a reader keeps of a sentence: its words with weights, those of the left or upper thing counting double.

    'A red star right of a blue ring' and 'a blue ring left of a red star' say the same and give the same.
    """
    if facts.get("relation") in ("right of", "below"):
        facts = seen_from_the_other(facts)
    words: dict[str, float] = {}
    for key, value in facts.items():
        word = value.split()[0] if key == "relation" else value.split()[-1]
        words[word] = words.get(word, 0.0) + (1.0 if key.startswith("other") else 2.0)
    return words


def language_documents(
    data: Path, tokenizer: LlamaTokenizerFast, seed: int
) -> tuple[list[list[int]], list[dict[int, float]]]:
    """Token ids of short documents, and for each the weights of the words that its last </s> shall recall (or none)."""
    rng = random.Random(seed)
    documents, recalls = [], []

    def add(text: str, facts: Facts, end: str = "</s>") -> None:
        documents.append(tokenizer(text + end).input_ids)
        recalls.append(recalled_tokens(facts, tokenizer))

    for name in ("pretrain.json", "contrastive.json"):
        for sample in json.loads((data / name).read_text()):
            add(sample["text"], sample["facts"])
            if rng.random() < 0.2:  # stage 1's `plain` template ends captions with a newline
                add(sample["text"], {}, "\n")
            twins, wrong = sample.get("Hallucination caption", []), sample.get("hallucinated facts", [])
            if isinstance(twins, str):
                twins, wrong = [twins], [wrong]
            for twin, change in zip(twins, wrong, strict=True):
                add(twin, sample["facts"] | change)
    for sample in json.loads((data / "finetune.json").read_text()):
        turns = [turn["value"].replace("<image>\n", "") for turn in sample["conversations"][:2]]
        add(" ".join(turns), {})
    return documents, recalls


def recalled_tokens(facts: Facts, tokenizer: LlamaTokenizerFast) -> dict[int, float]:
    """`recalled_words` by token id, with weights that sum to 1."""
    words = recalled_words(facts)
    return {
        tokenizer(word, add_special_tokens=False).input_ids[0]: weight / sum(words.values())
        for word, weight in words.items()
    }


@dataclass(frozen=True)
class Told:
    """A scene told in words instead of pixels, and what may follow."""

    notes: Tensor
    """[P, A] int64: token ids of the words that hold at each of the P places, 0 where there is nothing to say."""
    text: list[int]
    """Token ids of a true sentence about the scene, with its end."""
    recall: dict[int, float]
    """`recalled_tokens` of all that is true."""


def told_scenes(data: Path, tokenizer: LlamaTokenizerFast) -> list[Told]:
    """The scenes of pretrain.json and contrastive.json, as notes on the grid that the vision tower cuts them into."""
    words = torch.zeros(len(ATTRIBUTES), 1 + max(len(values) for values in ATTRIBUTES.values()), dtype=torch.long)
    for row, values in enumerate(ATTRIBUTES.values()):
        for column, value in enumerate(values):
            words[row, 1 + column] = tokenizer(value, add_special_tokens=False).input_ids[0]
    scenes = {}
    for line in (data / "scenes.jsonl").read_text().splitlines():
        scene = json.loads(line)
        labels = patch_labels(scene, IMAGE_SIZE // PATCH_SIZE)
        scenes[scene["image"]] = words.gather(1, labels).T, recalled_tokens(scene["facts"], tokenizer)
    told = []
    for name, end in (("pretrain.json", "\n"), ("contrastive.json", "</s>")):
        for sample in json.loads((data / name).read_text()):
            notes, recall = scenes[sample["image"]]
            text = tokenizer(sample["text"] + end, add_special_tokens=False).input_ids
            told.append(Told(notes=notes, text=text, recall=recall))
    return told


class LanguageTask(nn.Module):
    """What the language model learns from: sentences, and sentences behind notes.

    A large language model can put into a sentence what stands before it, so that LLaVA's connector only has to write
    what the image shows in the language model's own words. A tiny one that has read sentences alone has no use for
    what stands before; so this one is told scenes in notes: places that hold a few words each, as the mean of their
    embeddings.

    HACL reads the state at </s>. In a large model it holds what was read; a tiny one has no reason to keep that, so
    this one is given one: the state at </s> predicts the words that the sentence, or the notes, have stated.
    """

    def __init__(self, model: LlavaForConditionalGeneration, pad: int) -> None:
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.pad = pad

    def padded(self, rows: list[list[int]]) -> Tensor:
        """[B, L] token ids; padded behind, where causal rows never see it."""
        longest = max(map(len, rows))
        return torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])

    def recall_loss(self, logits: Tensor, recalls: list[dict[int, float]]) -> Tensor:
        """Cross entropy of logits [B, vocabulary] with the words to recall, above its minimum; none: left out."""
        wanted = torch.zeros_like(logits)
        for row, words in enumerate(recalls):
            wanted[row, list(words)] = torch.tensor(list(words.values()))
        apart = (torch.xlogy(wanted, wanted) - wanted * logits.log_softmax(-1)).sum(-1)
        return apart[wanted.sum(-1) > 0].mean()

    def read(self, documents: list[list[int]], recalls: list[dict[int, float]]) -> tuple[Tensor, Tensor]:
        """(loss, recall loss) of documents that end in the place to recall at."""
        ids = self.padded(documents)
        logits = self.lm_head(self.language_model(input_ids=ids).last_hidden_state)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=self.pad)
        last = logits[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in documents])]
        return loss, self.recall_loss(last, recalls)

    def tell(self, told: list[Told], eos: int) -> tuple[Tensor, Tensor]:
        """(loss of the sentences behind the notes, recall loss of </s> right behind the notes)."""
        embed = self.language_model.embed_tokens
        notes = torch.stack([one.notes for one in told])
        places = (embed(notes) * (notes > 0)[..., None]).sum(2) / (notes > 0).sum(2, keepdim=True).clamp(min=1)
        ids = self.padded([one.text for one in told])
        bos = embed(torch.ones(len(told), 1, dtype=torch.long))
        rows = torch.cat([bos, places, embed(ids)], dim=1)
        logits = self.lm_head(self.language_model(inputs_embeds=rows).last_hidden_state[:, places.shape[1] : -1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=self.pad)
        rows = torch.cat([places, embed(torch.full((len(told), 1), eos))], dim=1)  # as HACL reads an image
        last = self.lm_head(self.language_model(inputs_embeds=rows).last_hidden_state[:, -1])
        return loss, self.recall_loss(last, [one.recall for one in told])


def train_language_model(
    model: LlavaForConditionalGeneration, data: Path, tokenizer: LlamaTokenizerFast, steps: int, seed: int
) -> dict[str, float]:
    """Next-token prediction, in place; returns the last values of what `LanguageTask` says."""
    documents, recalls = language_documents(data, tokenizer, seed)
    scenes = told_scenes(data, tokenizer)
    task = LanguageTask(model, tokenizer.pad_token_id)
    read, told = list(batches(len(documents), 48, steps, seed)), list(batches(len(scenes), 24, steps, seed))
    history: list[dict[str, float]] = []

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = read[step].tolist()
        loss, recall = task.read([documents[k] for k in chosen], [recalls[k] for k in chosen])
        told_loss, told_recall = task.tell([scenes[k] for k in told[step].tolist()], tokenizer.eos_token_id)
        values = {"loss": loss, "recall": recall, "told": told_loss, "told recall": told_recall}
        history.append({name: value.item() for name, value in values.items()})
        return loss + 2 * recall + told_loss + told_recall, history[-1]

    fit(task, loss_of, steps, 4e-3, "language model", line=1)
    recent = history[-10:]
    return {name: sum(row[name] for row in recent) / len(recent) for name in recent[0]} if recent else {}


def build(
    tokenizer: LlamaTokenizerFast, seed: int, vision: Mapping[str, int] = VISION, language: Mapping[str, int] = LANGUAGE
) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 of tiny sizes with random weights."""
    torch.manual_seed(seed)
    vocab = -(-len(tokenizer) // 64) * 64  # rows beyond the tokenizer, as in LLaVA-1.5's own checkpoints
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **vision, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, hidden_act="quick_gelu", initializer_range=0.1
        ),
        text_config=LlamaConfig(
            **language, vocab_size=vocab, bos_token_id=1, eos_token_id=2, pad_token_id=tokenizer.pad_token_id,
            rms_norm_eps=1e-5, tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    config.pad_token_id = tokenizer.pad_token_id
    return LlavaForConditionalGeneration(config)


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


def language_parts(model: LlavaForConditionalGeneration) -> nn.ModuleList:
    return nn.ModuleList([model.model.language_model, model.lm_head])


def one_thread_each() -> None:
    """Two trainings run side by side: half of the cores for each, and no more than such small matrices can use."""
    torch.set_num_threads(min(4, max(1, (os.cpu_count() or 1) // 2)))


def language_worker(data: Path, steps: int, seed: int) -> tuple[bytes, dict[str, float]]:
    """A process of its own: (trained weights of `language_parts`, what `train_language_model` reached)."""
    one_thread_each()
    tokenizer = train_tokenizer((data / "corpus.txt").read_text().splitlines())
    model = build(tokenizer, seed)
    reached = train_language_model(model, data, tokenizer, steps, seed)
    buffer = io.BytesIO()
    torch.save(language_parts(model).state_dict(), buffer)
    return buffer.getvalue(), reached


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, output: Path) -> None:
    """A folder as llava-hf publishes LLaVA-1.5, which transformers 4 and 5 both read."""
    model.save_pretrained(output)
    weights = load_file(output / "model.safetensors")
    for name in [name for name in weights if name.startswith("vision_tower.")]:  # transformers 5 drops a level
        weights[f"vision_tower.vision_model.{name.removeprefix('vision_tower.').removeprefix('vision_model.')}"] = (
            weights.pop(name)
        )
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(output)
    processor.image_processor.save_pretrained(output)  # transformers 5 would put it into processor_config.json alone
    settings = output / "preprocessor_config.json"
    content = json.loads(settings.read_text())
    content["image_processor_type"] = "CLIPImageProcessor"  # transformers 4 has no class named after Pillow
    settings.write_text(json.dumps(content, indent=2) + "\n")
    # transformers 5 leaves `legacy` out, and 4 would take that for True (a space behind every special token).
    settings = output / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(
        json.dumps(content | {"legacy": False, "extra_special_tokens": {"image_token": "<image>"}}, indent=2) + "\n"
    )


def make_model(data: Path, output: Path, tower_steps: int, language_steps: int, seed: int) -> None:
    """Everything named at the top of this file; each part prints what it reached."""
    start = time.monotonic()
    transformers_logging.disable_progress_bar()
    one_thread_each()
    tokenizer = train_tokenizer((data / "corpus.txt").read_text().splitlines())
    print(f"tokenizer: {len(tokenizer)} tokens", flush=True)
    model = build(tokenizer, seed)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        reading = pool.submit(language_worker, data, language_steps, seed) if language_steps else None
        accuracy = train_tower(model.model.vision_tower, data, tower_steps, seed)
        if reading is not None:
            weights, reached = reading.result()
            language_parts(model).load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
    print(f"vision tower: colour and shape right in {accuracy:.0%} of the held-out drawings' patches (chance: 2%)")
    if reading is not None:
        print(
            "language model: {loss:.2f} nats a token, {told:.2f} behind notes; {recall:.3f} nats from recalling every "
            "word at </s>, {told recall:.3f} behind notes".format(**reached)
        )
    save(model, make_processor(tokenizer), output)
    number = sum(weight.numel() for weight in model.parameters())
    print(f"{output}: a LLaVA of {number / 1e6:.1f} million parameters, made in {time.monotonic() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's tiny LLaVA.")
    parser.add_argument("--data", type=Path, default=Path("output/quickstart/data"), help="what draw.py wrote")
    parser.add_argument("--output", type=Path, default=Path("output/quickstart/model"))
    parser.add_argument("--tower-steps", type=int, default=2800)
    parser.add_argument("--language-steps", type=int, default=440)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    make_model(args.data, args.output, args.tower_steps, args.language_steps, args.seed)


if __name__ == "__main__":
    main()
