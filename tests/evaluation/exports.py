"""Tiny exported models, images and questions for the tests of generation."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hacl_megatron.evaluation.answers.answerer import Answerer
from tests.tiny import write_tiny_llava
from tests.tiny_data import draw_scene, write_scene
from tests.tool_runs import to_hf, to_megatron

NUM_IMAGES = 6


def write_exports(folder: Path) -> dict[str, Path]:
    """One model exported twice: as trained on images cut (`square`) and padded (`pad`) to squares."""
    save = to_megatron(write_tiny_llava(folder / "source"), folder / "save")
    return {kind: to_hf(save, folder / kind, "--image-aspect-ratio", kind) for kind in ("square", "pad")}


def write_images(folder: Path) -> list[str]:
    """Oblong JPEGs, named as COCO names its own."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, names = random.Random(0), []
    for index in range(NUM_IMAGES):
        names.append(f"COCO_val2014_{index + 1:012d}.jpg")
        write_scene(folder / names[-1], draw_scene(rng), (rng.randint(30, 90), rng.randint(30, 90)), rng)
    return names


def speak(answerer: Answerer, texts: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts words into the model's mouth, letter by letter and one text a row of each batch.

    Returns a list that gets the number of tokens of each generation.
    """
    said = [[answerer.tokenizer.encode(f"A{letter}", bos=False)[-1] for letter in text] for text in texts]
    generate, lengths = answerer.model.generate, []

    def speaking(logits_processor=(), **inputs):
        start = inputs["input_ids"].shape[1]

        def force(ids: Tensor, scores: Tensor) -> Tensor:
            wanted = torch.tensor([row[ids.shape[1] - start] for row in said[: len(ids)]])
            return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)

        output = generate(**inputs, logits_processor=[*logits_processor, force])
        lengths.append(output.shape[1] - start)
        return output

    monkeypatch.setattr(answerer.model, "generate", speaking)
    return lengths


def write_pope_questions(path: Path, images: list[str], num_questions: int) -> list[dict]:
    """POPE questions of differing length, asked of the images in turn."""
    things = ["circle", "red square", "triangle on the left", "very large green circle at the bottom"]
    questions = [
        {
            "question_id": index + 1,
            "image": images[index % len(images)],
            "text": f"Is there a {things[index % len(things)]} in the image?",
            "label": "yes" if index % 2 else "no",
        }
        for index in range(num_questions)
    ]
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return questions
