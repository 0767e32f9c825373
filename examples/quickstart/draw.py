"""Draws the quickstart's data: coloured shapes as JPEG, captions, hallucinated captions, yes/no questions.

    python examples/quickstart/draw.py --output output/quickstart/data

A scene is a dictionary of *facts* ("colour": "red", "relation": "left of", ...). A caption states some of them;
its hallucinated twin is the same sentence with one or two facts replaced by wrong ones, as HACL's authors had
GPT-4 do. Everything is derived from --seed and the image's number alone, whatever the number of processes.

Written to --output:

    images/            JPEGs of many sizes and aspect ratios; the vision tower alone sees those named parts-...
    pretrain.json      stage 1: image, text (the caption), Hallucination caption, a one-turn conversation
    finetune.json      stage 2: descriptions, questions over several turns, some samples without an image
    contrastive.json   stage 2: image-caption pairs with two hallucinated captions (--contrastive-data-path)
    valid.json         held-out images with one hallucinated caption each
    scenes.jsonl       what stands where in each image: what make_model.py trains the vision tower on
    corpus.txt         sentences that make_model.py trains the tokenizer and the language model on
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

COLOURS = {
    "red": (214, 32, 38),
    "orange": (250, 140, 20),
    "yellow": (246, 222, 40),
    "green": (40, 150, 60),
    "turquoise": (60, 205, 200),
    "blue": (40, 80, 205),
    "purple": (125, 50, 150),
    "pink": (248, 120, 185),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = ("two", "three")
BACKGROUNDS = ("white", "black", "grey", "striped")
CHOICES = {
    "colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "place": PLACES, "relation": RELATIONS,
    "count": COUNTS, "background": BACKGROUNDS, "other colour": tuple(COLOURS), "other shape": SHAPES,
    "other size": SIZES,
}  # fmt: skip
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OPENINGS = ("", "There is ", "The picture shows ", "One can see ", "This is a picture of ", "Here we see ")
REQUESTS = (
    "Describe the image briefly.", "Give a brief description of the image.", "What is in the picture?",
    "What can you see?", "Write a short caption.",
)  # fmt: skip
SUPERSAMPLING = 4

Facts = dict[str, str]


# --- scenes -----------------------------------------------------------------------------------------------------


def draw_facts(rng: random.Random, width: int, height: int) -> Facts:
    """True facts of a new scene: one thing, several equal things, or two different ones side by side."""
    facts = {"colour": rng.choice(tuple(COLOURS)), "shape": rng.choice(SHAPES), "size": rng.choice(SIZES)}
    facts["background"] = rng.choice(BACKGROUNDS)
    horizontal = width > height if abs(width - height) > 0.15 * max(width, height) else rng.random() < 0.5
    kind = rng.random()
    if kind < 0.35:
        sides = PLACES[:2] if horizontal else PLACES[2:4]
        facts["place"] = rng.choice((*sides, "in the middle"))
    elif kind < 0.6:
        facts["count"], facts["size"] = rng.choice(COUNTS), "large"  # small ones would be specks
    else:
        facts["relation"] = rng.choice(RELATIONS[:2] if horizontal else RELATIONS[2:])
        while True:
            facts["other colour"], facts["other shape"] = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
            if (facts["other colour"], facts["other shape"]) != (facts["colour"], facts["shape"]):
                break
        facts["other size"] = rng.choice(SIZES)
    return facts


def seen_from_the_other(facts: Facts) -> Facts:
    """The same scene of two things with the roles exchanged: 'a left of b' is 'b right of a'."""
    if "relation" not in facts:
        return facts
    swapped = {"relation": OPPOSITE[facts["relation"]]}
    for key in ("colour", "shape", "size"):
        for one, two in ((key, f"other {key}"), (f"other {key}", key)):
            if one in facts:
                swapped[two] = facts[one]
    return {key: value for key, value in facts.items() if key == "background"} | swapped


def holds(stated: Facts, scene: Facts) -> bool:
    """Whether every stated fact is true of the scene, read from either of its two things."""
    return any(stated.items() <= view.items() for view in (scene, seen_from_the_other(scene)))


def place_things(rng: random.Random, facts: Facts, width: int, height: int) -> list[dict[str, Any]]:
    """Where the scene's things stand: for each its colour, shape and box (left, top, right, bottom) in pixels."""
    horizontal = width > height
    if "relation" in facts:
        horizontal = facts["relation"] in RELATIONS[:2]
    elif facts.get("place") in PLACES[:4]:
        horizontal = facts["place"] in PLACES[:2]

    number = {None: 1, "two": 2, "three": 3}[facts.get("count")]
    if "relation" in facts or facts.get("place") in PLACES[:4]:
        number = 2
    if number == 3 and max(width, height) < 1.4 * min(width, height):
        cells = [(column / 2, row / 2, (column + 1) / 2, (row + 1) / 2) for column in (0, 1) for row in (0, 1)]
        cells.remove(rng.choice(cells))
    elif horizontal:
        cells = [(column / number, 0.0, (column + 1) / number, 1.0) for column in range(number)]
    else:
        cells = [(0.0, row / number, 1.0, (row + 1) / number) for row in range(number)]

    if "relation" in facts:
        kinds = [(facts["colour"], facts["shape"], facts["size"])]
        kinds.append((facts["other colour"], facts["other shape"], facts["other size"]))
        if facts["relation"] in ("right of", "below"):
            kinds.reverse()
    else:
        if facts.get("place") in PLACES[:4]:
            cells = cells[:1] if facts["place"] in ("on the left", "at the top") else cells[1:]
        kinds = [(facts["colour"], facts["shape"], facts["size"])] * len(cells)

    things = []
    for (x0, y0, x1, y1), (colour, shape, size) in zip(cells, kinds, strict=True):
        room_x, room_y = (x1 - x0) * width, (y1 - y0) * height
        side = min(room_x, room_y) * (rng.uniform(0.62, 0.7) if size == "small" else rng.uniform(0.88, 0.97))
        spread = (0.4, 0.6) if facts.get("place") == "in the middle" else (0.2, 0.8)
        left = x0 * width + (room_x - side) * rng.uniform(*spread)
        top = y0 * height + (room_y - side) * rng.uniform(*spread)
        things.append({"colour": colour, "shape": shape, "size": size, "box": [left, top, left + side, top + side]})
    return things


# --- pixels -----------------------------------------------------------------------------------------------------


def polygon_of(shape: str, centre: tuple[float, float], radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a straight-edged shape, turned by `turn` radians."""

    def corner(angle: float, distance: float) -> tuple[float, float]:
        angle += turn - math.pi / 2
        return centre[0] + distance * math.cos(angle), centre[1] + distance * math.sin(angle)

    if shape == "triangle":
        return [corner(2 * math.pi * k / 3, 1.1 * radius) for k in range(3)]
    if shape == "square":
        return [corner(math.pi / 4 + math.pi * k / 2, 1.25 * radius) for k in range(4)]
    if shape == "star":
        return [corner(math.pi * k / 5, radius * (1.1 if k % 2 == 0 else 0.45)) for k in range(10)]
    assert shape == "cross", shape
    arm, tip = math.pi / 4, math.atan2(1, 3)
    corners = []
    for k in range(4):
        base = k * math.pi / 2
        corners += [
            corner(base - tip, 1.05 * radius),
            corner(base + tip, 1.05 * radius),
            corner(base + arm, radius * 0.45),
        ]
    return corners


def paint(rng: random.Random, facts: Facts, things: list[dict[str, Any]], width: int, height: int) -> Image.Image:
    """The scene as an RGB image of width x height, drawn larger and shrunk so that edges are smooth."""
    scale = SUPERSAMPLING
    level = {"white": (225, 255), "black": (0, 35), "grey": (110, 150), "striped": (170, 200)}[facts["background"]]
    tone = rng.randint(*level)
    tint = tuple(max(0, min(255, tone + rng.randint(-8, 8))) for _ in range(3))
    image = Image.new("RGB", (width * scale, height * scale), tint)
    pen = ImageDraw.Draw(image)
    if facts["background"] == "striped":
        dark = tuple(value - rng.randint(75, 95) for value in tint)
        step, slant = rng.randint(10, 14) * scale, rng.choice((-1, 0, 1))
        for x in range(-height * scale, (width + height) * scale, step):
            shift = slant * height * scale
            pen.line([(x, 0), (x + shift, height * scale)], fill=dark, width=step // 2)

    for thing in things:
        left, top, right, bottom = (value * scale for value in thing["box"])
        colour = tuple(max(0, min(255, c + rng.randint(-12, 12))) for c in COLOURS[thing["colour"]])
        if thing["shape"] == "circle":
            pen.ellipse([left, top, right, bottom], fill=colour)
        elif thing["shape"] == "ring":
            pen.ellipse([left, top, right, bottom], outline=colour, width=int((right - left) * 0.24))
        else:
            centre, radius = ((left + right) / 2, (top + bottom) / 2), (right - left) / 2
            pen.polygon(polygon_of(thing["shape"], centre, radius, rng.uniform(-0.2, 0.2)), fill=colour)
    image = image.resize((width, height), Image.Resampling.BOX)
    return image.filter(ImageFilter.GaussianBlur(0.5)) if rng.random() < 0.2 else image


# --- sentences --------------------------------------------------------------------------------------------------


def choose_stated(rng: random.Random, scene: Facts) -> Facts:
    """The facts that a caption of the scene will state: what and where always, size and background sometimes.

    Of two things the left or upper one comes first.
    """
    view = seen_from_the_other(scene) if scene.get("relation") in ("right of", "below") else scene
    chance = {"size": 0.4, "other size": 0.4, "background": 0.3, "place": 0.7}
    if "count" in view:
        chance["size"] = 0.0
    return {key: value for key, value in view.items() if rng.random() < chance.get(key, 1.0)}


def phrase(facts: Facts, prefix: str = "") -> str:
    """A thing without its article: 'large red circle'; plural where the facts count."""
    words = [facts.get(f"{prefix}size"), facts[f"{prefix}colour"], facts[f"{prefix}shape"]]
    plural = ("es" if facts[f"{prefix}shape"] == "cross" else "s") if "count" in facts else ""
    return " ".join(word for word in words if word) + plural


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def sentence(facts: Facts, opening: str = "") -> str:
    """The facts in words: 'There is a red circle left of a small blue star on a white background.'"""
    text = f"{facts['count']} {phrase(facts)}" if "count" in facts else with_article(phrase(facts))
    if "relation" in facts:
        text += f" {facts['relation']} {with_article(phrase(facts, 'other '))}"
    if "place" in facts:
        text += f" {facts['place']}"
    if "background" in facts:
        text += f" on a {facts['background']} background"
    if "count" in facts and opening == "There is ":
        opening = "There are "
    text = opening + text + "."
    return text[0].upper() + text[1:]


def true_sentences(scene: Facts) -> set[str]:
    """Every caption that `choose_stated` and an opening could make of the scene, and some with more sizes."""
    sentences = set()
    for view in (scene, seen_from_the_other(scene)):
        optional = [key for key in ("size", "other size", "place", "background") if key in view]
        for kept in itertools.product((True, False), repeat=len(optional)):
            left_out = {key for key, keep in zip(optional, kept, strict=True) if not keep}
            stated = {key: value for key, value in view.items() if key not in left_out}
            sentences |= {sentence(stated, opening) for opening in OPENINGS}
    return sentences


def hallucinate(rng: random.Random, stated: Facts, scene: Facts) -> Facts:
    """One or two of the stated facts replaced, such that the result is not true of the scene: returns what changed.

    A wrong relation is told by exchanging the two things: with other words it could be told from the text alone.
    """
    while True:
        keys = rng.sample(sorted(stated), k=min(len(stated), 1 if rng.random() < 0.7 else 2))
        wrong = {key: rng.choice([value for value in CHOICES[key] if value != stated[key]]) for key in keys}
        if "relation" in keys:
            exchanged = [(key, f"other {key}") for key in ("colour", "shape")]
            wrong = {a: stated[b] for pair in exchanged for a, b in (pair, pair[::-1]) if stated[a] != stated[b]}
        if not holds(stated | wrong, scene):
            return wrong


def yes_no_question(rng: random.Random, scene: Facts) -> tuple[str, str]:
    """A question about the scene and its answer, 'Yes.' as often as 'No.'."""
    stated = choose_stated(rng, scene)
    stated = stated if rng.random() < 0.5 else stated | hallucinate(rng, stated, scene)
    verb = "Are there" if "count" in stated else "Is there"
    text = sentence(stated)
    return f"{verb} {text[0].lower()}{text[1:-1]}?", "Yes." if holds(stated, scene) else "No."


def open_question(rng: random.Random, scene: Facts) -> tuple[str, str]:
    """A question whose answer is a word."""
    if rng.random() < 0.3:
        return "What is the colour of the background?", f"{scene['background'].capitalize()}."
    if "count" in scene and rng.random() < 0.5:
        return f"How many {scene['shape']}{'es' if scene['shape'] == 'cross' else 's'} are there?", (
            f"{scene['count'].capitalize()}."
        )
    if scene.get("other shape") == scene["shape"]:  # "the star" would name two things
        return f"What shape is the {scene['colour']} thing?", f"It is {with_article(scene['shape'])}."
    return f"What colour is the {scene['shape']}?", f"{scene['colour'].capitalize()}."


def conversation(turns: list[tuple[str, str]], image: bool, before: bool = True) -> list[dict[str, str]]:
    """LLaVA's `conversations`; the image stands in the first question, before or after its text."""
    records = []
    for number, (question, answer) in enumerate(turns):
        if image and number == 0:
            question = f"<image>\n{question}" if before else f"{question}\n<image>"
        records += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return records


# --- samples ----------------------------------------------------------------------------------------------------


def pair_sample(rng: random.Random, name: str, scene: Facts, twins: int) -> dict[str, Any]:
    """An image-caption pair with `twins` hallucinated captions, in the released HACL's keys plus the facts."""
    stated, opening = choose_stated(rng, scene), rng.choice(OPENINGS)
    caption = sentence(stated, opening)
    wrong = [hallucinate(rng, stated, scene) for _ in range(twins)]
    hallucinated = [sentence(stated | change, opening) for change in wrong]
    turns = [(rng.choice(REQUESTS), caption)]
    sample = {"id": f"{name}-pair", "image": f"{name}.jpg", "text": caption}
    if twins:
        sample["Hallucination caption"] = hallucinated[0] if twins == 1 else hallucinated
        sample["hallucinated facts"] = wrong[0] if twins == 1 else wrong
    sample["facts"] = stated
    sample["conversations"] = conversation(turns, image=True, before=rng.random() < 0.5)
    return sample


def dialogue_sample(rng: random.Random, name: str, scene: Facts) -> dict[str, Any]:
    """Stage 2: a description or a question first, then up to three more questions; no pair."""
    turns = [(rng.choice(REQUESTS), sentence(choose_stated(rng, scene), rng.choice(OPENINGS)))]
    if rng.random() < 0.5:
        turns = []
    for _ in range(rng.randint(1, 3)):
        turns.append((yes_no_question if rng.random() < 0.7 else open_question)(rng, scene))
    return {"id": f"{name}-dialogue", "image": f"{name}.jpg", "conversations": conversation(turns, image=True)}


def text_sample(rng: random.Random, number: int) -> dict[str, Any]:
    """Stage 2: a dialogue without an image, as a tenth of LLaVA-1.5's instruction data are."""
    scene = draw_facts(rng, 100, rng.randint(50, 200))
    text = sentence(choose_stated(rng, scene), rng.choice(OPENINGS))
    if rng.random() < 0.5:
        turns = [(f"{text} What shape is it?" if "relation" not in scene else f"{text} Is it a picture?", "")]
        turns = [(turns[0][0], "Yes." if "relation" in scene else f"It is {with_article(scene['shape'])}.")]
    else:
        corners = {
            "circle": "no",
            "ring": "no",
            "square": "four",
            "triangle": "three",
            "star": "ten",
            "cross": "twelve",
        }
        shape = rng.choice(SHAPES)
        turns = [(f"How many corners does a {shape} have?", f"A {shape} has {corners[shape]} corners.")]
    return {"id": f"text-{number}", "conversations": conversation(turns, image=False)}


def draw_one(job: tuple[int, str, Path]) -> tuple[dict[str, Any], Facts]:
    """Draws and saves one image; returns its line of scenes.jsonl and its facts."""
    seed, name, folder = job
    rng = random.Random(f"{seed}/{name}")
    long_side, ratio = rng.randint(48, 120), rng.uniform(0.75, 1.0)
    width, height = long_side, max(32, round(long_side * ratio))
    if rng.random() < 0.5:
        width, height = height, width
    facts = draw_facts(rng, width, height)
    things = place_things(rng, facts, width, height)
    image = paint(rng, facts, things, width, height)
    image.save(folder / f"{name}.jpg", quality=rng.randint(85, 95))
    for thing in things:
        thing["box"] = [round(value, 2) for value in thing["box"]]
    return {"image": f"{name}.jpg", "width": width, "height": height, "facts": facts, "things": things}, facts


def write_json(path: Path, samples: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def draw(output: Path, train: int, valid: int, parts: int, seed: int, processes: int) -> None:
    """Writes everything named at the top of this file under `output`."""
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    numbers = {"train": train, "valid": valid, "parts": parts}
    names = [f"{split}-{k:05d}" for split, number in numbers.items() for k in range(number)]
    jobs = [(seed, name, images) for name in names]
    with multiprocessing.Pool(processes) as pool:
        drawn = list(tqdm(pool.imap(draw_one, jobs, chunksize=32), total=len(jobs), desc="drawing", unit="img"))

    pretrain, finetune, contrastive, held_out, corpus = [], [], [], [], []
    for name, (_, scene) in zip(names, drawn, strict=True):
        if name.startswith("parts"):
            continue
        rng = random.Random(f"{seed}/{name}/text")
        if name.startswith("valid"):
            held_out.append(pair_sample(rng, name, scene, twins=1))
            continue
        pretrain.append(pair_sample(rng, name, scene, twins=0 if rng.random() < 0.05 else 1))
        finetune.append(dialogue_sample(rng, name, scene))
        contrastive.append(pair_sample(rng, name, scene, twins=2))
        corpus.append(pretrain[-1]["text"])
    rng = random.Random(f"{seed}/text-only")
    finetune += [text_sample(rng, number) for number in range(train // 10)]
    for sample in finetune:
        corpus += [turn["value"].replace("<image>\n", "") for turn in sample["conversations"]]

    write_json(output / "pretrain.json", pretrain)
    write_json(output / "finetune.json", finetune)
    write_json(output / "contrastive.json", contrastive)
    write_json(output / "valid.json", held_out)
    (output / "scenes.jsonl").write_text("".join(json.dumps(line) + "\n" for line, _ in drawn))
    (output / "corpus.txt").write_text("\n".join(corpus) + "\n")
    print(
        f"{train} training and {valid} held-out images in {images}, and {parts} for the vision tower alone; "
        f"{len(pretrain)} pairs for pretrain, {len(finetune)} dialogues and {len(contrastive)} pairs for finetune."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the quickstart's images and write its LLaVA JSON.")
    parser.add_argument("--output", type=Path, default=Path("output/quickstart/data"))
    parser.add_argument("--train", type=int, default=6000, help="training images")
    parser.add_argument("--valid", type=int, default=512, help="held-out images")
    parser.add_argument("--parts", type=int, default=12000, help="images that the vision tower alone learns from")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    args = parser.parse_args()
    draw(args.output, args.train, args.valid, args.parts, args.seed, args.processes)


if __name__ == "__main__":
    main()
