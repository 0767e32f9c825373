"""The whole of tools/prepare_data.py: manifest, checked images, shards and the report of one prepared folder.

OUT/manifest.arrow     OUT/shards/images-000000.tar ...     OUT/report.json  histograms.png  bad_images.jsonl
OUT/.partial/          what a killed start had finished; removed at the end
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.config.console import notify
from hacl_megatron.config.files.regular import check_regular
from hacl_megatron.config.files.urls import is_url, refuse_url
from hacl_megatron.config.flags import MANIFEST_FILE, MAX_IMAGE_PIXELS
from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodingSettings
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.manifest import sample_of
from hacl_megatron.data.prepare.arrow_manifest import FINDINGS, FORMAT, SHARDS_FOLDER, ArrowManifest, Measures
from hacl_megatron.data.prepare.join import (
    MERGED,
    begin_share,
    is_merged,
    join_shares,
    read_done,
    read_joined,
    share_folder,
    write_done,
    write_merged,
)
from hacl_megatron.data.prepare.llava_json import Record
from hacl_megatron.data.prepare.parts import Counts, build_parts, merge_parts, remove_folder
from hacl_megatron.data.prepare.report import read_report, write_report
from hacl_megatron.data.prepare.shards import ShardedImages, write_shards
from hacl_megatron.data.prepare.share import Share, check_sharing, uneven
from hacl_megatron.data.prepare.token_lengths import count_tokens, untrained_kinds
from hacl_megatron.data.store import UnusableImage, image_folder
from hacl_megatron.data.templates import check_template
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hacl_megatron.platform.folder_lock import held

WORK_FOLDER = ".partial"
_HALF_WRITTEN = re.compile(r".+\.arrow\.tmp-\d+|images-\d{6}\.tar\.tmp")


@dataclass(kw_only=True)
class PrepareSettings:
    """What tools/prepare_data.py was asked for."""

    inputs: list[str]
    output: str
    image_folder: str | None = None
    tokenizer: str | None = None
    version: str = "v1"
    """Template whose token lengths are counted."""
    model_max_length: int | None = None
    """Longest dialogue of the run that is to come, in rows: what will train nothing then is looked for, at some five
    times the cost of counting tokens. None: it is not."""
    visual_tokens: int = 576
    """Rows of an image; LLaVA-1.5's."""
    verify_images: bool = False
    write_shards: bool = False
    images_per_shard: int = 4096
    keep_duplicates: bool = False
    num_workers: int = 2
    max_image_pixels: int = MAX_IMAGE_PIXELS
    progress_bar: bool = True
    num_shards: int = 1
    """Processes that share the work."""
    shard_index: int | None = None
    """Which of them this one is; None: what all have done is joined, with `merge`, or there are no others."""
    merge: bool = False

    @property
    def share(self) -> Share | None:
        """The part of the work that is this process's; None: all of it."""
        return check_sharing(self.num_shards, self.shard_index, self.merge)


def run_prepare(settings: PrepareSettings) -> dict[str, Any]:
    """Prepares a folder, or a share of it, and returns its report (a folder's is also in OUT/report.json).

    Raises ValueError for a user's mistake and for the first fault of the files' structure.
    """
    _check(settings)
    work, share = os.path.join(settings.output, WORK_FOLDER), settings.share
    own = work if share is None else share_folder(work, share)
    os.makedirs(own, exist_ok=True)
    with _alone(settings.output, share):
        _remove_leftovers(settings.output, own)
        tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
        check_template(settings.version, tokenizer)
        images = _Images(settings, own) if settings.verify_images or settings.write_shards else None
        if share is not None:
            return _prepare_share(settings, share, tokenizer, images)
        deduplicate = not settings.keep_duplicates
        if settings.merge:
            key, manifest = _share_key(settings, tokenizer), os.path.join(settings.output, MANIFEST_FILE)
            if is_merged(work, key, settings.num_shards) and os.path.isfile(manifest):
                remove_folder(work, last=MERGED)  # during which an earlier start was killed
                return read_report(settings.output)
            parts, counts = join_shares(work, settings.inputs, settings.num_shards, key, deduplicate=deduplicate)
        else:
            parts, counts = _read(settings, tokenizer, images, work, deduplicate=deduplicate)
        for path, found in zip(settings.inputs, counts.findings, strict=True):
            # Which template will be trained with is not known: what only some of them hide is no reason to refuse.
            found.refuse_if_all(path, without=("image in the dialogue",))
        metadata: dict[str, Any] = {
            "files": [os.path.abspath(path) for path in settings.inputs],
            FINDINGS: [found.as_json() for found in counts.findings],
        }
        if tokenizer is not None:
            metadata |= {"version": settings.version, "tokenizer": _tokenizer_key(tokenizer)}
        edit = None
        if settings.write_shards:
            assert images is not None
            sharded = _write_shards(settings, parts, images)
            if sharded is None:
                left = "run every share once more, for the images' shards, then --merge"
                return {"records joined": sum(counts.samples_per_file), "to do": left}
            metadata["shards"], edit = sharded.shards, sharded.place
        manifest_path = os.path.join(settings.output, MANIFEST_FILE)
        merge_parts(parts, manifest_path, metadata, edit)
        report = write_report(
            ArrowManifest(manifest_path),
            settings.output,
            counts,
            version=settings.version,
            with_tokens=tokenizer is not None,
            with_images=images is not None,
            blank=images.blank() if settings.verify_images else None,
        )
        if settings.merge:
            write_merged(work, key, settings.num_shards)
        remove_folder(work, last=MERGED)
    return report


def _read(
    settings: PrepareSettings, tokenizer: Tokenizer | None, images: "_Images | None", work: str, *, deduplicate: bool
) -> tuple[list[str], Counts]:
    """The parts of all records, or of a share's."""
    total = sum(os.path.getsize(path) for path in settings.inputs) // settings.num_shards
    with _bar(settings, total=total, unit="B", unit_scale=True, desc="records") as bar:
        return build_parts(
            settings.inputs,
            work,
            measure=partial(_measure, settings, tokenizer, None if settings.write_shards else images),
            fingerprint=_fingerprint(settings, tokenizer),
            deduplicate=deduplicate,
            num_workers=settings.num_workers,
            progress=bar.update,
            share=settings.share,
        )


def _write_shards(settings: PrepareSettings, parts: Sequence[str], images: "_Images") -> ShardedImages | None:
    """The images' shards, or those of a share; None where others' are missing."""
    with _bar(settings, unit=" images", desc="shards") as bar:
        return write_shards(
            parts,
            images.store,
            settings.output,
            os.path.join(settings.output, WORK_FOLDER),
            measure=images.measure_bytes,
            fingerprint=_fingerprint(settings, None),
            images_per_shard=settings.images_per_shard,
            num_workers=settings.num_workers,
            progress=bar.update,
            share=settings.share,
            all_there=settings.merge,
        )


def _prepare_share(
    settings: PrepareSettings, share: Share, tokenizer: Tokenizer | None, images: "_Images | None"
) -> dict[str, Any]:
    """The share's records; once all are joined, its part of the images' shards."""
    work = os.path.join(settings.output, WORK_FOLDER)
    folder, key = share_folder(work, share), _share_key(settings, tokenizer)
    if (line := uneven(settings.inputs, share.count)) is not None:
        notify(f"note: {line}")
    if begin_share(work, share):
        notify(f"note: share {share} was joined into {settings.output} already, and is prepared anew")
    if read_done(folder, key) is None:
        write_done(folder, key, *_read(settings, tokenizer, images, folder, deduplicate=False))
    joined = read_joined(work, key, share) if settings.write_shards else None
    if joined is not None:
        _write_shards(settings, joined, images)
    left = f"--merge, when all {share.count} shares are done"
    if settings.write_shards and joined is None:
        left += ", and then all once more, for the images' shards"
    return {"share": str(share), "records read": sum(read_done(folder, key)["samples"]), "to do": left}


def _share_key(settings: PrepareSettings, tokenizer: Tokenizer | None) -> str:
    """Of what has to be the same for all shares."""
    files = [(os.path.abspath(path), (at := os.stat(path)).st_size, at.st_mtime_ns) for path in settings.inputs]
    return json.dumps([FORMAT, _fingerprint(settings, tokenizer), files, settings.num_shards])


def _check(settings: PrepareSettings) -> None:
    refuse_url("--output", settings.output, "it goes to a file system: give a folder, and upload it afterwards")
    for path in settings.inputs:
        refuse_url("--input", path, "give a file")
    check_sharing(settings.num_shards, settings.shard_index, settings.merge)
    for name in ("num_workers", "images_per_shard", "max_image_pixels", "model_max_length", "visual_tokens"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
    if settings.model_max_length is not None and settings.tokenizer is None:
        raise ValueError("--model-max-length is given without the tokenizer that fills it; add --tokenizer")
    for flag, wanted in (("--verify-images", settings.verify_images), ("--write-shards", settings.write_shards)):
        if wanted and settings.image_folder is None:
            raise ValueError(f"{flag} is given without the images; add --image-folder")
    if len(set(map(os.path.realpath, settings.inputs))) < len(settings.inputs):
        raise ValueError("--input names a file twice; to draw its samples more often use --data-weights in training")
    for path in settings.inputs:
        check_regular(path, "a LLaVA JSON or JSONL file, check --input")
    if os.path.exists(settings.output) and not os.path.isdir(settings.output):
        raise ValueError(f"--output {settings.output} is a file; expected a folder, which need not exist yet")


@contextlib.contextmanager
def _alone(output: str, share: Share | None) -> Iterator[None]:
    """Keeps a second start of the tool out of the folder, or of the share, for as long as this one runs."""
    work = os.path.join(output, WORK_FOLDER)
    wanted = [(work, fcntl.LOCK_EX if share is None else fcntl.LOCK_SH)]
    if share is not None:
        wanted.append((share_folder(work, share), fcntl.LOCK_EX))
    with contextlib.ExitStack() as stack:
        for folder, kind in wanted:
            file = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"--output {output} is being prepared by another process; wait for it, or give another folder"
                ) from None
            except OSError:
                pass  # a file system without locks
        # Where the kernel's locks are each host's own, this one is not.
        place, name = (output, WORK_FOLDER) if share is None else (work, f"share-{share}")
        stack.enter_context(held(Path(place), what=f"--output {output}", name=name, say=notify))
        yield


def _remove_leftovers(output: str, own: str) -> None:
    """Removes what a killed start had half written. No other is at work: that is what `_alone` is for.

    Args:
        own: the work folder, or a share's, beside which others are at work.
    """
    is_share = own != os.path.join(output, WORK_FOLDER)
    for folder in (own,) if is_share else (output, own, os.path.join(output, SHARDS_FOLDER)):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if _HALF_WRITTEN.fullmatch(name):
                os.unlink(os.path.join(folder, name))


def _bar(settings: PrepareSettings, **options: Any) -> Any:
    return tqdm(disable=not settings.progress_bar, mininterval=1.0, **options)


class _Images:
    """Reads and checks images, each name once.

    Args:
        work: folder for what the manifest has no place for, so that a second start knows it of images it skips.
    """

    def __init__(self, settings: PrepareSettings, work: str) -> None:
        self.store = image_folder(settings.image_folder)
        self._decode = settings.verify_images
        # `square` has no bound on padding: whether an image may be padded is for the run to say.
        self._decoder = ImageDecoder(
            ImageConfig(size=336), aspect_ratio="square", backend="pillow", max_image_pixels=settings.max_image_pixels
        )
        self._known: dict[str, tuple[int | None, int | None, str | None]] = {}
        key = hashlib.blake2b(_fingerprint(settings, None).encode(), digest_size=8).hexdigest()
        self._blank_file = os.path.join(work, f"blank-{key}.jsonl")
        self._lock = threading.Lock()

    def measure_bytes(self, name: str, data: bytes) -> tuple[int, int]:
        width, height, blank = self._decoder.measure(data, decode=self._decode)
        if blank:
            with self._lock, open(self._blank_file, "a", encoding="ascii") as file:
                file.write(json.dumps(name) + "\n")
        return width, height

    def blank(self) -> set[str]:
        """Names of the images found to be nearly of one colour, by this process or by the shares that it joins."""
        folder, name = os.path.split(self._blank_file)
        found: set[str] = set()
        for path in (self._blank_file, *glob.glob(f"{glob.escape(folder)}/share-*/{name}")):
            if os.path.isfile(path):
                with open(path, encoding="ascii") as file:  # a killed start's last line may be cut
                    found |= {json.loads(line) for line in file if line.endswith("\n")}
        return found

    def measure(self, name: str) -> tuple[int | None, int | None, str | None]:
        """Width, height and fault of the image of that name."""
        if name not in self._known:
            try:
                self._known[name] = (*self.measure_bytes(name, self.store.read(name)), None)
            except UnusableImage as error:
                self._known[name] = (None, None, str(error))
        return self._known[name]


def _measure(
    settings: PrepareSettings, tokenizer: Tokenizer | None, images: _Images | None, records: Sequence[Record]
) -> Measures:
    measures = Measures()
    if tokenizer is not None:
        samples = [
            sample_of(record, sample_id=index, version=settings.version, source="")
            for index, record in enumerate(records)
        ]
        tokens = count_tokens(samples, tokenizer, settings.version)
        measures = replace(measures, tokens=tokens)
        if settings.model_max_length is not None:
            encoding = EncodingSettings(
                version=settings.version,
                model_max_length=settings.model_max_length,
                image_layout=ImageLayout(visual_tokens=settings.visual_tokens),
            )
            measures = replace(measures, untrained=untrained_kinds(samples, tokens, tokenizer, encoding))
    if images is not None:
        measures = replace(measures, images=[[*map(images.measure, record.images)] for record in records])
    return measures


def _fingerprint(settings: PrepareSettings, tokenizer: Tokenizer | None) -> str:
    """What the measured columns depend on besides the records."""
    parts: list[Any] = []
    if tokenizer is not None:
        parts += [settings.version, _tokenizer_key(tokenizer), settings.model_max_length, settings.visual_tokens]
    if settings.verify_images or settings.write_shards:
        parts += [_place(str(settings.image_folder)), settings.verify_images, settings.max_image_pixels]
        parts += [settings.write_shards]
    return json.dumps(parts)


def _place(folder: str) -> str:
    return folder if is_url(folder) else os.path.realpath(folder)


def _tokenizer_key(tokenizer: Tokenizer) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, content in sorted(tokenizer.files.items()):
        digest.update(name.encode() + len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
