"""tools/plot_representations.py: numbers as transformers' states give them, at every layout; what pictures show."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hacl_megatron.evaluation.likelihood import representation_plots
from hacl_megatron.evaluation.likelihood.representation_plots import KINDS, project, thinned
from hacl_megatron.evaluation.likelihood.representations import SPACES, PointCloud
from tests.distributed import run_distributed
from tests.evaluation.likelihood.likelihood_oracle import Oracle
from tests.tiny import write_tiny_llava
from tests.tiny_data import write_tiny_data
from tests.tool_runs import run_tool

NUM_SAMPLES, BROKEN = 10, 3
EQUAL = 1
"""A sample of whose twins one is its caption: no twin, which counted as nearer than the caption."""
LAYOUTS = {"tp1": [], "tp2": ["--tensor-model-parallel-size", "2"], "pp2": ["--pipeline-model-parallel-size", "2"]}


def plot_all(commands: list[list[str]]) -> None:
    for arguments in commands:
        assert run_tool("plot_representations", *arguments) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, exports: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("representations")
    write_tiny_llava(folder / "other", seed=3)
    data = write_tiny_data(folder / "data", n=NUM_SAMPLES)
    samples = json.loads(data["contrastive"].read_text())
    (data["images"] / samples[BROKEN]["image"]).write_bytes(b"no image")
    own = samples[EQUAL]["Hallucination caption"]
    samples[EQUAL]["Hallucination caption"] = [samples[EQUAL]["text"], *([own] if isinstance(own, str) else own)]
    data["contrastive"].write_text(json.dumps(samples))
    flags = ["--data-path", str(data["contrastive"]), "--image-folder", str(data["images"]), "--device", "cpu",
             "--batch-size", "3", "--image-backend", "pillow"]  # fmt: skip
    commands = {
        name: ["--load", str(exports["square"]), "--output", str(folder / name), *flags, *layout]
        for name, layout in LAYOUTS.items()
    }
    commands["tp1"] += ["--before", str(folder / "other")]
    run_distributed(plot_all, 1, [commands.pop("tp1")])
    run_distributed(plot_all, 2, list(commands.values()))
    return folder


def numbers(folder: Path) -> dict:
    return json.loads((folder / "representations.json").read_text())


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_same_at_every_layout(folder: Path, layout: str) -> None:
    one, many = numbers(folder / "tp1"), numbers(folder / layout)
    assert many["samples"] == one["samples"] == NUM_SAMPLES - 1
    assert many["unusable"] == 1 and one["unusable"] == 2  # of each checkpoint
    for space in SPACES:
        (found,) = many[space].values()
        assert found == pytest.approx(one[space]["after"], abs=1e-4)
        assert one[space]["before"]["modality gap"] != pytest.approx(one[space]["after"]["modality gap"], abs=1e-2)


def test_numbers_are_those_of_transformers_states(folder: Path, exports: dict[str, Path]) -> None:
    oracle = Oracle(exports["square"], folder / "data" / "images")
    samples = json.loads((folder / "data" / "contrastive.json").read_text())
    del samples[BROKEN]
    wrong = [s["Hallucination caption"] for s in samples]
    wrong = [[texts] if isinstance(texts, str) else texts for texts in wrong]
    wrong = [[text for text in texts if text != s["text"]] for s, texts in zip(samples, wrong, strict=True)]
    images = torch.stack([oracle.image_state(s["image"]) for s in samples])
    captions = torch.stack([oracle.text_state(s["text"]) for s in samples])
    twins = [torch.stack([oracle.text_state(text) for text in texts]) for texts in wrong]
    spaces = {
        "hidden states": (images, captions, twins),
        "embeddings": (
            oracle.embedding(images, "vision_projector"),
            oracle.embedding(captions, "text_projector"),
            [oracle.embedding(own, "text_projector") for own in twins],
        ),
    }
    found = numbers(folder / "tp1")
    for space, (image, caption, own) in spaces.items():
        image, caption, *own = (torch.nn.functional.normalize(part, dim=-1) for part in (image, caption, *own))
        true = [float(v @ t) for v, t in zip(image, caption, strict=True)]
        false = [[float(v @ u) for u in part] for v, part in zip(image, own, strict=True)]
        flat = [value for part in false for value in part]
        centre = torch.cat(own).mean(0)
        assert found[space]["after"] == pytest.approx({
            "modality gap": float((image.mean(0) - caption.mean(0)).norm()),
            "caption-hallucination distance": float((caption.mean(0) - centre).norm()),
            "image-caption cosine": np.mean(true),
            "image-hallucinated cosine": np.mean(flat),
            "caption-hallucinated cosine": np.mean(
                [float(t @ u) for t, part in zip(caption, own, strict=True) for u in part]
            ),
            "hallucination accuracy": np.mean(
                [t > u for t, part in zip(true, false, strict=True) for u in part]
            ),
            "hallucination AUC": roc_auc_score([1] * len(true) + [0] * len(flat), true + flat),
        }, abs=1e-4)  # fmt: skip


def test_pictures_and_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(folder / "tp1"), size_guidance={"images": 0}).Reload()
    for space in SPACES:
        with Image.open(folder / "tp1" / f"{space.replace(' ', '_')}.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        middle = pixels[len(pixels) // 8 : -len(pixels) // 16]  # no title, no legend
        halves = np.split(middle, [middle.shape[1] // 2], axis=1)
        for half in halves:  # before, after
            red, green, blue = half[..., 0], half[..., 1], half[..., 2]
            for one, *others in ((red, green, blue), (green, red, blue), (blue, red, green)):
                assert ((one > others[0] + 30) & (one > others[1] + 30)).sum() > 100
        assert len(events.Images(f"representations/{space}")) == 1
        gaps = events.Scalars(f"representations/{space}/modality gap")
        expected = [numbers(folder / "tp1")[space][name]["modality gap"] for name in ("before", "after")]
        assert [event.value for event in gaps] == pytest.approx(expected)


def cloud(number: int = 30) -> PointCloud:
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(number), np.arange(number) % 3)
    captions = rng.normal(size=(number, 8)).astype(np.float32)
    return PointCloud(
        images=captions + 5, captions=captions, hallucinated=captions[owners] + owners[:, None], owners=owners
    )


@pytest.mark.parametrize("method", ["PCA", "t-SNE"])
def test_every_kind_keeps_its_points(method: str) -> None:
    points = project(cloud(), method)
    again = project(cloud(), method)
    for kind, *_ in KINDS:
        assert points[kind].shape == (len(getattr(cloud(), kind)), 2)
        assert np.array_equal(points[kind], again[kind])
    centres = [points[kind].mean(0) for kind in ("images", "captions")]
    spread = np.std(points["captions"], axis=0).max()
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread  # well apart in space, well apart in the plane


def test_a_large_set_is_thinned_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cloud()
    assert thinned(whole) is whole
    monkeypatch.setattr(representation_plots, "MAX_POINTS", 7)
    few = thinned(whole)
    assert len(few.images) == len(few.captions) == 7
    kept = [int(np.flatnonzero((whole.captions == caption).all(1))[0]) for caption in few.captions]
    assert kept[0] == 0 and kept[-1] == 29 and all(one < other for one, other in pairwise(kept))
    np.testing.assert_array_equal(few.images, whole.images[kept])
    assert len(few.hallucinated) == sum(at % 3 for at in kept)
    expected = few.captions[few.owners] + np.array(kept)[few.owners][:, None]
    np.testing.assert_allclose(few.hallucinated, expected, rtol=1e-6)


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capfd) -> None:
    common = ["--data-path", str(folder / "data" / "contrastive.json"), "--output", str(tmp_path)]
    assert run_tool("plot_representations", "--load", tmp_path, *common, "--image-folder", tmp_path) == 2
    assert "found no checkpoint" in capfd.readouterr().err
    assert run_tool("plot_representations", "--load", tmp_path, *common) == 2
    assert "give --image-folder" in capfd.readouterr().err
