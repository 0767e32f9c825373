"""Steps over records with several images beside others: from files, from shards, with one image that is broken."""

from pathlib import Path

import torch

from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.prepare.run import run_prepare
from tests.data.loader_runs import assert_same_batch, change_sample, draw, mains
from tests.data.prepare.prepare_runs import settings


def with_several(dataset: Path) -> None:
    """Records 0 to 3 have two images, of which the next record shows the second; 2 lists captions."""
    turns = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "a cat"}]
    for index in range(4):
        images = [f"train/{index}.jpg", f"train/{index + 1}.jpg"]
        change_sample(dataset, index, image=images, conversations=turns, text=None)
    change_sample(dataset, 2, text=["a cat", "a red cat"], **{"Hallucination caption": [["a dog"], []]})


def test_shards_and_files_give_the_same_steps_and_each_image_is_decoded_once(dataset, monkeypatch):
    with_several(dataset)
    decoded: list[int] = []
    decode = ImageDecoder.decode

    def counted(self, files, alone):
        decoded.append(len(files))
        return decode(self, files, alone)

    monkeypatch.setattr(ImageDecoder, "decode", counted)
    flags = {"prefetch_steps": 1}
    (first,) = draw(1, dataset, shuffle=False, contrastive_paths=[], flags=flags)
    assert decoded[0] == 5 and [pack.num_images for pack in mains(first)] == [4, 4]
    assert torch.equal(mains(first)[0].pixel_values[1], mains(first)[0].pixel_values[2]), "1.jpg, of two records"
    assert [len(pack.caption_keys) for pack in mains(first)] == [0, 2]
    assert mains(first)[1].hallucinated_owner.tolist() == [0] and not first.bad_samples

    files = draw(4, dataset, flags=flags)
    images = str(dataset / "images")
    run_prepare(
        settings(
            dataset, inputs=[str(dataset / "train.json")], image_folder=images, write_shards=True, images_per_shard=3
        )
    )
    (dataset / "images" / "train").rename(dataset / "gone")
    shards = draw(4, dataset, data_paths=[str(dataset / "out")], flags=flags)
    for one, other in zip(files, shards, strict=True):
        assert not one.bad_samples and not other.bad_samples
        for batch, same in zip(mains(one), mains(other), strict=True):
            assert_same_batch(batch, same)


def test_one_broken_image_is_its_records_alone(dataset):
    """The other image of such a record is seen in others' slots as before."""
    with_several(dataset)
    (dataset / "images" / "train" / "4.jpg").write_text("<html>404</html>")
    change_sample(dataset, 1, image=["train/1.jpg", "../secret.jpg"])
    change_sample(dataset, 0, image=["train/0.jpg", "train/1.jpg", "train/2.jpg"])
    steps = draw(3, dataset, shuffle=False, contrastive_paths=[])
    found = {bad.sample_id: bad for step in steps for bad in step.bad_samples}
    assert sorted(found) == [0, 1, 3, 4]
    for number, reason in (
        (0, "2 <image> tags for 3 images"),
        (1, "leaves the image"),
        (3, "not an image"),
        (4, "not"),
    ):
        assert reason in found[number].reason and "\n" not in found[number].reason
    assert found[3].source.endswith("train/4.jpg") and found[0].source.endswith("train.json")
    batch = mains(steps[0])[1]
    assert batch.sample_ids.tolist() == [2, 3] and batch.num_images == 2 and len(batch.caption_keys) == 2
