"""What the header of an image file tells, beyond its format and size."""

import re

from PIL import Image

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""A marker in entropy-coded data, where 0xff is followed by 0 (stuffing) or D0-D7 (restart) otherwise."""


def gpu_decoder_is_right(image: Image.Image, data: bytes) -> bool:
    """Whether DALI's decoders for the GPU get this file's colours right (seen on an H200, DALI 2.4.0, 2026-11-26).

    They take a JPEG of red, green and blue for one of luminance and two colours, and palettes of fewer than 8 bits for
    something else: other pictures, by 200 levels, without an error. What was not seen to be right is left to Pillow.
    """
    if image.format == "PNG":
        return data[24] == 8
    if image.format not in ("JPEG", "MPO") or image.mode != "RGB":
        return True
    # As libjpeg decides: by the markers of JFIF and Adobe, else by the components' names.
    transform = image.info.get("adobe_transform")
    names = [component[0] for component in image.layer]
    return "jfif" in image.info or transform == 1 or (transform is None and names == [1, 2, 3])


def jpeg_scans(data: bytes) -> tuple[int, bool]:
    """How many scans a JPEG has, and whether its end-of-image marker is there.

    Walks the segments, because an EXIF thumbnail carries an end-of-image marker of its own, and looks no further than
    the first one at this level, because some cameras write on behind it.
    """
    position, scans = 2, 0  # behind the start-of-image marker
    while match := _JPEG_MARKER.search(data, position):
        marker = data[match.end() - 1]
        if marker == 0xD9:
            return scans, True
        scans += marker == 0xDA
        length = 0 if marker == 0x01 else int.from_bytes(data[match.end() : match.end() + 2], "big")
        position = match.end() + length
    return scans, False
