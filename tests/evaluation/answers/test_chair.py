"""CHAIR against the published scorer, caption by caption."""

import json
from pathlib import Path

import pytest

from hacl_megatron.evaluation.answers.chair import ObjectReader, Synonyms, read_objects, score_chair
from hacl_megatron.evaluation.json_files import read_records
from tests.tool_runs import run_tool

DATA = Path(__file__).parent / "data/chair"
OFFICIAL = json.loads((DATA / "official.json").read_text())


def captions() -> list[dict]:
    return read_records(DATA / "captions.jsonl", needed=("image_id", "caption"), kind="captions")


def test_every_caption_is_read_as_the_published_scorer_reads_it() -> None:
    scores = score_chair(captions(), read_objects(DATA / "objects.json", Synonyms.read()))
    assert scores.metrics == OFFICIAL["overall_metrics"]
    compared = ("image_id", "mscoco_generated_words", "mscoco_hallucinated_words", "metrics")
    ours = [{key: sentence[key] for key in compared} for sentence in scores.details["sentences"]]
    theirs = [{key: sentence[key] for key in compared} for sentence in OFFICIAL["sentences"]]
    assert ours == theirs
    assert scores.notes == ("1 empty captions, in which CHAIR finds no hallucination",)


def test_the_table_shows_the_digits_that_the_published_scorer_prints(tmp_path, capsys) -> None:
    files = ("--captions", DATA / "captions.jsonl", "--objects", DATA / "objects.json")
    assert run_tool("evaluate", "--task", "chair", *files, "--output", tmp_path / "r.json") == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines()[2:5])
    assert shown == {name: f"{value * 100:.1f}" for name, value in OFFICIAL["overall_metrics"].items()}
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == OFFICIAL["overall_metrics"]


def test_a_list_of_ones_own_decides_what_an_object_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("vessel, boat, kayak\nhat\n")
    reader = ObjectReader(Synonyms.read(path))
    assert reader.objects("Kayaks, a boat, a dog in a hat.") == [
        ("kayak", "vessel"),
        ("boat", "vessel"),
        ("hat", "hat"),
    ]
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        Synonyms.read(path)


def test_the_three_forms_of_objects_agree(tmp_path: Path) -> None:
    synonyms = Synonyms.read()
    (tmp_path / "objects.json").write_text('{"7": ["dog", "cell phone"], "12": []}')
    lines = tmp_path / "lines.json"
    lines.write_text(
        '{"image": "COCO_val2014_000000000007.jpg", "objects": ["dog", "cell phone"]}\n'
        '{"image": "000000000012.jpg", "objects": []}\n'
    )
    folder = tmp_path / "annotations"
    folder.mkdir()
    instances = {
        "images": [{"id": 7}, {"id": 12}],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 7, "category_id": 18}],
    }
    (folder / "instances_val2014.json").write_text(json.dumps(instances))
    references = {"annotations": [{"image_id": 7, "caption": "A puppy beside two mobile phones."},
                                  {"image_id": 12, "caption": "A lake."}]}  # fmt: skip
    (folder / "captions_val2014.json").write_text(json.dumps(references))
    expected = {7: {"dog", "cell phone"}, 12: set()}
    for path in (tmp_path / "objects.json", lines, folder):
        assert read_objects(path, synonyms) == expected
    lines.write_text('{"image": "000000000007.jpg", "objects": ["dog"]}\n')  # a single line is a JSON object, too
    assert read_objects(lines, synonyms) == {7: {"dog"}}


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    synonyms, path = Synonyms.read(), tmp_path / "objects.json"
    with pytest.raises(ValueError, match="image 5 is not among the 1 images"):
        score_chair([{"image_id": 5, "caption": "A dog."}], {7: {"dog"}})
    path.write_text('{"7": ["dragon"]}')
    with pytest.raises(ValueError, match="'dragon' is in no line of the synonyms"):
        read_objects(path, synonyms)
    path.write_text('{"7": "dog"}')
    with pytest.raises(ValueError, match="image 7 are str, expected a list"):
        read_objects(path, synonyms)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"0 instances_\*.json"):
        read_objects(tmp_path / "empty", synonyms)
