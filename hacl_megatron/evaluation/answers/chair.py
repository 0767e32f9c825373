"""CHAIR (arXiv 1809.02156): objects that captions name and images do not have, as LisaAnne/Hallucination counts them.

    captions  {"image_id": 1290, "caption": "A child beside a cake."}    one a line, or a list
    objects   {"1290": ["cake", "chair", "person"], ...}                 or POPE's {"image", "objects"} lines, or
                                                                         COCO's folder of annotations

    caption ─lower, words, singular─→ double words ("hot dog") ─synonyms→ COCO objects ─not in the image→ hallucinated

CHAIR_s is the share of captions with a hallucinated object, CHAIR_i the share of hallucinated mentions among all
mentions; recall (of the image's objects) is that of the script's standalone form, Maxlinn/CHAIR-metric-standalone.

Words come from NLTK's tokenizer and singulars from TextBlob, whose inflection is the maintained port of the published
script's `pattern` (abandoned, and another package's name on the index by now).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hacl_megatron.config.files.regular import only_regular
from hacl_megatron.evaluation.json_files import expect_text, read_json, read_records
from hacl_megatron.evaluation.scores import Scores, ratio

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_DOUBLES = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier", "potted plant",
    "laptop computer", "stove top oven", "home plate", "train track",
)  # fmt: skip
DOUBLE_WORDS: dict[str, str] = {
    **dict(zip(_DOUBLES, _DOUBLES, strict=True)),
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},  # not a person
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",  # what `pattern` makes of "wine glass"
}
"""Two words that count as one, and as what."""


class Synonyms:
    """COCO's 80 objects and the words that stand for them: one object a line, its own name first, `, ` between."""

    def __init__(self, text: str) -> None:
        self.object_of: dict[str, str] = {}
        """Word -> object. A word of several lines belongs to the last, as in the published script."""
        for line in text.splitlines():
            if line.strip():
                words = line.strip().split(", ")
                self.object_of.update(dict.fromkeys(words, words[0]))

    @classmethod
    def read(cls, path: Path | None = None) -> "Synonyms":
        """From a file; without one, the published list (data/synonyms.txt of LisaAnne/Hallucination)."""
        if path is None:
            published = files("hacl_megatron.evaluation.answers").joinpath("coco_synonyms.txt")
            return cls(published.read_text(encoding="utf-8"))
        try:
            with open(path, encoding="utf-8", opener=only_regular) as file:
                synonyms = cls(file.read())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--synonyms {path}: cannot be read ({error})") from None
        if not synonyms.object_of:
            raise ValueError(f"--synonyms {path} is empty, expected a line for each object: its name, then synonyms")
        return synonyms


class ObjectReader:
    """Finds the COCO objects that a caption names. Raises ValueError where NLTK or TextBlob is not installed."""

    def __init__(self, synonyms: Synonyms) -> None:
        self.synonyms = synonyms
        try:
            from nltk.tokenize import NLTKWordTokenizer
            from nltk.tokenize.punkt import PunktSentenceTokenizer
            from textblob.en.inflect import singular_ie, singularize
        except ImportError as error:
            raise ValueError(
                f"CHAIR needs textblob and nltk ({error}): pip install textblob, which brings both"
            ) from None
        # Without a trained model Punkt knows no abbreviations. That changes no score: none of those of NLTK's English
        # model is, or is part of, a synonym, and all that the sentence's end decides is whether a full stop leaves its
        # word. So nothing has to be downloaded.
        self._sentences, self._words = PunktSentenceTokenizer(), NLTKWordTokenizer()
        self._unchanged = tuple(f"{stem}s" for stem in singular_ie)
        self._singularize = singularize
        self.singular = lru_cache(maxsize=None)(self._singular)

    def _singular(self, word: str) -> str:
        """A word's singular by `pattern` 3.6, from which TextBlob departs in two rules.

        `pattern` leaves "collies" and "doggies" as they are and knows "airbus"; TextBlob would find a "bus" in it.
        """
        if word.endswith(self._unchanged):
            return word
        return word[:-2] if word.endswith("buses") else self._singularize(word)

    def objects(self, caption: str) -> list[tuple[str, str]]:
        """(word, object) for each mention, in the caption's order: `("child", "person")`."""
        words = [
            self.singular(word)
            for sentence in self._sentences.tokenize(caption.lower())
            for word in self._words.tokenize(sentence)
        ]
        merged, position = [], 0
        while position < len(words):
            double = DOUBLE_WORDS.get(" ".join(words[position : position + 2]))
            merged.append(words[position] if double is None else double)
            position += 1 if double is None else 2
        if "toilet" in merged:  # the seat of a toilet is no chair
            merged = [word for word in merged if word != "seat"]
        object_of = self.synonyms.object_of
        return [(word, object_of[word]) for word in merged if word in object_of]


def score_chair(
    captions: Sequence[dict[str, Any]],
    objects: Mapping[int, Iterable[str]],
    *,
    synonyms: Synonyms | None = None,
    where: Path | str = "captions",
) -> Scores:
    """CHAIR over all captions; `details["sentences"]` has what was found in each.

    Args:
        objects: names of the objects in each image, by image id (`read_objects`).
        where: the captions' file, for messages.

    Raises:
        ValueError: an image without an entry in `objects`, or captions of a wrong kind.
    """
    reader = ObjectReader(synonyms or Synonyms.read())
    sentences: list[dict[str, Any]] = []
    mentions = hallucinated_mentions = present = recalled = empty = 0
    for number, record in enumerate(captions, 1):
        caption, image = expect_text(record, "caption", where, number), _image_id(record["image_id"], where)
        if image not in objects:
            raise ValueError(
                f"{where}, record {number}: image {image} is not among the {len(objects)} images with known objects; "
                "give --objects a file that has it"
            )
        truth, found = frozenset(objects[image]), reader.objects(caption)
        hallucinated = [pair for pair in found if pair[1] not in truth]
        seen = {name for _, name in found} & truth
        mentions += len(found)
        hallucinated_mentions += len(hallucinated)
        present += len(truth)
        recalled += len(seen)
        empty += not caption.strip()
        sentences.append({
            "image_id": image,
            "mscoco_hallucinated_words": [list(pair) for pair in hallucinated],
            "mscoco_generated_words": [name for _, name in found],
            "mscoco_gt_words": sorted(truth),
            "metrics": {
                "CHAIRs": int(bool(hallucinated)),
                "CHAIRi": len(hallucinated) / len(found) if found else 0.0,
                "Recall": len(seen) / len(truth) if truth else 0.0,
            },
        })  # fmt: skip
    bad = sum(sentence["metrics"]["CHAIRs"] for sentence in sentences)
    return Scores(
        task="chair",
        metrics={
            "CHAIRs": ratio(bad, len(sentences)),
            "CHAIRi": ratio(hallucinated_mentions, mentions),
            "Recall": ratio(recalled, present),
        },
        counts={
            "captions": len(sentences),
            "captions with a hallucinated object": bad,
            "object mentions": mentions,
            "hallucinated mentions": hallucinated_mentions,
            "objects in the images": present,
            "objects recalled": recalled,
        },
        decimals=1,
        percent=True,
        notes=(f"{empty} empty captions, in which CHAIR finds no hallucination",) if empty else (),
        details={"sentences": sentences},
    )


# ------------------------------------------------------------------------------------------------------------- objects


def read_objects(path: Path, synonyms: Synonyms) -> dict[int, frozenset[str]]:
    """Objects of each image by its id, from one of three sources.

    * a JSON object `{"1290": ["cake", ...]}`,
    * POPE's ground truth, `{"image": "COCO_val2014_000000001290.jpg", "objects": ["cake", ...]}` a line,
    * a folder with COCO's `instances_*.json` and `captions_*.json`: the segmented objects and those of the reference
      captions, as CHAIR defines its ground truth.

    Raises ValueError for what is none of these, or a name that is no synonym of an object.
    """
    if path.is_dir():
        return _coco_objects(path, synonyms)
    text_starts_object = path.is_file() and path.open(encoding="utf-8", errors="replace").read(4096).lstrip()[:1] == "{"
    named: dict[int, list[str]] = {}
    if text_starts_object and _is_one_object(path):
        named = {_image_id(key, path): value for key, value in read_json(path).items()}
    else:
        for record in read_records(path, needed=("image", "objects"), kind="ground-truth objects"):
            named[image_id_of_name(record["image"])] = record["objects"]
    for image, names in named.items():
        if not isinstance(names, list):
            raise ValueError(
                f"{path}: the objects of image {image} are {type(names).__name__}, expected a list of names"
            )
    return {image: frozenset(_object_of(name, synonyms, path) for name in names) for image, names in named.items()}


def _is_one_object(path: Path) -> bool:
    """Whether the file is a single JSON object rather than one a line."""
    try:
        return "objects" not in read_json(path)
    except ValueError:
        return False


def _coco_objects(folder: Path, synonyms: Synonyms) -> dict[int, frozenset[str]]:
    instances, captions = sorted(folder.glob("instances_*.json")), sorted(folder.glob("captions_*.json"))
    if not instances or not captions:
        raise ValueError(
            f"--objects {folder}: found {len(instances)} instances_*.json and {len(captions)} captions_*.json, "
            "expected at least one of each (COCO's annotations_trainval2014)"
        )
    found: dict[int, set[str]] = {}
    for path in instances:
        content = read_json(path)
        names = {row["id"]: _object_of(row["name"], synonyms, path) for row in content["categories"]}
        found.update({row["id"]: set() for row in content.get("images", ()) if row["id"] not in found})
        for row in content["annotations"]:
            found.setdefault(row["image_id"], set()).add(names[row["category_id"]])
    reader = ObjectReader(synonyms)
    for path in captions:
        for row in read_json(path)["annotations"]:
            found.setdefault(row["image_id"], set()).update(name for _, name in reader.objects(row["caption"]))
    return {image: frozenset(names) for image, names in found.items()}


def _object_of(name: Any, synonyms: Synonyms, where: Path) -> str:
    if name not in synonyms.object_of:
        raise ValueError(f"{where}: {name!r} is in no line of the synonyms; check the name, or give --synonyms")
    return synonyms.object_of[name]


def _image_id(value: Any, where: Path | str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: image id {value!r}, expected COCO's number of the image") from None


def image_id_of_name(name: str) -> int:
    """COCO's image id in a file name: `COCO_val2014_000000001290.jpg` or `000000001290.jpg` gives 1290."""
    if not isinstance(name, str) or not (match := re.search(r"(\d+)(\.\w+)?$", name)):
        raise ValueError(f"image {name!r}: no COCO image id in that name")
    return int(match[1])
