"""A model that sees pictures in tiles: records of one to four pictures of many shapes, and how its tower is run."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hacl_megatron.batch import SegmentLengths
from hacl_megatron.evaluation import random_dialogues
from tests.checkpoint.hf.round_trip_files import write_heads
from tests.distributed import run_distributed
from tests.model.parity_batches import make_batches
from tests.model.parity_cases import Layout, build, load
from tests.tiny_tiles import write_tiny_next, write_tiny_onevision

WRITERS = {"next": write_tiny_next, "onevision": write_tiny_onevision}
NUM_BATCHES = 12
"""Of two records each."""


@torch.no_grad()
def largest_differences(folder: Path) -> list[tuple[float, list[list[tuple[int, int]]]]]:
    """Of logits from transformers' own, and the pictures' sizes, of batches of records."""
    from hacl_megatron.platform.processes import start_platform

    module, architecture, groups = build(folder, Layout(), start_platform("cpu"))
    load(module, folder, architecture, Layout(), groups)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    draw, found = random.Random(5), []
    for seed in range(NUM_BATCHES):
        # Sides of 1 to 1,000 pixels, as many small as large.
        sizes = [
            [tuple(int(10 ** draw.uniform(0, 3)) for _ in range(2)) for _ in range(1 + (2 * seed + number) % 4)]
            for number in range(2)
        ]
        random_dialogues.TILED_SIZES = sizes
        batch = random_dialogues.random_batch(architecture, seed=seed)
        ours, expected = module(batch, SegmentLengths.of(batch)).logits, []
        for number in range(2):
            start, stop = batch.cu_seqlens[number : number + 2].tolist()
            ids = batch.token_ids.clone()
            ids[batch.image_rows] = theirs.config.image_token_id
            images = random_dialogues.images_for_transformers(architecture, batch, number)
            logits = theirs(input_ids=ids[None, start:stop], **images, use_cache=False).logits[0]
            targets = batch.target_rows[(batch.target_rows >= start) & (batch.target_rows < stop)]
            expected.append(logits[targets - start])
        expected = torch.cat(expected)
        found.append((float((ours[:, : expected.shape[1]] - expected).abs().max()), sizes))
    return found


def tiles_several_ways(folder: str) -> dict[str, Any]:
    """A LLaVA-OneVision's logits, with its frozen tower run at once and in parts, and with features from before; views
    at once; and gradients for text alone."""
    from hacl_megatron.model import hacl
    from hacl_megatron.platform.processes import start_platform

    device, weights = start_platform("cpu"), Path(folder)
    module, architecture, groups = build(weights, Layout(), device)
    load(module, weights, architecture, Layout(), groups)
    module.freeze(language_model=True, vision_tower=True)
    mixed, text = make_batches(layout=architecture.image_layout)
    at_once: list[int] = []
    module.vision_tower.register_forward_pre_hook(lambda _, inputs: at_once.append(len(inputs[0])))

    def logits(**options: Any) -> torch.Tensor:
        return module(mixed, SegmentLengths.of(mixed), **options).logits.detach()

    seen = {"at once": logits(), "views": len(mixed.pixel_values)}
    features = module.tower_features(mixed.pixel_values)
    seen["from before"] = logits(tower_features=features)
    before, hacl.VIEWS_AT_ONCE = hacl.VIEWS_AT_ONCE, 5
    at_once.clear()
    seen |= {"in parts": logits(), "at most": max(at_once), "in all": sum(at_once)}
    module.freeze(language_model=True, vision_tower=False)
    module.vision_tower.requires_grad_(True)
    at_once.clear()
    seen |= {"trained": logits(), "of a trained tower": [*at_once]}
    hacl.VIEWS_AT_ONCE = before
    module(text, SegmentLengths.of(text)).logits.square().sum().backward()
    connector = module.connector.named_parameters()
    return {**seen, "gradients": {name: None if p.grad is None else float(p.grad.abs().max()) for name, p in connector}}


def observe(folder: str) -> dict[str, Any]:
    seen = {name: largest_differences(Path(folder) / name) for name in WRITERS}
    return {**seen, "ways": tiles_several_ways(str(Path(folder) / "onevision"))}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiles")
    for name, write in WRITERS.items():
        write_heads(write(folder / name, layers=2))
    return run_distributed(observe, 1, str(folder))[0]


@pytest.mark.parametrize("name", WRITERS)
def test_logits_of_pictures_of_many_shapes_are_those_of_transformers(seen, name):
    """One to four a record; catches a grid, a cut or a count that is wrong for some proportions alone."""
    assert {len(record) for _, sizes in seen[name] for record in sizes} == {1, 2, 3, 4}
    difference, sizes = max(seen[name])
    assert difference < 2e-5, sizes


def test_a_frozen_tower_sees_few_views_at_once_and_a_newline_is_never_silent(seen):
    """Hundreds of views of a micro-batch would take the memory of as many images; a trained tower keeps them anyhow."""
    seen = seen["ways"]
    assert seen["at most"] == 5 and seen["in all"] == seen["views"] > 20
    assert seen["of a trained tower"] == [seen["views"]]
    assert torch.equal(seen["from before"], seen["at once"])
    for way in ("in parts", "trained"):
        torch.testing.assert_close(seen[way], seen["at once"], rtol=0, atol=1e-4)
    assert seen["gradients"].keys() > {"image_newline"} and set(seen["gradients"].values()) == {0.0}
