"""What examples/small_real makes of two Debian packages, on a dozen pictures of our own in their places."""

import json
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from tests.warm import run_warm

SCRIPTS = Path(__file__).parents[2] / "examples" / "small_real"
KEPT = {
    "food/onion_1": "red_onion",
    "food/onion_2": "Red onion #2 (BW)",
    "animals/cat": "BlackCat",
    "animals/dog": "A dog!",
    "animals/dogs": "Two dogs",
    "tools/hammer": "hammer",
    "tools/sextant": "sextant",
}
DROPPED = {
    "plants/cipolla": "cipolla rossa",
    "computer/onion": "onion",
    "food/nameless": "",
    **{f"food/set_{number}": "green apple" for number in range(13)},
}
WORDS = "a apple black cat dog dogs elephant green hammer hat onion red sextant two wearing"


def write_png(path: Path, title: str | None) -> None:
    """A picture with a red disc on nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngImagePlugin.PngInfo()
    if title is not None:
        text.add_text("Title", title)
    picture = Image.new("RGBA", (300, 150), (0, 0, 0, 0))
    picture.paste((200, 30, 30, 255), (20, 20, 60, 60))
    picture.save(path, pnginfo=text)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that pictures.py writes, and what it says."""
    root = tmp_path_factory.mktemp("debian")
    for name, title in {**KEPT, **DROPPED}.items():
        write_png(root / "usr/share/openclipart/png" / f"{name}.png", title)
    stamp = root / "usr/share/tuxpaint/stamps/animals/elephant.png"
    write_png(stamp, None)
    stamp.with_suffix(".txt").write_text("An elephant wearing a hat.\nfr.utf8=Un éléphant\n", encoding="utf-8")
    words = root / "usr/share/dict/american-english"
    words.parent.mkdir(parents=True)
    words.write_text("\n".join(WORDS.split()), encoding="utf-8")
    output = root / "data"
    done = run_warm([str(SCRIPTS / "pictures.py"), "--debian", str(root), "--output", str(output), "--held-out", "2"])
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_captions_are_sentences_of_known_words(written):
    """Catches a title in another language, a collection's or a symbol's that became a caption, and notes left in it."""
    folder, said = written
    captions = sorted(record["text"] for name in ("train", "valid") for record in read(folder, name))
    assert captions == [
        "A black cat.", "A dog.", "A hammer.", "A red onion.", "A red onion.", "A sextant.",
        "An elephant wearing a hat.", "Two dogs.",
    ]  # fmt: skip
    for found in ("1 (words that are none)", "1 (a symbol, a map, an icon)", "1 (no title)", "13 (a collection's"):
        assert found in said, said


def test_no_held_out_caption_is_trained_on(written):
    """Catches copies of one drawing on both sides, a held-out picture without a twin, and a control with its own
    pictures."""
    folder, _ = written
    train, valid, other = (read(folder, name) for name in ("train", "valid", "valid_other"))
    assert len({record["text"] for record in valid}) == 2
    assert not {record["text"] for record in train} & {record["text"] for record in valid}
    assert all(record["Hallucination caption"] != record["text"] for record in valid)
    assert [{**record, "image": ""} for record in other] == [{**record, "image": ""} for record in valid]
    assert sorted(record["image"] for record in other) == sorted(record["image"] for record in valid)
    assert all(mine["image"] != others["image"] for mine, others in zip(valid, other, strict=True))


def test_twins_exchange_words(written):
    """Catches a twin that only adds to its caption, which is told from it without a look at the picture."""
    folder, _ = written
    records = read(folder, "train") + read(folder, "valid")
    twins = [(record["text"], record["Hallucination caption"]) for record in records if len(record) > 4]
    assert len(twins) >= 5
    for caption, twin in twins:
        assert not twin.startswith(caption.rstrip(".")), (caption, twin)
    (sextant,) = (record for record in records if record["text"] == "A sextant.")  # in no list of the rules'
    assert "Hallucination caption" not in sextant


def test_pictures_are_small_and_white_where_nothing_is(written):
    """Catches black grounds, and pictures too large to ship to a laptop's trainer."""
    folder, _ = written
    with Image.open(folder / "images" / read(folder, "train")[0]["image"]) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (224, 112)
        assert min(picture.getpixel((200, 100))) > 250


def test_a_missing_package_is_named(tmp_path):
    """Catches a traceback, or hours of nothing, where a package was not laid out."""
    done = run_warm([str(SCRIPTS / "pictures.py"), "--debian", str(tmp_path), "--output", str(tmp_path / "data")])
    assert done.returncode == 2
    assert "usr/share/openclipart/png" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
