"""Broken and oversized images: each is refused with its reason before it costs time, and moves nothing else."""

import re
import struct
import zlib

import pytest
import torch

from tests.data.drawn_images import BACKENDS, BAD, PHOTO, PNG, decode, decoder, jpeg, needs_dali, with_thumbnail


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", BAD)
def test_broken_files_have_a_reason_and_move_nothing_else(decoders, backend, kind):
    data, reason = BAD[kind]
    good = [jpeg(60, 40, seed) for seed in range(3)]
    alone = decode(decoders(backend), *good)
    mixed = decoders(backend).decode([good[0], data, good[1], good[2]])
    assert [index for index, text in enumerate(mixed.reasons) if text] == [1]
    text = mixed.reasons[1]
    assert re.search(reason, text), text
    assert "\n" not in text and len(text) <= 300
    assert not mixed.pixel_values[1].any()
    assert torch.equal(mixed.pixel_values[[0, 2, 3]], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thumbnail_is_no_reason_to_refuse(decoders, backend):
    whole = decode(decoders(backend), with_thumbnail(PHOTO), PHOTO)
    assert torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_images_are_refused_before_they_are_decoded(backend):
    """A PNG of 30,000 x 30,000 pixels in a few bytes of header."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    bomb += struct.pack(">I", zlib.crc32(b"IHDR" + header)) + PNG[33:]
    item = decoder(backend, max_image_pixels=1000)
    assert item.decode([jpeg(31, 32), jpeg(40, 25), jpeg(20, 32), jpeg(32, 32), bomb]).reasons == [
        "31 x 32 pixels, padded to a square, are more than --max-image-pixels 1000",
        "40 x 25 pixels, padded to a square, are more than --max-image-pixels 1000",
        "20 x 32 pixels, padded to a square, are more than --max-image-pixels 1000",
        "32 x 32 pixels are more than --max-image-pixels 1000",
        item.decode([bomb]).reasons[0],
    ]
    assert "pixels" in item.decode([bomb]).reasons[0]
    item.close()
    item = decoder(backend, "square", max_image_pixels=1000)
    assert item.decode([jpeg(40, 25), jpeg(41, 25)]).reasons == [
        None, "41 x 25 pixels are more than --max-image-pixels 1000",
    ]  # fmt: skip
    item.close()


@needs_dali
@pytest.mark.parametrize("kind", ["text", "empty", "jpeg cut in half", "png cut in half", "webp cut in half"])
def test_broken_files_are_found_before_dali_sees_them(decoders, kind):
    """What DALI fails on is repeated image by image on a new pipeline: too slow for the common faults."""
    item = decoders("dali")
    before = [graph.num_failures for graph in item._graphs]
    assert item.decode([PHOTO, BAD[kind][0], PHOTO]).reasons[1] is not None
    assert [graph.num_failures for graph in item._graphs] == before
