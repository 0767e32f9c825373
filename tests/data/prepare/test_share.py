"""A preparation that several processes share gives, once joined, the very files of a single one."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from hacl_megatron.data.prepare import parts as prepare
from hacl_megatron.data.prepare.llava_json import read_records
from hacl_megatron.data.prepare.run import run_prepare
from hacl_megatron.data.prepare.share import Share, uneven
from tests.data.prepare.prepare_runs import settings, turns


def records(seed: int, count: int, images: int) -> list[dict]:
    """With repeated and taken names, such that were given to others, none at all, half surrogates, several images."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        record = {"conversations": turns(f"answer {rng.randrange(count)}"), "text": f"caption {rng.randrange(9)}"}
        kind = rng.randrange(12)
        if kind < 8:
            record["id"] = rng.choice(
                [f"{rng.randrange(count)}", f"{rng.randrange(9)}", f"{rng.randrange(9)}#2", "7#2#2"]
            )
        if kind not in (3, 11):  # the last have no name either: `record 7`
            record["image"] = f"{rng.randrange(images)}.jpg"
        if kind == 4:
            record["conversations"] = [{"from": "human", "value": "<image>\n<image>?"}, {"from": "gpt", "value": "b"}]
            record |= {"image": ["0.jpg", "1.jpg"], "text": ["one", None]}
        if kind == 5:
            record["id"] = rng.choice(["half \ud83d", f"{rng.randrange(9)}"])
        if kind == 6:
            record["conversations"] = [{"from": "human", "value": "<image>\nonly asked"}]
            del record["text"]
        if kind == 7:
            record["caption\u0009s"] = 1
        found.append(record)
    return found


def write_files(folder: Path) -> list[str]:
    """Two of lines, the second with blank ones, and a list between them."""
    one, two, three = (records(seed, count, 4) for seed, count in ((1, 300), (2, 40), (3, 500)))
    # Names that stand there once, before or behind the record that is given them.
    names = [(one, "early#2"), (one, "early"), (one, "late"), (three, "early"), (three, "late"), (three, "late#2")]
    for number, (records_of, name) in enumerate(names):
        records_of.append({"id": name, "image": "0.jpg", "conversations": turns(f"said {number}")})
    (folder / "one.jsonl").write_text("".join(json.dumps(record) + "\n" for record in one))
    (folder / "two.json").write_text(json.dumps(two))
    blank = ["", "\n", "  \t\n", "\u2003\n"]
    lines = (json.dumps(record) + "\n" + blank[number % 4] for number, record in enumerate(three))
    (folder / "three.JSONL").write_text("".join(lines))
    return [str(folder / name) for name in ("one.jsonl", "two.json", "three.JSONL")]


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("histograms.png", None)
    return found


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK_SAMPLES", 64)
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 8_000)


@pytest.mark.parametrize(
    "count, form", [(1, {}), (2, {}), (7, {}), (3, {"keep_duplicates": True}), (3, "all"), (4, "shards")]
)
def test_joined_shares_are_byte_for_byte_what_one_process_makes(source, count, form) -> None:
    """Manifest, report, shards, bad images. Catches records at a border that are read twice or by nobody, names that
    are settled in another order, lengths that are counted of what is dropped, and chunks that are cut elsewhere."""
    inputs = write_files(source)
    (source / "images" / "3.jpg").write_bytes(b"no image")
    images = {"image_folder": str(source / "images")}
    flags = {
        "all": {**images, "tokenizer": str(source / "tokenizer"), "model_max_length": 620, "verify_images": True},
        "shards": {**images, "write_shards": True, "images_per_shard": 1},
    }.get(form, form) if isinstance(form, str) else form  # fmt: skip
    one = settings(source, inputs=inputs, output=str(source / "one"), **flags)
    run_prepare(one)
    shared = {"inputs": inputs, "output": str(source / "shared"), "num_shards": count, **flags}
    if count == 1:
        run_prepare(settings(source, **shared))
    else:
        passes = 2 if form == "shards" else 1
        for number in range(passes):
            order = random.Random(number).sample(range(count), count)
            reports = [run_prepare(settings(source, shard_index=index, **shared)) for index in order]
            assert all("--merge" in report["to do"] for report in reports)
            joined = run_prepare(settings(source, merge=True, **shared))
            assert ("to do" in joined) == (number + 1 < passes)
    assert contents(source / "shared") == contents(source / "one")


def test_shares_take_each_record_once_and_name_it_as_in_the_file(source) -> None:
    """Borders fall into lines and between them; a record without a name is called by its number in the file."""
    (path, *_) = write_files(source)
    every = [(record.name, record.turns) for record, _ in read_records(path)]
    for count in (1, 2, 3, 10, 299, 5000):
        shares = [Share(number=number, count=count).spans([path])[0] for number in range(count)]
        found = [read_records(path, span=span) for span in shares if span is not None]
        assert [(record.name, record.turns) for some in found for record, _ in some] == every
    lines = Path(path).read_text().splitlines(keepends=True)
    Path(path).write_text("".join(lines), encoding="utf-8-sig")  # a byte-order mark is bytes of the first line
    for count in range(2, 30):
        shares = [Share(number=number, count=count).spans([path])[0] for number in range(count)]
        found = [read_records(path, span=span) for span in shares if span is not None]
        assert [(record.name, record.turns) for some in found for record, _ in some] == every, count
    Path(path).write_text("".join([*lines[:260], '{"id": 1,\n', *lines[261:]]))
    (span,) = Share(number=2, count=3).spans([path])
    with pytest.raises(ValueError, match=r"broken JSON in line 261, column"):
        list(read_records(path, span=span))


def test_a_killed_share_and_a_killed_join_go_on(source, monkeypatch) -> None:
    """What is done stays done; a share whose part is damaged makes it anew; the join begins again."""
    inputs = write_files(source)
    shared = {"inputs": inputs, "output": str(source / "shared"), "num_shards": 3}
    built = []

    def counted(*given, build=prepare.build_batch):
        built.append(1)
        if len(built) == 4:
            raise KeyboardInterrupt
        return build(*given)

    monkeypatch.setattr(prepare, "build_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        run_prepare(settings(source, shard_index=2, num_workers=1, **shared))
    folder = source / "shared/.partial/share-00002-of-00003"
    there = len([*folder.glob("*.arrow")])
    assert there >= 2 and not (folder / "done.json").exists()
    built[:] = [1] * 10
    run_prepare(settings(source, shard_index=2, num_workers=1, **shared))
    assert len(built) - 10 == len([*folder.glob("*.arrow")]) - there
    with pytest.raises(ValueError, match=r"2 of 3 shares are not done .*: --shard-index 0, 1; run them"):
        run_prepare(settings(source, merge=True, **shared))
    for index in (0, 1):
        run_prepare(settings(source, shard_index=index, **shared))
    monkeypatch.setattr("hacl_megatron.data.prepare.run.merge_parts", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_prepare(settings(source, merge=True, **shared))
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "CHUNK_SAMPLES", 64)
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 8_000)
    run_prepare(settings(source, merge=True, **shared))
    run_prepare(settings(source, inputs=inputs, output=str(source / "one")))
    assert contents(source / "shared") == contents(source / "one")


def test_a_join_that_was_killed_while_it_removed_shares_goes_on(source, monkeypatch) -> None:
    """Catches a start anew that misses the shares which are gone already, though the manifest is whole."""
    shared = {"inputs": write_files(source), "output": str(source / "shared"), "num_shards": 3}
    for index in range(3):
        run_prepare(settings(source, shard_index=index, **shared))
    removed, rmtree = [], shutil.rmtree

    def killed(folder, **more) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(rmtree(folder, **more))

    with monkeypatch.context() as patch:
        patch.setattr("hacl_megatron.data.prepare.parts.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_prepare(settings(source, merge=True, **shared))
    whole = {name: data for name, data in contents(source / "shared").items() if not name.startswith(".partial")}
    report = run_prepare(settings(source, merge=True, **shared))
    assert report == json.loads((source / "shared/report.json").read_text())
    assert contents(source / "shared") == whole and not (source / "shared/.partial").exists()
    with pytest.raises(ValueError, match="3 of 3 shares are not done"):
        run_prepare(settings(source, merge=True, **shared))


@pytest.mark.parametrize("form", ["verify_images", "write_shards"])
def test_shares_prepared_anew_behind_a_killed_join_are_joined(source, monkeypatch, form) -> None:
    """Images changed, the JSON did not: catches a join that takes the shares for those it has joined already, a share
    that takes over what was measured of the images before, and shares of before and after that are mixed."""
    images = {"image_folder": str(source / "images"), form: True, "images_per_shard": 1}
    shared = {"inputs": write_files(source), "output": str(source / "shared"), "num_shards": 3, **images}

    def prepare_share(index: int) -> None:
        run_prepare(settings(source, shard_index=index, **shared))

    passes = 2 if form == "write_shards" else 1
    Image.effect_noise((20, 10), 90).save(source / "images/1.jpg")
    removed, rmtree = [], shutil.rmtree

    def killed(folder, **more) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(rmtree(folder, **more))

    for number in range(passes):
        for index in range(3):
            prepare_share(index)
        if number + 1 < passes:
            run_prepare(settings(source, merge=True, **shared))
    with monkeypatch.context() as patch:
        patch.setattr("hacl_megatron.data.prepare.parts.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_prepare(settings(source, merge=True, **shared))
    Image.effect_noise((31, 17), 90).save(source / "images/1.jpg")
    for number in range(passes):
        for index in range(3):
            prepare_share(index)
            if number == 0 and index == 1:
                with pytest.raises(ValueError, match=r"1 of 3 shares are not done .*: --shard-index 2; run them"):
                    run_prepare(settings(source, merge=True, **shared))
        run_prepare(settings(source, merge=True, **shared))
    run_prepare(settings(source, **{**images, "inputs": shared["inputs"], "output": str(source / "one")}))
    assert contents(source / "shared") == contents(source / "one")


def test_shares_of_other_files_or_settings_are_not_joined(source) -> None:
    """A file that grew meanwhile, or a share that was made with another flag, would give a mixture."""
    inputs = write_files(source)
    shared = {"inputs": inputs, "output": str(source / "shared"), "num_shards": 2}
    for index in (0, 1):
        run_prepare(settings(source, shard_index=index, **shared))
    with pytest.raises(ValueError, match="2 of 2 shares are not done with these settings and files"):
        run_prepare(settings(source, merge=True, tokenizer=str(source / "tokenizer"), **shared))
    written = os.stat(inputs[0]).st_mtime_ns
    os.utime(inputs[0], ns=(0, 0))  # written anew, with as many bytes
    with pytest.raises(ValueError, match="2 of 2 shares are not done with these settings and files"):
        run_prepare(settings(source, merge=True, **shared))
    os.utime(inputs[0], ns=(written, written))
    with open(inputs[0], "a") as file:
        file.write(json.dumps(records(9, 1, 1)[0]) + "\n")
    with pytest.raises(ValueError, match="2 of 2 shares are not done with these settings and files"):
        run_prepare(settings(source, merge=True, **shared))


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"num_shards": 4}, "--num-shards 4: give either --shard-index"),
        ({"num_shards": 4, "shard_index": 1, "merge": True}, "--num-shards 4: give either --shard-index"),
        ({"num_shards": 4, "shard_index": 4}, r"--shard-index 4, expected 0 to 3"),
        ({"num_shards": 0}, "--num-shards is 0"),
        ({"merge": True}, "--merge is given without --num-shards"),
        ({"output": "s3://bucket/out"}, "--output s3://bucket/out: found a URL"),
    ],
)
def test_shares_that_cannot_be(source, flags, words) -> None:
    with pytest.raises(ValueError, match=words):
        run_prepare(settings(source, **flags))


def test_a_list_that_keeps_all_others_waiting_is_said(source) -> None:
    (source / "long.json").write_text(json.dumps(records(1, 100, 1)))
    assert uneven([str(source / "long.json")], 4).startswith(f"{source}/long.json is one JSON list")
    assert uneven([str(source / "long.json")], 1) is None
