"""Images of a batch of questions or items, by name: each file read and decoded once, the unusable ones with reasons."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.store import ImageFolder, UnusableImage, image_key


@dataclass(frozen=True, kw_only=True)
class NamedImages:
    """What became of the images that were asked for; a name is in `places` or in `reasons`."""

    pixel_values: Tensor
    """float32 [I, 3, S, S]: the views of the usable images, in the order of their names."""
    places: dict[str, range]
    """Which of them each name's are."""
    sizes: dict[str, tuple[int, int]]
    """(width, height) of each usable image in pixels, as it is shown."""
    keys: dict[str, int]
    """64-bit hash of each usable image's file."""
    reasons: dict[str, str]
    """Why a name has no image."""


def read_images(names: Iterable[str], store: ImageFolder, decoder: ImageDecoder) -> NamedImages:
    """Read and decode the images of `names`, in which a name may be repeated."""
    files: dict[str, bytes] = {}
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            files[name] = store.read(name)
        except UnusableImage as error:
            reasons[name] = str(error)
    decoded = decoder.decode([*files.values()])
    refused = {name: reason for name, reason in zip(files, decoded.reasons, strict=True) if reason is not None}
    kept, places, chosen = [], {}, []
    for name, first, end in zip(files, decoded.first_views, decoded.first_views[1:], strict=False):
        if name not in refused:
            kept.append(name)
            places[name] = range(len(chosen), len(chosen) + end - first)
            chosen += range(first, end)
    return NamedImages(
        pixel_values=decoded.pixel_values[chosen],
        places=places,
        sizes={name: decoder.size_of(files[name]) for name in kept},
        keys={name: image_key(files[name]) for name in kept},
        reasons=reasons | refused,
    )
