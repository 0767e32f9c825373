"""Training on pictures in tiles and on records with several images: LLaVA-NeXT's and LLaVA-OneVision's way.

What transformers' models make of the very files is the oracle for one process; one process is it for the layouts.
"""

import json
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from hacl_megatron.data.encoding import IGNORE, IMAGE
from hacl_megatron.data.store import UnusableImage
from hacl_megatron.train import run
from tests.distributed import run_distributed
from tests.tiny import image_token_id
from tests.tool_runs import to_hf
from tests.training.gradient_cases import Case, read, record
from tests.training.runs import assert_same_run, layout_flags, train, weights
from tests.training.test_families import write_parts
from tests.training.tile_cases import MODELS, flags_of, make_tiled_inputs

SAMPLES = 8
STAGES = ("pretrain", "finetune")
LAYOUTS = {"next": ("tp2-sp", "tp2-pp2-sp-first1", "cp2"), "onevision": ("pp2-first1", "tp2")}
REFERENCES = [Case("all", "prompt"), Case("own", "image", preference="phrase")]
CUT = [Case("all", "prompt", micro_batches=4), Case("own", "image", preference="phrase", tokens=1500)]
"""The same in micro-batches; by tokens their number is uneven, and sizes are read ahead."""


def record_all(folder: str, layout: str, models: list[str]) -> None:
    for model in models:
        _, flags = layout_flags(layout, samples=SAMPLES)
        flags += ["--global-batch-size", str(SAMPLES), *flags_of(Path(folder), model)]
        for stage in STAGES:
            asked = [*REFERENCES, *CUT] if layout == "tp1" else CUT
            record(folder, f"{model}-{layout}", flags, stage, asked, samples=SAMPLES)


def record_samples(folder: str, model: str) -> None:
    """Every sample of stage 2's first step as it was before it was packed, with the names of its images."""
    from hacl_megatron.data import step_maker

    seen, pack = [], step_maker.pack

    def pack_and_record(slots, *args, **options):
        seen.extend(slots)
        return pack(slots, *args, **options)

    with mock.patch.object(step_maker, "pack", pack_and_record):
        flags = [*layout_flags("tp1")[1], *flags_of(Path(folder), model)]
        record(folder, f"{model}-alone", flags, "finetune", [Case()], samples=SAMPLES)
    torch.save(seen[:SAMPLES], Path(folder) / f"{model}-samples.pt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiled_inputs(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def recorded(root: Path) -> Path:
    wanted: dict[str, list[str]] = {"tp1": list(MODELS)}
    for model, layouts in LAYOUTS.items():
        for layout in layouts:
            wanted.setdefault(layout, []).append(model)
    for layout, models in wanted.items():
        run_distributed(record_all, layout_flags(layout)[0], str(root), layout, models)
    return root


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_that_of_transformers_on_the_same_files(root: Path, model: str) -> None:
    """Pixels by transformers' own processor, features and rows by its own model: fails where a view, a row, a newline
    or an image's place in its record is another."""
    run_distributed(record_samples, 1, str(root), model)
    samples = torch.load(root / f"{model}-samples.pt", weights_only=False)
    theirs = AutoModelForImageTextToText.from_pretrained(root / model).eval()
    processor = AutoImageProcessor.from_pretrained(root / model)
    files = _files_by_key(root / "data" / "images")
    total, count, numbers = 0.0, 0, set()
    for slot in samples:
        encoded = slot.encoded
        ids = torch.from_numpy(encoded.dialogue).clone()[None]
        ids[ids == IMAGE] = image_token_id()
        given = {}
        if slot.image_keys:
            images = [Image.open(files[key]).convert("RGB") for key in slot.image_keys]
            numbers.add(len(images))
            given = dict(processor(images if model == "next" else [images], return_tensors="pt"))
        with torch.no_grad():
            logits = theirs(input_ids=ids, **given).logits[0, :-1]
        labels = torch.from_numpy(encoded.labels)[1:]
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
        count += int((labels != IGNORE).sum())
    found = read(root, "finetune", f"{model}-alone", 1, Case())
    assert len(numbers) > 1 and 1 in numbers
    assert found["losses"][0] == pytest.approx(total / count, rel=2e-4)


def _files_by_key(folder: Path) -> dict[int, Path]:
    from hacl_megatron.data.store import image_key

    return {image_key(path.read_bytes()): path for path in folder.glob("**/*.jpg")}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("model", "layout"), [(m, layout) for m, layouts in LAYOUTS.items() for layout in ("tp1", *layouts)]
)
def test_losses_and_gradients_are_those_of_one_micro_batch(recorded: Path, model: str, layout: str, stage: str) -> None:
    """Fails where tiles are counted, cut into micro-batches, handed on or summed otherwise than alone."""
    for cut, whole in zip(CUT, REFERENCES, strict=True):
        expected = read(recorded, stage, f"{model}-tp1", 1, whole)
        found = read(recorded, stage, f"{model}-{layout}", layout_flags(layout)[0], cut)
        assert found["num_micro_batches"] == cut.micro_batches or cut.tokens
        torch.testing.assert_close(found["losses"][:3], expected["losses"][:3], rtol=1e-5, atol=0)
        torch.testing.assert_close(found["losses"][3:], expected["losses"][3:], rtol=1e-5, atol=1e-6)
        assert found["gradients"].keys() == expected["gradients"].keys()
        assert expected["gradients"]["connector.image_newline"].norm() > 1e-6
        for name, gradient in expected["gradients"].items():
            difference = float((found["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12))
            assert difference <= 1e-4, (cut.name(), name, difference)
        assert all(norm == megatrons > 0 for norm, megatrons in found["norms"])


def test_a_run_that_changes_its_layout_goes_on(root: Path) -> None:
    """Two stops, three layouts, the last export opened by transformers: fails where the newline is lost or cut."""

    def command(name: str, layout: str, *more: str) -> list[str]:
        files = ["--config", str(root / "finetune.yaml"), "--save", str(root / name), "--micro-batch-size", "2"]
        start = flags_of(root, "onevision")
        return [*layout_flags(layout)[1], *files, *start, "--use-distributed-optimizer", *more]

    chain = ["--load", str(root / "chain")]
    train([command("whole", "tp1"), command("chain", "tp1", *chain, "--exit-interval", "2")], 1)
    train([command("chain", "tp2-sp", *chain, "--exit-interval", "1"), command("chain", "pp2-first1", *chain)], 2)
    assert_same_run(root / "whole", root / "chain", ("lm loss", "contrastive loss i2t", "grad-norm"))


def test_parts_become_a_model_in_tiles_that_transformers_opens(root: Path, tmp_path: Path) -> None:
    """A language model and a tower of their own, the grids by a flag: stage 1, export, transformers' own reading."""
    text, clip = write_parts(tmp_path, "qwen2")
    flags = ["--config", str(root / "pretrain.yaml"), "--pretrained-checkpoint", str(text), "--vision-tower", str(clip)]
    flags += ["--save", str(tmp_path / "run"), "--image-grid-pinpoints", "next", "--model-max-length", "380"]
    train([[*flags, *layout_flags("tp1")[1]]], 1)
    out = to_hf(tmp_path / "run", tmp_path / "out", "--dtype", "float32", "--verify")
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert float(model.model.image_newline.detach().norm()) > 0
    second = ["--config", str(root / "finetune.yaml"), "--model-max-length", "500", *layout_flags("tp1")[1]]
    whole = tmp_path / "whole"
    train([["--config", str(root / "pretrain.yaml"), "--save", str(whole), *layout_flags("tp1")[1]]], 1)
    for name, start in (("ours", whole), ("theirs", root / "llava")):  # stage 1 had no tiles
        grids = ["--pretrained-checkpoint", str(start), "--image-grid-pinpoints", "next", "--train-iters", "1"]
        train([[*second, *grids, "--save", str(tmp_path / name)]], 1)
        assert weights(tmp_path / name)["connector.image_newline"].norm() > 0
    with pytest.raises(
        AssertionError, match=r"--image-grid-pinpoints is onevision, but the model in checkpoint .* has"
    ):
        train([[*flags, "--image-grid-pinpoints", "onevision", "--load", str(tmp_path / "run")]], 1)


def test_pictures_that_do_not_fit_are_named_and_counted(root: Path) -> None:
    flags = ["--config", str(root / "finetune.yaml"), "--save", str(root / "short"), *flags_of(root, "next")]
    train([[*flags, "--model-max-length", "230", *layout_flags("tp1")[1]]], 1)
    bad = [json.loads(line) for line in (root / "short" / "bad_samples.jsonl").read_text().splitlines()]
    assert any("tiles) end at" in line["reason"] and "--model-max-length" in line["reason"] for line in bad)
    assert np.unique([line["reason"].startswith("the rows of its") for line in bad]).tolist() == [False, True]


def see_other_files(command: list[str]) -> None:
    """Train where one rank cannot read the head of some pictures, as on nodes whose disks differ."""
    from hacl_megatron.data import read_ahead

    size = read_ahead._size

    def hidden(store, size_of, image, *rest):
        if torch.distributed.get_rank() == 1 and image < "0024.jpg":
            raise UnusableImage("no such file")
        return size(store, size_of, image, *rest)

    with mock.patch.object(read_ahead, "_size", hidden):
        run(command)


def test_ranks_that_see_other_files_stop_in_one_line(root: Path, tmp_path: Path) -> None:
    """Catches samples that train twice, and others that never do; and memory that is read as sizes."""
    files = ["--config", str(root / "finetune.yaml"), "--save", str(tmp_path), "--micro-batch-tokens", "1500"]
    command = [*files, *flags_of(root, "next")]  # the other rank is a replica
    with pytest.raises(AssertionError, match="ValueError: ranks count other rows for the same samples of this step"):
        train([partial(see_other_files, command)], 2)
