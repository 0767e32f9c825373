"""Image files read by threads before the step that needs them is made.

    sample id ─sample→ manifest's record ─read→ file being read ... ─result→ bytes, key
                                     (threads: one read each, at storage's pace)

While one step is decoded and packed the files of the next are read: a slow read costs nothing as long as
`num_threads` of them at a time keep up with the steps.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial

from hacl_megatron.data.manifest import Manifest, Sample
from hacl_megatron.data.store import ImageStore, StoredImage, image_key

SizeOf = Callable[..., tuple[int, int]]
KEPT_SIZES = 200_000
"""Images whose sizes are remembered: some 30 MB."""


class ReadAhead:
    """Samples of one or more manifests, and their images' bytes under way.

    Args:
        manifests: the ordinary samples, then the contrastive ones; ids count through both.
        num_threads: files that are read at a time.
        size_of: `ImageDecoder.size_of`.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        store: ImageStore,
        num_threads: int,
        size_of: SizeOf,
    ) -> None:
        self._manifests, self._store = list(manifests), store
        self._size = lru_cache(KEPT_SIZES)(partial(_size, store, size_of))
        self._threads = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="image-reader")

    def sample(self, sample_id: int) -> Sample:
        """The record of a sample."""
        index = sample_id
        for manifest in self._manifests:
            if index < len(manifest):
                break
            index -= len(manifest)
        return manifest[index]

    def read(self, sample: Sample) -> "list[Future[tuple[bytes, int]]]":
        """Starts to read a sample's images: bytes and key to come of each."""
        return [self._threads.submit(self._read, *place) for place in zip(sample.images, sample.stored, strict=True)]

    def sizes(self, sample: Sample) -> "list[Future[tuple[int, int]]]":
        """Starts to read the heads of a sample's images: (width, height) to come of each, as it is shown."""
        alone = len(sample.images) == 1
        places = zip(sample.images, sample.stored, strict=True)
        return [self._threads.submit(self._size, *place, alone) for place in places]

    def cancel(self) -> None:
        """Ends the threads as soon as their reads return; whoever waits for another read gets CancelledError."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, image: str, stored: StoredImage | None) -> tuple[bytes, int]:
        data = self._store.fetch(image, stored)
        return data, image_key(data)


def _size(store: ImageStore, size_of: SizeOf, image: str, stored: StoredImage | None, alone: bool) -> tuple[int, int]:
    with store.open(image, stored) as file:
        return size_of(file, alone=alone)
