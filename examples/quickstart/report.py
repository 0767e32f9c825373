"""What the quickstart's training achieved: a table, and report.png with curves and a few scored images.

    python examples/quickstart/report.py --output output/quickstart

Reads both stages' metrics.jsonl, and scores held-out images with the exported Hugging Face model, that is, with
transformers and this page alone.
"""

import argparse
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from draw import true_sentences
from PIL import Image
from safetensors.torch import load_file
from tokenizer import VICUNA_PROMPT
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

ROWS = (
    ("lm loss", "language-model loss, a token"),
    ("contrastive loss", "contrastive loss"),
    ("retrieval accuracy i2t", "finds its caption among 64"),
    ("hallucination accuracy", "prefers caption to its hallucinated twin"),
    ("hallucination margin", "cosine margin of caption over twin"),
)
CURVES = ("lm loss", "contrastive loss", "retrieval accuracy i2t", "hallucination accuracy")
GOAL = 0.8
PROMPT = VICUNA_PROMPT.removesuffix("ASSISTANT:")
"""What precedes the image's EOS with finetune.yaml: see `represent`."""
NUM_IMAGES = 4
NUM_DESCRIBED = 64


@dataclass(frozen=True)
class PairScore:
    """Cosine of an image with its caption and with the caption's hallucinated twin."""

    caption: float
    hallucinated: float


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def last(rows: list[dict[str, float]], tag: str) -> float:
    """The newest value of a scalar that is not logged every iteration."""
    return next(row[tag] for row in reversed(rows) if tag in row)


def padded_to_square(image: Image.Image, mean: list[float]) -> Image.Image:
    """LLaVA-1.5's `expand2square`: the mean colour around an image that is not square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


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
    `prompt` it is BOS and the template's text, "" in stage 1 and `PROMPT` in stage 2.
    """
    model = LlavaForConditionalGeneration.from_pretrained(hf_dir).eval()
    processor = AutoProcessor.from_pretrained(hf_dir)
    heads = load_file(hf_dir / "hacl_heads.safetensors")
    tokenizer, images = processor.tokenizer, processor.image_processor
    visual_tokens = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2

    def text_ids(text: str) -> list[int]:
        return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]

    def at_eos(token_ids: list[int], head: str, **inputs: Tensor) -> Tensor:
        ids = torch.tensor([[*token_ids, tokenizer.eos_token_id]])
        state = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).last_hidden_state[0, -1]
        return F.normalize(F.linear(state, heads[f"{head}.weight"], heads[f"{head}.bias"]).float(), dim=-1)

    context = [] if prompt is None else text_ids(prompt)
    context += [model.config.image_token_id] * visual_tokens
    rows = []
    for sample in samples:
        image = padded_to_square(Image.open(image_folder / sample["image"]).convert("RGB"), images.image_mean)
        pixels = images(images=image, return_tensors="pt")["pixel_values"]
        twin = sample["Hallucination caption"]
        twin = twin if isinstance(twin, str) else twin[0]
        v = at_eos(context, "vision_projector", pixel_values=pixels)
        rows.append((v, *(at_eos(text_ids(text), "text_projector") for text in (sample["text"], twin))))
    return Represented(*(torch.stack(column) for column in zip(*rows, strict=True)))


def score_pairs(hf_dir: Path, samples: list[dict[str, Any]], image_folder: Path, prompt: str | None) -> list[PairScore]:
    """v·t and v·u of each sample: see `represent`."""
    pairs = represent(hf_dir, samples, image_folder, prompt)
    right, wrong = ((pairs.images * texts).sum(-1).tolist() for texts in (pairs.captions, pairs.hallucinated))
    return [PairScore(caption=t, hallucinated=u) for t, u in zip(right, wrong, strict=True)]


def retrieval_accuracy(pairs: Represented, captions: list[str], among: int = 64) -> float:
    """Share of the images that find their caption, or one that equals it, among each `among` pairs in turn."""
    right = 0
    for start in range(0, len(captions), among):
        group = slice(start, start + among)
        nearest = (pairs.images[group] @ pairs.captions[group].T).argmax(-1).tolist()
        right += sum(captions[start + k] == captions[start + best] for k, best in enumerate(nearest))
    return right / len(captions)


@torch.no_grad()
def describe(hf_dir: Path, samples: list[dict[str, Any]], image_folder: Path) -> list[str]:
    """What the exported model answers, greedily, when asked to describe each image; by transformers alone."""
    model = LlavaForConditionalGeneration.from_pretrained(hf_dir).eval()
    processor = AutoProcessor.from_pretrained(hf_dir)
    request = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Write a short caption."}]}]
    prompt = processor.apply_chat_template(request, add_generation_prompt=True).removeprefix(
        processor.tokenizer.bos_token  # the tokenizer adds it again
    )
    mean = processor.image_processor.image_mean
    images = [padded_to_square(Image.open(image_folder / one["image"]).convert("RGB"), mean) for one in samples]
    inputs = processor(text=[prompt] * len(images), images=images, return_tensors="pt")
    answers = model.generate(**inputs, max_new_tokens=40, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [processor.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def true_of(answers: list[str], samples: list[dict[str, Any]], data: Path) -> list[bool]:
    """Whether each answer is one of the sentences that are true of its sample's scene."""
    scenes = map(json.loads, (data / "scenes.jsonl").read_text(encoding="utf-8").splitlines())
    facts = {scene["image"]: scene["facts"] for scene in scenes}
    return [answer in true_sentences(facts[sample["image"]]) for answer, sample in zip(answers, samples, strict=True)]


def print_table(stages: list[tuple[str, list[dict[str, float]]]]) -> None:
    """Before (first training batch) and after each stage (held-out pairs)."""
    print(f"\n{'':44}{'before':>12}" + "".join(f"{'after ' + name:>18}" for name, _ in stages))
    first = stages[0][1][0]
    for tag, label in ROWS:
        after = "".join(f"{last(rows, tag + ' validation'):18.3f}" for _, rows in stages)
        print(f"{label:44}{first[tag]:12.3f}{after}")
    print(
        "before: the first training batch; after: 512 held-out image-caption pairs, each with one hallucinated twin\n"
    )


def draw(
    stages: list[tuple[str, list[dict[str, float]]]],
    samples: list[dict[str, Any]],
    scores: list[PairScore],
    image_folder: Path,
    target: Path,
) -> None:
    """Curves of both stages above, scored images below."""
    figure = plt.figure(figsize=(14, 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    for axis, tag in zip(above.subplots(1, len(CURVES)), CURVES, strict=True):
        start = 0
        for name, rows in stages:
            iterations = [start + row["iteration"] for row in rows if tag in row]
            axis.plot(iterations, [row[tag] for row in rows if tag in row], linewidth=1, label=name)
            held_out = [
                (start + row["iteration"], row[tag + " validation"]) for row in rows if tag + " validation" in row
            ]
            axis.plot(*zip(*held_out, strict=True), "o", color="black", markersize=4)
            start += int(rows[-1]["iteration"])
        axis.set_title(tag)
        axis.set_xlabel("step (dots: held out)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis, sample, score in zip(below.subplots(1, len(samples)), samples, scores, strict=True):
        axis.imshow(Image.open(image_folder / sample["image"]))
        axis.axis("off")
        twin = sample["Hallucination caption"]
        for line, (words, cosine, colour) in enumerate(
            ((sample["text"], score.caption, "darkgreen"), (twin, score.hallucinated, "firebrick"))
        ):
            axis.annotate(
                textwrap.fill(f"{cosine:+.2f}  {words}", 48), (0.5, 0), (0, -6 - 28 * line), "axes fraction",
                "offset points", ha="center", va="top", fontsize=8.5, color=colour,
            )  # fmt: skip
    below.suptitle("cosine of the image with its caption (green) and with the hallucinated twin (red)", fontsize=10)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"))
    output = parser.parse_args().output
    stages = [(name, read_metrics(output / name)) for name in ("pretrain", "finetune")]
    print_table(stages)

    pairs = json.loads((output / "data" / "valid.json").read_text(encoding="utf-8"))
    samples, image_folder = pairs[:: len(pairs) // NUM_IMAGES][:NUM_IMAGES], output / "data" / "images"
    scores = score_pairs(output / "export", samples, image_folder, PROMPT)
    described = pairs[:NUM_DESCRIBED]
    spoken = describe(output / "export", described, image_folder)
    true = true_of(spoken, described, output / "data")
    draw(stages, samples, scores, image_folder, output / "report.png")

    before, after = stages[0][1][0]["contrastive loss"], last(stages[0][1], "contrastive loss validation")
    accuracy = last(stages[1][1], "hallucination accuracy validation")
    print(f"Contrastive loss {before:.2f} -> {after:.2f} after pretrain (goal: at most {before / 2:.2f}).")
    print(f"Hallucination accuracy {accuracy:.2f} on held-out pairs (goal: {GOAL}; guessing gives 0.50).")
    print(f"Asked to describe {len(true)} held-out images, the exported model says something true of {sum(true)}:")
    for sample, answer, is_true in list(zip(described, spoken, true, strict=True))[:NUM_IMAGES]:
        print(f"  {sample['image']}  {'true ' if is_true else 'wrong'}  {answer}   [caption: {sample['text']}]")
    print(f"\nCurves and scored images: {output / 'report.png'}")
    print(f"All curves:               tensorboard --logdir {output}")
    print(f"The trained model:        {output / 'export'} (transformers' LlavaForConditionalGeneration)")
    if after > before / 2 or accuracy < GOAL:
        raise SystemExit("The quickstart did not reach its goal: please report this with report.png")


if __name__ == "__main__":
    main()
