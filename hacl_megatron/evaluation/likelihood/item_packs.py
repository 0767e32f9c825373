"""From items to packs, and from what the model made of a pack back to items.

keys ─┬─ image names ─FolderStore→ bytes ─ImageDecoder→ pixels, each image once ─┐
      └─ Task.encode → token rows ───────────────────────────────────────────────┴→ PackedBatch
                                                                                         │ model
key → ItemOutput  ←──────────────── split at segments and owners ←─────────────── PackResult
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hacl_megatron.assemble.forward import losses_of_tokens
from hacl_megatron.assemble.module import pad_multiple
from hacl_megatron.batch import PackedBatch
from hacl_megatron.config.run import RunConfig
from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodedSample, UnusableSample
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.node_cache import NodeCache
from hacl_megatron.data.packing import PackSlot, pack, with_views
from hacl_megatron.data.store import ImageFolder, image_folder
from hacl_megatron.evaluation.image_files import read_images
from hacl_megatron.evaluation.likelihood.task import AnswerLikelihood, ItemOutput, Task
from hacl_megatron.model.hacl import ModelOutput


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What the last stage made of one pack, on the host in fp32. Shape legend as in `hacl_megatron.batch`."""

    losses: Tensor
    """[K]: minus the log-likelihood of each target."""
    images: Tensor
    """[N, d]"""
    captions: Tensor
    """[N, d]"""
    hallucinated: Tensor
    """[M, d]"""
    states: tuple[Tensor, Tensor, Tensor] | None = None
    """[N, H], [N, H], [M, H]: the heads' inputs, where asked for."""


def result_of_pack(output: ModelOutput, batch: PackedBatch, *, vocab_size: int, tp_group: ProcessGroup) -> PackResult:
    """On every tensor-parallel rank of the last stage, whose logits are parts of one vocabulary."""
    losses = losses_of_tokens(output, batch, vocab_size=vocab_size, tp_group=tp_group)
    return PackResult(
        losses=losses.float().cpu(),
        images=output.image_embeddings.cpu(),
        captions=output.caption_embeddings.cpu(),
        hallucinated=output.hallucinated_embeddings.cpu(),
    )


@dataclass(frozen=True, kw_only=True)
class PackedItems:
    """One pack of items, those that could not be used left out."""

    pack: PackedBatch
    sequences: dict[int, int]
    """How many sequences each item in the pack has, in the pack's order."""
    errors: dict[int, str]
    """Why the other items are not in it."""


class ItemReader:
    """Reads, decodes and packs items. One thread at a time may call it.

    Args:
        layout: what decides the rows that an image takes.
        pad_multiple: every pack's number of rows is a multiple of it.
    """

    def __init__(
        self, store: ImageFolder, decoder: ImageDecoder, *, layout: ImageLayout, pad_multiple: int = 1
    ) -> None:
        self.store = store
        self.decoder = decoder
        self.layout = layout
        self.pad_multiple = pad_multiple

    @classmethod
    def of(cls, config: RunConfig) -> "ItemReader":
        """Reads images as a run of this configuration does."""
        return cls(
            image_folder(config.data.image_folder, NodeCache.of(config.data)),
            ImageDecoder.of(config),
            layout=config.architecture.image_layout,
            pad_multiple=pad_multiple(config),
        )

    def read(self, task: Task, keys: Sequence[int]) -> PackedItems:
        """The pack of the items `keys`; without any it is a pack of padding."""
        errors: dict[int, str] = {}
        encoded: dict[int, list[EncodedSample]] = {}
        names = {key: task.image(key) for key in keys}
        images = read_images(names.values(), self.store, self.decoder)
        for key, name in names.items():
            if name in images.reasons:
                errors[key] = f"{name}: {images.reasons[name]}"
                continue
            try:
                encoded[key] = task.encode(key, images.sizes[name])
            except UnusableSample as error:
                errors[key] = str(error)
        slots = [
            PackSlot(sample_id=key, encoded=sequence, image_keys=(images.keys[names[key]],))
            for key, sequences in encoded.items()
            for sequence in sequences
        ]
        batch = pack(
            slots,
            images.pixel_values[:0],
            visual_tokens=self.layout.visual_tokens,
            pad_multiple=self.pad_multiple,
            parts=task.parts,
        )
        # `pack` gives every sequence an image of its own; here those of an item, and items, share theirs.
        places = [images.places[names[slot.sample_id]] for slot in slots]
        views = torch.tensor([view for place in places for view in place], dtype=torch.int64)
        batch = with_views(batch, images.pixel_values, views, visual_tokens=self.layout.visual_tokens)
        return PackedItems(
            pack=batch, sequences={key: len(sequences) for key, sequences in encoded.items()}, errors=errors
        )

    def close(self) -> None:
        """Ends the threads that decode images."""
        self.decoder.close()


def outputs_of_items(items: PackedItems, result: PackResult) -> dict[int, ItemOutput]:
    """What the model made of each item of one pack."""
    batch, outputs = items.pack, {}
    if batch.num_pairs:
        for index, key in enumerate(items.sequences):
            own = batch.hallucinated_owner == index
            states = None
            if result.states is not None:
                image, caption, hallucinated = result.states
                states = image[index].numpy(), caption[index].numpy(), hallucinated[own].numpy()
            outputs[key] = ItemOutput(
                image=result.images[index].numpy(),
                caption=result.captions[index].numpy(),
                hallucinated=result.hallucinated[own].numpy(),
                states=states,
            )
        return outputs
    # Dialogues alone: each is the segment of its number.
    segments = torch.searchsorted(batch.cu_seqlens.long(), batch.target_rows, right=True) - 1
    sums = torch.zeros(batch.cu_seqlens.numel(), dtype=torch.float64)
    sums.index_add_(0, segments, -result.losses.double())
    counts = torch.bincount(segments, minlength=sums.numel())
    first = 0
    for key, number in items.sequences.items():
        outputs[key] = ItemOutput(
            answers=tuple(
                AnswerLikelihood(log_likelihood=float(sums[at]), num_tokens=int(counts[at]))
                for at in range(first, first + number)
            )
        )
        first += number
    return outputs
