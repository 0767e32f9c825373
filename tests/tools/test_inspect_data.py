"""The page of tools/inspect_data.py, read back with Python's HTML parser and used in a browser."""

import base64
import hashlib
import io
import json
import re
import runpy
import zlib
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.show import compare, reason_class
from tests.browser import Browser, needs_browser
from tests.data import drawn_images
from tests.data.tiny_tokenizer import write_tokenizer
from tests.tiny_tiles import write_tiny_onevision
from tests.tool_runs import TOOLS, run_tool

V = 576
EVIL = '<script>alert("x")</script> & <b>cat</b> \u202e\x07'


class Page(HTMLParser):
    """Sections of a page, unpacked in the file's order: their tokens, reasons, notes, captions, images; every tag and
    address in them; the page's `index`, and `around`, what it has besides."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        whole = path.read_text(encoding="utf-8")
        packed = re.compile(r'<script type="text/plain" id="s(\d+)">([A-Za-z0-9+/=]+)</script>')
        self.around = packed.sub("", whole)
        self.index = json.loads(re.search(r'<script type="application/json" id="index">(.*?)</script>', whole)[1])
        self.sections: list[dict] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self._open: list[tuple[str, str]] = []
        for place, (number, chunk) in enumerate(packed.findall(whole)):
            assert int(number) == place
            self.feed(zlib.decompress(base64.b64decode(chunk)).decode("utf-8"))
            assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.addresses += [value for key, value in attrs.items() if key in ("src", "href", "srcset", "action")]
        if tag == "section":
            self.sections.append(
                {"tokens": [], "text": "", "reason": "", "note": "", "del": [], "ins": [], "image": None, "images": []}
            )
        if tag == "h3" and self.sections:
            self.sections[-1]["tokens"].append([])
        if tag == "img":
            self.sections[-1]["image"] = attrs["src"]
            self.sections[-1]["images"].append(attrs["src"])
        kind = attrs.get("class", "")
        if tag == "span" and kind.split()[:1] == ["t"] and self.sections:
            self.sections[-1]["tokens"][-1].append([[*kind.split(), "ignored"][1], "", ""])
        if tag not in ("meta", "img", "br"):
            self._open.append((tag, kind))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag, tag

    def handle_data(self, data):
        if not self.sections or not self._open:
            return
        section, (tag, kind) = self.sections[-1], self._open[-1]
        section["text"] += data
        if kind in ("reason", "note"):
            section[kind] += data
        if tag in ("del", "ins"):
            section[tag].append(data)
        if any(kind.split()[:1] == ["t"] for _, kind in self._open):
            section["tokens"][-1][-1][2 if tag == "small" else 1] += data


def turns(question: str, *more: str) -> list[dict]:
    values = [f"<image>\n{question}", *more]
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "images").mkdir()
    (folder / "images" / "wide.jpg").write_bytes(drawn_images.jpeg(90, 60))
    (folder / "images" / "cut.jpg").write_bytes(drawn_images.PHOTO[:900])
    pair = {"text": "A red cat, big.", "Hallucination caption": ["A blue cat, big.", "Two red cats, big."]}
    records = [
        {"id": "pair", "image": "wide.jpg", "conversations": turns("What is it?", "it is a cat"), **pair},
        {"id": EVIL, "image": "wide.jpg", "conversations": turns("What?", f"a {EVIL}"), "text": EVIL},
        {"id": "talk", "conversations": turns("What?", "a cat", "is it red?", "yes")},
        {"id": "cut", "image": "cut.jpg", "conversations": turns("What is it?", "a cat")},
        {"id": "gone", "image": "gone.jpg", "conversations": turns("What is it?", "a cat")},
        {"id": "half", "image": "wide.jpg", "conversations": turns("What is it?", "a \ud83d cat")},
        {"id": "odd", "image": "../wide.jpg", "conversations": [{"from": "tool", "value": "<i>x</i>"}]},
        *({"id": f"more-{n}", "conversations": turns("What?", "a dog")} for n in range(30)),
    ]
    (folder / "data.json").write_text(json.dumps(records))
    write_tokenizer(folder / "tokenizer", legacy=True)
    return folder


def inspect(dataset: Path, *arguments: object) -> Page:
    out = dataset / "page.html"
    out.unlink(missing_ok=True)
    assert run(dataset, out, *arguments) == 0
    return Page(out)


def run(dataset: Path, out: Path, *arguments: object) -> int:
    paths = ("--data-path", dataset / "data.json", "--image-folder", dataset / "images")
    return run_tool("inspect_data", *paths, "--tokenizer", dataset / "tokenizer", "--output", out, *arguments)


def texts(tokens: list, kind: str) -> str:
    return "".join(text for own, text, _ in tokens if own == kind).replace("▁", " ")


def test_tokens_targets_lengths_and_positions(dataset):
    (section,) = inspect(dataset, "--ids", "pair").sections
    dialogue, image, caption, *hallucinated = section["tokens"]
    assert texts(dialogue, "target") == " it is a cat</s>"
    assert texts(dialogue, "image") == f"<image> × {V}" and texts(image, "image") == f"<image> × {V}"
    assert texts(dialogue, "ignored").startswith("<s> A chat between a curious user")
    assert texts(dialogue, "ignored").endswith(" ASSISTANT:")
    assert texts(caption, "ignored") == "<s> A red cat, big." and texts(caption, "eos") == "</s>"
    assert [texts(tokens, "ignored") for tokens in hallucinated] == ["<s> A blue cat, big.", "<s> Two red cats, big."]
    for tokens in (dialogue, image, caption, *hallucinated):
        expected = 0
        for _, text, position in tokens:
            count = V if text.startswith("<image>") else 1
            assert position == (str(expected) if count == 1 else f"{expected}–{expected + count - 1}")
            expected += count
        assert f"{expected} rows" in section["text"]
    assert f"{sum(kind == 'target' for kind, *_ in dialogue)} targets" in section["text"]
    assert not section["reason"] and not section["note"]


def test_differences_of_hallucinated_captions(dataset):
    (section,) = inspect(dataset, "--ids", "pair").sections
    assert (section["del"], section["ins"]) == (["red", "A", "cat"], ["blue", "Two", "cats"])
    words = compare("A red cat.", "A red cat, asleep.")
    assert [(word.text, word.change) for word in words if word.change != "same"] == [(", asleep", "added")]
    for caption, other in (("a b c", "c b a"), ("", "x"), ("x", ""), ("a  b", "a b\n")):
        words = compare(caption, other)
        assert all(word.text for word in words), "a mark of nothing"
        assert "".join(word.text for word in words if word.change != "removed") == other
        assert "".join(word.text for word in words if word.change != "added") == caption


def test_what_a_likelihood_objective_compares(dataset, tmp_path):
    """The differing tokens of the true answer and of its twin; and why another twin is not compared."""
    (section,) = inspect(dataset, "--ids", "pair", "--preference-loss", "phrase").sections
    assert "no answer of the dialogue is the caption that it is a twin of" in section["note"]
    record = {
        "id": "twin", "image": "wide.jpg", "text": "A red cat.", "Hallucination caption": "A dog cat.",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red cat."}],
    }  # fmt: skip
    (tmp_path / "twin.json").write_text(json.dumps([record]))
    page = inspect(dataset, "--data-path", tmp_path / "twin.json", "--preference-loss", "phrase")
    true, twin = page.sections[0]["tokens"][3:5]
    assert (texts(true, "target"), texts(twin, "target")) == (" red", " dog")
    assert texts(true, "ignored") == texts(twin, "ignored") == ""
    assert true[0][2] == twin[0][2], "both behind the prompt and the word that they share"


def test_rejected_answers_of_a_preference_record(dataset, tmp_path):
    """Their words beside the chosen answer's; the compared tokens, and a word where nothing compares them."""
    record = {"question": "What is it?", "image": "wide.jpg", "chosen": "A red cat.", "rejected": ["A dog cat.", "A"]}
    (tmp_path / "pairs.json").write_text(json.dumps([record]))
    (section,) = inspect(dataset, "--data-path", tmp_path / "pairs.json", "--preference-loss", "phrase").sections
    assert (section["del"], section["ins"], section["note"]) == (["red", " red cat."], ["dog"], "")
    dialogue, true, rejected, *_ = section["tokens"]
    assert texts(dialogue, "target") == " A red cat.</s>" and texts(dialogue, "image") == f"<image> × {V}"
    assert (texts(true, "target"), texts(rejected, "target")) == (" red", " dog")
    (section,) = inspect(dataset, "--data-path", tmp_path / "pairs.json").sections
    assert section["note"] == "Its rejected answers are not used: --preference-loss is none."
    assert len(section["tokens"]) == 1 and section["del"] == ["red", " red cat."]


def test_the_picture_is_the_padded_and_resized_one(dataset, monkeypatch):
    (section,) = inspect(dataset, "--ids", "pair").sections
    kind, _, data = section["image"].partition(",")
    assert kind == "data:image/png;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=int)
    monkeypatch.setattr(drawn_images, "SIZE", 336)
    expected = drawn_images.llava_pad((dataset / "images" / "wide.jpg").read_bytes()).astype(int)
    assert shown.shape == (336, 336, 3) and np.abs(shown - expected).max() <= 2
    assert "JPEG of 90 x 60" in section["text"]


def test_all_images_of_a_record_are_shown_with_their_rows_and_captions(dataset, tmp_path):
    """Only the last was shown, under the first one's name, and the rows of neighbours ran into one image's."""
    (dataset / "images" / "tall.jpg").write_bytes(drawn_images.jpeg(60, 90, seed=1))
    turns_of_two = turns("<image>\nWhich is big?", "A red cat.", "And <image>?", "no")
    record = {
        "id": "several", "image": ["wide.jpg", "tall.jpg", "gone.jpg"], "conversations": turns_of_two,
        "text": ["A red cat.", None, "A dog."], "Hallucination caption": [["A blue cat."], [], ["A dog cat."]],
    }  # fmt: skip
    (tmp_path / "several.json").write_text(json.dumps([record]))
    (section,) = inspect(dataset, "--data-path", tmp_path / "several.json").sections
    assert len(section["images"]) == len(set(section["images"])) == 2
    assert section["reason"].startswith("Unusable: gone.jpg: no such file")
    for number, (name, file) in enumerate((("wide.jpg", "JPEG of 90 x 60"), ("tall.jpg", "JPEG of 60 x 90")), start=1):
        assert f"<image {number}> {name}{file}" in section["text"]
    dialogue, *others = section["tokens"]
    found = [(text, position) for kind, text, position in dialogue if kind == "image"]
    assert [text for text, _ in found] == [f"<image {number}> × {V}" for number in (1, 2, 3)]
    starts = [int(position.partition("–")[0]) for _, position in found]
    assert starts[0] + V < starts[1] and starts[1] + V < starts[2], "a line's end between the first two"
    assert texts(others[0], "image") == f"<image 1> × {V}" and texts(others[2], "image") == f"<image 3> × {V}"
    assert "caption of image 1A red cat." in section["text"] and "caption of image 3A dog." in section["text"]
    assert "hallucinated caption 1 + EOS of image 3" in section["text"] and section["ins"] == ["blue", " cat"]


def test_tiles_are_drawn_row_by_row(dataset, tmp_path):
    """Of a model in tiles the whole picture alone was shown, with the rows of all. Beside others it is one view."""
    folder = write_tiny_onevision(tmp_path / "model")
    records = [
        {"id": "alone", "image": "wide.jpg", "conversations": turns("What is it?", "a cat")},
        {"id": "both", "image": ["wide.jpg", "wide.jpg"], "conversations": turns("<image>\nWhich?", "a cat")},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    arguments = ("--data-path", tmp_path / "data.json", "--pretrained-checkpoint", folder, "--ids", "alone", "both")
    alone, both = inspect(dataset, *arguments).sections
    layout = read_model_config(folder).image_layout
    rows, (tall, wide) = layout.rows((90, 60), alone=True), layout.cut(90, 60).grid
    assert (rows.num_views, tall, wide) == (1 + tall * wide, 2, 2) and len(alone["images"]) == rows.num_views
    assert f"<image> × {len(rows)}" in alone["text"]
    views = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))).astype(int)
        for url in alone["images"][1:]
    ]
    drawn = np.vstack([np.hstack(views[start : start + wide]) for start in range(0, len(views), wide)])
    picture = Image.open(dataset / "images" / "wide.jpg").convert("RGB").resize((96, 64), Image.Resampling.BICUBIC)
    assert drawn.shape == (96, 96, 3) and not drawn[:15].any() and not drawn[81:].any(), "padded with black"
    assert np.abs(drawn[16:80] - np.asarray(picture).astype(int)).mean() < 2
    assert len(both["images"]) == 2 and f"<image 2> × {len(layout.rows((90, 60), alone=False))}" in both["text"]


def test_texts_stay_texts(dataset):
    page = inspect(dataset, "--ids", EVIL)
    (section,) = page.sections
    assert '<script>alert("x")</script> & <b>cat</b> \u202e\\x07' in section["text"]
    assert not page.tags & {"script", "i", "iframe", "link"}
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)


def test_broken_samples_are_shown_with_their_reasons(dataset):
    page = inspect(dataset, "--ids", "pair", "cut", "gone", "half", "odd", "talk")
    reasons = [section["reason"] for section in page.sections]
    for found, expected in zip(
        reasons, ["", "cut off", "no such file", "does not tokenize", "leaves the image folder", ""], strict=True
    ):
        assert expected in found and bool(found) == bool(expected), (found, expected)
    assert "turn 0 is from 'tool'" in reasons[4] and "<i>x</i>" in page.sections[4]["text"]
    assert [section["image"] is None for section in page.sections] == [False, True, True, False, True, True]
    assert "a \\ud83d cat" in page.sections[3]["text"]


def test_what_the_trainer_does_is_noted(dataset):
    (cut,) = inspect(dataset, "--ids", "pair", "--model-max-length", V + 40).sections
    assert f"cut at --model-max-length {V + 40}" in cut["note"]
    page = inspect(dataset, "--ids", "pair", "--version", "plain", "--contrastive-image-context", "prompt")
    dialogue, image, *_ = page.sections[0]["tokens"]
    assert texts(dialogue, "ignored") == "<s>" and texts(dialogue, "target").startswith(" it is a cat")
    assert [kind for kind, *_ in image] == ["ignored", "image", "eos"]


def test_which_samples(dataset, capsys):
    first, again, other = (
        [s["text"] for s in inspect(dataset, "--random", 5, "--seed", seed).sections] for seed in (1, 1, 2)
    )
    assert first == again != other and len(set(first)) == 5
    assert len(inspect(dataset, "--random", 999).sections) == 37
    (by_number,) = inspect(dataset, "--ids", "#2").sections
    assert "sample 2 of" in by_number["text"] and texts(by_number["tokens"][0], "target") == " a cat</s> yes</s>"
    capsys.readouterr()
    assert run(dataset, dataset / "no.html", "--ids", "pairs") == 2
    assert "--ids 'pairs': no such sample; did you mean pair?" in capsys.readouterr().err
    assert run(dataset, dataset / "no.html", "--random", 0) == 2 and not (dataset / "no.html").exists()
    assert run(dataset, dataset / "no" / "no.html") == 2
    assert f"there is no folder {dataset / 'no'}; make it" in capsys.readouterr().err


def test_nothing_but_the_page_itself_is_run_or_fetched(dataset):
    """Catches a text that ends the index's script, another script that its policy lets run, and outside addresses."""
    page = inspect(dataset, "--all")
    assert EVIL.replace("\x07", "\\x07") in page.index["samples"][1]["text"]
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page.around)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    *data, script = re.findall(r"<script([^>]*)>(.*?)</script>", page.around, re.DOTALL)
    assert [kind for kind, _ in data] == [' type="application/json" id="index"'] and script[0] == ""
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert (rules["default-src"], rules["img-src"], rules["script-src"]) == ("'none'", "data:", f"'sha256-{digest}'")
    assert not re.search(r"(src|href|srcset)=|url\(|@import|https?:", page.around)


def test_pictures_of_many_samples_are_small(dataset):
    """Catches a page of thousands that has each pixel of all of them, and one of few that has lost some."""
    many = inspect(dataset, "--data-path", dataset / "data.json", dataset / "data.json", "--all")
    assert len(many.sections) == 74
    for size, page in ((192, many), (50, inspect(dataset, "--ids", "pair", "--picture-size", 50))):
        kind, _, data = page.sections[0]["image"].partition(",")
        assert kind == "data:image/webp;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (size, size)


def test_data_that_holds_no_kinds_of_edits(dataset, tmp_path, monkeypatch):
    """Catches a manifest, which --data-path takes by its name too, and a URL that are read as JSON."""
    (tmp_path / "one.json").write_text(json.dumps(json.loads((dataset / "data.json").read_text())[:1]))
    assert run_tool("prepare_data", "--input", tmp_path / "one.json", "--output", tmp_path / "out") == 0
    arrow = str(tmp_path / "out" / "manifest.arrow")
    page = inspect(dataset, "--data-path", arrow)
    assert len(page.sections) == 1 and f"<b>not known of {arrow}; give the JSON, as a file here</b>" in page.around
    monkeypatch.syspath_prepend(TOOLS)
    kinds_of_edits = runpy.run_path(str(TOOLS / "inspect_data.py"))["kinds_of_edits"]
    url = "s3://bucket/one.json"
    assert kinds_of_edits(Namespace(data_path=[url]), Manifest.read([arrow], version="v1"), [0]) == ({}, [url])


def test_reasons_of_one_class() -> None:
    """Catches a class for each file, and classes that are thrown together."""
    for reason, expected in (
        ("no such file in the image folder /data/a b.c", "no such file in the image folder … b.c"),
        ("the name '../a\\'b.jpg' leaves the image folder /data", "the name … leaves the image folder …"),
        ("a JPEG of 12,000 scans; expected at most 500", "a JPEG of … scans; expected at most …"),
        ("not an image: it starts with b'\\x00 1'", "not an image: it starts with …"),
        ("it has no answer with words", "it has no answer with words"),
        ("and/or", "and/or"),
    ):
        assert reason_class(reason) == expected
    assert len(reason_class("x" * 500)) == 100


# --------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def many(dataset: Path) -> tuple[Path, list[dict]]:
    """A page of 60 samples, and its records: of five edit kinds, with faults, of many lengths."""
    kinds = ("colour", "object", "count", "action", "size")
    records = []
    for n in range(60):
        record = {"id": f"s{n}", "image": "wide.jpg", "conversations": turns("What?", "a cat " * (n * 7 % 31 + 1))}
        if n % 3 == 0:
            edits = [{"kind": kinds[n % 5], "before": "red", "after": "blue"}]
            record |= {"text": f"A red cat {n}.", "Hallucination caption": f"A blue cat {n}."}
            record |= {"Hallucination edits": [edits]} if n % 2 else {}
        records.append(record | ({"image": "gone.jpg"} if n % 10 == 4 else {}))
    records[7]["id"] = '<img src="x" onerror="window.evil=1">'
    records[8]["conversations"] = turns("What?", "")
    (dataset / "many.json").write_text(json.dumps(records))
    out = dataset / "many.html"
    assert run(dataset, out, "--data-path", dataset / "many.json", "--all", "--picture-size", 16) == 0
    return out, records


@needs_browser
def test_a_page_is_searched_filtered_ordered_and_turned(many):
    """Catches choices that show others than they say or are lost with the address, pictures of pages that nobody looks
    at, texts that become elements, what the policy stops, and a page that is wider than a telephone."""
    path, records = many
    lengths = {f"s{n}": n * 7 % 31 for n in range(60)}
    with Browser() as browser:

        def shown() -> list[str]:
            return browser.run("[...document.querySelectorAll('h2')].map(title => title.textContent)")

        def choose(control: str, value: str) -> list[str]:
            before = browser.run("drawing")
            browser.run(
                f"{{ const control = document.getElementById({json.dumps(control)});"
                f"control.value = {json.dumps(value)}; control.dispatchEvent(new Event('input')); }}"
            )
            browser.wait(f"drawing > {before} && drawn === drawing")
            return shown()

        def names(wanted) -> list[str]:
            return [record["id"] for n, record in enumerate(records) if wanted(n, record)]

        browser.open(path)
        browser.wait("drawn && drawn === drawing")
        assert shown() == names(lambda n, _: n < 20) and shown()[7] == '<img src="x" onerror="window.evil=1">'
        pictures = [address for address in browser.requests if address.startswith("data:image/webp")]
        assert len(pictures) <= 20 and len(browser.requests) - len(pictures) <= 2, "the page, and about:blank"
        browser.run("document.querySelector('.on').click()")
        browser.wait("document.querySelector('h2').textContent === 's20'")
        assert shown() == names(lambda n, _: 20 <= n < 40) and browser.run("location.hash") == "#page=2"
        assert browser.run("document.querySelector('.shown').textContent") == "21–40 of 60"

        gone = names(lambda n, _: n % 10 == 4)
        (unusable,) = browser.run(
            "[...document.getElementById('fault').options].map(one => one.value).filter(one => one.includes('no such'))"
        )
        assert choose("fault", unusable) == gone and browser.run("document.querySelector('.page').value") == "1"
        assert choose("fault", "any") == names(lambda n, _: n % 10 == 4 or n == 8)
        faults = browser.run("document.getElementById('fault').textContent")
        assert "trains nothing: it has no answer with words (1)" in faults
        assert choose("fault", "none")[:5] == names(lambda n, _: n in (0, 1, 2, 3, 5))
        choose("fault", "")
        colours = names(lambda n, _: n % 3 == 0 and n % 2 and n % 5 == 0)
        assert choose("kind", "colour") == colours
        assert choose("text", "CAT 45") == ["s45"]
        choose("kind", "")
        assert choose("text", "blue CAT 9.") == ["s9"] and choose("text", "no such words") == []
        assert browser.run("document.querySelector('.shown').textContent") == "none, chosen from 60"
        choose("text", "")
        found = choose("sort", "longest")
        own = [lengths.get(name, 49 % 31) for name in found]
        assert own == sorted(own, reverse=True) and own[0] == 30
        assert choose("per", "50")[:20] == found

        browser.open(path, "sort=shortest&text=cat&page=3&fault=nonsense")
        browser.wait("drawn && drawn === drawing")
        own = [lengths.get(name, 49 % 31) for name in shown()]
        assert own == sorted(own) and browser.run("location.hash") == "#text=cat&sort=shortest&page=3"
        for width in (390, 900, 1100):
            browser.open(path, width=width)
            browser.wait("drawn && drawn === drawing")
            assert browser.run("document.documentElement.scrollWidth") <= width
        assert not browser.problems and browser.run("window.evil") is None

        for broken, says in (
            ("document.getElementById('s20').textContent = 'AAAA'", "The samples cannot be shown: "),
            ("window.DecompressionStream = undefined", "this browser cannot unpack them; open the page in a newer one"),
        ):
            browser.open(path)
            browser.wait("drawn && drawn === drawing")
            browser.run(f"{{ {broken}; document.querySelector('.on').click() }}")
            browser.wait("document.querySelector('#samples > .reason') !== null")
            assert says in browser.run("document.getElementById('samples').textContent"), "a page that stays as it was"
