"""Image files read by threads before the step that needs them is made.

    sampler.peek ─ids→ want ─→ [sample, file being read] [sample, file being read] ... ─take→ the step's draws
                                     (threads: one read each, at storage's pace)

While one step is decoded and packed the files of the next are read: a slow read costs nothing as long as
`num_threads` of them at a time keep up with the steps.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from hacl_megatron.data.manifest import Manifest, Sample
from hacl_megatron.data.store import ImageStore, image_key


class ReadAhead:
    """The next draws of one rank in their order, each with its image's bytes under way.

    Args:
        manifests: the ordinary samples, then the contrastive ones; ids count through both.
        num_threads: files that are read at a time.

    One thread at a time may call `want` and `take`.
    """

    def __init__(self, manifests: Sequence[Manifest], store: ImageStore, num_threads: int) -> None:
        self._manifests, self._store = list(manifests), store
        self._threads = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="image-reader")
        self._under_way: deque[tuple[int, Sample, Future[tuple[bytes, int]] | None]] = deque()

    def want(self, sample_ids: Sequence[int]) -> None:
        """Starts to read what the next draws need; `sample_ids` are all of them, from the next `take` on."""
        for sample_id in sample_ids[len(self._under_way) :]:
            sample = self._sample(sample_id)
            file = None if sample.image is None else self._threads.submit(self._read, sample)
            self._under_way.append((sample_id, sample, file))

    def take(self, sample_id: int) -> "tuple[Sample, Future[tuple[bytes, int]] | None]":
        """The next draw: its sample, and its image's bytes and key (None for a text-only sample)."""
        wanted, sample, file = self._under_way.popleft()
        assert wanted == sample_id, (wanted, sample_id)
        return sample, file

    def cancel(self) -> None:
        """Ends the threads as soon as their reads return; whoever waits for another read gets CancelledError."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _sample(self, sample_id: int) -> Sample:
        index = sample_id
        for manifest in self._manifests:
            if index < len(manifest):
                break
            index -= len(manifest)
        return manifest[index]

    def _read(self, sample: Sample) -> tuple[bytes, int]:
        assert sample.image is not None
        data = self._store.fetch(sample.image, sample.stored)
        return data, image_key(data)
