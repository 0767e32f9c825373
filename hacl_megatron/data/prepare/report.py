"""What a prepared folder holds, in numbers: report.json, bad_images.jsonl and histograms.png."""

import json
import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hacl_megatron.data.prepare.arrow_manifest import ArrowManifest
from hacl_megatron.data.prepare.json_text import json_text
from hacl_megatron.data.prepare.parts import Counts

REPORT_FILE = "report.json"
BAD_IMAGES_FILE = "bad_images.jsonl"
NUM_NAMED = 3
"""Images of one colour that the report names."""


def read_report(output: str) -> dict[str, Any]:
    """What `write_report` wrote into the folder `output`."""
    with open(os.path.join(output, REPORT_FILE), encoding="utf-8") as file:
        return json.load(file)


def write_report(
    manifest: ArrowManifest,
    output: str,
    counts: Counts,
    *,
    version: str,
    with_tokens: bool,
    with_images: bool,
    blank: set[str] | None,
) -> dict[str, Any]:
    """Counts and quantiles; writes the three files into `output`.

    Args:
        version: template of the token lengths, which were counted `with_tokens`.
        with_images: images were looked at.
        blank: names of those nearly of one colour; None where pictures were not decoded.
    """
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
    if with_tokens:
        report["unusable text"] = manifest.column("dialogue_tokens").null_count
    if with_images:
        report["bad images"] = _write_bad_images(manifest, os.path.join(output, BAD_IMAGES_FILE))
    of_one_colour: list[str] = []
    if blank is not None:
        of_one_colour = [name for name in image.unique().to_pylist() if name in blank]
        report["images (nearly) of one colour"] = len(of_one_colour)
    found = [
        f"{path}: {line}"
        for path, about in zip(manifest.files, manifest.findings, strict=True)
        for line in about.lines(without=("rejected answers",))  # counted above; which loss will train is not known
    ]
    found += [f"as this tokenizer and --version {version} have it, {line}" for line in counts.untrained.lines()]
    if of_one_colour:
        first = ", ".join(map(repr, of_one_colour[:NUM_NAMED]))
        found.append(
            f"{len(of_one_colour)} images are (nearly) of one colour, first {first}; look at them with inspect_data.py"
        )
    if found:
        report["to look at"] = found
    with open(os.path.join(output, REPORT_FILE), "w", encoding="utf-8") as file:
        file.write(json_text(report, indent=2))
    _draw_histograms(values, os.path.join(output, "histograms.png"))
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
