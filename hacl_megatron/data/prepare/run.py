"""The whole of tools/prepare_data.py: manifest, checked images, shards and the report of one prepared folder.

OUT/manifest.arrow     OUT/shards/images-000000.tar ...     OUT/report.json  histograms.png  bad_images.jsonl
OUT/.partial/          what a killed start had finished; removed at the end
"""

import contextlib
import fcntl
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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.config.console import notify
from hacl_megatron.config.files.regular import check_regular
from hacl_megatron.config.flags import MANIFEST_FILE, MAX_IMAGE_PIXELS
from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodingSettings
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.manifest import sample_of
from hacl_megatron.data.prepare.arrow_manifest import FINDINGS, SHARDS_FOLDER, ArrowManifest, Measures
from hacl_megatron.data.prepare.json_text import json_text
from hacl_megatron.data.prepare.llava_json import Record
from hacl_megatron.data.prepare.parts import Counts, build_parts, merge_parts, remove_folder
from hacl_megatron.data.prepare.shards import write_shards
from hacl_megatron.data.prepare.token_lengths import count_tokens, untrained_kinds
from hacl_megatron.data.store import FolderStore, UnusableImage
from hacl_megatron.data.templates import check_template
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hacl_megatron.platform.folder_lock import held

WORK_FOLDER = ".partial"
REPORT_FILE = "report.json"
BAD_IMAGES_FILE = "bad_images.jsonl"
NUM_NAMED = 3
"""Images of one colour that the report names."""
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


def run_prepare(settings: PrepareSettings) -> dict[str, Any]:
    """Prepares a folder and returns its report (also in OUT/report.json).

    Raises ValueError for a user's mistake and for the first fault of the files' structure.
    """
    _check(settings)
    os.makedirs(settings.output, exist_ok=True)
    work = os.path.join(settings.output, WORK_FOLDER)
    os.makedirs(work, exist_ok=True)
    with _alone(settings.output):
        _remove_leftovers(settings.output)
        tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
        check_template(settings.version, tokenizer)
        images = _Images(settings, work) if settings.verify_images or settings.write_shards else None
        total = sum(os.path.getsize(path) for path in settings.inputs)
        with _bar(settings, total=total, unit="B", unit_scale=True, desc="records") as bar:
            parts, counts = build_parts(
                settings.inputs,
                work,
                measure=partial(_measure, settings, tokenizer, None if settings.write_shards else images),
                fingerprint=_fingerprint(settings, tokenizer),
                deduplicate=not settings.keep_duplicates,
                num_workers=settings.num_workers,
                progress=bar.update,
            )
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
            with _bar(settings, unit=" images", desc="shards") as bar:
                sharded = write_shards(
                    parts,
                    images.store,
                    settings.output,
                    work,
                    measure=images.measure_bytes,
                    fingerprint=_fingerprint(settings, None),
                    images_per_shard=settings.images_per_shard,
                    num_workers=settings.num_workers,
                    progress=bar.update,
                )
            metadata["shards"], edit = sharded.shards, sharded.place
        manifest_path = os.path.join(settings.output, MANIFEST_FILE)
        merge_parts(parts, manifest_path, metadata, edit)
        report = _report(ArrowManifest(manifest_path), settings, counts, images)
        remove_folder(work)
    return report


def _check(settings: PrepareSettings) -> None:
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
def _alone(output: str) -> Iterator[None]:
    """Keeps a second start of the tool out of the folder for as long as this one runs."""
    file = os.open(os.path.join(output, WORK_FOLDER), os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--output {output} is being prepared by another process; wait for it, or give another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        # Where the kernel's locks are each host's own, this one is not.
        with held(Path(output), what=f"--output {output}", name=WORK_FOLDER, say=notify):
            yield
    finally:
        os.close(file)


def _remove_leftovers(output: str) -> None:
    """Removes what a killed start had half written. No other is at work: that is what `_alone` is for."""
    for folder in (output, os.path.join(output, WORK_FOLDER), os.path.join(output, SHARDS_FOLDER)):
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
        self.store = FolderStore(settings.image_folder)
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
        """Names of the images found to be nearly of one colour."""
        if not os.path.isfile(self._blank_file):
            return set()
        with open(self._blank_file, encoding="ascii") as file:
            return {json.loads(line) for line in file if line.endswith("\n")}  # a killed start's last may be cut

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
        parts += [os.path.realpath(str(settings.image_folder)), settings.verify_images, settings.max_image_pixels]
        parts += [settings.write_shards]
    return json.dumps(parts)


def _tokenizer_key(tokenizer: Tokenizer) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, content in sorted(tokenizer.files.items()):
        digest.update(name.encode() + len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------- report


def _report(
    manifest: ArrowManifest, settings: PrepareSettings, counts: Counts, images: _Images | None
) -> dict[str, Any]:
    """Counts and quantiles; writes report.json, bad_images.jsonl and histograms.png."""
    image, _ = manifest.of_images("image")
    several = manifest.column("more_images").is_valid()
    with_pairs = manifest.column("pairs")
    report: dict[str, Any] = {
        "samples": len(manifest),
        "files": dict(zip(manifest.files, counts.samples_per_file, strict=True)),
        "duplicates dropped": counts.dropped,
        "renamed, same id as another record": counts.renamed,
        "text only": manifest.column("image").null_count,
        "several images": _number_of(several),
        "distinct images": len(image.unique()),
        "with caption": _number_of(
            pc.if_else(
                several,
                with_pairs.is_valid(),
                pc.or_(manifest.column("text").is_valid(), manifest.column("first_answer_is_caption")),
            )
        ),
        "with hallucinated captions": sum(
            any(pair["hallucinated"] for pair in pairs) for pairs in with_pairs.drop_null().to_pylist()
        )
        + _number_of(
            pc.and_(pc.invert(several), pc.greater(pc.list_value_length(manifest.column("hallucinated_captions")), 0))
        ),
        "preference records": len(manifest) - manifest.column("rejected_answers").null_count,
        "rejected answers": pc.sum(pc.list_value_length(manifest.column("rejected_answers"))).as_py() or 0,
    }
    lengths = {
        "words of a dialogue": "num_words", "tokens of a dialogue, image as one": "dialogue_tokens",
        "tokens of a caption": "caption_tokens", "width": "width", "height": "height",
    }  # fmt: skip
    columns = {
        label: manifest.of_images(name)[0] if name in ("width", "height") else manifest.column(name)
        for label, name in lengths.items()
    }
    values = {label: column.drop_null().to_numpy() for label, column in columns.items()}
    values = {label: found for label, found in values.items() if len(found)}
    for label, found in values.items():
        report[label] = dict(
            zip(("min", "median", "99 %", "max"), np.percentile(found, [0, 50, 99, 100]).round().astype(int).tolist())  # noqa: B905
        )
    if settings.tokenizer:
        report["unusable text"] = manifest.column("dialogue_tokens").null_count
    if images is not None:
        report["bad images"] = _write_bad_images(manifest, os.path.join(settings.output, BAD_IMAGES_FILE))
    blank: list[str] = []
    if settings.verify_images:
        assert images is not None
        there, known = image.unique().to_pylist(), images.blank()
        blank = [name for name in there if name in known]
        report["images (nearly) of one colour"] = len(blank)
    found = [
        f"{path}: {line}"
        for path, about in zip(manifest.files, manifest.findings, strict=True)
        for line in about.lines(without=("rejected answers",))  # counted above; which loss will train is not known
    ]
    found += [
        f"as this tokenizer and --version {settings.version} have it, {line}" for line in counts.untrained.lines()
    ]
    if blank:
        first = ", ".join(map(repr, blank[:NUM_NAMED]))
        found.append(
            f"{len(blank)} images are (nearly) of one colour, first {first}; look at them with inspect_data.py"
        )
    if found:
        report["to look at"] = found
    with open(os.path.join(settings.output, REPORT_FILE), "w", encoding="utf-8") as file:
        file.write(json_text(report, indent=2))
    _draw_histograms(values, os.path.join(settings.output, "histograms.png"))
    return report


def _number_of(column: pa.ChunkedArray) -> int:
    """How many are true."""
    return pc.sum(column).as_py() or 0


def _write_bad_images(manifest: ArrowManifest, path: str) -> int:
    """One JSON object for each unusable image, with the samples that name it; returns their number."""
    (faults, rows), (names, _), ids = (
        manifest.of_images("image_fault"),
        manifest.of_images("image"),
        manifest.column("id"),
    )
    bad: dict[str, dict[str, Any]] = {}
    for at in pc.indices_nonzero(faults.is_valid()).to_pylist():
        name, sample = names[at].as_py(), ids[int(rows[at])].as_py()
        known = bad.setdefault(name, {"image": name, "reason": faults[at].as_py(), "samples": {}})
        known["samples"][int(rows[at])] = sample  # once, however often it names the image
    for entry in bad.values():
        entry["samples"] = [*entry["samples"].values()]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json_text(entry) + "\n" for entry in bad.values())
    return len(bad)


def _draw_histograms(values: dict[str, np.ndarray], path: str) -> None:
    """Lengths and sizes as a picture; left out where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(4 * len(values), 3), layout="constrained")
    for axes, (label, found) in zip(np.atleast_1d(figure.subplots(1, len(values))), values.items(), strict=True):
        top = np.percentile(found, 99.5)
        axes.hist(np.minimum(found, top), bins=50)  # the rest is in the last bar
        axes.set_xlabel(label)
        axes.set_ylabel("samples")
    figure.savefig(path, dpi=100)
