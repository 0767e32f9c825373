"""What could be changed in a caption: its units, each with the texts that would make it false.

A unit is one thing the caption says: a class of objects with all its mentions, an attribute of a noun, a count, a
relation, an action, a person. Changing a unit changes every mention of it, so that the caption stays of one piece.
An option is never a word that may be true of the same thing (the word lists bar those), nor one that the caption
itself mentions: "a cat and a dog" never becomes "a dog and a cat".
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hacl_megatron.hallucinate.lexicon import CONTEXT, MASS, PLURAL, SINGULAR, Entry, Lexicon, Match
from hacl_megatron.hallucinate.text import Caption

ANIMATE_GROUPS = frozenset(("animal", "wild animal", "bird", "sportsperson", "worker"))
_ANIMATE_WORDS = CONTEXT["animate words"]
_PLACE_WORDS = CONTEXT["place words"]
_WAY_WORDS = CONTEXT["way words"]
_ARTICLES = CONTEXT["articles"]
_HEARD_BEFORE_BASE = CONTEXT["heard before base"]
_BARE = CONTEXT["bare"]

MALE = ("he", "him", "his", "himself")
FEMALE = ("she", "her", "her", "herself")


@dataclass(slots=True)
class Site:
    """Tokens start to end - 1; an option's text for it is that of `form`."""

    start: int
    end: int
    form: int


@dataclass(slots=True)
class Unit:
    """One thing that the caption says, with what could be said instead."""

    kind: str
    name: str
    """What it is now: for the record of edits."""
    sites: list[Site]
    options: Sequence[tuple[str | None, ...]]
    """Each a tuple of texts by form."""


def find_units(caption: Caption, matches: list[Match], words: Lexicon, *, relaxed: bool = False) -> list[Unit]:
    """All units of a caption, in a fixed order. `relaxed` takes nouns on weaker evidence (telegraphic alt texts)."""
    mentioned = {id(meaning.entry) for match in matches for meaning in match.meanings}
    present = set(caption.low)
    units = _objects(caption, matches, words, mentioned, relaxed)
    units += _people(caption, matches, present)
    units += _attributes(caption, matches, words, present, relaxed)
    units += _actions(caption, matches, present)
    return units


def _named(caption: Caption, start: int) -> bool:
    """Whether a capital letter in the middle of a sentence makes the token (part of) a name."""
    word = caption.words[start]
    if not word[0].isupper() or caption.capitalised or word.isupper():
        return False
    return start > 0 and caption.sentences[start - 1] == caption.sentences[start] and caption.low[start - 1] != '"'


def _noun_stands_alone(caption: Caption, match: Match, form: int, words: Lexicon, relaxed: bool) -> bool:
    """Whether the match is a noun phrase's head, and neither a verb nor a part of a compound."""
    low, context = caption.low, CONTEXT
    if _named(caption, match.start):
        return False
    if match.end < len(low):
        after = low[match.end]
        if after == "-" or (after == "'" and not relaxed):
            return False
        if after.isalpha() and after not in context["after"] and not after.endswith(("ed", "ing")):
            return False
        if after.endswith("ing") and any(after == word for word in ("building", "parking", "dining", "wedding")):
            return False
    at = match.start - 1
    adjectives = context["adjectives"]
    while (
        at >= 0
        and (low[at] in adjectives or low[at].endswith(("ful", "ous", "ive", "less", "ish", "ed", "ic")))
        and low[at] not in context["not adjectives"]
    ):
        at -= 1
    if at >= 0 and low[at] == "and" and at >= 1 and low[at - 1] in adjectives:
        at -= 1
        while at >= 0 and low[at] in adjectives:
            at -= 1
    if at < 0:
        return form != SINGULAR or relaxed
    before = low[at]
    if before in context["determiners"]:
        return True
    if before == "'" or before == "s":
        return at >= 1 and low[at - 1] == "'"
    if form == SINGULAR and not relaxed:
        return False
    if before in _BARE or before in context["before"]:
        return True
    return relaxed and before.isalpha() and at >= 1 and low[at - 1] in ("a", "an", "the")


def _objects(caption: Caption, matches: list[Match], words: Lexicon, mentioned: set[int], relaxed: bool) -> list[Unit]:
    found: dict[int, tuple[Entry, list[Site], list[bool]]] = {}
    heads: dict[str, Entry] = {}
    read: list[tuple[Match, Entry, int]] = []
    for match in matches:
        for meaning in match.meanings:
            if meaning.kind == "object":
                form = meaning.form
                if form == SINGULAR and caption.low[match.end - 1] in CONTEXT["one form"]:
                    form = _number_of(caption, match)
                read.append((match, meaning.entry, form))
                if match.end - match.start > 1:
                    heads[caption.low[match.end - 1].removesuffix("s")] = meaning.entry
                break
    for match, entry, form in read:
        if match.end - match.start == 1:
            # "a teddy bear ... the bear": the second is no bear either
            entry = heads.get(caption.low[match.start].removesuffix("s"), entry)
            if form == MASS and entry.written[MASS] is None:
                continue
        if len(match.meanings) > 1 and not relaxed and _is_modifier(caption, match):
            continue
        _, sites, sure = found.setdefault(id(entry), (entry, [], []))
        sites.append(Site(match.start, match.end, form))
        sure.append(_noun_stands_alone(caption, match, form, words, relaxed))
    units = []
    for entry, sites, sure in found.values():
        if not any(sure):
            continue
        forms = {site.form for site in sites}
        if _preposition_binds(caption, entry, sites) or any(_bare(caption, site) for site in sites):
            continue
        options = [
            option.written
            for option in entry.options
            if id(option) not in mentioned and all(option.written[form] for form in forms)
        ]
        if options:
            units.append(Unit("object", entry.name, sites, options))
    return units


def _preposition_binds(caption: Caption, entry: Entry, sites: list[Site]) -> bool:
    """Whether "on the field", "in the street" would make "on the forest", "in the hill"."""
    bound = {"land": "on", "open ground": "in", "room": "on"}.get(entry.group)
    return bound is not None and any(bound in caption.low[max(0, site.start - 3) : site.start] for site in sites)


def _number_of(caption: Caption, match: Match) -> int:
    """Whether "sheep", "aircraft" and the like are one or several, by the words around them."""
    after = caption.low[match.end] if match.end < len(caption.low) else ""
    before = set(caption.low[max(0, match.start - 3) : match.start])
    one = before & CONTEXT["one"] or after in CONTEXT["one"]
    return SINGULAR if one and not before & {"few", "of"} else PLURAL


def _bare(caption: Caption, site: Site) -> bool:
    """Whether a countable noun stands without article, as in "have cake" or "by train"."""
    low = caption.low
    if site.form != SINGULAR or not site.start or caption.capitalised:
        return False
    heads_phrase = site.end == len(low) or not low[site.end].isalpha() or low[site.end] in CONTEXT["after"]
    before = low[site.start - 1]
    return heads_phrase and before.isalpha() and (before in CONTEXT["before"] or before in CONTEXT["bare"])


def _is_modifier(caption: Caption, match: Match) -> bool:
    """Whether a word that is an adjective as well ("orange", "glass") stands before another word."""
    return match.end < len(caption.low) and caption.low[match.end].isalpha() and caption.low[match.end] not in _BARE


def _people(caption: Caption, matches: list[Match], present: set[str]) -> list[Unit]:
    found: dict[int, tuple[Entry, list[Site]]] = {}
    for match in matches:
        for meaning in match.meanings:
            if meaning.kind == "person" and not _named(caption, match.start):
                found.setdefault(id(meaning.entry), (meaning.entry, []))[1].append(
                    Site(match.start, match.end, meaning.form)
                )
    units = []
    for entry, sites in found.values():
        options: list[tuple[str | None, ...]] = []
        for option in entry.options:
            if option.name in present or option.written[PLURAL] in present:
                continue
            options.append((*option.written, *(FEMALE if option.name in _FEMALE_WORDS else MALE)))
        if not options:
            continue
        gender = FEMALE if entry.name in _FEMALE_WORDS else MALE if entry.name in _MALE_WORDS else ()
        others = {other.name for other, _ in found.values() if other is not entry}
        if gender and not others & (CONTEXT["female words"] if gender is FEMALE else CONTEXT["male words"]):
            sites = sites + _pronouns(caption, gender)
        units.append(Unit("person", entry.name, sites, options))
    return units


_FEMALE_WORDS = CONTEXT["female words"]
_MALE_WORDS = CONTEXT["male words"]


def _pronouns(caption: Caption, gender: tuple[str, ...]) -> list[Site]:
    """The pronouns of one gender, by form: subject, object, possessive, reflexive (`her` by what follows it)."""
    sites = []
    for at, word in enumerate(caption.low):
        if word not in gender:
            continue
        form = gender.index(word)
        if word == "her" and at + 1 < len(caption.low):
            after = caption.low[at + 1]
            form = 2 if after.isalpha() and after not in _AFTER_OBJECT else 1
        sites.append(Site(at, at + 1, 3 + form))
    return sites


_AFTER_OBJECT = CONTEXT["after object"]


def _attributes(caption: Caption, matches: list[Match], words: Lexicon, present: set[str], relaxed: bool) -> list[Unit]:
    low, context = caption.low, CONTEXT
    people = CONTEXT["animate words"] | CONTEXT["male words"] | CONTEXT["female words"]
    found: dict[tuple[str, str, str], tuple[Entry, list[Site]]] = {}
    for match in matches:
        for meaning in match.meanings:
            if meaning.kind != "attribute" or _named(caption, match.start):
                continue
            entry, word = meaning.entry, " ".join(low[match.start : match.end])
            before = low[match.start - 1] if match.start else ""
            after = low[match.end] if match.end < len(low) else ""
            if not _is_attribute(entry, word, before, after, match, context):
                continue
            if word == "old" and (after in people) != (entry.options[0].name == "young"):
                continue  # an old man is not young, an old truck is not brand-new
            found.setdefault((entry.group, word, after), (entry, []))[1].append(Site(match.start, match.end, 0))
    units = []
    for (group, word, _), (entry, sites) in found.items():
        options = [option.written for option in entry.options if not present & set(option.name.split())]
        if options:
            units.append(Unit("colour" if group == "colour" else f"attribute ({group})", word, sites, options))
    return units


_VAGUE = CONTEXT["vague"]
_FIXED = {
    "white": "house wine bread rice board tail",
    "red": "wine light carpet cross bull sox",
    "green": "light tea bean beans onion onions bay salad",
    "black": "pepper friday bean beans tea market belt eye",
    "blue": "jay cheese jeans ray tooth",
    "brown": "bear rice sugar bread",
    "orange": "juice slice slices peel tree trees county",
    "yellow": "pages",
    "pink": "floyd",
    "glass": "of",
    "open": "field fields space spaces area areas to up its their his her for with a the and in on wide air mouth",
    "closed": "to up",
    "bright": "and future",
    "dark": "chocolate and",
    "fresh": "air start",
    "short": "of stop film story",
    "long": "time as enough term way before after beach run island",
    "old": "fashioned school enough fashion",
    "young": "at girl girls boy boys child children kid kids",
    "square": "feet foot meters root of in",
    "round": "of up the trip about",
    "dry": "out off ice cleaning",
    "wood": "duck",
    "iron": "man maiden the",
    "paper": "towel towels plane",
    "stone": "age henge",
    "clean": "up the and",
    "small": "business talk group",
    "big": "ben apple bang data",
    "tan": "lines",
    "metal": "band music",
    "calm": "and down",
    "smiling": "at and for while in",
    "wide": "open range variety",
    "busy": "and with day days atmosphere schedule",
    "bustling": "day atmosphere",
    "crowded": "around atmosphere",
}
_FIXED_AFTER = {word: frozenset(text.split()) for word, text in _FIXED.items()}


def _is_attribute(
    entry: Entry, word: str, before: str, after: str, match: Match, context: dict[str, frozenset[str]]
) -> bool:
    """Whether an adjective's word is one here, said of a thing."""
    if before in ("polar", "olive", "very", "as", "so", "too", "-", "ultra", "'", "looking") or after == "-":
        return False
    if after in _FIXED_AFTER.get(word, ()) or (entry.group == "size" and after in _VAGUE):
        return False
    if word in ("dark", "bright") and after in CONTEXT["adjectives"]:
        return False  # a shade: "dark black"
    if before in ("light", "dark", "bright", "deep", "pale") and entry.group == "colour":
        return False
    if before == "and" and entry.group == "state":
        return False  # "bustling and busy" says one thing twice
    nominal = word in ("orange", "glass", "metal", "wood", "stone", "iron", "paper", "brick", "marble", "leather")
    nominal = nominal or word in ("cardboard", "plastic", "steel", "concrete", "round", "square", "dark", "open")
    nominal = nominal or word in ("granite", "wicker", "porcelain", "ceramic", "violet", "lavender", "teal", "old")
    if nominal or entry.group == "size" or word in ("long", "short", "dry", "clean", "wet", "fresh", "calm", "closed"):
        # these are nouns or verbs as well: they have to stand before a noun
        return after.isalpha() and after not in context["after"] and before not in ("to", "of the")
    return after.isalpha() or before in ("is", "are", "was", "were", "in", "and") or after in ("", ",", ".")


def _subject_is_animate(caption: Caption, matches: list[Match], index: int) -> bool:
    """Whether the nearest thing before match `index`, in its sentence, is a person or an animal."""
    start = matches[index].start
    at = matches[index - 1] if index else None
    for back in range(start - 1, max(-1, start - 9), -1):
        if caption.sentences[back] != caption.sentences[start]:
            return False
        if caption.low[back] in _ANIMATE_WORDS:
            return True
        while at is not None and at.start > back:
            index -= 1
            at = matches[index - 1] if index else None
        if at is not None and at.end - 1 == back:
            for meaning in at.meanings:
                if meaning.kind == "person":
                    return True
                if meaning.kind == "object":
                    return meaning.entry.group in ANIMATE_GROUPS
    return False


def _actions(caption: Caption, matches: list[Match], present: set[str]) -> list[Unit]:
    low = caption.low
    found: dict[int, Unit] = {}
    for index, match in enumerate(matches):
        if match.meanings[0].kind != "action" or _named(caption, match.start):
            continue
        before = low[match.start - 1] if match.start else ""
        after = low[match.end] if match.end < len(low) else "."
        for meaning in match.meanings:
            if meaning.kind != "action":
                continue
            frame, form = meaning.entry.group, meaning.form
            following = _PLACE_WORDS if frame == "posture" else _WAY_WORDS if frame == "motion" else _ARTICLES
            if after not in following:
                continue
            if form == 0 and before not in _HEARD_BEFORE_BASE:
                continue
            if before in ("a", "an", "the", "of", "for", "in", "'"):
                continue
            if not _subject_is_animate(caption, matches, index):
                continue
            options = [option.written for option in meaning.entry.options if option.name not in present]
            if options:
                unit = found.setdefault(id(meaning.entry), Unit("action", low[match.start], [], options))
                unit.sites.append(Site(match.start, match.end, form))
                break
    return list(found.values())
