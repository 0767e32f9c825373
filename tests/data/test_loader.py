"""The whole way from LLaVA JSON and JPEGs to packed steps, with real files, tokenizer and decoder."""

import json
import threading

import pytest
import torch

from hacl_megatron.data import images
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.store import image_key
from tests.data.loader_runs import (
    MODEL,
    NUM_CONTRASTIVE,
    NUM_SAMPLES,
    TEXT_ONLY,
    assert_same_batch,
    change_sample,
    draw,
    image_bytes,
    loader_of,
    mains,
    pixels_by_sample,
)

BACKENDS = [
    pytest.param("dali", marks=pytest.mark.skipif(not images.dali_is_installed(), reason="DALI is not installed")),
    "pillow",
]


# ---- what a step holds


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_holds_every_sample_once_with_its_own_image_and_segments(dataset, backend):
    with loader_of(dataset, flags={"image_backend": backend}) as loader:
        assert loader.num_samples == NUM_SAMPLES + NUM_CONTRASTIVE
        steps = [next(loader) for _ in range(4)]
    batches = [batch for step in steps for batch in mains(step)]
    assert sorted(i for batch in batches for i in batch.sample_ids.tolist()) == list(range(16))
    assert [len(step.micro_batches) for step in steps] == [2] * 4
    assert all(batch.sample_ids.shape == (2,) and batch.num_rows % 4 == 0 for batch in batches)
    assert not any(step.bad_samples or step.num_truncated or step.num_tokenization_mismatches for step in steps)
    assert sum(batch.num_pairs for batch in batches) == 3 + NUM_CONTRASTIVE
    assert sum(batch.hallucinated_eos_rows.numel() for batch in batches) == 2 * NUM_CONTRASTIVE
    assert all(batch.num_targets for batch in batches)

    decoder = ImageDecoder(MODEL.image, aspect_ratio="pad", backend=backend)
    pixels = pixels_by_sample(steps)
    assert sorted(pixels) == sorted(set(range(16)) - TEXT_ONLY)
    for sample_id, ours in pixels.items():
        assert torch.equal(ours, decoder.decode([image_bytes(sample_id)]).pixel_values[0]), sample_id
    decoder.close()
    keys = {key for batch in batches for key in batch.image_keys.tolist()}
    assert keys == {image_key(image_bytes(i)) for i in (0, 1, 2, 12, 13, 14, 15)}


def test_equal_images_of_a_step_are_decoded_once_and_stand_in_every_slot(dataset, monkeypatch):
    same = (dataset / "images/train/0.jpg").read_bytes()
    for index in range(4):
        (dataset / f"images/train/{index}.jpg").write_bytes(same)
    counts = []
    decode = ImageDecoder.decode

    def counted(self, files, alone):
        counts.append(len(files))
        return decode(self, files, alone)

    monkeypatch.setattr(ImageDecoder, "decode", counted)
    (step,) = draw(1, dataset, shuffle=False, contrastive_paths=[], flags={"prefetch_steps": 1})
    assert counts[0] == 1
    first, second = (batch.pixel_values for batch in mains(step))
    assert first.shape[0] == second.shape[0] == 2
    assert all(torch.equal(first[0], other) for other in (first[1], second[0], second[1]))


def test_truncations_and_mismatches_are_counted(dataset):
    long = "a cat " * 100
    change_sample(
        dataset, 1, conversations=[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": long}]
    )
    steps = draw(3, dataset, shuffle=False, contrastive_paths=[])
    assert [step.num_truncated for step in steps] == [1, 0, 0]
    # Three empty answers: LLaVA's rounds then do not add up to the length of the whole, and all labels are ignored.
    empty = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": ""}] * 3
    change_sample(dataset, 6, conversations=empty)
    steps = draw(3, dataset, shuffle=False, contrastive_paths=[])
    assert [step.num_tokenization_mismatches for step in steps] == [0, 1, 0]
    assert not any(step.bad_samples for step in steps)


# ---- bad samples


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_samples_are_reported_and_move_nothing_else(dataset, backend):
    flags = {"image_backend": backend}
    clean = draw(4, dataset, flags=flags)
    folder = dataset / "images" / "train"
    whole = (folder / "1.jpg").read_bytes()
    (folder / "0.jpg").unlink()
    (folder / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "2.jpg").write_text("<html>404</html>")
    (folder / "3.jpg").write_bytes(b"")
    (folder / "4.jpg").unlink()
    (folder / "4.jpg").mkdir()
    change_sample(dataset, 6, image="../train.json")
    change_sample(dataset, 7, conversations=[])
    gif = image_bytes(9, "GIF")
    (folder / "9.jpg").write_bytes(gif)
    bad = (0, 1, 2, 3, 4, 6, 7)

    steps = draw(4, dataset, flags=flags)
    records = {record.sample_id: record for step in steps for record in step.bad_samples}
    assert sorted(records) == list(bad)
    for index, reason in {
        0: "no such file", 1: "cut off", 2: "not an image", 3: "empty", 4: "is a folder", 6: "leaves the image folder",
        7: "no turns",
    }.items():  # fmt: skip
        assert reason in records[index].reason and "\n" not in records[index].reason
        assert records[index].name == f"train-{index}"
    assert records[1].source == str(folder / "1.jpg")
    assert records[7].source == str(dataset / "train.json")

    for before, after in zip(clean, steps, strict=True):
        assert before.data_state | {"digest": ""} == after.data_state | {"digest": ""}  # the JSON has changed
        for one, other in zip(mains(before), mains(after), strict=True):
            assert torch.equal(one.sample_ids, other.sample_ids)
    before, after = pixels_by_sample(clean), pixels_by_sample(steps, bad)
    assert set(after) == set(before) - set(bad)
    for index in set(after) - {9}:
        assert torch.equal(after[index], before[index]), index
    decoder = ImageDecoder(MODEL.image, aspect_ratio="pad", backend=backend)
    assert torch.equal(after[9], decoder.decode([gif]).pixel_values[0])
    decoder.close()

    # Slots of bad samples contribute nothing: no pair of samples 0 .. 2, the contrastive ones' are all there.
    assert sum(batch.num_pairs for step in steps for batch in mains(step)) == NUM_CONTRASTIVE
    for before_step, after_step in zip(clean, steps, strict=True):
        for one, other in zip(mains(before_step), mains(after_step), strict=True):
            if not set(one.sample_ids.tolist()) & {*bad, 9}:
                assert_same_batch(one, other)


def test_a_micro_batch_of_bad_samples_alone_is_still_a_pack(dataset):
    for index in range(4):
        (dataset / f"images/train/{index}.jpg").unlink()
    (step,) = draw(1, dataset, shuffle=False, contrastive_paths=[])
    assert [record.sample_id for record in step.bad_samples] == [0, 1, 2, 3]
    for batch in mains(step):
        assert batch.num_images == batch.num_pairs == batch.num_targets == 0
        assert batch.num_rows == batch.num_padding_rows == 4


# ---- order, state, ranks


def test_going_on_from_a_steps_state_gives_the_uninterrupted_run(dataset):
    """The state of a step knows nothing of what the thread has read ahead since."""
    with loader_of(dataset, flags={"prefetch_steps": 3}) as loader:
        steps = [next(loader) for _ in range(9)]
    for stop in (0, 3, 5):  # in the first epoch, at its end, in the second
        state = json.loads(json.dumps(steps[stop].data_state))
        for step, expected in zip(draw(3, dataset, data_state=state), steps[stop + 1 : stop + 4], strict=True):
            assert step.data_state == expected.data_state
            for one, other in zip(mains(step), mains(expected), strict=True):
                assert_same_batch(one, other)


def test_two_ranks_share_the_global_batches_of_one(dataset):
    alone = draw(5, dataset)
    ranks = [draw(5, dataset, data_parallel_rank=rank, data_parallel_size=2) for rank in (0, 1)]
    for step, *parts in zip(alone, *ranks, strict=True):
        assert [part.data_state for part in parts] == [step.data_state] * 2
        batches = [batch for part in parts for batch in mains(part)]
        assert len(batches) == len(step.micro_batches) == 2
        for one, other in zip(mains(step), batches, strict=True):
            assert_same_batch(one, other)


def test_workers_and_read_ahead_change_nothing(dataset):
    few = draw(4, dataset, flags={"num_workers": 1, "prefetch_steps": 1})
    many = draw(4, dataset, flags={"num_workers": 6, "prefetch_steps": 4})
    for one, other in zip(few, many, strict=True):
        for batch, theirs in zip(mains(one), mains(other), strict=True):
            assert_same_batch(batch, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 3}, "global"),
        ({"flags": {"image_folder": "/nowhere"}}, "--image-folder"),
        ({"data_state": {"consumed_samples": 0}}, "data state"),
        ({"data_paths": ["/nowhere.json"]}, "/nowhere.json"),
    ],
)
def test_mistakes_are_found_before_a_thread_starts(dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        loader_of(dataset, **changes)
    with pytest.raises(ValueError, match="--prefetch-steps"):
        loader_of(dataset, flags={"prefetch_steps": 0})
    assert not any(thread.name == "step-loader" for thread in threading.enumerate())


def test_decoding_on_the_gpu_needs_one_and_is_left_out_with_pillow(dataset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    draw(1, dataset, decode_device="mixed", flags={"image_backend": "pillow"})
    if images.dali_is_installed():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            loader_of(dataset, decode_device="mixed", flags={"image_backend": "dali"})
