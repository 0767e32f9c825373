"""A tiny LLaVA-NeXT and LLaVA-OneVision, and data of pictures of many shapes, alone and several in a record."""

import json
import random
from pathlib import Path

from PIL import Image

from tests.tiny_data import swap_twins
from tests.tiny_tiles import write_tiny_next, write_tiny_onevision
from tests.training.runs import make_inputs

MODELS = {"next": write_tiny_next, "onevision": write_tiny_onevision}

SIZES = [(48, 48), (20, 150), (150, 20), (97, 61), (61, 97), (200, 190), (96, 48), (33, 100), (7, 9), (140, 90)]
LENGTH = 900
"""`--model-max-length` that all samples fit into."""


def make_tiled_inputs(folder: Path) -> Path:
    """Both models, and the data and YAML of `make_inputs` with pictures of these sizes; every other record of stage 2
    shows two to four of them, some with listed captions."""
    make_inputs(folder)
    for name, write in MODELS.items():
        write(folder / name)
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        config["text_config"]["max_position_embeddings"] = LENGTH
        path.write_text(json.dumps(config))
    draw = random.Random(5)
    swap_twins(folder / "data")
    names = sorted(str(path.relative_to(folder / "data" / "images")) for path in folder.glob("data/images/**/*.jpg"))
    for name in names:
        path = folder / "data" / "images" / name
        with Image.open(path) as image:
            resized = image.resize(draw.choice(SIZES))
        resized.save(path, quality=92)
    path = folder / "data" / "finetune.json"
    records = json.loads(path.read_text())
    by_image = {record["image"]: record for record in json.loads((folder / "data" / "contrastive.json").read_text())}
    for number, record in enumerate(records):
        if number % 2 == 0 and "image" in record:
            shown = [record["image"], *draw.sample(names, draw.randint(1, 3))]
            told = [by_image[name] for name in shown]
            record.pop("Hallucination caption", None)
            record["image"] = shown
            record["text"] = [one["text"] if at != 1 else None for at, one in enumerate(told)]
            record["Hallucination caption"] = [
                [] if at == 1 else [one["Hallucination caption"]] if isinstance(one["Hallucination caption"], str)
                else one["Hallucination caption"] for at, one in enumerate(told)
            ]  # fmt: skip
            first, *others = told
            record["conversations"] = [
                {"from": "human", "value": "<image>\nWhat is here?"},
                {"from": "gpt", "value": first["text"]},
                {"from": "human", "value": "And here: " + ", here: ".join(["<image>"] * len(others)) + "?"},
                {"from": "gpt", "value": others[-1]["text"]},
            ]
    path.write_text(json.dumps(records, indent=1))
    return folder


def flags_of(folder: Path, model: str) -> list[str]:
    """Beside the YAML of the stage."""
    return ["--pretrained-checkpoint", str(folder / model), "--model-max-length", str(LENGTH)]
