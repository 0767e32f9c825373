"""Answers with hallucinations in the place of the true one, as rows that a likelihood objective compares with it.

    dialogue      BOS  image*  A    red   cat   .  </s>
    with a twin   BOS  image*  A    blue  cat   .  </s>
                               shared^    the branch's own rows: blue cat .

Both are the same template's rows of the same turns but for one answer. What the two share in front of their first
difference is computed once, and behind the twin's last token that is compared nothing is computed at all.
"""

from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from hacl_megatron.data.templates.template import IGNORE


class NothingToCompare(ValueError):
    """This twin gives a likelihood objective nothing; its message is why. The sample's other parts are used."""


@dataclass(frozen=True, kw_only=True)
class RejectedAnswer:
    """A twin of an answer, and which tokens of the two are compared. Positions count through a dialogue's rows."""

    rows: np.ndarray
    """int64 [L]: the dialogue with the twin, up to the row that predicts the twin's last token that is compared."""
    shared: int
    """How many of these rows are the true dialogue's own first ones; at least 1."""
    chosen: np.ndarray
    """int64 [C]: positions of the true answer's tokens that are compared, ascending; all of them are targets."""
    rejected: np.ndarray
    """int64 [R]: positions of the twin's tokens that are compared, ascending, at most L."""
    rejected_ids: np.ndarray
    """int64 [R]: those tokens."""


def rejected_answer(
    dialogue: np.ndarray,
    labels: np.ndarray,
    twin: np.ndarray,
    twin_labels: np.ndarray,
    *,
    limit: int,
    whole: bool = False,
) -> RejectedAnswer:
    """The comparison of a dialogue with the one in which a twin stands.

    Args:
        dialogue, labels: int64 [L], the whole dialogue's rows and labels (`EncodedSample`), not yet cut.
        twin, twin_labels: int64 [L'], the same with the twin in an answer's place.
        limit: rows that are kept (`--model-max-length`).
        whole: compare all tokens of the two answers that are kept.

    Else the tokens in which the two whole answers differ, by difflib over token ids, as far as they are kept: cut
    before, the end that a longer twin loses would be a difference. Raises NothingToCompare where they do not differ in
    a token that is trained on.
    """
    length = min(len(dialogue), len(twin))
    (differ,) = np.nonzero(dialogue[:length] != twin[:length])
    first = int(differ[0]) if len(differ) else length
    if not len(differ) and len(dialogue) == len(twin):
        raise NothingToCompare("its tokens are the true answer's own")
    if first >= limit:
        raise NothingToCompare(f"it differs from the true answer behind --model-max-length {limit}")
    chosen, rejected = _answer_around(labels, first), _answer_around(twin_labels, first)
    if not len(chosen) or not len(rejected):
        raise NothingToCompare("the template trains on no token of the answer that it replaces")
    if not whole:
        matcher = SequenceMatcher(a=dialogue[chosen].tolist(), b=twin[rejected].tolist(), autojunk=False)
        changes = [change for change in matcher.get_opcodes() if change[0] != "equal"]
        chosen = np.concatenate([chosen[begin:end] for _, begin, end, _, _ in changes])
        rejected = np.concatenate([rejected[begin:end] for _, _, _, begin, end in changes])
    chosen, rejected = chosen[chosen < limit], rejected[rejected < limit]
    if not len(chosen) and not len(rejected):
        raise NothingToCompare(f"it differs from the true answer behind --model-max-length {limit}")
    end = int(rejected[-1]) if len(rejected) else 1
    return RejectedAnswer(
        rows=twin[:end], shared=min(first, end), chosen=chosen, rejected=rejected, rejected_ids=twin[rejected]
    )


CROP_AREA = (0.01, 0.2)
"""Share of the image that a crop keeps: of the 0 to 20 % of Wang et al. 2024, what has pixels."""


def little_left(pixels: Tensor, image_key: int) -> Tensor:
    """A crop of an image, drawn by its key alone and enlarged to its size, in which little can be seen.

    pixels: float32 [3, H, W], normalised, as is the result.
    """
    rng = np.random.default_rng(image_key % (1 << 64))
    height, width = pixels.shape[1:]
    side = rng.uniform(*CROP_AREA) ** 0.5
    rows, columns = max(round(side * height), 1), max(round(side * width), 1)
    top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
    crop = pixels[None, :, top : top + rows, left : left + columns]
    return F.interpolate(crop, (height, width), mode="bilinear", align_corners=False)[0]


def _answer_around(labels: np.ndarray, at: int) -> np.ndarray:
    """Positions of the unbroken run of targets that holds position `at`; the first row's has none."""
    if at >= len(labels) or labels[at] == IGNORE:
        return np.empty(0, dtype=np.int64)
    (others,) = np.nonzero(labels == IGNORE)
    before, behind = others[others < at], others[others > at]
    begin = int(before[-1]) + 1 if len(before) else 1
    return np.arange(begin, int(behind[0]) if len(behind) else len(labels), dtype=np.int64)
