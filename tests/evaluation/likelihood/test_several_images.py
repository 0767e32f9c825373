"""Tasks over image-caption pairs, on a file in which records have several images."""

import json

import pytest

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodingSettings
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.tokenizer import load_tokenizer
from hacl_megatron.evaluation.likelihood.task_table import MANIFEST_TASKS, manifest_tasks
from tests.data.tiny_tokenizer import write_tokenizer

TURNS = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "a cat"}]
TWO = {"image": ["1.jpg", "2.jpg"], "conversations": TURNS, "text": ["a cat", None]}
TWO |= {"Hallucination caption": [["a dog"], []]}
ONE = {"image": "1.jpg", "conversations": [], "text": "a cat", "Hallucination caption": "a dog"}


@pytest.mark.parametrize("name", MANIFEST_TASKS)
def test_records_with_several_images_are_left_out_and_counted(tmp_path, capsys, name):
    """Scored with the first image alone, they would be other questions than they are."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", legacy=True))
    settings = EncodingSettings(version="v1", model_max_length=99, image_layout=ImageLayout(visual_tokens=2))

    def task(*records: dict):
        (tmp_path / "a.json").write_text(json.dumps(records))
        manifest = Manifest.read([str(tmp_path / "a.json")], version="v1")
        return manifest_tasks([name], manifest, tokenizer, settings, limit=None)[name]

    assert task(TWO, ONE, TWO, ONE | {"image": ["1.jpg"]}).item_keys() == [1, 3]
    assert f"{name}: 2 of 4 samples have several images and are left out" in capsys.readouterr().out
    assert task(ONE, ONE).item_keys() == [0, 1] and "several images" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of its first 1 samples has"):
        task(TWO)
