"""Image files read by threads before the step that needs them is made.

    sample id ─sample→ manifest's record ─read→ file being read ... ─result→ bytes, key
                                     (threads: one read each, at storage's pace)

While one step is decoded and packed the files of the next are read: a slow read costs nothing as long as
`num_threads` of them at a time keep up with the steps.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from hacl_megatron.data.manifest import Manifest, Sample
from hacl_megatron.data.store import ImageStore, image_key


class ReadAhead:
    """Samples of one or more manifests, and their images' bytes under way.

    Args:
        manifests: the ordinary samples, then the contrastive ones; ids count through both.
        num_threads: files that are read at a time.
    """

    def __init__(self, manifests: Sequence[Manifest], store: ImageStore, num_threads: int) -> None:
        self._manifests, self._store = list(manifests), store
        self._threads = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="image-reader")

    def sample(self, sample_id: int) -> Sample:
        """The record of a sample."""
        index = sample_id
        for manifest in self._manifests:
            if index < len(manifest):
                break
            index -= len(manifest)
        return manifest[index]

    def read(self, sample: Sample) -> "Future[tuple[bytes, int]] | None":
        """Starts to read a sample's image: its bytes and key to come, or None for a text-only sample."""
        return None if sample.image is None else self._threads.submit(self._read, sample)

    def cancel(self) -> None:
        """Ends the threads as soon as their reads return; whoever waits for another read gets CancelledError."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, sample: Sample) -> tuple[bytes, int]:
        assert sample.image is not None
        data = self._store.fetch(sample.image, sample.stored)
        return data, image_key(data)
