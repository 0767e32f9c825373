"""LLaVA JSON files and JPEGs of coloured shapes, drawn from seeds: `write_tiny_data`."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 210), "yellow": (230, 210, 40)}
SHAPES = ("circle", "square", "triangle")
PLACES = ("left", "right", "top", "bottom")


def draw_scene(rng: random.Random) -> dict[str, str]:
    colour, shape, place = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(PLACES)
    return {"colour": colour, "shape": shape, "place": place, "caption": f"A {colour} {shape} on the {place}."}


def hallucinate(scene: dict[str, str], rng: random.Random) -> str:
    """The caption with an object that is not in the image."""
    wrong = rng.choice([shape for shape in SHAPES if shape != scene["shape"]])
    return f"A {rng.choice(list(COLOURS))} {wrong} and a {scene['colour']} {scene['shape']} on the {scene['place']}."


def write_scene(path: Path, scene: dict[str, str], size: tuple[int, int], rng: random.Random) -> None:
    """A small JPEG [size = (width, height)] with the scene's shape on a noisy ground."""
    width, height = size
    image = Image.new("RGB", size, tuple(rng.randrange(90, 180) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.randrange(width), rng.randrange(height)
        draw.line((x, y, rng.randrange(width), rng.randrange(height)), fill=tuple(rng.randrange(256) for _ in range(3)))
    radius = min(size) // 4
    x = {"left": radius, "right": width - radius}.get(scene["place"], width // 2)
    y = {"top": radius, "bottom": height - radius}.get(scene["place"], height // 2)
    colour = COLOURS[scene["colour"]]
    if scene["shape"] == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif scene["shape"] == "square":
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    image.save(path, quality=92)


def write_tiny_data(
    folder: Path, n: int = 24, seed: int = 0, *, min_size: int = 24, max_size: int = 96
) -> dict[str, Path]:
    """Write `n` samples each of three LLaVA JSON files, with their JPEGs, and return the paths.

    `pretrain`     image + caption; the caption under `text` or only as the first answer; 0, 1 (a string) or 2 (a list)
                   hallucinated captions
    `finetune`     dialogues of one to three turns; every fifth is text only, every other one without any caption key
    `contrastive`  image, `text` and 1 or 2 hallucinated captions; no conversations beyond the caption
    `images`       the image folder that the names are relative to
    """
    rng = random.Random(seed)
    folder = Path(folder)
    images = folder / "images"
    (images / "part_0").mkdir(parents=True, exist_ok=True)
    scenes, names = [], []
    for index in range(n):
        scene = draw_scene(rng)
        name = f"part_0/{index:04d}.jpg" if index % 3 == 0 else f"{index:04d}.jpg"
        write_scene(images / name, scene, (rng.randint(min_size, max_size), rng.randint(min_size, max_size)), rng)
        scenes.append(scene)
        names.append(name)

    pretrain, finetune, contrastive = [], [], []
    for index, (scene, name) in enumerate(zip(scenes, names, strict=True)):
        wrong = [hallucinate(scene, rng) for _ in range(2)]
        turns = [
            {"from": "human", "value": rng.choice(["<image>\nDescribe the image.", "Describe the image.\n<image>"])},
            {"from": "gpt", "value": scene["caption"]},
        ]

        sample = {"id": f"pretrain-{index}", "image": name, "conversations": turns}
        if index % 2 == 0:
            sample["text"] = scene["caption"]
        if index % 3 == 1:
            sample["Hallucination caption"] = wrong[0]
        elif index % 3 == 2:
            sample["Hallucination caption"] = wrong
        pretrain.append(sample)

        if index % 5 == 4:
            question, answer = rng.choice([("Is a circle round?", "Yes."), ("Name a colour.", f"{scene['colour']}.")])
            dialogue = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            finetune.append({"id": f"finetune-{index}", "conversations": dialogue * rng.randint(1, 2)})
        else:
            dialogue = [{"from": "human", "value": f"<image>\nWhat is on the {scene['place']}?"},
                        {"from": "gpt", "value": f"A {scene['shape']}."}]  # fmt: skip
            for _ in range(rng.randint(0, 2)):
                dialogue += [
                    {"from": "human", "value": "Which colour has it?"},
                    {"from": "gpt", "value": f"It is {scene['colour']}."},
                ]
            sample = {"id": f"finetune-{index}", "image": name, "conversations": dialogue}
            if index % 2 == 0:
                sample.update({"text": scene["caption"], "Hallucination caption": wrong[: 1 + index % 4 // 2]})
            finetune.append(sample)

        contrastive.append({
            "id": f"contrastive-{index}", "image": name, "conversations": turns, "text": scene["caption"],
            "Hallucination caption": wrong if index % 2 else wrong[0],
        })  # fmt: skip

    paths = {"images": images}
    for key, samples in (("pretrain", pretrain), ("finetune", finetune), ("contrastive", contrastive)):
        paths[key] = folder / f"{key}.json"
        paths[key].write_text(json.dumps(samples, indent=1))
    return paths


def swap_twins(folder: Path) -> None:
    """Rewrites the hallucinated captions of `write_tiny_data`'s files: the caption with another colour or shape.

    As it draws them they are longer than their captions, and so less likely under any model: a likelihood objective
    would have next to no gradient.
    """
    for path in folder.glob("*.json"):
        records = json.loads(path.read_text())
        for record in records:
            if twins := record.get("Hallucination caption"):
                caption = record.get("text") or record["conversations"][1]["value"]
                swapped = [_with_next(caption, tuple(COLOURS)), _with_next(caption, SHAPES)]
                record["Hallucination caption"] = swapped[: len(twins)] if isinstance(twins, list) else swapped[0]
        path.write_text(json.dumps(records, indent=1))


def _with_next(caption: str, words: tuple[str, ...]) -> str:
    (at,) = (number for number, word in enumerate(words) if word in caption)
    return caption.replace(words[at], words[(at + 1) % len(words)])
