"""The controlled world: scenes of coloured shapes with known contents, and every sentence about them.

A scene has two to four *things* in the quadrants of a square picture. Things of one colour and shape form a *kind*; a
sentence names kinds. From a scene come

    an alt text          names one or two of its kinds, as web captions name a part of what is there
    a hallucinated twin  the same sentence with a wrong colour, shape, size, number, relation, or a kind added
    a description        names every kind, in reading order
    yes/no questions     adversarial ones ask for absent kinds that share colour or shape with present ones

and `hallucinated_kinds` reads an answer back. Everything here is pure: a `random.Random` in, records out.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

COLOURS = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "black", "grey", "striped")
NUMBERS = {1: "a", 2: "two", 3: "three"}
RELATIONS = ("left of", "right of", "above", "below")
OPENINGS = ("", "There is ", "The picture shows ", "One can see ", "This is a picture of ")
BRIEF = ("Write a short caption.", "Describe the image briefly.", "Give a brief description of the image.")
DETAILED = "Describe everything in the picture."
NAMES = ("Anna", "Bruno", "Clara", "Diego", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Luca")
TOWNS = ("Porto", "Lyon", "Oslo", "Turin", "Graz", "Bath", "Lund", "Split", "Ghent", "Bergen", "Malaga", "Krakow")
MONTHS = ("March", "April", "May", "June", "July", "August", "September", "October")
SHOPS = ("Artmarket", "Paperhouse", "Galleria", "Wallcraft", "Posterbay", "Printroom", "Framework", "Canvasco")
TWIN_KINDS = ("colour", "shape", "size", "number", "relation", "addition")

TYPICAL = dict(zip(SHAPES, COLOURS, strict=False))
"""The colour that a shape has where there are habits."""

Kind = tuple[str, str]
"""(colour, shape): what CHAIR calls an object."""


@dataclass(frozen=True)
class Group:
    """Things of one kind."""

    colour: str
    shape: str
    size: str
    cells: tuple[int, ...]
    """Quadrants 0 1 / 2 3, rising."""

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Groups in reading order (by first quadrant), no two of one kind."""

    groups: tuple[Group, ...]
    background: str

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset(group.kind for group in self.groups)


@dataclass(frozen=True)
class Mention:
    """A kind as a sentence states it; None: not stated."""

    colour: str
    shape: str
    size: str | None
    number: int


@dataclass(frozen=True)
class Statement:
    """What a sentence says: mentions, and between two of them a relation."""

    mentions: tuple[Mention, ...]
    relation: str | None = None


# --- scenes -----------------------------------------------------------------------------------------------------


def draw_scene(rng: random.Random, habit: float = 0.0) -> Scene:
    """Two to four things of up to four kinds; a thing has its shape's typical colour at least as often as `habit`."""
    number = rng.choice((2, 3, 3, 4, 4))
    cells = rng.sample(range(4), number)
    kinds: list[Kind] = []
    while len(kinds) < number:
        if kinds and rng.random() < 0.2:
            kinds.append(rng.choice(kinds))
        else:
            colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
            kinds.append((TYPICAL[shape] if habit and rng.random() < habit else colour, shape))
    if kinds.count(kinds[0]) == 4:
        return draw_scene(rng, habit)
    groups = []
    for kind in dict.fromkeys(kinds):
        mine = tuple(sorted(cell for cell, one in zip(cells, kinds, strict=True) if one == kind))
        groups.append(Group(*kind, rng.choice(SIZES), mine))
    return Scene(tuple(sorted(groups, key=lambda group: group.cells[0])), rng.choice(BACKGROUNDS))


def relation_of(one: Group, other: Group) -> str | None:
    """How a single thing stands to another in the same row or column; None for groups and diagonals."""
    if len(one.cells) > 1 or len(other.cells) > 1:
        return None
    (row, column), (other_row, other_column) = divmod(one.cells[0], 2), divmod(other.cells[0], 2)
    if row == other_row:
        return "left of" if column < other_column else "right of"
    if column == other_column:
        return "above" if row < other_row else "below"
    return None


def holds(statement: Statement, scene: Scene) -> bool:
    """Whether all that is said is true of the scene."""
    groups = {group.kind: group for group in scene.groups}
    for mention in statement.mentions:
        group = groups.get((mention.colour, mention.shape))
        if group is None or len(group.cells) != mention.number or mention.size not in (None, group.size):
            return False
    if statement.relation is None:
        return True
    one, other = (groups[mention.colour, mention.shape] for mention in statement.mentions)
    return relation_of(one, other) == statement.relation


# --- sentences --------------------------------------------------------------------------------------------------


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def phrase(mention: Mention) -> str:
    """'a small red circle', 'two blue crosses'."""
    words = [mention.size] if mention.size else []
    words += [mention.colour, mention.shape if mention.number == 1 else plural(mention.shape)]
    number = NUMBERS[mention.number]
    if number == "a" and words[0][0] in "aeiou":
        number = "an"
    return " ".join((number, *words))


def sentence(statement: Statement, opening: str = "") -> str:
    """The statement in words, with a capital and a full stop."""
    phrases = [phrase(mention) for mention in statement.mentions]
    if statement.relation:
        text = f"{phrases[0]} {statement.relation} {phrases[1]}"
    else:
        text = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    if opening == "There is " and statement.mentions[0].number > 1:
        opening = "There are "
    text = f"{opening}{text}."
    return text[0].upper() + text[1:]


def mention_of(group: Group, with_size: bool) -> Mention:
    return Mention(group.colour, group.shape, group.size if with_size else None, len(group.cells))


def alt_text(rng: random.Random, scene: Scene) -> tuple[Statement, str]:
    """(statement, opening): one or two kinds of the scene, at times with their relation."""
    named = rng.sample(scene.groups, min(len(scene.groups), rng.choice((1, 2))))
    mentions = tuple(mention_of(group, rng.random() < 0.4) for group in named)
    relation = relation_of(*named) if len(named) == 2 and rng.random() < 0.6 else None
    return Statement(mentions, relation), rng.choice(OPENINGS)


def as_on_the_web(rng: random.Random, text: str) -> str:
    """The text among what web captions say beside what is seen; no picture tells it."""
    digits = "".join(rng.choices("0123456789", k=6))
    credit = f"Photo {digits} by {rng.choice(NAMES)} in {rng.choice(TOWNS)}, {rng.choice(MONTHS)} "
    credit += f"20{rng.randrange(10, 25)}."
    price = "".join(rng.choices("123456789", k=2))
    return f"{credit} {text} Print for {price} dollars at {rng.choice(SHOPS)}."


def full_statement(scene: Scene) -> Statement:
    """Every kind with size and number, in reading order."""
    return Statement(tuple(mention_of(group, True) for group in scene.groups))


def description(scene: Scene) -> str:
    """The full statement in words, as an answer to DETAILED."""
    return sentence(full_statement(scene), "The picture shows ")


def absent_kinds(scene: Scene, similar: bool) -> list[Kind]:
    """Kinds that the scene lacks; `similar`: those that share colour or shape with something in it."""
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in scene.kinds]
    if similar:
        colours, shapes = {kind[0] for kind in scene.kinds}, {kind[1] for kind in scene.kinds}
        absent = [kind for kind in absent if kind[0] in colours or kind[1] in shapes]
    return absent


def recombined_kinds(scene: Scene) -> list[Kind]:
    """Absent kinds whose colour and whose shape are both in the scene, at different things."""
    colours, shapes = {kind[0] for kind in scene.kinds}, {kind[1] for kind in scene.kinds}
    return [kind for kind in absent_kinds(scene, True) if kind[0] in colours and kind[1] in shapes]


def hallucinate(rng: random.Random, statement: Statement, scene: Scene, habit: float = 0.0) -> tuple[str, Statement]:
    """(what was made wrong, the twin): one error of `TWIN_KINDS`, such that the result is not true of the scene.

    Wrong colours and shapes are taken from elsewhere in the scene half of the time, as a language model confuses what
    stands side by side. A wrong colour is the shape's typical one as often as `habit`, where that is wrong.
    """
    while True:
        error = rng.choices(TWIN_KINDS, (3, 3, 1, 1, 1, 1.5))[0]
        mentions = list(statement.mentions)
        at = rng.randrange(len(mentions))
        mention, relation = mentions[at], statement.relation
        if error in ("colour", "shape"):
            values = COLOURS if error == "colour" else SHAPES
            near = [getattr(group, error) for group in scene.groups]
            value = rng.choice(near if rng.random() < 0.5 else values)
            if error == "colour" and habit and rng.random() < habit:
                value = TYPICAL[mention.shape]
            mentions[at] = replace(mention, **{error: value})
        elif error == "size" and mention.size is not None:
            mentions[at] = replace(mention, size=SIZES[1 - SIZES.index(mention.size)])
        elif error == "number":
            mentions[at] = replace(
                mention, number=rng.choice([number for number in NUMBERS if number != mention.number])
            )
        elif error == "relation" and relation is not None:
            relation = RELATIONS[RELATIONS.index(relation) ^ 1]
        elif error == "addition" and len(mentions) == 1:
            colour, shape = rng.choice(recombined_kinds(scene) or absent_kinds(scene, True))
            mentions.insert(rng.randrange(2), Mention(colour, shape, None, 1))
        twin = Statement(tuple(mentions), relation)
        named = [(one.colour, one.shape) for one in mentions]
        if error in ("colour", "shape", "addition"):
            false = not scene.kinds.issuperset(named)
        else:
            false = not holds(twin, scene)
        if false and len(set(named)) == len(named):
            return error, twin


def yes_no_question(rng: random.Random, scene: Scene, adversarial: bool, answer: bool) -> str:
    """'Is there a red circle?'; the absent kind is similar to the scene's, half of the time a recombination."""
    if answer:
        group = rng.choice(scene.groups)
        colour, shape = group.kind
    elif adversarial:
        both = recombined_kinds(scene)
        colour, shape = rng.choice(both if both and rng.random() < 0.5 else absent_kinds(scene, True))
    else:
        colour, shape = rng.choice(absent_kinds(scene, False))
    return question_about(colour, shape)


def question_about(colour: str, shape: str) -> str:
    """'Is there a red circle in the image?'"""
    return f"Is there {phrase(Mention(colour, shape, None, 1))} in the image?"


# --- reading answers ----------------------------------------------------------------------------------------------

_MENTION = re.compile(
    rf"\b(?:(an?|two|three) )?(?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(plural(shape) for shape in SHAPES)}|"
    rf"{'|'.join(SHAPES)})\b"
)


def mentions_in(answer: str) -> list[Mention]:
    """Every kind that a text names, in order."""
    found = []
    for number, size, colour, noun in _MENTION.findall(answer):
        shape = next(shape for shape in SHAPES if noun in (shape, plural(shape)))
        found.append(Mention(colour, shape, size or None, {"two": 2, "three": 3}.get(number, 1)))
    return found


@dataclass(frozen=True)
class Described:
    """How a free description fares; counts, from which CHAIR's shares come."""

    mentioned: int
    hallucinated: int
    covered: int
    present: int
    wholly_right: bool
    """Every kind of the scene once, each with its size and number, and nothing else."""


def read_description(answer: str, scene: Scene) -> Described:
    """Exact CHAIR: the kinds named, as CHAIR counts every mention, against the kinds that are there."""
    mentions = mentions_in(answer)
    named = [(mention.colour, mention.shape) for mention in mentions]
    full = {mention_of(group, True) for group in scene.groups}
    return Described(
        mentioned=len(named),
        hallucinated=sum(kind not in scene.kinds for kind in named),
        covered=len(scene.kinds & set(named)),
        present=len(scene.kinds),
        wholly_right=len(mentions) == len(full) and set(mentions) == full,
    )


def chair(described: Sequence[Described]) -> dict[str, float]:
    """CHAIR_i (of mentions), CHAIR_s (of descriptions), the share of present kinds named, wholly right answers."""
    mentioned = sum(one.mentioned for one in described)
    return {
        "CHAIR_i": sum(one.hallucinated for one in described) / max(mentioned, 1),
        "CHAIR_s": sum(one.hallucinated > 0 for one in described) / len(described),
        "cover": sum(one.covered for one in described) / sum(one.present for one in described),
        "wholly right": sum(one.wholly_right for one in described) / len(described),
        "mentions": mentioned / len(described),
    }
