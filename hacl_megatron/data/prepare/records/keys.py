"""The keys of a record, those of LLaVA, the released HACL code and preference data, and what others probably mean."""

import difflib
from functools import lru_cache

IMAGE_TAG = "<image>"
"""Where a conversation's text names its image."""

IMAGE_KEY = "image"
IMAGES_KEY = "images"
HALLUCINATED_KEY = "Hallucination caption"
CAPTION_KEYS = ("caption", HALLUCINATED_KEY)
"""Keys that mark a record without `text` as a contrastive sample, whose caption is then its first answer."""
CHOSEN_KEY = "chosen"
REJECTED_KEY = "rejected"
ANSWER_KEYS = (CHOSEN_KEY, REJECTED_KEY)
"""Answers of a preference record, as TRL and RLAIF-V have them."""

_WRITTEN_BY_US = "hallucinationedits"
_IMAGE_ELSEWHERE = {
    "image", "images", "img", "imgs", "imagepath", "imagepaths", "imagefile", "imagename", "imageurl", "imgpath",
    "imgname", "filename", "imagefilename", "picture", "pictures", "pic", "photo", "imagelist",
}  # fmt: skip
"""What other formats call it: xtuner `img`, COCO `file_name`."""
_TEXTS = {"text": "text", "texts": "text", "caption": "caption", "captions": "caption"}
"""Other spellings of the keys that say which text is the caption."""
_OF_PREFERENCES = {
    CHOSEN_KEY: ("choosen", "chosens", "chosenanswer", "chosenresponse", "chosenresponses", "choseanswer"),
    REJECTED_KEY: ("rejecteds", "reject", "rejectedanswer", "rejectedanswers", "rejectedresponse", "rejectedresponses"),
    "question": ("query", "instruction"),
    "prompt": (),
}
"""Other spellings of a preference record's keys: ms-swift says `rejected_response`."""


@lru_cache(maxsize=4096)
def meant_by(key: str) -> str | None:
    """The key that `key`, which nothing reads, was probably meant for; None: it is one that is read, or like none."""
    if key in (IMAGE_KEY, IMAGES_KEY, *CAPTION_KEYS, *_OF_PREFERENCES, "id", "conversations", "text"):
        return None
    letters = "".join(filter(str.isalpha, key.lower()))
    if letters in _IMAGE_ELSEWHERE or (
        key.isalpha() and difflib.SequenceMatcher(None, letters, "image").ratio() >= 0.8
    ):
        return IMAGE_KEY
    if letters in _TEXTS:
        return _TEXTS[letters]
    for name, others in _OF_PREFERENCES.items():
        if letters in others or difflib.SequenceMatcher(None, letters, name).ratio() >= 0.85:
            return name
    wanted = "".join(filter(str.isalpha, HALLUCINATED_KEY.lower()))
    is_like = letters.startswith("halluc") or difflib.SequenceMatcher(None, letters, wanted).ratio() >= 0.75
    return HALLUCINATED_KEY if is_like and letters != _WRITTEN_BY_US else None
