"""The nouns of a description, for AMBER: as its script finds them, or by an approximation that downloads nothing.

`SpacyNouns`    NLTK's tagger and WordNet lemmatiser, and spaCy's `en_core_web_lg` (400 MB) for near synonyms: AMBER's
                own way, with its own models. Scores to publish need it.
`LexiconNouns`  TextBlob's lexicon tagger and rule-based singulars, no near synonyms.
"""

from collections.abc import Set
from functools import lru_cache
from typing import Protocol

SPACY_MODEL = "en_core_web_lg"
SIMILARITY = 0.8
"""Cosine above which two words are near synonyms (`--similarity_score` of AMBER's script)."""


class NounReader(Protocol):
    """What AMBER's scorer asks about words."""

    notes: tuple[str, ...]
    """What to say about scores that were made with it."""

    def nouns(self, text: str, known: Set[str]) -> list[str]:
        """The nouns of `text` in its order, as lemmas; `known` are those that matter."""
        ...

    def similar(self, first: str, second: str) -> bool:
        """Whether two nouns are near synonyms."""
        ...


class LexiconNouns:
    """Nouns by TextBlob's lexicon tagger, which ships its data. Raises ValueError where TextBlob is not installed."""

    notes = (
        "approximation: AMBER's nouns by TextBlob's lexicon tagger, near synonyms by AMBER's relation.json alone; not "
        "comparable with published CHAIR, Cover, Hal, Cog (for those: --amber-nouns spacy)",
    )

    def __init__(self) -> None:
        try:
            from nltk.tokenize import NLTKWordTokenizer
            from nltk.tokenize.punkt import PunktSentenceTokenizer
            from textblob.en import tag
            from textblob.en.inflect import singularize
        except ImportError as error:
            raise ValueError(f"AMBER's descriptions need textblob and nltk ({error}): pip install textblob") from None
        self._sentences, self._words, self._tag = PunktSentenceTokenizer(), NLTKWordTokenizer(), tag
        self._singularize = lru_cache(maxsize=None)(singularize)

    def nouns(self, text: str, known: Set[str]) -> list[str]:
        found = []
        for sentence in self._sentences.tokenize(text):
            for word, kind in self._tag(" ".join(self._words.tokenize(sentence)), tokenize=False):
                if kind.startswith("NN"):
                    found.append(word if word in known else self._singularize(word))
        return found

    def similar(self, first: str, second: str) -> bool:
        return first == second


class SpacyNouns:
    """Nouns and near synonyms exactly as AMBER's `inference.py` finds them.

    Args:
        model: a spaCy model with word vectors, by name or folder.

    Raises:
        ValueError: NLTK, spaCy, or the data of either is not there; says what to download.
    """

    def __init__(self, model: str = SPACY_MODEL) -> None:
        try:
            import nltk
            import spacy
            from nltk.stem import WordNetLemmatizer

            self._nlp = spacy.load(model)
        except (ImportError, OSError) as error:
            raise ValueError(
                f"--amber-nouns spacy needs spaCy's {model} ({_first_line(error)}): pip install spacy nltk; "
                f"python -m spacy download {SPACY_MODEL}"
            ) from None
        self._nltk, self._lemmatizer = nltk, WordNetLemmatizer()
        try:
            self.nouns("A dog sits.", frozenset())
        except LookupError as error:
            raise ValueError(
                f"--amber-nouns spacy needs NLTK's data ({_first_line(error)}): python -m nltk.downloader punkt_tab "
                "averaged_perceptron_tagger_eng wordnet"
            ) from None
        self.notes = () if model == SPACY_MODEL else (f"near synonyms by {model}, not AMBER's {SPACY_MODEL}",)
        self.similar = lru_cache(maxsize=None)(self._similar)

    def nouns(self, text: str, known: Set[str]) -> list[str]:
        tagged = self._nltk.pos_tag(self._nltk.word_tokenize(text))
        return [self._lemmatizer.lemmatize(word) for word, kind in tagged if kind.startswith("NN")]

    def _similar(self, first: str, second: str) -> bool:
        return self._nlp(first).similarity(self._nlp(second)) > SIMILARITY


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip(" *")), type(error).__name__)[:200]
