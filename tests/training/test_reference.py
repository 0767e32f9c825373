"""The trainer against a plain implementation on transformers: same checkpoint, same samples, five optimiser steps."""

import itertools
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.reference_hacl import ReferenceHacl, ReferenceTrainer, Sample, Twin
from tests.selection import selected
from tests.tiny import image_token_id
from tests.tiny_data import swap_twins
from tests.training.runs import make_inputs, metrics, train

STEPS = 5
COMPARED = ("lm loss", "contrastive loss i2t", "contrastive loss t2i", "temperature", "grad-norm")

# name: stage, and flags beside those of `make_inputs`
CASES: dict[str, tuple[str, dict]] = {
    "pretrain": ("pretrain", {}),
    "pretrain-prompt": (
        "pretrain",
        {"contrastive-image-context": "prompt", "hallucination-negatives": "own", "hallucination-weight": 4.0},
    ),
    "finetune": ("finetune", {"weight-decay": 1.0}),
    "finetune-prompt": ("finetune", {"contrastive-image-context": "prompt"}),
    "pretrain-accumulated": (
        "pretrain",
        {"micro-batch-size": 4, "contrastive-negatives": "micro-batch", "hallucination-negatives": "none"},
    ),
    "pretrain-cached": ("pretrain", {"micro-batch-size": 2}),
    "pretrain-warmup": ("pretrain", {"micro-batch-size": 4, "contrastive-warmup-fraction": 0.8, "adam-eps": 1e-2}),
    "finetune-cached": ("finetune", {"micro-batch-size": 2, "contrastive-image-context": "prompt"}),
    "pretrain-phrase": ("pretrain", {"preference-loss": "phrase", "preference-weight": 2.0}),
    "finetune-phrase": (
        "finetune",
        {"preference-loss": "phrase", "generation-weight": 0.5, "contrastive-weight": 0.0, "micro-batch-size": 4},
    ),
    "pretrain-dpo": ("pretrain", {"preference-loss": "dpo", "preference-weight": 2.0, "preference-beta": 0.5}),
    "finetune-dpo": (
        "finetune",
        {"preference-loss": "dpo", "generation-weight": 0.5, "contrastive-weight": 0.0, "micro-batch-size": 4},
    ),
    "pretrain-mdpo": ("pretrain", {"preference-loss": "mdpo", "contrastive-weight": 0.0}),
    "finetune-mdpo": ("finetune", {"preference-loss": "mdpo"}),
    "finetune-duplicates": (
        "finetune",
        # Adam does not feel a gradient's scale, and so its clipping, unless epsilon counts.
        {"mask-duplicates": False, "lr-warmup-fraction": 0.4, "clip-grad": 0.3, "adam-eps": 1e-2, "adam-beta2": 0.9},
    ),
    "finetune-heads-apart": ("finetune", {"clip-heads-apart": True, "clip-grad": 0.3, "adam-eps": 1e-2}),
}


def train_and_record(command: list[str], recorded: str) -> None:
    """Train, and store each micro-batch's samples as they were before they were packed."""
    from hacl_megatron.data import step_maker
    from hacl_megatron.train import run
    from hacl_megatron.training import build

    pack, open_loader, seen = step_maker.pack, build.open_loader, []

    def open_and_forget(*arguments, **options):
        seen.clear()  # for dpo the data is opened to look at it, then to score it, and then to train on it
        return open_loader(*arguments, **options)

    def pack_and_record(slots, pixel_values, **settings):
        if settings["parts"].dialogues:  # the other pack of a micro-batch holds the same samples
            pixels = iter(pixel_values)
            seen.append([_as_sample(slot, pixels) for slot in slots])
        return pack(slots, pixel_values, **settings)

    with (
        mock.patch.object(step_maker, "pack", pack_and_record),
        mock.patch.object(build, "open_loader", open_and_forget),
    ):
        run(command)
    torch.save(seen, recorded)


def _as_sample(slot, pixels) -> Sample:
    from hacl_megatron.data.encoding import IMAGE
    from hacl_megatron.data.preferences import little_left

    encoded = slot.encoded
    rows = torch.from_numpy(encoded.dialogue).clone()
    rows[rows == IMAGE] = image_token_id()
    segments = [text for pair in encoded.pairs for text in (pair.caption_segment, *pair.hallucinated_segments)]
    texts = [torch.from_numpy(segment[:-1]) for segment in segments]  # the reference puts its own EOS behind
    pixel_values = next(pixels).clone() if encoded.images else None
    crops = encoded.rejected and encoded.answers_per_twin == 3
    return Sample(
        dialogue=rows,
        labels=torch.from_numpy(encoded.labels),
        pixel_values=pixel_values,
        cropped_pixels=little_left(pixel_values, *slot.image_keys) if crops else None,
        image_id=next(iter(slot.image_keys), None),
        caption=texts[0] if texts else None,
        hallucinated=texts[1:],
        twins=[_as_twin(answer) for answer in encoded.rejected],
    )


def _as_twin(answer) -> Twin:
    from hacl_megatron.data.encoding import IMAGE

    rows = torch.from_numpy(answer.rows)
    rows = torch.cat([rows, torch.tensor(answer.rejected_ids[-1:])])  # which nothing behind it needs
    rows[rows == IMAGE] = image_token_id()
    return Twin(rows=rows, chosen=torch.from_numpy(answer.chosen), rejected=torch.from_numpy(answer.rejected))


def run_reference(folder: Path, config: dict, micro_batches: list[list[Sample]]) -> list[dict[str, float]]:
    model = ReferenceHacl.from_folder(
        folder / "llava",
        freeze_language_model=config.get("freeze-LM", False),
        image_context=config.get("contrastive-image-context", "image"),
        hallucination_negatives=config.get("hallucination-negatives", "all"),
        hallucination_weight=config.get("hallucination-weight", 1.0),
        mask_duplicates=config.get("mask-duplicates", True),
        contrastive_weight=config.get("contrastive-weight", 1.0),
        preference_weight=config.get("preference-weight", 1.0) if "preference-loss" in config else 0.0,
        generation_weight=config.get("generation-weight", 1.0),
        preference_beta=config.get("preference-beta", 0.1) if "dpo" in config.get("preference-loss", "") else None,
    )
    trainer = ReferenceTrainer(
        model,
        lr=config["lr"],
        train_iters=config["train-iters"],
        weight_decay=config.get("weight-decay", 0.0),
        betas=(0.9, config.get("adam-beta2", 0.999)),
        eps=config.get("adam-eps", 1e-8),
        clip_grad=config.get("clip-grad", 1.0),
        clip_heads_apart=config.get("clip-heads-apart", False),
        warmup_fraction=config.get("lr-warmup-fraction", 0.03),
        contrastive_warmup_fraction=config.get("contrastive-warmup-fraction", 0.0),
    )
    per_step = config["global-batch-size"] // config["micro-batch-size"]
    steps = [micro_batches[step * per_step : (step + 1) * per_step] for step in range(STEPS)]
    if config.get("contrastive-negatives") != "micro-batch":  # one pool
        steps = [[list(itertools.chain.from_iterable(step))] for step in steps]
    return [trainer.step(step) for step in steps]


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every selected case trained by this package in one process, and `NAME.pt` with the samples it saw."""
    folder = make_inputs(tmp_path_factory.mktemp("reference"))
    swap_twins(folder / "data")
    hidden, generator = 48, torch.Generator().manual_seed(3)
    heads = {
        f"{name}.{key}": torch.randn(shape, generator=generator) / hidden**0.5
        for name in ("vision_projector", "text_projector")
        for key, shape in (("weight", (hidden // 4, hidden)), ("bias", (hidden // 4,)))
    }
    save_file({**heads, "temperature": torch.tensor([0.09])}, folder / "llava" / "hacl_heads.safetensors")
    commands = []
    for name in selected(request, "name", CASES):
        stage, flags = CASES[name]
        config = {**yaml.safe_load((folder / f"{stage}.yaml").read_text()), "micro-batch-size": 8, **flags}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        command = ["--config", str(folder / f"{name}.yaml"), "--save", str(folder / name)]
        commands.append(partial(train_and_record, command, str(folder / f"{name}.pt")))
    train(commands, 1)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_five_steps_give_the_losses_of_the_plain_implementation(finished: Path, name: str) -> None:
    config = yaml.safe_load((finished / f"{name}.yaml").read_text())
    micro_batches = torch.load(finished / f"{name}.pt", weights_only=False)  # written by our own child just now
    expected = run_reference(finished, config, micro_batches)
    found = metrics(finished / name)
    assert len(found) == STEPS
    for one, other in zip(expected, found, strict=True):
        of_pairs = {tag for tag in COMPARED if tag.startswith(("contrastive", "temperature"))}
        compared = {*COMPARED} - (of_pairs if config.get("contrastive-weight") == 0 else set())
        for tag in [*compared, *(["preference loss"] if "preference-loss" in config else [])]:
            assert other[tag] == pytest.approx(one[tag], rel=1e-4, abs=1e-6), (other["iteration"], tag)
    assert len({round(row["lm loss"], 5) for row in found}) == STEPS
    assert all(row.get("preference loss", 1.0) > 0.05 for row in found), "or nothing of it is trained"
