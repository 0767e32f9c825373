"""The quickstart's last page, and what it knows of answers: each by itself, without a trained model."""

import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.browser import Browser, needs_browser

SCRIPTS = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    """The scripts import one another by file name, as `python examples/quickstart/NAME.py` lets them."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def plurals(word: str) -> tuple[str, str]:
    return f"{word}s", f"{word}es"


def test_exactly_what_was_made_wrong_is_marked():
    """Of 300 scenes: nothing in a true caption; in a twin at most what was made wrong, and never nothing."""
    from draw import OPENINGS, choose_stated, draw_facts, hallucinate, sentence
    from marking import hallucinated, marked, read_answer

    rng = random.Random(1)
    for _ in range(300):
        scene = draw_facts(rng, 100, rng.randint(50, 200))
        stated, opening = choose_stated(rng, scene), rng.choice(OPENINGS)
        caption = sentence(stated, opening)
        assert {fact.key: fact.value for fact in read_answer(caption)} == stated
        assert hallucinated(caption, scene) == [] and marked(caption, scene) == [(caption, False)]
        wrong = hallucinate(rng, stated, scene)
        twin = sentence(stated | wrong, opening)
        found = hallucinated(twin, scene)
        assert 0 < len(found) <= len(wrong), (twin, scene)
        assert all(twin[fact.start : fact.end].lower() in (fact.value, *plurals(fact.value)) for fact in found)
        assert "".join(text for text, _ in marked(twin, scene)) == twin


def test_a_thing_named_twice_is_marked_where_the_other_one_stands():
    """Read from the side that fewest words contradict, not from the first thing alone."""
    from marking import marked

    scene = {"colour": "blue", "shape": "square", "relation": "below", "other colour": "pink", "other shape": "ring"}
    pieces = marked(
        "Here we see a pink ring above a large pink ring.", scene | {"other size": "small", "size": "large"}
    )
    assert pieces == [
        ("Here we see a pink ring above a large ", False), ("pink", True), (" ", False), ("ring", True), (".", False),
    ]  # fmt: skip
    counted = {"colour": "blue", "shape": "square", "size": "large", "count": "two"}
    pieces = marked("A blue square left of a red square.", counted)
    assert [text for text, wrong in pieces if wrong] == ["left of", "red"]
    assert marked("Two blue crosses.", counted)[1] == ("crosses", True)
    assert marked("There is no picture.", scene) == [("There is no picture.", True)] and marked("", scene) == []


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_makes_updates_orthogonal(shape: tuple[int, int]) -> None:
    """U V^T of the singular value decomposition, but for singular values that are only about 1."""
    from muon import orthogonal

    update = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(update, full_matrices=False)
    found = orthogonal(update)
    singular = u.mT @ found @ v.mT
    assert (singular - torch.diag_embed(singular.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3
    values = singular.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3


HOSTILE = '<img src=x onerror="document.title=1"> & <b>"ü漢"</b> {{ title }}'


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of everything, all of whose texts are hostile, and as long as an answer can be."""
    import page as module

    folder = tmp_path_factory.mktemp("page")
    Image.new("RGB", (120, 60), "red").save(folder / "a.jpg")
    scene = {"colour": "red", "shape": "star", "background": "white", "size": "small", "place": "on the left"}
    long = "The picture shows a large turquoise triangle right of a large turquoise triangle on a striped background."
    said = [module.Said(when, [HOSTILE, long, "A red star on the left."], 0.5) for when in ("before", "after stage 1")]
    sample = {"image": "a.jpg", "text": HOSTILE, "Hallucination caption": "A blue star."}
    cards = [module.card(sample, scene, folder, said, at) for at in range(3)]
    rows = [{"iteration": step, **dict.fromkeys(module.CURVES, 0.5), "lm loss validation": 1.0} for step in (1, 2)]
    table = module.table_of([(one.when, one.scores([scene] * 3)) for one in said])
    module.write_page(
        folder / "report.html", title=HOSTILE, about=HOSTILE, tiles=[(HOSTILE, HOSTILE)] * 3, learnt=HOSTILE,
        scores=table, curves=module.curve_images([("pretrain", rows), ("finetune", rows)]), shown=HOSTILE,
        cards=[module.with_twin(one, sample, scene, 0.1, 0.2) for one in cards], compared=HOSTILE, comparison=table,
        comparison_cards=cards, places=[(f"output/{'long' * 60}", HOSTILE)],
    )  # fmt: skip
    return folder / "report.html"


@needs_browser
@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_fits_asks_for_nothing_and_shows_hostile_texts_as_texts(page: Path, width: int) -> None:
    with Browser() as browser:
        browser.open(page, width=width)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.title") == HOSTILE
        assert browser.run("document.querySelectorAll('img').length") == 4 + 3 + 3
        assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert not browser.problems
        assert all(url.startswith(("file:", "data:", "about:")) for url in browser.requests)
        marked = browser.run("[...document.querySelectorAll('.card mark')].map(mark => mark.textContent)")
        assert HOSTILE in marked and "triangle" in marked and "star" not in marked
        if width == 390:  # nothing is cut off within a card either
            assert browser.run("[...document.querySelectorAll('.card')].every(c => c.scrollWidth <= c.clientWidth)")
