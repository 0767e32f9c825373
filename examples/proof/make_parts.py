"""Makes what stands before any arm: a vision tower that has seen the world, language models that have read about it.

    python examples/proof/make_parts.py --data output/proof/data --output output/proof/parts

Writes Hugging Face folders, OUTPUT/tower, OUTPUT/language and OUTPUT/telling (a second language model, made from the
first), which are frozen in stage 1 of every arm. The tower has CLIP's architecture and learns what every patch shows
(colour, shape, size, background) from hidden state -2, which is what LLaVA reads; not by CLIP's own loss.

parts/ holds a pair in half precision (--store), which run.sh takes.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from draw_world import dialogue_sample, read_scene, read_scenes
from language import Library, told_errors, train_language_model, train_to_match, train_to_tell
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlamaTokenizerFast,
    LlavaForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging
from world import (
    BACKGROUNDS,
    BRIEF,
    COLOURS,
    DETAILED,
    OPENINGS,
    SHAPES,
    SIZES,
    Mention,
    Statement,
    alt_text,
    as_on_the_web,
    description,
    sentence,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from fitting import batches, fit
from scenes import IMAGE_SIZE, PATCH_SIZE, square_pixels
from tiny_llava import build, make_processor
from tokenizer import VICUNA_PROMPT, train_tokenizer
from vision_tower import TowerTask

ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "background": BACKGROUNDS}
VISION = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
LANGUAGE = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
GRID = IMAGE_SIZE // PATCH_SIZE
SHOWN = 0.15
"""A patch shows a thing that covers at least this share of it."""
QUIZZES = 200
"""Of six questions each, by which the language model is judged."""
TOLD_ERRORS, FURTHER_STEPS, FURTHER_ROUNDS, FURTHER_LR = 0.02, 400, 5, 1.5e-3
"""The language model learns on, a round of steps at a time, until no more of its answers are wrong. A round begins with
half as many steps of `train_to_match`: without it a third of them stayed wrong for 800 steps."""
FURTHER_MATRICES_LR = 4e-3
"""Muon's."""
SYSTEM = VICUNA_PROMPT.removesuffix("USER: ASSISTANT:")


def patch_labels(record: dict[str, Any]) -> Tensor:
    """[A, GRID * GRID] int64 of a line of scenes.jsonl: what each patch shows of `ATTRIBUTES`, 0 for no thing."""
    edges = torch.arange(GRID + 1) * PATCH_SIZE
    labels = torch.zeros(len(ATTRIBUTES), GRID, GRID, dtype=torch.long)
    labels[3] = 1 + BACKGROUNDS.index(record["background"])
    for thing in record["things"]:
        left, top, right, bottom = thing["box"]
        wide = (edges[1:].clamp(max=right) - edges[:-1].clamp(min=left)).clamp(min=0)
        high = (edges[1:].clamp(max=bottom) - edges[:-1].clamp(min=top)).clamp(min=0)
        covered = high[:, None] * wide[None, :] >= SHOWN * PATCH_SIZE**2
        for row, name in enumerate(("colour", "shape", "size")):
            labels[row, covered] = 1 + ATTRIBUTES[name].index(thing[name])
    return labels.flatten(1)


# --- vision tower -----------------------------------------------------------------------------------------------


def train_tower(tower: nn.Module, data: Path, steps: int, seed: int) -> float:
    """Trains `tower` in place on the split `parts`; returns the share of dev's patches with colour and shape right."""
    task = TowerTask(tower, ATTRIBUTES)

    def load(split: str) -> tuple[Tensor, Tensor]:
        records = [record for name, record in read_scenes(data).items() if name.startswith(split)]
        pixels = [
            square_pixels(Image.open(data / "images" / record["image"]), tower.config.image_size) for record in records
        ]
        return torch.stack(pixels), torch.stack([patch_labels(record) for record in records])

    if steps:
        pixels, labels = load("parts")
        index = list(batches(len(pixels), 48, steps, seed))

        def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
            x, y = pixels[index[step]], labels[index[step]]
            if step % 2:  # in a mirror
                x, y = x.flip(-1), y.unflatten(-1, (GRID, GRID)).flip(-1).flatten(-2)
            if step // 2 % 2:  # upside down
                x, y = x.flip(-2), y.unflatten(-1, (GRID, GRID)).flip(-2).flatten(-2)
            loss, accuracy = task(x, y)
            return loss, {"loss": loss.item(), "patches right": accuracy.item()}

        fit(task, loss_of, steps, 2e-3, "vision tower", line=0)
    with torch.no_grad():
        return task(*load("dev"))[1].item()


# --- language model ---------------------------------------------------------------------------------------------


def new_library(data: Path, tokenizer: LlamaTokenizerFast, seed: int, split: str = "parts") -> Library:
    """Documents about the scenes of a split, with the notes of what each patch of their pictures shows."""
    records = [record for name, record in read_scenes(data).items() if name.startswith(split)]
    words = torch.zeros(len(ATTRIBUTES), 1 + max(map(len, ATTRIBUTES.values())), dtype=torch.long)
    for row, values in enumerate(ATTRIBUTES.values()):
        for column, value in enumerate(values):
            words[row, 1 + column] = tokenizer(value, add_special_tokens=False).input_ids[0]
    labels = torch.stack([patch_labels(record) for record in records])
    notes = torch.stack([words[row][labels[:, row]] for row in range(len(ATTRIBUTES))], dim=-1)
    return Library([read_scene(record) for record in records], notes, tokenizer, SYSTEM, seed)


# --- both -------------------------------------------------------------------------------------------------------


def corpus(data: Path) -> list[str]:
    """Sentences that hold every word of the world."""
    rng = random.Random(0)
    scenes = [read_scene(record) for record in list(read_scenes(data).values())[:2000]]
    lines = [*BRIEF, DETAILED, *OPENINGS, "Yes.", "No."]
    for scene in scenes:
        lines += [sentence(*alt_text(rng, scene)), description(scene), as_on_the_web(rng, "")]
        lines += [turn["value"].removeprefix("<image>\n") for turn in dialogue_sample(rng, "", scene)["conversations"]]
    for shape in SHAPES:
        lines += [sentence(Statement((Mention(colour, shape, None, 2),))) for colour in COLOURS]
    lines += [f"{word} " * 3 for word in (*BACKGROUNDS, *COLOURS, *SHAPES, *SIZES)]
    return lines


def new_model(data: Path, seed: int) -> tuple[LlavaForConditionalGeneration, LlamaTokenizerFast]:
    tokenizer = train_tokenizer(corpus(data))
    return build(tokenizer, seed, VISION, LANGUAGE), tokenizer


def language_worker(data: Path, output: Path, steps: int, seed: int) -> dict[str, float]:
    """A process of its own: writes OUTPUT, a LLaMA with its tokenizer; returns what it reached."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    model, tokenizer = new_model(data, seed)
    library = new_library(data, tokenizer, seed)
    reached = train_language_model(model.model.language_model, model.lm_head, library, steps, fit)
    llama = LlamaForCausalLM(model.config.text_config)
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    llama.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return reached | {"told errors": told_errors(llama.model, llama.lm_head, held_out(data, tokenizer), QUIZZES)}


def held_out(data: Path, tokenizer: LlamaTokenizerFast) -> Library:
    """Of the scenes of dev."""
    return new_library(data, tokenizer, seed=0, split="dev")


def further_worker(data: Path, language: Path, steps: int, seed: int, number: int) -> dict[str, float]:
    """A process of its own: the language model in `language` learns on; returns what it reached."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(min(2, os.cpu_count() or 1))  # no tower beside it any more
    model, tokenizer = LlamaForCausalLM.from_pretrained(language), AutoTokenizer.from_pretrained(language)
    library = new_library(data, tokenizer, seed + 100 * number)
    with_muon = partial(fit, matrices_lr=FURTHER_MATRICES_LR)
    lessons = train_to_match(model, library, steps // 2, fit)
    reached = train_language_model(model.model, model.lm_head, library, steps, with_muon, FURTHER_LR)
    reached["lessons"] = lessons
    unfinished = language.with_name(f"{language.name}.part")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(language)
    unfinished.rename(language)
    reached["told errors"] = told_errors(model.model, model.lm_head, held_out(data, tokenizer), QUIZZES)
    return reached | {"further rounds": number}


def telling_worker(data: Path, language: Path, output: Path, steps: int, seed: int) -> dict[str, float]:
    """A process of its own: goes on from `language`; writes OUTPUT, returns what it reached."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    model, tokenizer = LlamaForCausalLM.from_pretrained(language), AutoTokenizer.from_pretrained(language)
    reached = train_to_tell(model, new_library(data, tokenizer, seed + 1), steps, fit)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return reached


def tower_worker(data: Path, output: Path, steps: int, seed: int) -> dict[str, float]:
    """A process of its own: writes OUTPUT, a CLIP tower with its image processor; returns what it reached."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    model, tokenizer = new_model(data, seed)
    seen = train_tower(model.model.vision_tower, data, steps, seed)
    tower = CLIPVisionModel(model.config.vision_config)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(output)
    make_processor(tokenizer).image_processor.save_pretrained(output)
    return {"patches right": seen}


def make_parts(
    data: Path,
    output: Path,
    *,
    tower_steps: int,
    language_steps: int,
    telling_steps: int,
    seed: int,
    further_rounds: int = FURTHER_ROUNDS,
    further_steps: int = FURTHER_STEPS,
) -> None:
    """Trains the tower and the language model, both at once, then the second language model from the first.

    The first learns on until it answers what it is told. When it jumps from guessing to knowing depends on the
    arithmetic of the machine and the libraries: the same steps left 0.5 % of the answers wrong, and elsewhere 24 %.
    OUTPUT/parts.json lists what is finished, which is not repeated.
    """
    record = output / "parts.json"
    reached: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    output.mkdir(parents=True, exist_ok=True)
    language, telling = output / "language", output / "telling"

    def train(**jobs: tuple[Any, ...]) -> None:
        start = time.monotonic()
        waiting = {name: pool.submit(*job) for name, job in jobs.items()}
        for name, one in waiting.items():
            before = reached.get(name, {}).get("seconds", 0)
            reached[name] = one.result() | {"seconds": before + round(time.monotonic() - start)}
            record.write_text(json.dumps(reached, indent=1) + "\n")

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        first = {
            "language": (language_worker, data, language, language_steps, seed),
            "tower": (tower_worker, data, output / "tower", tower_steps, seed),
        }
        train(**{name: job for name, job in first.items() if name not in reached})
        while reached["language"]["told errors"] > TOLD_ERRORS:
            done = reached["language"].get("further rounds", 0)
            if done == further_rounds:
                break
            train(language=(further_worker, data, language, further_steps, seed, done + 1))
        if telling_steps and "telling" not in reached:
            train(telling=(telling_worker, data, language, telling, telling_steps, seed))
    for name, values in reached.items():
        print(f"{name}: {values}")
    if (errors := reached["language"]["told errors"]) > TOLD_ERRORS:
        print(f"The language model still gets {errors:.1%} of the questions about what it is told wrong.")


def store(parts: Path, target: Path) -> None:
    """The first language model and the tower, in `target`, with float16 weights: half as large for a repository."""
    for name in ("language", "tower"):
        shutil.copytree(parts / name, target / name, dirs_exist_ok=True)
        weights = target / name / "model.safetensors"
        save_file({key: value.half() for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    reached = json.loads((parts / "parts.json").read_text())
    (target / "parts.json").write_text(json.dumps({name: reached[name] for name in ("language", "tower")}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("output/proof/data"))
    parser.add_argument("--output", type=Path, default=Path("output/proof/parts"))
    parser.add_argument("--tower-steps", type=int, default=2000)
    parser.add_argument("--language-steps", type=int, default=1500)
    parser.add_argument("--further-rounds", type=int, default=FURTHER_ROUNDS, help="of the language model, at most")
    parser.add_argument("--telling-steps", type=int, default=800, help="0: no second language model")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--store", type=Path, help="put a copy with float16 weights there")
    args = parser.parse_args()
    make_parts(
        args.data,
        args.output,
        tower_steps=args.tower_steps,
        language_steps=args.language_steps,
        telling_steps=args.telling_steps,
        seed=args.seed,
        further_rounds=args.further_rounds,
    )
    if args.store:
        store(args.output, args.store)


if __name__ == "__main__":
    main()
