"""The keys of a LLaVA record, the released HACL code's among them, and what others were probably meant for."""

import difflib
from functools import lru_cache

IMAGE_TAG = "<image>"
"""Where a conversation's text names its image."""

IMAGE_KEY = "image"
HALLUCINATED_KEY = "Hallucination caption"
CAPTION_KEYS = ("caption", HALLUCINATED_KEY)
"""Keys that mark a record without `text` as a contrastive sample, whose caption is then its first answer."""

_WRITTEN_BY_US = "hallucinationedits"
_IMAGE_ELSEWHERE = {
    "image", "images", "img", "imgs", "imagepath", "imagepaths", "imagefile", "imagename", "imageurl", "imgpath",
    "imgname", "filename", "imagefilename", "picture", "pictures", "pic", "photo", "imagelist",
}  # fmt: skip
"""What other formats call it: LLaMA-Factory and TRL `images`, xtuner `img`, COCO `file_name`."""
_TEXTS = {"text": "text", "texts": "text", "caption": "caption", "captions": "caption"}
"""Other spellings of the keys that say which text is the caption."""


@lru_cache(maxsize=4096)
def meant_by(key: str) -> str | None:
    """The key that `key`, which nothing reads, was probably meant for; None: it is one that is read, or like none."""
    if key in (IMAGE_KEY, *CAPTION_KEYS, "id", "conversations", "text"):
        return None
    letters = "".join(filter(str.isalpha, key.lower()))
    if letters in _IMAGE_ELSEWHERE or (
        key.isalpha() and difflib.SequenceMatcher(None, letters, "image").ratio() >= 0.8
    ):
        return IMAGE_KEY
    if letters in _TEXTS:
        return _TEXTS[letters]
    wanted = "".join(filter(str.isalpha, HALLUCINATED_KEY.lower()))
    is_like = letters.startswith("halluc") or difflib.SequenceMatcher(None, letters, wanted).ratio() >= 0.75
    return HALLUCINATED_KEY if is_like and letters != _WRITTEN_BY_US else None
