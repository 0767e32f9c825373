"""What the model will see of a sample, as plain records that a page can print (tools/inspect_data.py).

    Sample ─┬ encode ─→ segments ─→ Segment of Token (text, position, target or not)
            ├ ImageStore ──→ ImageDecoder ─→ pixels ─de-normalised→ PNGs, or small WebPs
            └ captions ─difflib→ Word (same, left out, written in)

Everything goes through the trainer's own readers, templates and decoder; nothing is computed a second time here.
"""

import base64
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.data.encoding import IGNORE, IMAGE, EncodedSample, EncodingSettings, UnusableSample, encode
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.manifest import IMAGE_TAG, Sample
from hacl_megatron.data.store import ImageStore, UnusableImage
from hacl_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How pixels are shown."""

    size: int | None = None
    """Most pixels a side, for pages of many; such pictures are WebP with loss. None: PNG, each pixel as it is."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One row of a segment, or all rows of an image."""

    text: str
    """The piece as the vocabulary has it ("▁cat"); `<image>` for an image's rows, of several `<image 1>`, ..."""
    position: int
    """Position of the (first) row in its segment, from 0."""
    count: int = 1
    """Rows: 1, or an image's."""
    token_id: int | None = None
    """None for an image."""
    kind: Literal["target", "ignored", "image", "eos"]
    """`target`: the loss asks for it. `eos`: the row whose hidden state represents an image or a caption."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows that attend to each other and to nothing else."""

    title: str
    tokens: list[Token]
    length: int
    num_targets: int


@dataclass(frozen=True, kw_only=True)
class Word:
    """A stretch of a hallucinated caption, compared with the caption."""

    text: str
    change: Literal["same", "removed", "added"]


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """One of a sample's images."""

    name: str
    url: str | None = None
    """The pixels after padding and resizing, as a `data:` URL; None where it is unusable."""
    tiles: tuple[tuple[str, ...], ...] = ()
    """Of an image in tiles theirs, row by row."""
    file: str | None = None
    """Size and format of its file."""


@dataclass(frozen=True, kw_only=True)
class ShownCaption:
    """A caption, and what was written into it."""

    caption: str
    image: int | None
    """Of several images the one that it is a caption of, from 1."""
    hallucinated: list[list[Word]]
    """Of each hallucinated caption."""


@dataclass(kw_only=True)
class ShownSample:
    """One sample, ready to print."""

    sample: Sample
    reasons: list[str] = field(default_factory=list)
    """Why it cannot be trained on; empty for a good sample."""
    faults: list[str] = field(default_factory=list)
    """Classes of what is wrong with it, such as "unusable: the file is empty"; samples of one fault share one."""
    notes: list[str] = field(default_factory=list)
    """What the trainer does to it that one may not expect."""
    images: list[ShownImage] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    captions: list[ShownCaption] = field(default_factory=list)
    rejected: list[list[Word]] = field(default_factory=list)
    """Rejected answers beside the last one."""


def show(
    sample: Sample,
    *,
    store: ImageStore,
    decoder: ImageDecoder,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    pictures: Pictures | None = None,
) -> ShownSample:
    """The sample as the loader would take it, with the reasons if it would not. `pictures`: default PNGs."""
    shown = ShownSample(sample=sample)
    sizes, alone = [], len(sample.images) == 1
    for image, stored in zip(sample.images, sample.stored, strict=True):
        try:
            data = store.fetch(image, stored)
            sizes.append(decoder.size_of(data, alone=alone))
            shown.images.append(_shown_image(image, data, decoder, pictures or Pictures(), alone=alone))
        except UnusableImage as error:
            shown.images.append(ShownImage(name=image))
            shown.reasons.append(str(error) if alone else f"{image}: {error}")
            shown.faults.append(f"unusable: {reason_class(str(error))}")
    encoded = None
    if len(sizes) == len(sample.images) or not settings.image_layout.needs_sizes:
        try:
            encoded = encode(sample, tokenizer, settings, sizes)
        except UnusableSample as error:
            shown.reasons.append(str(error))
            shown.faults.append(f"unusable: {reason_class(str(error))}")
    if encoded is not None:
        shown.segments = list(_segments(encoded, tokenizer))
        if encoded.truncated:
            shown.notes.append(f"The dialogue is cut at --model-max-length {settings.model_max_length}.")
            shown.faults.append("cut at --model-max-length")
        if encoded.untrained is not None:
            shown.faults.append(f"trains nothing: {encoded.untrained}")
        if encoded.tokenization_mismatch:
            shown.notes.append("Its rounds do not tokenize to the length of the whole: LLaVA ignores all its labels.")
        elif shown.segments[0].num_targets == 0:
            shown.notes.append("Nothing of the dialogue is a target.")
        shown.notes += [f"A twin is not compared: {reason}." for reason in encoded.uncompared]
        shown.faults += [f"has a twin that is not compared: {reason_class(reason)}" for reason in encoded.uncompared]
    if sample.caption is not None:
        shown.captions = [_shown_caption(sample.caption, sample.hallucinated_captions)]
        if not sample.images:
            shown.notes.append("A caption without an image makes no pair.")
    elif sample.hallucinated_captions:
        shown.notes.append("Its hallucinated captions are not used: it has no caption.")
    for pair in sample.listed_pairs:
        shown.captions.append(_shown_caption(pair.caption, pair.hallucinated, pair.image + 1))
    if sample.rejected_answers:
        chosen = str(sample.conversations[-1][1])
        shown.rejected = [compare(chosen, text) for text in sample.rejected_answers]
        if settings.preference_loss == "none":
            shown.notes.append("Its rejected answers are not used: --preference-loss is none.")
    return shown


def reason_class(reason: str) -> str:
    """The reason without what is one sample's own: quoted texts, paths, numbers, at most 100 characters.

    "the name '../a.jpg' leaves the image folder /data" gives "the name … leaves the image folder …".
    """
    text = re.sub(r"""b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*"|(?<![\w.])/\S+|\d[\d.,]*""", "…", reason)
    return text if len(text) <= 100 else text[:99] + "…"


def compare(caption: str, hallucinated: str) -> list[Word]:
    """The hallucinated caption's words, with what was left out of the caption before what was written instead.

    "A red cat." and "A blue cat." give same "A ", removed "red", added "blue", same " cat.".
    """
    ours, theirs = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (caption, hallucinated))
    words = []
    for tag, a, b, c, d in difflib.SequenceMatcher(a=ours, b=theirs, autojunk=False).get_opcodes():
        if tag == "equal":
            words.append(Word(text="".join(theirs[c:d]), change="same"))
            continue
        words += [Word(text="".join(ours[a:b]), change="removed")] if a < b else []
        words += [Word(text="".join(theirs[c:d]), change="added")] if c < d else []
    return words


def _shown_caption(caption: str, hallucinated: Sequence[str], image: int | None = None) -> ShownCaption:
    return ShownCaption(caption=caption, image=image, hallucinated=[compare(caption, text) for text in hallucinated])


def _shown_image(name: str, data: bytes, decoder: ImageDecoder, pictures: Pictures, *, alone: bool) -> ShownImage:
    """An image's pixels. Raises UnusableImage."""
    decoded = decoder.decode([data], [alone])
    if decoded.reasons[0] is not None:
        raise UnusableImage(decoded.reasons[0])
    whole, *tiles = decoded.pixel_values
    wide = decoder.layout.cut(*decoder.size_of(data)).grid[1] if tiles else 1
    small = Pictures(size=pictures.size and max(pictures.size // wide, 1))
    urls = [picture_url(tile, decoder.config, small) for tile in tiles]
    with Image.open(io.BytesIO(data)) as image:
        file = f"{image.format} of {image.width} x {image.height}, {len(data) / 1000:,.1f} kB"
    rows = tuple(tuple(urls[start : start + wide]) for start in range(0, len(urls), wide))
    return ShownImage(name=name, url=picture_url(whole, decoder.config, pictures), tiles=rows, file=file)


def picture_url(pixels: Tensor, config: ImageConfig, pictures: Pictures) -> str:
    """float32 [3, S, S] of normalised pixels → a `data:` URL of the picture with their levels."""
    mean, std = np.array(config.mean), np.array(config.std)
    levels = (pixels.double().movedim(0, -1).numpy() * std + mean) * 255
    image, file = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8)), io.BytesIO()
    if pictures.size is None:
        image.save(file, "PNG")
    else:
        image.thumbnail((pictures.size, pictures.size))
        image.save(file, "WEBP", quality=75)
    kind = "png" if pictures.size is None else "webp"
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def _segments(encoded: EncodedSample, tokenizer: Tokenizer) -> Iterator[Segment]:
    several = len(encoded.images) > 1
    names = [f"<image {number}>" if several else IMAGE_TAG for number in range(1, 1 + len(encoded.images))]
    images = [name for name, rows in zip(names, encoded.images, strict=True) for _ in range(len(rows))]
    yield _segment("dialogue", encoded.dialogue, encoded.labels, tokenizer, images)
    for pair in encoded.pairs:
        of_image = f" of image {pair.image + 1}" if several else ""
        own = [names[pair.image]] * len(encoded.images[pair.image])
        yield _segment(f"image + EOS{of_image}", pair.image_segment, None, tokenizer, own)
        yield _segment(f"caption + EOS{of_image}", pair.caption_segment, None, tokenizer)
    for number, answer in enumerate(encoded.rejected, start=1):
        first = min([*answer.chosen.tolist(), *answer.rejected.tolist()])
        twin = np.concatenate([answer.rows, answer.rejected_ids[-1:]])
        for title, rows, compared in (
            (f"true answer against rejected answer {number}: compared tokens", encoded.dialogue, answer.chosen),
            (f"rejected answer {number}: compared tokens", twin, answer.rejected),
        ):
            yield _compared_tokens(title, rows, compared, first, tokenizer, images)
    for pair in encoded.pairs:
        of_image = f" of image {pair.image + 1}" if several else ""
        for number, rows in enumerate(pair.hallucinated_segments, start=1):
            yield _segment(f"hallucinated caption {number} + EOS{of_image}", rows, None, tokenizer)


def _compared_tokens(
    title: str, rows: np.ndarray, compared: np.ndarray, first: int, tokenizer: Tokenizer, images: Sequence[str]
) -> Segment:
    """Of a dialogue's rows those from `first` on to the last of the positions `compared`, which are its targets."""
    rows = rows[: max([first, *(compared + 1).tolist()])]
    labels = np.full(len(rows), IGNORE)
    labels[compared] = rows[compared]
    tokens = [token for token in _segment(title, rows, labels, tokenizer, images).tokens if token.position >= first]
    return Segment(title=title, tokens=tokens, length=len(tokens), num_targets=len(compared))


def _segment(
    title: str, rows: np.ndarray, labels: np.ndarray | None, tokenizer: Tokenizer, images: Sequence[str] = ()
) -> Segment:
    """`labels` None: a segment whose last row, EOS, is read. `images`: what each image row is called, in order."""
    pieces = tokenizer.backend.convert_ids_to_tokens([int(row) for row in rows if row != IMAGE])
    texts = iter(pieces)
    tokens: list[Token] = []
    names = np.full(len(rows), "", dtype=object)
    names[rows == IMAGE] = images[: int((rows == IMAGE).sum())]
    for name, group in groupby(range(len(rows)), key=lambda at: names[at]):
        positions = list(group)
        if name:
            tokens.append(Token(text=name, position=positions[0], count=len(positions), kind="image"))
            continue
        for at in positions:
            kind = "target" if labels is not None and labels[at] != IGNORE else "ignored"
            if labels is None and at == len(rows) - 1:
                kind = "eos"
            tokens.append(Token(text=next(texts), position=at, token_id=int(rows[at]), kind=kind))
    # A segment's first row is nobody's target: no row predicts it.
    num_targets = 0 if labels is None else int((labels[1:] != IGNORE).sum())
    return Segment(title=title, tokens=tokens, length=len(rows), num_targets=num_targets)
