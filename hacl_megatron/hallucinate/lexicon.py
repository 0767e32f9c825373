"""The word lists in `words/`, read once into tables that map a phrase to what it may mean.

    "wine glasses" -> Meaning(kind="object", entry=<class wine glass>, form=PLURAL)
    "orange"       -> Meaning(kind="object", ...fruit), Meaning(kind="attribute", ...colour)

The lists were written for this project; their format is explained at the head of each.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from hacl_megatron.hallucinate.text import plural_of, tokenize

SINGULAR, PLURAL, MASS = range(3)
"""Forms of a noun: index into an entry's `written`."""


def _lines(name: str) -> Iterator[tuple[str, str]]:
    """(section, line) of a word list, without comments and empty lines."""
    section = ""
    text = (resources.files(__package__) / "words" / name).read_text(encoding="utf-8")
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif line and not line.startswith("#"):
            yield section, line


def _context() -> dict[str, frozenset[str]]:
    sections: dict[str, frozenset[str]] = {}
    for section, line in _lines("context.txt"):
        sections[section] = sections.get(section, frozenset()) | frozenset(line.split())
    return sections


CONTEXT = _context()
"""Words around a phrase by what they show (words/context.txt)."""


@dataclass(eq=False, slots=True)
class Entry:
    """Words of one meaning, and how it is written into a caption."""

    name: str
    """Its first word."""
    group: str
    """The section of its list: objects of one kind, colours, a verb's frame."""
    written: tuple[str | None, ...]
    """Its forms; None for one that it lacks. Nouns: singular, plural, mass; verbs: base, third person, -ing."""
    options: list["Entry"] = field(default_factory=list)
    """What contradicts it: may be written in its place."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """One reading of a phrase."""

    kind: str
    """`object`, `person`, `attribute` or `action`."""
    entry: Entry
    form: int


@dataclass(slots=True)
class Match:
    """Tokens start to end - 1 of a caption are a phrase of the lists."""

    start: int
    end: int
    meanings: tuple[Meaning, ...]


class Lexicon:
    """All lists. `Lexicon()` reads them (some 10 ms); `lexicon()` keeps one for the process."""

    def __init__(self) -> None:
        self._phrases: dict[str, list[Meaning]] = {}
        self._lengths: dict[str, list[int]] = {}
        self.objects: dict[str, Entry] = {}
        """Object classes by their first word."""
        self.scenes: dict[str, list[Entry]] = {}
        """Objects that may be invented, by the group of an object that is there, or `anything`."""
        self._read_objects()
        self._read_people()
        self._read_attributes()
        self._read_actions()
        self._read_scenes()
        for lengths in self._lengths.values():
            lengths.sort(reverse=True)
        self._found = {phrase: tuple(meanings) for phrase, meanings in self._phrases.items()}

    def matches(self, low: list[str]) -> list[Match]:
        """The phrases among lower-case tokens: the longest at each place, from left to right, never overlapping."""
        found, at, count = [], 0, len(low)
        lengths, phrases = self._lengths, self._found
        while at < count:
            step = 1
            for length in lengths.get(low[at], ()):
                if at + length <= count:
                    phrase = low[at] if length == 1 else " ".join(low[at : at + length])
                    if phrase in phrases:
                        found.append(Match(at, at + length, phrases[phrase]))
                        step = length
                        break
            at += step
        return found

    def same_meaning(self, one: str, other: str) -> bool:
        """Whether two words may say the same (dog and puppies, big and large), as far as the lists know."""
        entries = [{id(meaning.entry) for meaning in self._phrases.get(word.lower(), ())} for word in (one, other)]
        return bool(entries[0] & entries[1])

    def _add(self, phrase: str, kind: str, entry: Entry, form: int) -> None:
        tokens = tokenize(phrase).low
        key = " ".join(tokens)
        meanings = self._phrases.setdefault(key, [])
        if not any(m.kind == kind and m.entry is entry for m in meanings):
            meanings.append(Meaning(kind, entry, form))
        lengths = self._lengths.setdefault(tokens[0], [])
        if len(tokens) not in lengths:
            lengths.append(len(tokens))

    def _read_objects(self) -> None:
        groups: dict[str, list[Entry]] = {}
        for group, line in _lines("objects.txt"):
            nouns = [_noun(word.strip()) for word in line.split("|")]
            entry = Entry(next(form for form in nouns[0] if form), group, nouns[0])
            assert entry.name not in self.objects, f"objects.txt: {entry.name} leads two classes"
            self.objects[entry.name] = entry
            groups.setdefault(group, []).append(entry)
            for forms in nouns:
                for form, word in enumerate(forms):
                    if word:
                        self._add(word, "object", entry, form)
        barred: dict[str, set[str]] = {}
        for _, line in _lines("conflicts.txt"):
            names = [name.strip() for name in line.split(",")]
            for name in names:
                assert name in self.objects, f"conflicts.txt: {name} leads no class of objects.txt"
                barred.setdefault(name, set()).update(names)
        for entries in groups.values():
            for entry in entries:
                bars = barred.get(entry.name, set())
                entry.options = [other for other in entries if other is not entry and other.name not in bars]

    def _read_people(self) -> None:
        for _, line in _lines("people.txt"):
            word, others = line.split(" : ")
            forms = _noun(word)
            entry = Entry(forms[0] or "", "people", forms)
            entry.options = [
                Entry(_noun(other)[0] or "", "people", _noun(other)) for other in map(str.strip, others.split(","))
            ]
            for form in (SINGULAR, PLURAL):
                self._add(forms[form] or "", "person", entry, form)

    def _read_attributes(self) -> None:
        for section, line in _lines("attributes.txt"):
            words, others = line.split(" : ")
            names = [word.strip() for word in words.split("|")]
            entry = Entry(names[0], section, (names[0],))
            entry.options = [Entry(other.strip(), section, (other.strip(),)) for other in others.split(",")]
            for name in names:
                self._add(name, "attribute", entry, 0)

    def _read_actions(self) -> None:
        for frame, line in _lines("actions.txt"):
            words, others = line.split(" : ")
            entry = Entry(words.split()[2], frame, ())
            entry.options = []
            for other in others.split(","):
                base, third, continuous, *rest = other.split()
                particle = "".join(" " + word for word in rest)
                forms = (base + particle, third + particle, continuous + particle)
                entry.options.append(Entry(continuous, frame, forms))
            for verb in words.split("|"):
                for form, word in enumerate(verb.split()):
                    if word not in ("be", "is"):
                        self._add(word, "action", entry, form)

    def _read_scenes(self) -> None:
        for _, line in _lines("scenes.txt"):
            triggers, names = line.split(" : ")
            entries = []
            for name in map(str.strip, names.split(",")):
                entry = self.objects.get(name) or Entry(name, "", (name, None, None))
                entries.append(entry)
            for trigger in map(str.strip, triggers.split(",")):
                self.scenes[trigger] = entries


@cache
def lexicon() -> Lexicon:
    """The word lists, read on the first call."""
    return Lexicon()


def _noun(word: str) -> tuple[str | None, str | None, str | None]:
    """(singular, plural, mass) of a word as the lists write it."""
    word = word.strip()
    if word.endswith("/mass"):
        return None, None, word.removesuffix("/mass")
    if word.endswith("/plural"):
        return None, word.removesuffix("/plural"), None
    singular, _, plural = word.partition("=")
    return singular, plural or plural_of(singular), None
