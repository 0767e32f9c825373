"""The raw data that most of these tests prepare."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.data.prepare.prepare_runs import RECORDS
from tests.data.tiny_tokenizer import write_tokenizer


@pytest.fixture
def source(tmp_path) -> Path:
    """`a.json`, `images/`, `tokenizer/`."""
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    for name, size in (("a/1.jpg", (20, 10)), ("a/2.png", (8, 9)), ("b/3.jpg", (31, 17))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 90).convert("RGB").save(path)
    write_tokenizer(tmp_path / "tokenizer", legacy=True)
    return tmp_path
