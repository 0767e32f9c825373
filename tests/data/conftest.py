"""Fixtures of several files: a small data set, and image decoders that are built once."""

import json
from pathlib import Path

import pytest

from hacl_megatron.data.images import ImageDecoder
from tests.data.drawn_images import decoder
from tests.data.loader_runs import NUM_CONTRASTIVE, NUM_SAMPLES, TEXT_ONLY, image_bytes, sample
from tests.data.tiny_tokenizer import write_tokenizer


@pytest.fixture
def dataset(tmp_path) -> Path:
    """`train.json` (12, two of them text only, three with captions), `contrastive.json` (4) and `images/`."""
    return write_dataset(tmp_path)


def write_dataset(tmp_path: Path) -> Path:
    train = [sample(index, "train", **({"text": "a red cat"} if index < 3 else {})) for index in range(NUM_SAMPLES)]
    for index in TEXT_ONLY:
        del train[index]["image"]
        train[index]["conversations"][0]["value"] = "What is it?"
    contrastive = [
        sample(index, "pairs", **{"text": f"a cat {index}", "Hallucination caption": ["a dog", "a red dog"]})
        for index in range(NUM_CONTRASTIVE)
    ]
    for name, samples in (("train", train), ("contrastive", contrastive)):
        (tmp_path / f"{name}.json").write_text(json.dumps(samples))
    for seed, record in enumerate([*train, *contrastive]):
        if "image" in record:
            path = tmp_path / "images" / record["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(seed))
    write_tokenizer(tmp_path / "tokenizer", legacy=True)
    return tmp_path


@pytest.fixture(scope="module")
def decoders():
    """One decoder for each backend and aspect ratio, built when first asked for."""
    built = {}

    def get(backend: str, aspect_ratio: str = "pad") -> ImageDecoder:
        key = backend, aspect_ratio
        if key not in built:
            built[key] = decoder(backend, aspect_ratio)
        return built[key]

    yield get
    for item in built.values():
        item.close()
