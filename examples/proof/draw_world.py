"""Draws the controlled world: JPEGs, alt texts with hallucinated twins, dialogues, questions.

    python examples/proof/draw_world.py --output output/proof/data

Splits are disjoint sets of scenes; everything follows from --seed (of dev and test: --held-out-seed) and the picture's
name.

    parts       what the vision tower and the language model learn from, before any arm: scenes.jsonl alone
    pretrain    stage 1: one alt text and one twin a picture                             pretrain.json
                the same among what web captions say beside what is seen                 pretrain-web.json
                either with other pictures' alt texts and twins for the contrast        pretrain-*sham.json
    habit_...   both stages where a thing has its shape's typical colour in 7 of 10 cases, and twins follow the habit
    finetune    stage 2: a description or questions a picture                            finetune.json
    prefer      after stage 2: a description or a yes/no question a picture, the true
                answer and a rejected one (habit_prefer alone)                           habit_prefer.json
    dev, test   held out: pairs DEV.json, questions (POPE's lines) DEV.questions.json    (dev tunes, test is reported)
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from world import (
    BRIEF,
    DETAILED,
    Group,
    Scene,
    alt_text,
    as_on_the_web,
    description,
    draw_scene,
    full_statement,
    hallucinate,
    sentence,
    yes_no_question,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from draw import conversation, paint, write_json

SIDE = 64
HABIT = 0.7
PAIRS = ("pretrain", "habit_pretrain", "dev", "test")


def read_scene(record: dict[str, Any]) -> Scene:
    """The scene of a line of scenes.jsonl."""
    groups = (Group(**group | {"cells": tuple(group["cells"])}) for group in record["groups"])
    return Scene(tuple(groups), record["background"])


def read_scenes(data: Path, split: str = "") -> dict[str, dict[str, Any]]:
    """scenes.jsonl by picture, those of a split alone: groups, background, and every thing's box in pixels."""
    begins = f'{{"image": "{split}'
    lines = (data / "scenes.jsonl").read_text().splitlines()
    return {record["image"]: record for record in map(json.loads, filter(lambda line: line.startswith(begins), lines))}


def habit_of(name: str) -> float:
    """How often things of this picture or split have their shapes' typical colours."""
    return HABIT if name.startswith("habit") else 0.0


def draw_one(job: tuple[int, str, Path]) -> dict[str, Any]:
    """Draws and saves one picture; returns its line of scenes.jsonl."""
    seed, name, folder = job
    rng = random.Random(f"{seed}/{name}")
    scene = draw_scene(rng, habit_of(name))
    things = []
    for group in scene.groups:
        for cell in group.cells:
            side = SIDE / 2 * (rng.uniform(0.5, 0.6) if group.size == "small" else rng.uniform(0.85, 0.97))
            left = (cell % 2) * SIDE / 2 + (SIDE / 2 - side) * rng.uniform(0.2, 0.8)
            top = (cell // 2) * SIDE / 2 + (SIDE / 2 - side) * rng.uniform(0.2, 0.8)
            box = [round(value, 2) for value in (left, top, left + side, top + side)]
            things.append({"colour": group.colour, "shape": group.shape, "size": group.size, "box": box})
    image = paint(rng, {"background": scene.background}, things, SIDE, SIDE)
    image.save(folder / f"{name}.jpg", quality=rng.randint(85, 95))
    return {"image": f"{name}.jpg", **asdict(scene), "things": things}


def pair_sample(rng: random.Random, name: str, scene: Scene, twins: int = 1) -> dict[str, Any]:
    """A picture with its alt text and hallucinated twins, in the released HACL's keys."""
    statement, opening = alt_text(rng, scene)
    wrong = [hallucinate(rng, statement, scene, habit_of(name)) for _ in range(twins)]
    sample = {"id": f"{name}-pair", "image": f"{name}.jpg", "text": sentence(statement, opening)}
    sample["Hallucination caption"] = [sentence(twin, opening) for _, twin in wrong]
    sample["twin kinds"] = [error for error, _ in wrong]
    sample["conversations"] = conversation([(rng.choice(BRIEF), sample["text"])], image=True)
    return sample


def web_sample(seed: int, sample: dict[str, Any]) -> dict[str, Any]:
    """A pair whose caption and twins stand among the same words that the picture does not show."""

    def wrapped(text: str) -> str:
        return as_on_the_web(random.Random(f"{seed}/{sample['id']}/web"), text)

    turns = [dict(turn) for turn in sample["conversations"]]
    turns[1]["value"] = wrapped(sample["text"])
    twins = [wrapped(twin) for twin in sample["Hallucination caption"]]
    return sample | {"text": turns[1]["value"], "Hallucination caption": twins, "conversations": turns}


def with_others(samples: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The pairs as before, but alt text and twins, which the contrast reads, are those of another picture each."""
    order = random.Random(f"{seed}/others").sample(range(len(samples)), len(samples))
    given = dict(zip(order, [*order[1:], order[0]], strict=True))  # round a circle: nobody keeps its own
    keys = ("text", "Hallucination caption", "twin kinds")
    return [sample | {key: samples[given[k]][key] for key in keys} for k, sample in enumerate(samples)]


def dialogue_sample(rng: random.Random, name: str, scene: Scene) -> dict[str, Any]:
    """Stage 2: a full description first half of the time, then questions, adversarial half of the time."""
    turns = [(DETAILED, description(scene))] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        answer = rng.random() < 0.5
        question = yes_no_question(rng, scene, adversarial=rng.random() < 0.5, answer=answer)
        turns.append((question, "Yes." if answer else "No."))
    return {"id": f"{name}-dialogue", "image": f"{name}.jpg", "conversations": conversation(turns, image=True)}


def preference_sample(rng: random.Random, name: str, scene: Scene) -> dict[str, Any]:
    """After stage 2: half of the time a description and its twin, else a yes/no question as POPE's adversarial ones."""
    if rng.random() < 0.5:
        _, twin = hallucinate(rng, full_statement(scene), scene, habit_of(name))
        question, chosen, rejected = DETAILED, description(scene), sentence(twin, "The picture shows ")
    else:
        answer = rng.random() < 0.5
        question = yes_no_question(rng, scene, adversarial=True, answer=answer)
        chosen, rejected = ("Yes.", "No.") if answer else ("No.", "Yes.")
    record = {"question": question, "chosen": chosen, "rejected": rejected}
    return {"id": f"{name}-preference", "image": f"{name}.jpg"} | record


def questions_of(rng: random.Random, name: str, scene: Scene) -> list[dict[str, Any]]:
    """POPE's lines: a question whose answer is yes, an adversarial one whose answer is no."""
    lines = []
    for answer in (True, False):
        text = yes_no_question(rng, scene, adversarial=True, answer=answer)
        lines.append({"image": f"{name}.jpg", "text": text, "label": "yes" if answer else "no"})
    return lines


HELD_OUT = ("dev", "test")
SIZES = {
    "parts": 8000, "pretrain": 3840, "finetune": 6000, "habit_pretrain": 3840, "habit_finetune": 6000,
    "habit_prefer": 1280, "dev": 1000, "test": 2000,
}  # fmt: skip


def draw(output: Path, sizes: dict[str, int], seed: int, processes: int, held_out_seed: int | None = None) -> None:
    """Writes everything named at the top of this file under `output`; scenes.jsonl last.

    Args:
        held_out_seed: draws dev and test by another seed than the rest.
    """

    def seed_of(name: str) -> int:
        return held_out_seed if held_out_seed is not None and name.startswith(HELD_OUT) else seed

    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    names = [f"{split}-{k:05d}" for split, size in sizes.items() for k in range(size)]
    with multiprocessing.Pool(processes) as pool:
        records = pool.map(draw_one, [(seed_of(name), name, images) for name in names], chunksize=64)
    made: dict[str, list[dict[str, Any]]] = {}
    for name, record in zip(names, records, strict=True):
        rng, scene, split = random.Random(f"{seed_of(name)}/{name}/text"), read_scene(record), name.split("-")[0]
        if split.endswith("finetune"):
            made.setdefault(split, []).append(dialogue_sample(rng, name, scene))
        elif split.endswith("prefer"):
            made.setdefault(split, []).append(preference_sample(rng, name, scene))
        elif split != "parts":
            made.setdefault(split, []).append(pair_sample(rng, name, scene))
            if split in HELD_OUT:
                made.setdefault(f"{split}.questions", []).extend(questions_of(rng, name, scene))
    for split in PAIRS:
        made[f"{split}-web"] = [web_sample(seed_of(split), sample) for sample in made[split]]
    for split in ("pretrain", "pretrain-web", "habit_pretrain-web"):
        made[f"{split}-sham"] = with_others(made[split], seed)
    for split, samples in made.items():
        for number, sample in enumerate(samples, 1):
            if split.endswith("questions"):
                sample["question_id"] = number
        write_json(output / f"{split}.json", samples)
    (output / "scenes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{output}: " + ", ".join(f"{size} {split}" for split, size in sizes.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/proof/data"))
    for split, size in SIZES.items():
        parser.add_argument(f"--{split.replace('_', '-')}", type=int, default=size, help="pictures")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--held-out-seed", type=int, default=2027, help="of dev and test")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    args = parser.parse_args()
    sizes = {split: getattr(args, split) for split in SIZES}
    draw(args.output, sizes, args.seed, args.processes, args.held_out_seed)


if __name__ == "__main__":
    main()
