"""The loader over prepared folders, tar shards, weighted files and slow storage."""

import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare
from hacl_megatron.data.step_maker import MicroBatching
from hacl_megatron.data.store import ImageStore
from tests.data.loader_runs import (
    NUM_CONTRASTIVE,
    NUM_SAMPLES,
    assert_same_batch,
    draw,
    loader_of,
    mains,
    sample,
)


def prepared(dataset: Path, **changes) -> dict:
    """Arguments of `loader_of` that read `dataset` out of prepared folders with shards, the images' folder gone."""
    for name in ("train", "contrastive"):
        run_prepare(
            PrepareSettings(
                inputs=[str(dataset / f"{name}.json")], output=str(dataset / "out" / name), progress_bar=False,
                image_folder=str(dataset / "images"), write_shards=True, images_per_shard=5, **changes,
            )
        )  # fmt: skip
    return {
        "data_paths": [str(dataset / "out" / "train")],
        "contrastive_paths": [str(dataset / "out" / "contrastive" / "manifest.arrow")],
    }


def test_shards_give_the_very_steps_that_the_folder_gives(dataset):
    folder = draw(9, dataset)
    paths = prepared(dataset)
    shutil.rmtree(dataset / "images")
    (dataset / "images").mkdir()
    shards = draw(9, dataset, **paths)
    for one, other in zip(folder, shards, strict=True):
        assert one.data_state == other.data_state and not other.bad_samples
        for batch, theirs in zip(mains(one), mains(other), strict=True):
            assert_same_batch(batch, theirs)
    # And so a run goes on from the one with the other.
    (step,) = draw(1, dataset, **paths, data_state=json.loads(json.dumps(folder[4].data_state)))
    assert_same_batch(mains(step)[0], mains(folder[5])[0])


def test_a_shard_that_lost_its_end_costs_its_samples_alone(dataset):
    paths = prepared(dataset)
    shard = dataset / "out" / "train" / "shards" / "images-000001.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    steps = draw(4, dataset, **paths)
    bad = [record for step in steps for record in step.bad_samples]
    assert 3 <= len(bad) <= 5
    for record in bad:
        assert "not in the shard" in record.reason and record.source.startswith(f"{shard}: train/")


def ids_of(steps) -> list[int]:
    return [i for step in steps for batch in mains(step) for i in batch.sample_ids.tolist()]


def test_weights_groups_and_blocks_reach_the_sampler(dataset):
    extra = [sample(index, "train") for index in range(4)]
    (dataset / "extra.json").write_text(json.dumps(extra))
    paths = [str(dataset / "train.json"), str(dataset / "extra.json")]
    flags = {"data_weights": [0.5, 2.0]}
    with loader_of(dataset, data_paths=paths, flags=flags) as loader:
        assert loader.num_samples == NUM_SAMPLES // 2 + 8 + NUM_CONTRASTIVE
        epochs = ids_of(next(loader) for _ in range(9))  # two epochs of 18 in steps of 4
    counts = Counter(epochs)
    assert [counts[i] for i in range(NUM_SAMPLES)] == [1] * NUM_SAMPLES
    assert [counts[NUM_SAMPLES + i] for i in range(4)] == [4] * 4
    assert [counts[NUM_SAMPLES + 4 + i] for i in range(NUM_CONTRASTIVE)] == [2] * NUM_CONTRASTIVE

    # Validation knows neither: its files are others.
    plain = {"data_paths": paths, "contrastive_paths": [], "shuffle": False}
    more = {"data_weights": [3.0], "group_by_modality_length": True, "shuffle_block": 2}
    assert ids_of(draw(4, dataset, flags=more, **plain)) == list(range(16))

    alone = {"contrastive_paths": [], "global_batch_size": 2}
    grouped = ids_of(draw(6, dataset, flags={"group_by_modality_length": True}, **alone))
    assert {5, 8} in [set(grouped[at : at + 2]) for at in range(0, 12, 2)]  # those without an image
    blocks = ids_of(draw(6, dataset, flags={"shuffle_block": 1}, **alone))
    assert sorted(grouped) == sorted(blocks) == list(range(12)) and blocks != grouped


def test_other_content_of_the_same_size_is_no_resume(dataset):
    (step,) = draw(1, dataset)
    others = [sample(index, "train") for index in reversed(range(NUM_SAMPLES))]
    (dataset / "train.json").write_text(json.dumps(others))
    with pytest.raises(ValueError, match=r"digest .*content of --data-path"):
        loader_of(dataset, data_state=step.data_state)


# ---- slow storage


def test_files_of_the_next_step_are_read_while_this_one_is_decoded(dataset, monkeypatch):
    """Each decoding waits until a read for a later step has begun: for ever, if none begins before it has ended."""
    fetched: list[str] = []
    began, missing = threading.Condition(), []
    fetch, decode = ImageStore.fetch, ImageDecoder.decode

    def noted(self, image, stored):
        with began:
            fetched.append(image)
            began.notify_all()
        return fetch(self, image, stored)

    def decode_when_more_are_read(self, files, alone):
        of_this_step = len(fetched_before) + len(files)
        with began:
            if not began.wait_for(lambda: len(fetched) > of_this_step, timeout=60):
                missing.append(len(fetched))
        fetched_before.extend(files)
        return decode(self, files, alone)

    fetched_before: list[bytes] = []
    monkeypatch.setattr(ImageStore, "fetch", noted)
    monkeypatch.setattr(ImageDecoder, "decode", decode_when_more_are_read)
    draw(3, dataset, flags={"prefetch_steps": 1})
    assert not missing


def test_as_many_files_are_read_at_a_time_as_the_flag_says(dataset, monkeypatch):
    """Every read waits until that many are under way: for ever, if there are never so many."""
    fetch, now, under_way, most = ImageStore.fetch, threading.Condition(), [], []

    def slow(self, image, stored):
        with now:
            under_way.append(image)
            most.append(len(under_way))
            now.notify_all()
            now.wait_for(lambda: max(most) >= 4, timeout=60)
        time.sleep(0.005)  # for a fifth to come
        with now:
            under_way.remove(image)
        return fetch(self, image, stored)

    monkeypatch.setattr(ImageStore, "fetch", slow)
    draw(2, dataset, flags={"io_threads": 4}, global_batch_size=16, micro_batching=MicroBatching(micro_batch_size=4))
    assert max(most) == 4
