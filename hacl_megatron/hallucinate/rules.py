"""Hallucinated captions by rules: offline, the same for the same seed, id and caption whatever else is processed.

    caption ─tokenize→ tokens ─lexicon→ matches ─units→ what it says ─draw 1 to 3→ edits ─write→ hallucinated caption

An edit exchanges an object, a person, a colour or another attribute, a count, an action or a spatial relation, or puts
in an object that the caption does not mention. What an edit writes contradicts the caption by the word lists; an
inserted object alone may happen to be in the picture (hallucinated objects are likely ones: POPE, EMNLP 2023).
"""

import hashlib
from dataclasses import dataclass
from random import Random

from hacl_megatron.hallucinate.lexicon import CONTEXT, Lexicon, lexicon
from hacl_megatron.hallucinate.relations import find_relations
from hacl_megatron.hallucinate.text import Caption, article_for, in_case_of, tokenize
from hacl_megatron.hallucinate.units import Site, Unit, find_units

_WEIGHTS = {"object": 3.0, "colour": 2.0, "count": 2.0, "spatial relation": 2.0, "action": 2.0, "person": 1.5}
_INSERTION = "inserted object"
_ENDINGS = (" with {} nearby", " next to {}", " and {}", " beside {}")
_SENTENCES = (
    " There is also {} in the scene.",
    " In the background, {} can be seen.",
    " {} is visible as well.",
    " Nearby, there is {}.",
)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change: what the caption said, and what it says now."""

    kind: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Hallucination:
    """A caption with errors written in."""

    text: str
    edits: tuple[Edit, ...]


def hallucinate(caption: str, *, seed: int, name: str, count: int = 1) -> list[Hallucination]:
    """Up to `count` different hallucinated captions; fewer where the caption gives no more, [] for one without words.

    The result depends on (seed, name, caption, count) alone, `name` being the record's id; the first n of a larger
    `count` are those of a smaller.
    """
    words = lexicon()
    parsed = tokenize(caption)
    if not any(word.isalpha() for word in parsed.low):
        return []
    digest = hashlib.blake2b(f"{seed}\0{name}\0{caption}".encode("utf-8", "surrogatepass"), digest_size=8)
    random = Random(int.from_bytes(digest.digest(), "little"))
    matches = words.matches(parsed.low)
    units = find_units(parsed, matches, words) + find_relations(parsed, matches, words)
    if not units:
        units = find_units(parsed, matches, words, relaxed=True)
    if not CONTEXT["negations"].isdisjoint(parsed.low):
        units = [unit for unit in units if not _is_denied(parsed, unit)]
    inserted = _insertion(parsed, matches, words)
    if not units or len(parsed.words) >= 8:
        units = [*units, inserted]
    seen = {_normal(caption)}
    same_words = sorted(caption.lower().split())
    found: list[Hallucination] = []
    for attempt in range(6 * count):
        if len(found) == count:
            break
        # the last tries may always insert: a caption with a single unit still gets `count` different ones
        candidate = _one(parsed, units if attempt < 3 * count else [*units[-1:], inserted], random)
        if candidate is None:
            continue
        key = _normal(candidate.text)
        if key in seen or sorted(candidate.text.lower().split()) == same_words:
            continue
        seen.add(key)
        found.append(candidate)
    return found


def _is_denied(caption: Caption, unit: Unit) -> bool:
    """Whether the caption says that something is not so: what takes its place may well not be so either."""
    negations = CONTEXT["negations"]
    return any(not negations.isdisjoint(caption.low[max(0, site.start - 4) : site.start]) for site in unit.sites)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _one(caption: Caption, units: list[Unit], random: Random) -> Hallucination | None:
    """Draws 1 to 3 units, by weight and by the caption's length, and an option of each."""
    length = len(caption.words)
    wanted = 1 if length < 9 else random.randint(1, 2) if length < 30 else random.randint(1, 3)
    order = sorted(units, key=lambda unit: random.random() ** (1.0 / _WEIGHTS.get(unit.kind, 1.5)), reverse=True)
    taken: set[int] = set()
    written: set[str] = set()
    changes: list[tuple[Site, str]] = []
    edits: list[Edit] = []
    for unit in order:
        tokens = {token for site in unit.sites for token in range(site.start, max(site.end, site.start + 1))}
        if tokens & taken:
            continue
        option = unit.options[random.randrange(len(unit.options))]
        text = next(form for form in option if form)
        if text in written:
            continue
        taken |= tokens
        written.add(text)
        changes += [(site, option[site.form] or text) for site in unit.sites]
        edits.append(Edit(kind=unit.kind, before=unit.name, after=text.strip()))
        if len(edits) == wanted:
            break
    if not edits:
        return None
    return Hallucination(text=_write(caption, changes), edits=tuple(edits))


def _write(caption: Caption, changes: list[tuple[Site, str]]) -> str:
    """The caption's text with the changes in: in the old words' case, with the articles before them made to fit."""
    pieces, at = [], 0
    for site, new in sorted(changes, key=lambda change: (change[0].start, change[0].end)):
        if site.start == site.end:  # an insertion, which brings its own blanks and case
            begin = end = caption.end(site.start - 1) if site.start else 0
        else:
            begin, end = caption.starts[site.start], caption.end(site.end - 1)
            new = in_case_of(new, caption, site.start)
        if site.start and site.start < site.end and caption.low[site.start - 1] in ("a", "an"):
            article = in_case_of(article_for(new), caption, site.start - 1)
            if caption.words[site.start - 1] == "A" and not caption.words[site.start].isupper():
                article = article.capitalize()
            pieces += [caption.text[at : caption.starts[site.start - 1]], article]
            at = caption.end(site.start - 1)
        pieces += [caption.text[at:begin], new]
        at = end
    return "".join((*pieces, caption.text[at:]))


def _insertion(caption: Caption, matches: list, words: Lexicon) -> Unit:
    """An object that the caption does not mention: as a sentence of its own in a long caption, else at the end."""
    mentioned, groups = set(), []
    for match in matches:
        for meaning in match.meanings:
            mentioned.add(meaning.entry.name)
            if meaning.kind == "object" and meaning.entry.group in words.scenes:
                groups.append(meaning.entry.group)
    barred = mentioned | {name for match in matches for meaning in match.meanings for name in (meaning.entry.name,)}
    present = set(caption.low)
    pool = {entry.name: entry for group in groups[:4] for entry in words.scenes[group]}
    pool = pool or {entry.name: entry for entry in words.scenes["anything"]}
    names = [name for name in pool if name not in barred and not present & set(name.split())]
    names = names or ["red umbrella"]
    ends = [i + 1 for i, word in enumerate(caption.low) if word == "."]
    if len(ends) >= 2 and len(caption.words) >= 30:
        place = ends[len(ends) // 2 - 1]
        texts = []
        for number, name in enumerate(names):
            phrase = f"{article_for(name)} {name}"
            template = _SENTENCES[number % len(_SENTENCES)]
            texts.append(template.format(phrase.capitalize() if template.startswith(" {") else phrase))
    else:
        place = len(caption.words)
        while place and not caption.words[place - 1][-1].isalnum():
            place -= 1
        texts = []
        for number, name in enumerate(names):
            text = _ENDINGS[number % len(_ENDINGS)].format(f"{article_for(name)} {name}")
            texts.append(text.title() if caption.capitalised else text)
        if caption.text.isupper():
            texts = [text.upper() for text in texts]
    return Unit(_INSERTION, "", [Site(place, place, 0)], [(text,) for text in texts])
