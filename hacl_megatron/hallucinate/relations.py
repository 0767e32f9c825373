"""Counts and spatial relations of a caption, as units that `hacl_megatron.hallucinate.units` describes.

Logic decides what contradicts what: "at least four" does not become "at least three" (still true) but "only two"; left
and right are not exchanged where a sentence has both ("one on the left, one on the right" would stay true).
"""

from hacl_megatron.hallucinate.lexicon import CONTEXT, PLURAL, Lexicon, Match
from hacl_megatron.hallucinate.text import Caption
from hacl_megatron.hallucinate.units import Site, Unit

_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NOT_BEFORE_COUNT = CONTEXT["not before count"]
_DETERMINERS = CONTEXT["after relation"]
_SIDES = {"left": "right", "right": "left"}
_SIDE_BEFORE = CONTEXT["side before"]
_SIDE_NOUNS = CONTEXT["side nouns"]
_SURFACES = frozenset(("seat", "large furniture"))
_SIMPLE = {  # phrase: what contradicts it; a determiner has to follow
    ("in", "front", "of"): ("behind",),
    ("behind",): ("in front of",),
    ("on", "top", "of"): ("underneath",),
    ("above",): ("below",),
    ("below",): ("above",),
    ("under",): ("on top of",),
    ("underneath",): ("on top of",),
    ("beneath",): ("on top of",),
    ("inside",): ("outside",),
    ("inside", "of"): ("outside of",),
    ("outside",): ("inside",),
    ("outside", "of"): ("inside of",),
    ("next", "to"): ("far away from",),
    ("beside",): ("far away from",),
    ("close", "to"): ("far away from",),
    ("near",): ("far away from",),
    ("looking", "at"): ("looking away from",),
    ("looking", "out", "of"): ("turned away from",),
}
_PLAIN = {  # phrase: what contradicts it, whatever follows
    ("in", "the", "background"): ("in the foreground",),
    ("in", "the", "foreground"): ("in the background",),
    ("outdoors",): ("indoors",),
    ("indoors",): ("outdoors",),
}
_FIRST = {phrase[0] for phrase in (*_SIMPLE, *_PLAIN)} | {"left", "right", "on"}


def find_relations(caption: Caption, matches: list[Match], words: Lexicon) -> list[Unit]:
    """The units of kind `count` and `spatial relation`, in a fixed order."""
    return _counts(caption, matches, words) + _spatial(caption, matches)


def _counts(caption: Caption, matches: list[Match], words: Lexicon) -> list[Unit]:
    low = caption.low
    plural_at = {
        match.start
        for match in matches
        if any(meaning.kind in ("object", "person") and meaning.form == PLURAL for meaning in match.meanings)
    }
    units, paired = [], "both" in low or ("other" in low and low[low.index("other") - 1] == "the")
    for at, word in enumerate(low):
        if word not in _COUNT_WORDS and word not in _DIGITS:
            continue
        noun = at + 1
        if word == "couple" or word == "pair":
            if not (at and low[at - 1] == "a" and low[at + 1 : at + 2] == ["of"]) or word == "pair":
                continue
            noun = at + 2
        while noun < len(low) and low[noun] in CONTEXT["adjectives"]:
            noun += 1
        if noun not in plural_at and not (
            noun < len(low) and (low[noun] in _PLURALS or low[noun] in CONTEXT["one form"])
        ):
            continue
        before = low[at - 1] if at else ""
        if word == "couple":
            before = low[at - 2] if at > 1 else ""
            if before not in _NOT_BEFORE_COUNT:
                options = [text for text in ("three", "four", "a dozen") if text not in low]
                units.append(Unit("count", "a couple of", [Site(at - 1, at + 2, 0)], [(text,) for text in options]))
        elif word in _DIGITS:
            if before not in _NOT_BEFORE_COUNT:
                options = [digit for digit in _DIGITS[:8] if digit not in low]
                units.append(Unit("count", word, [Site(at, at + 1, 0)], [(digit,) for digit in options]))
        elif word in ("several", "many", "numerous"):
            if before not in ("so", "as", "how", "too", "the", "these", "those", "of") and "two" not in low:
                units.append(Unit("count", word, [Site(at, at + 1, 0)], [("only two",)]))
        elif before == "least" and low[at - 2 : at - 1] == ["at"] and word in _NUMBERS:
            value = _NUMBERS.index(word) + 2
            options = [f"only {number}" for number in _NUMBERS[: max(0, value - 2)] if number not in low][:3]
            if options:
                units.append(Unit("count", f"at least {word}", [Site(at - 2, at + 1, 0)], [(o,) for o in options]))
        elif before not in _NOT_BEFORE_COUNT and not (paired and word == "two"):
            options = [(number,) for number in _NUMBERS[:9] if number not in low]
            sites = [Site(i, i + 1, 0) for i, other in enumerate(low) if other == word and (i == at or _the(low, i))]
            units.append(Unit("count", word, sites, options))
    return [unit for unit in units if unit.options]


_DIGITS = ("2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12")
_COUNT_WORDS = frozenset((*_NUMBERS, "couple", "pair", "several", "many", "numerous"))
_PLURALS = CONTEXT["plurals"]


def _the(low: list[str], at: int) -> bool:
    return at > 0 and low[at - 1] in ("the", "these", "those")


def _spatial(caption: Caption, matches: list[Match]) -> list[Unit]:
    low, units = caption.low, []
    surfaces = {
        match.start
        for match in matches
        if match.meanings[0].kind == "object" and match.meanings[0].entry.group in _SURFACES
    }
    present = set(low)
    for at, word in enumerate(low):
        if word not in _FIRST:
            continue
        after = low[at + 1] if at + 1 < len(low) else "."
        before = low[at - 1] if at else ""
        if word in _SIDES:
            if before not in _SIDE_BEFORE or after not in _SIDE_NOUNS:
                continue
            if word == "right" and before == "to" and after in ("in", "with"):
                continue
            sentence = caption.sentences[at]
            other = _SIDES[word]
            if any(text == other and caption.sentences[i] == sentence for i, text in enumerate(low)):
                continue
            units.append(Unit("spatial relation", word, [Site(at, at + 1, 0)], [(other,)]))
            continue
        if word == "on" and after in ("a", "an", "the", "his", "her", "their"):
            noun = at + 2
            while noun < len(low) and noun not in surfaces and noun < at + 4:
                noun += 1
            if noun in surfaces and "under" not in present:
                units.append(Unit("spatial relation", "on", [Site(at, at + 1, 0)], [("under",)]))
            continue
        for length in (3, 2, 1):
            phrase = tuple(low[at : at + length])
            if len(phrase) < length:
                continue
            following = low[at + length] if at + length < len(low) else "."
            options = _PLAIN.get(phrase)
            if options is None and following in _DETERMINERS and before not in ("from", "left", "farther", "-"):
                options = _SIMPLE.get(phrase)
            if options is None:
                continue
            if (length > 1 or before not in ("and", "or")) and not _mentions(low, options[0]):
                site = Site(at, at + length, 0)
                units.append(Unit("spatial relation", " ".join(phrase), [site], [(text,) for text in options]))
            break
    return units


def _mentions(low: list[str], phrase: str) -> bool:
    words = phrase.split()
    return any(low[i : i + len(words)] == words for i in range(len(low) - len(words) + 1))
