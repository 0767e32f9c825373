"""Kinds of edit, as a record lists them beside its hallucinated captions."""

import json
from pathlib import Path

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.hallucinate.items import kinds_in, kinds_of
from tests.tool_runs import run_tool

CAPTIONS = ["A red cat sits on a wooden table.", "Two dogs run across the green grass.", "A man rides a brown horse."]


def test_each_twin_that_the_rules_wrote_has_the_kinds_of_its_edits(tmp_path: Path) -> None:
    """Catches edits that go to another twin or record, and texts that are not those of the manifest."""
    records = [{"id": str(n), "image": f"{n}.jpg", "text": text, "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}]}
        for n, text in enumerate(CAPTIONS)]  # fmt: skip
    records.append({"id": "two", "image": ["a.jpg", "b.jpg"], "text": [CAPTIONS[0], None], "conversations": [
        {"from": "human", "value": "<image>\n<image>\nWhat?"}, {"from": "gpt", "value": "It."}]})  # fmt: skip
    source, out = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps(records))
    arguments = ("--method", "rules", "--input", source, "--output", out, "--per-caption", 2, "--num-workers", 1)
    assert run_tool("generate_hallucinations", *arguments) == 0
    written = json.loads(out.read_text())
    found = kinds_in(out, [1, 3])
    assert sorted(found) == [1, 3]
    for number, edits, texts in (
        (1, written[1]["Hallucination edits"], written[1]["Hallucination caption"]),
        (3, written[3]["Hallucination edits"][0], written[3]["Hallucination caption"][0]),
    ):
        assert len(texts) == 2
        expected = {text: tuple(sorted({edit["kind"] for edit in own})) for text, own in zip(texts, edits, strict=True)}
        assert found[number] == expected
    manifest = Manifest.read([str(out)], version="v1", cache_dir=str(tmp_path / "cache"))
    assert set(found[1]) == set(manifest[1].hallucinated_captions)
    assert set(found[3]) == set(manifest[3].pairs[0].hallucinated)


def test_edits_of_another_shape_say_nothing() -> None:
    """Catches a stranger's key of this name that ends the page."""
    for edits in (None, "x", 7, [None], [["x"]], [[{"kind": 3}]], {"kind": "object"}, [[]]):
        assert kinds_of({"Hallucination caption": "A dog.", "Hallucination edits": edits}) == {}
    assert kinds_of({"Hallucination edits": [[{"kind": "object"}]]}) == {}
    edits = [[{"kind": "object"}, {"kind": "colour"}, {"kind": "object"}]]
    record = {"Hallucination caption": " <image>\nA dog. ", "Hallucination edits": edits}
    assert kinds_of(record) == {"A dog.": ("colour", "object")}
