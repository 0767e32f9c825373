"""Which words of an answer are not true of its picture: exact, because what a drawing shows is known.

An answer is read back into the facts that it states, each with the words that state it. Of the readings of the scene
(a scene of two things can be told from either) the one counts that fewest facts contradict; those are the
hallucinated ones.
"""

import re
from dataclasses import dataclass

from draw import BACKGROUNDS, COLOURS, COUNTS, OPENINGS, PLACES, RELATIONS, SHAPES, SIZES, Facts, seen_from_the_other


def _any_of(words: tuple[str, ...]) -> str:
    return "|".join(words)


def _thing(prefix: str) -> str:
    """One thing without its article, 'large red circle'; named groups, since `(?P<...>` allows no spaces."""
    return (
        rf"(?:(?P<{prefix}size>{_any_of(SIZES)}) )?(?P<{prefix}colour>{_any_of(tuple(COLOURS))}) "
        rf"(?P<{prefix}shape>{_any_of(SHAPES)})(?:e?s)?"
    )


_SENTENCE = re.compile(
    rf"(?:{_any_of(tuple(filter(None, OPENINGS)))}|There are )?(?:an?|(?P<count>{_any_of(COUNTS)})) {_thing('')}"
    rf"(?: (?P<relation>{_any_of(RELATIONS)}) an? {_thing('other_')})?"
    rf"(?: (?P<place>{_any_of(PLACES)}))?(?: on a (?P<background>{_any_of(BACKGROUNDS)}) background)?\.",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Stated:
    """A fact as an answer states it."""

    key: str
    value: str
    start: int
    end: int
    """Where its words stand."""


def read_answer(answer: str) -> list[Stated] | None:
    """The facts that a sentence of `draw.sentence`'s form states; None: it has another form."""
    match = _SENTENCE.fullmatch(answer)
    if match is None:
        return None
    found = []
    for name, value in match.groupdict().items():
        if value is not None:
            start, end = match.span(name)
            while answer[end].isalpha():  # of a plural
                end += 1
            found.append(Stated(name.replace("_", " "), value.lower(), start, end))
    return found


def hallucinated(answer: str, scene: Facts) -> list[Stated] | None:
    """The stated facts that are not true of the scene; none where all are, None where the form is unknown."""
    stated = read_answer(answer)
    if stated is None:
        return None
    views = (scene, seen_from_the_other(scene))
    if "count" in scene:  # of equal things, naming two is not false: only that they are not counted, but related
        views = ({f"other {key}": scene[key] for key in ("colour", "shape", "size")} | scene,)
    return min(([fact for fact in stated if view.get(fact.key) != fact.value] for view in views), key=len)


def marked(answer: str, scene: Facts) -> list[tuple[str, bool]]:
    """The answer in pieces, (text, whether it is hallucinated); one of another form is wholly so."""
    wrong = hallucinated(answer, scene)
    if wrong is None:
        return [(answer, True)] if answer else []
    pieces, at = [], 0
    for fact in sorted(wrong, key=lambda fact: fact.start):
        pieces += [(answer[at : fact.start], False), (answer[fact.start : fact.end], True)]
        at = fact.end
    return [piece for piece in (*pieces, (answer[at:], False)) if piece[0]]
