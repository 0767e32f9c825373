"""Loaders over a small data set of real files: JSON, JPEGs, a tokenizer; and how two steps are compared."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hacl_megatron.batch import PackedBatch, StepBatches
from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, VisionConfig
from hacl_megatron.config.flags import DataFlags, TrainingFlags
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.loader import StepLoader, build_loader
from hacl_megatron.data.step_maker import MicroBatching
from hacl_megatron.data.tokenizer import load_tokenizer

SIZE, PATCH = 32, 16
MODEL = ModelConfig(
    language=LanguageConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1, vocab_size=600
    ),
    vision=VisionConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, image_size=SIZE, patch_size=PATCH
    ),
    image=ImageConfig(size=SIZE),
)
NUM_SAMPLES, NUM_CONTRASTIVE = 12, 4
TEXT_ONLY = {5, 8}
"""Samples without an image; all others have one."""


def image_bytes(seed: int, format: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    file = io.BytesIO()
    noise.resize((60 + seed, 50 - seed), Image.BICUBIC).save(file, format)
    return file.getvalue()


def sample(index: int, prefix: str, **more) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat " * (index % 3 + 1)}]
    return {"id": f"{prefix}-{index}", "image": f"{prefix}/{index}.jpg", "conversations": turns, **more}


def change_sample(dataset: Path, index: int, **changes) -> None:
    path = dataset / "train.json"
    samples = json.loads(path.read_text())
    samples[index].update(changes)
    path.write_text(json.dumps(samples))


def loader_of(dataset: Path, *, flags: dict | None = None, **changes) -> StepLoader:
    paths = {
        "data_path": changes.pop("data_paths", [str(dataset / "train.json")]),
        "contrastive_data_path": changes.pop("contrastive_paths", [str(dataset / "contrastive.json")]),
    }
    paths["valid_data_path"] = paths["data_path"]
    config = RunConfig(
        data=DataFlags(**{"image_folder": str(dataset / "images"), "model_max_length": 64, **paths, **(flags or {})}),
        training=TrainingFlags(seed=3),
        architecture=MODEL,
    )
    settings = {
        "config": config,
        "tokenizer": load_tokenizer(str(dataset / "tokenizer")),
        "global_batch_size": 4,
        "micro_batching": MicroBatching(micro_batch_size=2),
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "pad_multiple": 4,
        "for_validation": not changes.pop("shuffle", True),
        "data_state": None,
    }
    return build_loader(**{**settings, **changes})


def draw(num_steps: int, *args, **changes) -> list[StepBatches]:
    with loader_of(*args, **changes) as loader:
        return [next(loader) for _ in range(num_steps)]


def mains(step: StepBatches) -> list[PackedBatch]:
    assert all(batch.ahead is None for batch in step.micro_batches)
    return [batch.main for batch in step.micro_batches]


def assert_same_batch(one: PackedBatch, other: PackedBatch) -> None:
    for key, value in vars(one).items():
        theirs = getattr(other, key)
        assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs, key


def pixels_by_sample(steps: list[StepBatches], bad: tuple[int, ...] = ()) -> dict[int, torch.Tensor]:
    """Each sample's pixels, from the rule that a micro-batch's images stand in the order of their good samples."""
    found = {}
    for step in steps:
        for batch in mains(step):
            with_image = [i for i in batch.sample_ids.tolist() if i not in TEXT_ONLY and i not in bad]
            assert batch.num_images == len(with_image)
            found.update(zip(with_image, batch.pixel_values, strict=True))
    return found
