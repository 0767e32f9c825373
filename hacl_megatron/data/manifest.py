"""LLaVA data as one numbered list of samples, wherever it lies.

    [ {"id": "7", "image": "a/7.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                         {"from": "gpt", "value": "A cat."}],
       "text": "A cat on a mat.", "Hallucination caption": ["A dog on a mat."]}, ... ]

or the same objects one a line (`.jsonl`), or a folder that tools/prepare_data.py made of such files. `text` and
`Hallucination caption` are the released HACL code's keys; a record without them is LLaVA's own, or a preference record
(`hacl_megatron.data.prepare.preference_json`). `image` may be a list, and with it `text` and `Hallucination caption`
(`hacl_megatron.data.prepare.records.captions`). Faults of a file's
structure raise when it is read, before any training; faults of one sample's text are found when it is encoded
(`hacl_megatron.data.encoding`) and cost that sample alone.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hacl_megatron.config.files.objects import NoSuchObject, StoreError, object_state
from hacl_megatron.config.files.urls import below, inside, is_url
from hacl_megatron.data.prepare.cache import open_data
from hacl_megatron.data.prepare.llava_json import Record, text_or_first_answer
from hacl_megatron.data.prepare.records.captions import Pair, clean_caption
from hacl_megatron.data.prepare.records.keys import CAPTION_KEYS, IMAGE_TAG
from hacl_megatron.data.store import StoredImage
from hacl_megatron.data.templates import Template, find_template

__all__ = ["CAPTION_KEYS", "IMAGE_TAG", "Manifest", "Pair", "Sample", "sample_of"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One record of a LLaVA JSON file."""

    sample_id: int
    """Index in the manifest."""
    name: str
    """The record's own `id`; its first image's name or its index if it has none."""
    images: tuple[str, ...]
    """Image names relative to the image folder, in the order of their tags; empty for a text-only sample."""
    conversations: tuple[tuple[str, str], ...]
    """Turns as (from, value), as the file has them: not yet checked to be strings or in order."""
    caption: str | None
    """Text of the image-caption pair, without surrounding blanks or image tags; None if there is none, and with several
    images, of which `listed_pairs` says."""
    hallucinated_captions: tuple[str, ...]
    """The caption with hallucinations written in, cleaned like it; empty ones are left out. Empty with several images.
    """
    listed_pairs: tuple[Pair, ...] = ()
    """Of several images, those whose captions the record lists."""
    rejected_answers: tuple[str, ...] = ()
    """Of a preference record, what was rejected in the place of the last turn, the chosen answer."""
    source: str
    """The JSON file."""
    stored: tuple[StoredImage | None, ...] = ()
    """Where each image lies in a tar shard; None: it is a file of the image folder, as all are where nothing is given.
    """

    def __post_init__(self) -> None:
        if not self.stored:
            object.__setattr__(self, "stored", (None,) * len(self.images))
        assert len(self.stored) == len(self.images), (self.stored, self.images)

    @property
    def image(self) -> str | None:
        """The only image's name, of several the first one's; None for a text-only sample."""
        return self.images[0] if self.images else None

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The image-caption pairs, in the order of their images."""
        if len(self.images) == 1 and self.caption is not None:
            return (Pair(0, self.caption, self.hallucinated_captions),)
        return self.listed_pairs

    def twin_conversations(self) -> Iterator[tuple[tuple[str, str], ...] | None]:
        """The turns with another answer in a true one's place: what a likelihood objective rejects, whichever it is.

        Of each hallucinated caption, with it in the place of the first answer that is its caption, of several images of
        those behind its image's tag; None where no answer is. Before the first question nothing is an answer: templates
        leave it out. Then of each rejected answer, with it in the place of the last turn.
        """
        turns = self.conversations
        captions = [(pair.image, pair.caption, pair.hallucinated) for pair in self.listed_pairs]
        for image, caption, twins in captions or [(0, self.caption, self.hallucinated_captions)]:
            place = self._answer_that_is(caption, image) if caption and twins else None
            for twin in twins:
                if place is None:
                    yield None
                    continue
                role, value = turns[place]
                # With the blanks around the caption, which are no difference of the two.
                with_twin = value.replace(caption, twin, 1) if caption in value else twin
                yield (*turns[:place], (role, with_twin), *turns[place + 1 :])
        for rejected in self.rejected_answers:
            yield (*turns[:-1], ("gpt", rejected))

    def _answer_that_is(self, caption: str, image: int) -> int | None:
        """Number of the first answer behind a question that is this caption, and has seen the image of this number."""
        shown = 0
        for number, (role, value) in enumerate(self.conversations):
            if not isinstance(value, str):
                continue
            seen = len(self.images) < 2 or shown > image
            if number and role == "gpt" and seen and clean_caption(value) == caption:
                return number
            shown += value.count(IMAGE_TAG)
        return None


def sample_of(
    record: Record, *, sample_id: int, version: str, source: str, stored: tuple[StoredImage | None, ...] = ()
) -> Sample:
    """A record as the conversation template `version` sees it: the template decides which answers are captions."""
    return Sample(
        sample_id=sample_id,
        name=record.name,
        images=record.images,
        conversations=record.turns,
        caption=None if len(record.images) > 1 else _caption_of(record, find_template(version)),
        hallucinated_captions=() if len(record.images) > 1 else record.hallucinated,
        listed_pairs=record.pairs,
        rejected_answers=record.rejected or (),
        source=source,
        stored=stored,
    )


def _caption_of(record: Record, template: Template) -> str | None:
    """`text`; else the first answer, if the template says so or a key marks the record as contrastive; else None.

    A preference record's answers are no captions for the template's sake: they answer any question.
    """
    takes_answer = record.first_answer_is_caption or (template.first_answer_is_caption and record.rejected is None)
    return text_or_first_answer(record.text, record.turns if takes_answer else ())


class Manifest(Sequence[Sample]):
    """The samples of one or more files or prepared folders, in their order.

    Samples stay in files that are mapped into memory and are built when asked for, so that a million of them cost a
    rank a few megabytes; threads may share it, and a worker process that it is sent to maps the same files.
    """

    def __init__(self, paths: Sequence[str], *, version: str, cache_dir: str | None = None) -> None:
        self._arguments = (tuple(paths), version, cache_dir)
        self._version = version
        self._parts = [open_data(path, cache_dir) for path in paths]
        self._starts = np.cumsum([0, *map(len, self._parts)])

    @classmethod
    def read(cls, paths: Sequence[str], *, version: str, cache_dir: str | None = None) -> "Manifest":
        """Opens the files one after another; the template `version` decides which answers are captions.

        Raw JSON is prepared into a cache first (`hacl_megatron.data.prepare.cache`; `cache_dir` says where).
        Raises ValueError naming file, record and key for whatever is missing, broken or of the wrong type.
        """
        return cls(paths, version=version, cache_dir=cache_dir)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._arguments

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # slices are not supported
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a manifest of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        record, source, stored = self._parts[number].record(index - int(self._starts[number]))
        return sample_of(record, sample_id=int(index), version=self._version, source=source, stored=stored)

    @property
    def samples_per_file(self) -> tuple[int, ...]:
        """How many samples each of the paths gave."""
        return tuple(map(len, self._parts))

    def remarks(self, preference_loss: str = "none") -> Iterator[str]:
        """What to tell a user about the files before they are trained on, a line each.

        Args:
            preference_loss: of the run (`--preference-loss`); without one, rejected answers are said to be ignored.

        Raises ValueError where training would see no image of any of a file's records, or none of its hallucinated
        captions.
        """
        without = ("image in the dialogue",) if find_template(self._version).shows_untagged_image else ()
        without += ("rejected answers",) if preference_loss != "none" else ()
        for part in self._parts:
            for path, findings in zip(part.files, part.findings, strict=True):
                findings.refuse_if_all(path, without)
                yield from (f"{path}: {line}" for line in findings.lines(without))

    @property
    def digest(self) -> str:
        """Hash of what training sees of the samples, in their order: images' names, dialogues, captions.

        The same for raw JSON and for what was prepared from it without dropping duplicates, wherever the files lie.
        """
        digest = hashlib.blake2b(digest_size=16)
        for part in self._parts:
            digest.update(np.ascontiguousarray(part.numbers("content"), dtype="<u8"))
        pa.default_memory_pool().release_unused()  # else each rank goes on holding whole columns' worth of memory
        return digest.hexdigest()

    def modality_lengths(self) -> np.ndarray:
        """int64 [num_samples]: words of each dialogue, negative for a sample without image, never 0.

        LLaVA's `modality_lengths` (llava/train/train.py), on which `--group-by-modality-length` works.
        """
        lengths = [np.empty(0, dtype=np.int64)]
        for part in self._parts:
            words = np.maximum(part.numbers("num_words").astype(np.int64), 1)
            lengths.append(np.where(part.column("image").is_null().to_numpy(), -words, words))
        return np.concatenate(lengths)


def _reopen(paths: tuple[str, ...], version: str, cache_dir: str | None) -> Manifest:
    return Manifest(paths, version=version, cache_dir=cache_dir)


_LOOKED_AT = 32
"""Images of a file that are looked for before a run."""


def refuse_where_no_image_is(samples: Sequence[Sample], root: str) -> None:
    """Look for some of the images, spread over all samples, and see that not every one is missing.

    Raises:
        ValueError: all are, with the folder in which they would be found, where that is one level off.
    """
    step = max(1, len(samples) // _LOOKED_AT)
    names: list[str] = []
    for index in range(0, len(samples), step):
        sample = samples[index]
        files = (name for name, stored in zip(sample.images, sample.stored, strict=True) if stored is None)
        names += [name for name in files if not os.path.isabs(name)]
    if is_url(root):
        _refuse_where_no_object_is(names, root)
        return
    if not os.path.isdir(root):  # the store says so
        return
    if not names or any(_is_file(Path(root, name)) for name in names):
        return
    raise ValueError(
        f"--image-folder {root}: none of {len(names)} images of the data that were looked for is there, such as "
        f"{names[0]}; {_where_else(Path(root), names[0])}"
    )


def _refuse_where_no_object_is(names: Sequence[str], root: str) -> None:
    for name in names:
        try:
            object_state(below(root, inside(name) or name), first_look=True)
        except NoSuchObject:
            continue
        except StoreError as error:
            raise ValueError(f"--image-folder {error}") from None
        return
    if names:
        raise ValueError(
            f"--image-folder {root}: none of {len(names)} images of the data that were looked for is there, such as "
            f"{names[0]}; give the URL that image names are relative to"
        )


def _where_else(root: Path, name: str) -> str:
    below = sorted(path for path in root.iterdir() if path.is_dir())[:1000]
    for folder in (*below, root.absolute().parent, root.absolute().parent.parent):
        if _is_file(folder / name):
            return f"it is in {folder}: give --image-folder {folder}"
    parts = Path(name).parts
    for number in range(1, len(parts)):
        if _is_file(root / Path(*parts[number:])):
            return f"it is there as {Path(*parts[number:])}: take {Path(*parts[:number])}/ out of the data's names"
    return "give the folder that image names are relative to"


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # False where pathlib raises, as for a name too long
