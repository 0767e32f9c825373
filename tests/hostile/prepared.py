"""A small prepared folder with shards, to be damaged."""

import json
import os
from pathlib import Path

from PIL import Image

from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare


def prepare(folder: Path, num_images: int = 12) -> Path:
    """`folder`/out with one shard; record i shows image i and says "answer i"; one in four has a twin."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index in range(num_images):
        Image.effect_noise((16 + index, 16), 80).convert("RGB").save(folder / "images" / f"{index}.jpg")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"answer {index}"}]
        record = {"id": f"r{index}", "image": f"{index}.jpg", "conversations": turns}
        records.append(record if index % 4 else record | {"Hallucination caption": [f"wrong {index}"]})
    (folder / "a.json").write_text(json.dumps(records))
    run_prepare(
        PrepareSettings(
            inputs=[str(folder / "a.json")], output=str(folder / "out"), image_folder=str(folder / "images"),
            write_shards=True, num_workers=1, progress_bar=False,
        )
    )  # fmt: skip
    assert os.path.isfile(folder / "out" / "shards" / "images-000000.tar")
    return folder / "out"
