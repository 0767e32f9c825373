"""A caption as tokens, and what English asks of the words that are written into it: articles, plurals, case."""

import re
from dataclasses import dataclass

_TOKEN = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*|\d+(?:[.,]\d+)*|[^\w\s]|_")
_SENTENCE_ENDS = frozenset(".!?")
_VOWEL_SOUND = re.compile(r"(?!one\b|once\b|uni(?!nt|nv|nf|mp)|us[aeiu]|eu|ukulele)[aeiou]|hour|honest|heir")


@dataclass(slots=True)
class Caption:
    """One caption, cut into words, numbers and single punctuation marks."""

    text: str
    words: list[str]
    """Its n tokens as they stand."""
    low: list[str]
    """The same in lower case."""
    starts: list[int]
    """Where each begins in `text`."""
    sentences: list[int]
    """The number of the sentence each is in, from 0."""
    capitalised: bool
    """Whether it is in title case: a capital letter says nothing about names then."""

    def end(self, token: int) -> int:
        """Where a token ends in the text."""
        return self.starts[token] + len(self.words[token])


def tokenize(text: str) -> Caption:
    """Cut a caption into tokens; blanks and line ends stay in `text` alone."""
    words, starts, sentences = [], [], []
    sentence, long_words, capitals = 0, 0, 0
    for match in _TOKEN.finditer(text):
        word = match[0]
        words.append(word)
        starts.append(match.start())
        sentences.append(sentence)
        if len(word) > 3:
            long_words += 1
            capitals += word[0].isupper()
        elif word in _SENTENCE_ENDS:
            sentence += 1
    capitalised = long_words >= 2 and capitals >= 0.8 * long_words
    return Caption(text, words, [word.lower() for word in words], starts, sentences, capitalised)


def article_for(word: str) -> str:
    """`a` or `an`, by the sound that `word` begins with.

    >>> article_for("umbrella"), article_for("uniform"), article_for("hour")
    ('an', 'a', 'an')
    """
    return "an" if _VOWEL_SOUND.match(word.lower()) else "a"


def plural_of(word: str) -> str:
    """The regular plural of a noun; irregular ones stand in the word lists."""
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def in_case_of(new: str, caption: Caption, at: int) -> str:
    """`new` (lower case) in the case that the token `at` of the caption has."""
    old = caption.words[at]
    if len(old) > 1 and old.isupper():
        return new.upper()
    if not old[0].isupper():
        return new
    return new.title() if caption.capitalised else new[0].upper() + new[1:]
