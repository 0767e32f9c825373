"""Images packed into WebDataset tar shards, each image once, with its place for random access.

    images-000003.tar:  000012288.jpg  000012288.json  000012289.png  000012289.json ...

`{key}.json` is {"image": name, "records": [LLaVA records with this image, ...]}, so that webdataset and
megatron-energon read whole samples; a record with several images stands beside the first of them. This trainer reads
the images alone, by the offsets in its manifest. Keys are the images' numbers in order of first use, names appear
inside the JSON only: nothing in a header comes from a user's file. Text-only records are in the manifest alone.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hacl_megatron.config.files.checksum import checksum
from hacl_megatron.data.prepare.arrow_manifest import SCHEMA, SHARDS_FOLDER, images_of
from hacl_megatron.data.prepare.parts import is_whole, read_part, write_part
from hacl_megatron.data.prepare.share import Share
from hacl_megatron.data.store import ImageFolder, UnusableImage

MeasureImage = Callable[[str, bytes], tuple[int, int]]
"""Width and height of an image by its name and its file's bytes; raises UnusableImage."""

_SUFFIXES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}
"""By the first bytes, since LLaVA's data names GIFs .jpg; what is none of these is called jpg like all the rest."""

_INDEX = re.compile(r"shard-(\d{6,})-[0-9a-f]+\.arrow")
"""Name of a shard's index: its number and what it was made of."""

_PLACES = pa.schema(
    [
        ("shard", pa.int32()), ("offset", pa.int64()), ("size", pa.int64()), ("width", pa.int32()),
        ("height", pa.int32()), ("image_fault", pa.string()), ("checksum", pa.uint64()),
    ]
)  # fmt: skip
"""What a shard's index says of each of its images; an unusable one has a fault and no place."""


@dataclass(frozen=True, kw_only=True)
class ShardedImages:
    """The shards that were written and where each image went."""

    shards: list[str]
    """File names, in order."""
    names: pa.Array
    """[num_images]: the image names, each once."""
    places: pa.RecordBatch
    """[num_images]: shard, offset, size, width, height, image_fault, checksum."""

    def place(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A manifest's record batch with its images' places filled in."""
        codes = pc.index_in(batch.column("image"), value_set=self.names)
        columns = {name: self.places.column(name).take(codes) for name in _PLACES.names}
        more = batch.column("more_images")
        if more.null_count < len(more):
            codes = pc.index_in(pc.struct_field(more.flatten(), "image"), value_set=self.names)
            places = iter(self.places.take(codes).to_pylist())
            columns["more_images"] = pa.array(
                [images and [image | next(places) for image in images] for images in more.to_pylist()], more.type
            )
        return pa.record_batch([columns.get(name, batch.column(name)) for name in SCHEMA.names], schema=batch.schema)


def write_shards(
    parts: Sequence[str],
    store: ImageFolder,
    output: str,
    work: str,
    *,
    measure: MeasureImage,
    fingerprint: str,
    images_per_shard: int,
    num_workers: int,
    progress: Callable[[int], Any] = lambda num_images: None,
    share: Share | None = None,
    all_there: bool = False,
) -> ShardedImages | None:
    """Packs every image of the parts' records into `output`/shards; a shard that is there already is left alone.

    None where not all are there: with `share`, which writes each of its own, and with `all_there`, which writes none.

    Args:
        work: folder of the shards' indices, by which a second start knows what is finished.
        fingerprint: says what `measure` depends on.
        progress: called with the number of images done since the last call, from any thread.
    """
    batches = [read_part(part) for part in parts]
    all_images = pa.chunked_array([images_of(batch, "image")[0] for batch in batches], pa.string())
    names = all_images.combine_chunks().dictionary_encode().dictionary
    firsts = pa.chunked_array([batch.column("image") for batch in batches], pa.string())
    codes = pc.index_in(firsts, value_set=names).combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)
    rows = np.argsort(codes, kind="stable")  # the rows of each image side by side, text-only ones first
    starts = np.searchsorted(codes[rows], np.arange(len(names) + 1))
    first_row = np.cumsum([0, *(batch.num_rows for batch in batches)])
    folder = os.path.join(output, SHARDS_FOLDER)
    os.makedirs(folder, exist_ok=True)

    def records(image: int) -> list[dict[str, Any]]:
        found = []
        for row in rows[starts[image] : starts[image + 1]].tolist():
            number = int(np.searchsorted(first_row, row, side="right")) - 1
            found.append(_llava_record(batches[number], row - int(first_row[number])))
        return found

    def write(number: int) -> pa.RecordBatch | None:
        begin = number * images_per_shard
        some = names[begin : begin + images_per_shard].to_pylist()
        key = hashlib.blake2b(json.dumps([fingerprint, begin, some]).encode(), digest_size=8).hexdigest()
        shard, index = os.path.join(folder, shard_name(number)), os.path.join(work, f"shard-{number:06d}-{key}.arrow")
        if share is not None and number % share.count != share.number:
            return None
        if not (is_whole(index) and os.path.isfile(shard)):
            if all_there:
                return None
            write_part(index, _write_shard(shard, number, begin, some, store, records, measure))
        progress(len(some))
        return read_part(index)

    count = -(-len(names) // images_per_shard)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="shards") as threads:
        try:
            indices = list(threads.map(write, range(count)))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    if any(index is None for index in indices):
        return None
    table = pa.Table.from_batches(indices, _PLACES).combine_chunks()
    places = table.to_batches()[0] if len(names) else pa.record_batch([[]] * len(_PLACES), schema=_PLACES)
    return ShardedImages(shards=[shard_name(number) for number in range(count)], names=names, places=places)


def indices_of_share(work: str, share: Share) -> list[str]:
    """The indices in `work` of the shards that this share writes."""
    found = [(name, match) for name in os.listdir(work) if (match := _INDEX.fullmatch(name))]
    return [os.path.join(work, name) for name, match in found if int(match[1]) % share.count == share.number]


def shard_name(number: int) -> str:
    """File name of a shard; `arrow_manifest.SHARD_NAME` takes no other."""
    return f"images-{number:06d}.tar"


def _write_shard(
    path: str,
    number: int,
    first_key: int,
    names: list[str],
    store: ImageFolder,
    records: Callable[[int], list[dict[str, Any]]],
    measure: MeasureImage,
) -> pa.RecordBatch:
    """Writes one shard, which appears whole or not at all, and returns its index."""
    rows: list[tuple[Any, ...]] = []
    with open(f"{path}.tmp", "wb") as file:
        # USTAR: a header is one block, so that an image starts 512 bytes behind its member.
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, name in enumerate(names, start=first_key):
                try:
                    data = store.read(name)
                    width, height = measure(name, data)
                except UnusableImage as error:
                    rows.append((None, None, None, None, None, str(error), None))
                    continue
                place = (number, tar.offset + tarfile.BLOCKSIZE, len(data), width, height, None)
                rows.append((*place, checksum(data)))
                _add(tar, f"{key:09d}.{_suffix(data)}", data)
                about = {"image": name, "records": records(key)}
                _add(tar, f"{key:09d}.json", json.dumps(about, ensure_ascii=False).encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)
    columns = zip(*rows, strict=True)
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, _PLACES, strict=True)], schema=_PLACES
    )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner 0, time 0: the same images give the same file
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _suffix(data: bytes) -> str:
    return next((suffix for begin, suffix in _SUFFIXES.items() if data.startswith(begin)), "jpg")


def _llava_record(batch: pa.RecordBatch, row: int) -> dict[str, Any]:
    """A row as LLaVA's JSON has it, with the keys of the released HACL code and of preferences where they are used."""
    exact = batch.column("exact")[row].as_py()
    if exact is not None:
        name, image, turns, text, is_contrastive, hallucinated, rejected, more, pairs = json.loads(exact)
        conversations = [{"from": role, "value": value} for role, value in turns]
    else:
        name, image, conversations, text, is_contrastive, hallucinated, rejected, more, pairs = (
            batch.column(key)[row].as_py() for key in (*SCHEMA.names[:7], "more_images", "pairs")
        )
        more = [other["image"] for other in more or ()]
        pairs = [(pair["image"], pair["caption"], pair["hallucinated"]) for pair in pairs or ()]
    record = {"id": name, "image": [image, *more] if more else image, "conversations": conversations}
    if rejected is not None:
        record |= {"conversations": conversations[:-1], "chosen": conversations[-1]["value"]}
        record["rejected"] = rejected or [""]
    if pairs:
        texts, hallucinated = [None] * (1 + len(more)), [[] for _ in (image, *more)]
        for number, caption, twins in pairs:
            texts[number], hallucinated[number] = caption, twins
        record["text"] = texts
    if text is not None:
        record["text"] = text
    if any(hallucinated) or is_contrastive:
        record["Hallucination caption"] = hallucinated
    return record
