"""Hallucinated captions by rules: what they cover, and that each is English and false."""

import json
import re
from pathlib import Path

import pytest

from hacl_megatron.hallucinate.lexicon import PLURAL, SINGULAR, lexicon
from hacl_megatron.hallucinate.report import word_distance
from hacl_megatron.hallucinate.rules import Hallucination, hallucinate
from hacl_megatron.hallucinate.text import article_for, tokenize

HERE = Path(__file__).parent
CAPTIONS = [json.loads(line)["caption"] for line in (HERE / "mplug_owl_captions.jsonl").read_text().splitlines()]
ALT_TEXTS = (HERE / "alt_texts.txt").read_text().splitlines()
COCO_CLASSES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball
bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush"""


def several(caption: str, count: int = 12) -> list[Hallucination]:
    """Many different ones of a caption, so that a wrong rule shows."""
    return [one for seed in range(count) for one in hallucinate(caption, seed=seed, name="x", count=2)]


def texts(caption: str) -> set[str]:
    return {one.text for one in several(caption)}


@pytest.mark.parametrize("captions", [CAPTIONS, ALT_TEXTS], ids=["mplug-owl", "alt texts"])
def test_nearly_every_caption_gets_as_many_as_asked_for(captions):
    made = [hallucinate(caption, seed=3, name=str(i), count=3) for i, caption in enumerate(captions)]
    assert sum(len(found) == 3 for found in made) >= 0.97 * len(captions)
    for caption, found in zip(captions, made, strict=True):
        plain = [" ".join(text.casefold().split()) for text in (caption, *(one.text for one in found))]
        assert len(set(plain)) == len(plain)
        for one in found:
            assert 1 <= len(one.edits) <= 3
            assert one.text.count("\n") == caption.count("\n")
            # a mention changes everywhere: the distance has no fixed bound, the length has
            assert len(one.text.split()) <= len(caption.split()) + 3 * 9
            inflected = ("object", "person", "action")
            assert all(edit.kind in inflected or edit.after.lower() in one.text.lower() for edit in one.edits)


def test_depends_on_seed_id_and_caption_alone():
    one = [hallucinate(caption, seed=1, name=str(i), count=2) for i, caption in enumerate(CAPTIONS[:40])]
    other = [hallucinate(CAPTIONS[i], seed=1, name=str(i), count=2) for i in reversed(range(40))][::-1]
    assert one == other
    assert [found[:1] for found in one] == [
        hallucinate(caption, seed=1, name=str(i), count=1) for i, caption in enumerate(CAPTIONS[:40])
    ]
    for changed in ({"seed": 2, "name": "0"}, {"seed": 1, "name": "other"}):
        assert sum(hallucinate(c, **changed)[0] != one[i][0] for i, c in enumerate(CAPTIONS[:40])) > 30


def test_no_option_of_any_word_may_mean_the_same():
    words, checked = lexicon(), 0
    for meanings in words._phrases.items():
        phrase = meanings[0]
        for meaning in meanings[1]:
            for option in meaning.entry.options:
                checked += 1
                for form in filter(None, option.written):
                    assert form != phrase and not (meaning.kind != "action" and words.same_meaning(phrase, form)), (
                        f"{phrase} may be written as {form}"
                    )
    assert checked > 3000


def test_every_coco_class_is_known():
    words = lexicon()
    for name in re.split(r",\s+", COCO_CLASSES.replace("\n", " ")):
        found = words.matches(tokenize(name).low)
        if name not in ("person", "bird"):  # whole kinds: what takes their place could still be one
            assert [(match.start, match.end) for match in found] == [(0, len(name.split()))], name
            assert any(meaning.kind == "object" and meaning.entry.options for meaning in found[0].meanings), name


def test_articles_and_plurals_against_inflect():
    inflect = pytest.importorskip("inflect")
    engine, words = inflect.engine(), lexicon()
    for entry in words.objects.values():
        singular, plural = entry.written[SINGULAR], entry.written[PLURAL]
        if singular:
            assert f"{article_for(singular)} {singular}" == engine.a(singular)
        if singular and plural and not singular.startswith(("pair of", "cactus", "octopus", "flamingo")):
            assert engine.compare(singular, plural) == "s:p" or singular == plural, (singular, plural)
    for caption in CAPTIONS[:150] + ALT_TEXTS:
        for one in hallucinate(caption, seed=5, name="", count=2):
            new = set(re.findall(r"\b[Aa]n? [a-z-]+", one.text)) - set(re.findall(r"\b[Aa]n? [a-z-]+", caption))
            for phrase in new:
                article, word = phrase.split()
                assert engine.a(word).split()[0] == article.lower(), one.text


@pytest.mark.parametrize(
    ("caption", "never"),
    [
        (
            "There are at least four cars on the street.",
            r"at least (three|two)|only (four|five|six)",
        ),
        ("There are at least 12 boats in the harbor.", r"at least \d(?!\d)"),
        ("One cat is on the left side and one cat is on the right side.", r"^One cat is on the right"),
        ("A cat and a dog sit on the grass.", r"[Aa] dog and a cat|puppy|kitten"),
        ("A big dog lies near a large tree.", r"large dog|huge|big tree"),
        ("Two dogs, one behind the other, and three cats", r"[Tt]hree dogs|two cats"),
        ("A person rides a bike.", r"man|woman|bicycle"),
        ("Wear a watch and train well, she said at the park.", r"watch and (car|bus)|airplane well"),
        ("She has red wine and a black and white cat.", r"(blue|green) wine|and (red|blue) cat"),
        (
            "Then Paul Brown and Rose Bush met their friend Jack Black somewhere near Orange County.",
            r"Blue|Green|White|Apple|Tulip",
        ),
        ("A man left his bag behind.", r"right|in front of"),
        ("An old man sits in a vintage old truck.", r"brand-new man|young truck|youngyoung"),
        ("The street is not crowded and there are no cars.", r"not (empty|deserted)|no (trucks|buses|boats|trains)"),
        ("A few sheep and a few deer graze.", r"few (pig|cow|goat|dog|cat|horse)\b"),
        ("A young girl and a young boy run in an open field.", r"elderly (girl|boy)|closed field"),
        ("They have cake at school.", r"have (donut|cookie|pretzel)|at (museum|hospital)"),
    ],
)
def test_what_must_never_be_written(caption, never):
    for text in texts(caption):
        assert not re.search(never, text), text


@pytest.mark.parametrize(
    ("caption", "pattern"),
    [
        ("A man in his boat waves to a dog.", r"A woman in her boat waves to a dog\."),
        ("A woman holds her bag and smiles while a dog looks at her.", r"A man holds his bag .* looks at him\."),
        ("A young girl plays tennis. She holds a racket. A man looks on.", r"A young boy plays \w+\. He holds .*"),
        ("The zebras eat. One zebra looks up.", r"The (\w+)s eat\. One \1 looks up\."),
        ("a teddy bear on a bed; the bear is brown", r"a ([a-z ]+) on a (\w+); the \1 is \w+|.*"),
        ("A Big Red Bus In London City", r"A Big (Blue|Green|Yellow|White|Black) Bus In London City"),
        ("RED CAR FOR SALE IN TEXAS", r"(BLUE|GREEN|YELLOW|WHITE|BLACK) CAR FOR SALE IN TEXAS"),
        ("Two women sit on a bench.", r"Two men sit on a bench\."),
        ("a bowl next to an apple", r"a bowl next to an? (banana|pear|peach|lemon|pineapple|watermelon|mango|orange)"),
        ("There are at least six sheep in the field.", r"There are only (two|three|four) sheep in the field\."),
        ("There are several cars on the road.", r"There are only two cars on the road\."),
        ("A boy is standing on the grass. He is standing alone.", r".*(\b\w+) on the grass\. He is \1 alone\."),
        ("the ball lies in front of the house", r"the ball lies behind the house"),
        ("a wooden table and a red chair", r"a (metal|plastic|glass) table and a red chair"),
    ],
)
def test_what_is_written_among_others(caption, pattern):
    assert any(re.fullmatch(pattern, text) and text != caption for text in texts(caption)), texts(caption)


def test_one_thing_changes_in_all_its_mentions():
    for text in texts("The zebras eat. One zebra looks up. Zebras live in Africa. A zebra's stripes are black."):
        assert ("zebra" in text.lower()) == (len(re.findall("zebra", text.lower())) == 4), text


@pytest.mark.parametrize("caption", ["", "  ", "...", "123", "\u4e00 \U0001f600", "\ud83d", "a" * 5000, "the " * 3000])
def test_odd_captions_do_no_harm(caption):
    for one in hallucinate(caption, seed=0, name="x", count=3):
        assert one.text != caption and one.edits


def test_word_distance_is_levenshteins():
    assert word_distance("a red cat sits", "a cat sat down") == 3
    assert word_distance("", "a b") == 2 and word_distance("a b", "a b") == 0
