"""Steps of pictures in tiles, whose rows follow from sizes that are read before the files."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hacl_megatron.config.tiles import tiles_of
from hacl_megatron.data.step_maker import MicroBatching
from tests.data import loader_runs
from tests.data.loader_runs import draw, loader_of, mains

FLAGS = {"prefetch_steps": 1, "model_max_length": 200}
BY_LENGTH = [{"balance": True}, {"micro_batch_tokens": 300}]


@pytest.fixture(autouse=True)
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_runs, "MODEL", replace(loader_runs.MODEL, tiles=tiles_of("next", loader_runs.SIZE)))


def picture(dataset: Path, number: int) -> Path:
    return dataset / "images" / "train" / f"{number}.jpg"


@pytest.mark.parametrize("how", BY_LENGTH)
def test_ranks_that_see_other_files_share_out_by_another_hash(dataset: Path, how: dict) -> None:
    """By which a step stops (`training.step`): else samples train twice, and others never."""
    found = []
    for rank, hidden in ((0, False), (1, False), (1, True)):
        if hidden:
            picture(dataset, 0).rename(picture(dataset, 0).with_suffix(".x"))
        (step,) = draw(
            1, dataset, shuffle=False, contrastive_paths=[], flags=FLAGS, global_batch_size=8, data_parallel_rank=rank,
            data_parallel_size=2, micro_batching=MicroBatching(micro_batch_size=2, **how),
        )  # fmt: skip
        found.append({batch.shared_out_by for batch in mains(step)})
    picture(dataset, 0).with_suffix(".x").rename(picture(dataset, 0))
    assert found[0] == found[1] != found[2] and all(len(one) == 1 for one in found) and found[0] != {0}


@pytest.mark.parametrize("size", [(20, 200), (60, 40)])
def test_a_picture_that_was_replaced_since_its_rows_were_counted_is_refused(dataset: Path, size: tuple) -> None:
    """Catches rows of the old size over the new one's views, and a run that it ends."""
    by_length = MicroBatching(micro_batch_size=2, balance=True)
    with loader_of(dataset, contrastive_paths=[], flags=FLAGS, micro_batching=by_length) as loader:
        for _ in range(3):
            next(loader)
        for number in range(12):
            if picture(dataset, number).exists():
                with Image.open(picture(dataset, number)) as image:
                    resized = image.resize(size)
                resized.save(picture(dataset, number))
        steps = [next(loader) for _ in range(4)]
    reasons = [bad.reason for step in steps for bad in step.bad_samples]
    assert any(f"and is {size[0]} x {size[1]} now" in reason for reason in reasons), reasons
