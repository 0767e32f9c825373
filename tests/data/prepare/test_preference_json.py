"""Preference records in the forms that TRL, RLAIF-V and LLaMA-Factory publish: what is read, said and refused."""

import json
import tarfile
from typing import Any

import pyarrow as pa
import pytest

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodingSettings, UnusableSample, encode
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare.run import run_prepare
from hacl_megatron.data.prepare.sealed_arrow import write_sealed
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.data.prepare.prepare_runs import RECORDS, settings
from tests.tool_runs import run_tool

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What is it?"}
TAGGED = "<image>\nWhat is it?"
TURNS = (("human", TAGGED), ("gpt", "A cat."))


def user(content: Any) -> dict:
    return {"role": "user", "content": content}


def said(content: Any) -> dict:
    return {"role": "assistant", "content": content}


PARTS = [IMAGE, TEXT]
STRINGS = {"question": "What is it?", "image": "a/1.jpg", "chosen": "A cat.", "rejected": "A dog."}
CONVERSATIONAL = {"prompt": [user(PARTS)], "images": ["a/1.jpg"], "chosen": [said("A cat.")]}
FORMS = {
    "strings": STRINGS,
    "prompt": {"prompt": "What is it?", "image": ["a/1.jpg"], "chosen": " A cat.", "rejected": " A dog.\n"},
    "tagged": STRINGS | {"question": TAGGED},
    "RLAIF-V": STRINGS | {
        "image": {"bytes": "/9j/4AAQ", "path": None}, "image_path": "a/1.jpg", "ds_name": "RLAIF-V", "idx": 7,
        "origin_dataset": "COCO", "origin_split": '{"model": "OmniLMM"}',
    },
    "pandas": STRINGS | {"conversations": float("nan"), "images": None},
    "TRL": CONVERSATIONAL | {"rejected": [said([{"type": "text", "text": "A dog."}])]},
    "TRL without parts": {
        "prompt": [user("What is it?")], "images": "a/1.jpg", "chosen": [said("A cat.")], "rejected": [said("A dog.")]
    },
    "datasets writes every key of a part": CONVERSATIONAL | {
        "prompt": [user([{"type": "image", "text": None}, TEXT | {"image": None}])], "rejected": [said("A dog.")]
    },
    "implicit prompt": {
        "images": ["a/1.jpg"], "chosen": [user(PARTS), said("A cat.")], "rejected": [user(PARTS), said("A dog.")]
    },
    "implicit prompt beside its text": {
        "prompt": "What is it?", "image": "a/1.jpg",
        "chosen": [user("What is it?"), said("A cat.")], "rejected": [user("What is it?"), said("A dog.")],
    },
    "LLaMA-Factory": {
        "image": "a/1.jpg", "conversations": [{"from": "human", "value": TAGGED}],
        "chosen": {"from": "gpt", "value": "A cat."}, "rejected": {"from": "gpt", "value": "A dog."},
    },
}  # fmt: skip
SEVERAL = {
    "strings": STRINGS | {"rejected": ["A dog.", "A cow."]},
    "lists of messages": CONVERSATIONAL | {"rejected": [[said("A dog.")], [said("A cow.")]]},
    "an empty one": STRINGS | {"rejected": ["A dog.", " ", "A cow."]},
}


def read(tmp_path, *records: dict, version: str = "v1") -> Manifest:
    (tmp_path / "a.json").write_text(json.dumps(records))
    return Manifest.read([str(tmp_path / "a.json")], version=version)


@pytest.mark.parametrize("version", ["plain", "v1"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same_and_nothing_is_remarked_upon(tmp_path, form, version):
    """A key that is read was once said to be misspelt; `plain` would take a chosen answer for a caption."""
    manifest = read(tmp_path, FORMS[form], version=version)
    (sample,) = manifest
    assert (sample.image, sample.conversations, sample.rejected_answers) == ("a/1.jpg", TURNS, ("A dog.",))
    assert list(sample.twin_conversations()) == [(TURNS[0], ("gpt", "A dog."))]
    assert sample.caption is None and sample.hallucinated_captions == ()
    assert sample.name == {"RLAIF-V": "7"}.get(form, "a/1.jpg")
    lines = [line for line in manifest.remarks(preference_loss="phrase") if "the picture in key 'image'" not in line]
    assert lines == []
    (line,) = [line for line in manifest.remarks() if "the picture in key" not in line]
    assert line.endswith(f"records ({sample.name}): rejected answers are ignored, for --preference-loss is none")


@pytest.mark.parametrize("form", SEVERAL)
def test_several_rejected_answers_are_as_many_twins(tmp_path, form):
    manifest = read(tmp_path, SEVERAL[form])
    assert [turns[1][1] for turns in manifest[0].twin_conversations()] == ["A dog.", "A cow."]
    assert any("a rejected answer is empty" in line for line in manifest.remarks()) == (form == "an empty one")


def test_a_picture_inside_the_record_is_said_not_to_be_read(tmp_path):
    (line, _) = read(tmp_path, FORMS["RLAIF-V"]).remarks()
    assert "(7): the picture in key 'image' is not read, but the file that 'image_path' names" in line
    record = STRINGS | {"image": {"bytes": "/9j/", "path": "a/1.jpg"}}
    assert read(tmp_path, record)[0].image == "a/1.jpg"


def test_dialogues_and_text_alone(tmp_path):
    """The image stands in the first question; a system message stays, for the template to judge."""
    talk = [{"role": "system", "content": "Be brief."}, user("What is it?"), said("A cat."), user("Red?")]
    manifest = read(
        tmp_path,
        {"prompt": talk, "image": "a/1.jpg", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
    )
    assert manifest[0].conversations == (
        ("system", "Be brief."), ("human", TAGGED), ("gpt", "A cat."), ("human", "Red?"), ("gpt", "Yes.")
    )  # fmt: skip
    assert list(manifest[0].twin_conversations()) == [(*manifest[0].conversations[:-1], ("gpt", "No."))]
    assert manifest[1].image is None and manifest[1].conversations == (("human", "1 + 1?"), ("gpt", "2"))


def test_with_captions_a_preference_record_is_a_pair_too(tmp_path):
    """Each of the released keys, in either template; its twins come first."""
    text = {"text": "A cat on a mat.", "Hallucination caption": "A dog on a mat."}
    own = {"Hallucination caption": "A cow."}
    for version in ("plain", "v1"):
        with_text, with_twin, marked, llava = read(
            tmp_path, STRINGS | text, STRINGS | own, STRINGS | {"caption": ""},
            {"image": "a/1.jpg", "conversations": [{"from": a, "value": b} for a, b in TURNS]}, version=version,
        )  # fmt: skip
        assert with_text.caption == "A cat on a mat."
        assert list(with_text.twin_conversations()) == [None, (TURNS[0], ("gpt", "A dog."))]
        assert with_twin.caption == marked.caption == "A cat."
        assert [turns[1][1] for turns in with_twin.twin_conversations()] == ["A cow.", "A dog."]
        assert llava.caption == ("A cat." if version == "plain" else None), "others' captions are as they were"


REFUSED = {
    "no rejected": ({"question": "Q", "chosen": "A"}, "key 'chosen' and no 'rejected'; a preference record has both"),
    "misspelt": (
        {"question": "Q", "chosen": "A", "rejected_response": "B"},
        "key 'chosen' and no 'rejected'; did you mean 'rejected' by 'rejected_response'?",
    ),
    "no chosen": ({"question": "Q", "choosen": "A", "rejected": "B"}, "did you mean 'chosen' by 'choosen'?"),
    "both misspelt": ({"question": "Q", "Chosen": "A", "Rejected": "B"}, "did you mean 'chosen' by 'Chosen'?"),
    "no prompt": ({"query": "Q", "chosen": "A", "rejected": "B"}, "did you mean 'question' by 'query'?"),
    "transcripts": ({"chosen": "Human: Q Assistant: A", "rejected": "Human: Q"}, "neither 'question' nor 'prompt'"),
    "two prompts": (STRINGS | {"prompt": "Who?"}, "found 'question' and 'prompt', which differ"),
    "an image that is none": (STRINGS | {"image": None, "images": ["1.jpg", None]}, "key 'images[1]' is NoneType null"),
    "a picture alone": (STRINGS | {"image": {"bytes": "x", "path": None}}, "pictures are read from files"),
    "no rejected at all": (STRINGS | {"rejected": []}, "key 'rejected' is list []; expected an answer"),
    "a number": (STRINGS | {"chosen": 5}, "key 'chosen' is int 5; expected a string, or messages"),
    "a message without content": (STRINGS | {"chosen": [said(None)]}, "key 'chosen[0]' is dict"),
    "an image in an answer": (
        STRINGS | {"chosen": [said([{"type": "image_url", "image_url": {}}])]},
        "key 'chosen[0] part 0' is dict",
    ),
    "a named image": (STRINGS | {"question": [user([IMAGE | {"url": "http://x"}, TEXT])]}, "the name under 'image'"),
    "a question as answer": (STRINGS | {"chosen": [user("A")]}, "key 'chosen' holds human where the prompt is human"),
    "prompt with answer": (STRINGS | {"question": [user("Q"), said("A")]}, "the prompt is human, gpt; expected a user"),
    "a role of two lines": (STRINGS | {"question": [{"role": "a\nb", "content": "Q"}]}, r"the prompt is 'a\nb'"),
    "longer answers": (
        STRINGS | {"rejected": [said("A dog."), user("Sure?"), said("Yes.")]},
        "key 'rejected' holds gpt, human, gpt where the prompt is human; expected one answer",
    ),
    "other beginnings": (
        {"chosen": [user("Q"), said("A")], "rejected": [user("Other?"), said("A")]},
        "the only message in which 'chosen' and 'rejected' differ",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line_that_names_the_record(tmp_path, fault):
    record, words = REFUSED[fault]
    with pytest.raises(ValueError) as caught:
        read(tmp_path, STRINGS, record)
    line = str(caught.value)
    assert words in line and line.startswith(f"{tmp_path / 'a.json'}, record 1 (line 1): ") and "\n" not in line


def test_what_is_read_in_another_way_than_it_is_written_is_said(tmp_path):
    repeated = '{"id": "t", "question": "Q", "chosen": [{"role": "assistant", "content": "A", "content": "B"}], '
    (tmp_path / "a.jsonl").write_text(
        repeated + '"rejected": "C"}\n'
        + json.dumps({"id": "l", "conversations": [{"from": a, "value": b} for a, b in TURNS], "image": "a.jpg",
                      "rejected_response": "A dog.", "rejected": False}) + "\n"
        + json.dumps(STRINGS | {"id": "i", "image_path": "b.jpg", "images": "c.jpg"}) + "\n"
        + json.dumps({"id": "p", "prompt": "Who?", "chosen": [user("Q"), said("A")], "rejected": "B"}) + "\n"
    )  # fmt: skip
    manifest = Manifest.read([str(tmp_path / "a.jsonl")], version="v1")
    assert [line.split("records ")[1] for line in manifest.remarks(preference_loss="phrase")] == [
        "(t): key 'content' stands there more than once: the last one is read",
        "(l): key 'rejected_response' is not read; did you mean 'rejected', an answer?",
        "(i): key 'images' is not read: 'image' names another image",
        "(i): key 'image_path' is not read: 'image' names another image",
        "(p): the prompt is not read: 'chosen' holds the whole conversation, with another",
    ]


def test_data_without_such_records_keep_their_digest(tmp_path):
    """A run is resumed on the data that it began with: this is what the code before preference records computed."""
    assert read(tmp_path, *RECORDS).digest == "fbf6d96abeb3f1e2ad09e069651e8fa0"
    digests = {read(tmp_path, STRINGS | {"rejected": answers}).digest for answers in ("A dog.", "A cow.", ["a", "b"])}
    assert len(digests) == 3, "what is rejected is part of what training sees"


@pytest.mark.parametrize("number", [2, 3])
def test_a_manifest_of_an_earlier_format_still_opens(source, number):
    """It was refused where a column is new; its records, also those that only JSON can hold, have none."""
    run_prepare(settings(source))
    path = source / "out" / "manifest.arrow"
    table = pa.ipc.open_file(str(path)).read_all()
    exact = [None if e is None else json.dumps(json.loads(e)[: number + 4]) for e in table.column("exact").to_pylist()]
    assert sum(e is not None for e in exact) == 2
    place = table.schema.names.index("exact")
    table = table.set_column(place, table.schema.field(place), pa.array(exact, pa.string()))
    metadata = json.loads(table.schema.metadata[b"hacl_megatron"]) | {"format": number}
    table = table.drop_columns(["more_images", "pairs", *["rejected_answers"] * (number == 2)])
    schema = table.schema.with_metadata({b"hacl_megatron": json.dumps(metadata).encode()})
    write_sealed(str(source / "old.arrow"), schema, table.cast(schema).to_batches())
    new, old = (Manifest.read([str(file)], version="plain") for file in (path, source / "old.arrow"))
    assert list(old) == list(new) and old.digest == new.digest


def test_prepared_with_shards_they_are_counted_once_and_stay_the_same(source, capsys):
    records = [
        *RECORDS[:3], {"id": "p"} | STRINGS, {"id": "p"} | FORMS["TRL"], {"id": "q"} | SEVERAL["strings"],
        {"id": "e"} | STRINGS | {"rejected": ""}, {"id": "h"} | STRINGS | {"rejected": "\ud83d"},
    ]  # fmt: skip
    (source / "a.json").write_text(json.dumps(records))
    arguments = ["--input", source / "a.json", "--output", source / "out", "--image-folder", source / "images"]
    assert run_tool("prepare_data", *arguments, "--write-shards", "--tokenizer", source / "tokenizer") == 0
    report = json.loads((source / "out" / "report.json").read_text())
    counts = {key: report[key] for key in ("samples", "duplicates dropped", "preference records", "rejected answers")}
    assert counts == {"samples": 7, "duplicates dropped": 1, "preference records": 4, "rejected answers": 4}
    assert "preference records: 4" in capsys.readouterr().out
    assert not any("--preference-loss" in line for line in report["to look at"])
    prepared = list(Manifest.read([str(source / "out")], version="v1"))
    assert [sample.rejected_answers for sample in prepared[3:]] == [
        ("A dog.",), ("A dog.", "A cow."), (), ("\ud83d",)
    ]  # fmt: skip
    assert all(sample.caption is None for sample in prepared[3:])
    with pytest.raises(UnusableSample, match="text does not tokenize"):
        tokenizer = load_tokenizer(str(source / "tokenizer"))
        limits = {"model_max_length": 512, "image_layout": ImageLayout(visual_tokens=3), "preference_loss": "phrase"}
        encode(prepared[-1], tokenizer, EncodingSettings(version="v1", **limits))
    # What stands beside an image in a shard is a record of the same kind.
    with tarfile.open(source / "out" / "shards" / "images-000000.tar") as tar:
        found = [json.load(tar.extractfile(name))["records"] for name in tar.getnames() if name.endswith(".json")]
    records = {record["id"]: record for of_image in found for record in of_image}
    assert records.keys() == {sample.name for sample in prepared}
    (source / "again.json").write_text(json.dumps([records[sample.name] for sample in prepared]))
    for one, other in zip(prepared, Manifest.read([str(source / "again.json")], version="v1"), strict=True):
        assert one.conversations == other.conversations
        assert other.rejected_answers == (("?",) if one.name == "h" else one.rejected_answers)


def test_hallucinated_captions_are_written_for_the_others_of_a_mixed_file(tmp_path):
    """The tool refused the whole file; an answer to any question is no caption to falsify."""
    pair = {"id": "c", "image": "a/1.jpg", "conversations": [{"from": a, "value": b} for a, b in TURNS]}
    (tmp_path / "a.json").write_text(json.dumps([STRINGS, pair, STRINGS | {"id": "t", "text": "A red cat."}]))
    arguments = ("--method", "rules", "--input", tmp_path / "a.json", "--output", tmp_path / "b.json")
    assert run_tool("generate_hallucinations", *arguments) == 0
    one, two, three = json.loads((tmp_path / "b.json").read_text())
    assert one == STRINGS and "Hallucination caption" in two and "Hallucination caption" in three
