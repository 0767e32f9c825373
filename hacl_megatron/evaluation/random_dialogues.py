"""Random dialogues with images, for `agreement`: packed as training packs them, and as transformers takes them."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hacl_megatron.batch import PackedBatch, Parts, rows_to_read
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.tiles import ImageRows
from hacl_megatron.data.encoding import IMAGE, EncodedSample
from hacl_megatron.data.packing import PackSlot, pack
from hacl_megatron.data.templates.template import IGNORE

TEXT_LENGTHS = (23, 57)
"""Tokens of the two dialogues beside their images."""
TILED_SIZES = (((2400, 1300),), ((250, 800), (300, 300)))
"""(width, height) of the images of each, where pictures are cut into tiles: one of more pixels than nine tiles have,
and two, of which one is tall."""


def random_batch(config: ModelConfig, image_token: int | None = None, seed: int = 0) -> PackedBatch:
    """Two dialogues, packed; every text row has a target.

    Each has one image, or those of `TILED_SIZES`: the first behind a row of text, each other behind one more.

    Args:
        image_token: id by which the other model marks an image, beside the one that `config` states; it may lie
            anywhere in the vocabulary, and no text has it.
    """
    generator = torch.Generator().manual_seed(seed)
    size, images = config.vision.image_size, [_images(config, dialogue) for dialogue in range(2)]
    lengths = [text + sum(len(rows) for rows in shown) for text, shown in zip(TEXT_LENGTHS, images, strict=True)]
    marks = {image_token, config.extra.get("image_token_index")}
    text_ids = torch.tensor([token for token in range(3, config.language.vocab_size) if token not in marks])
    ids = text_ids[torch.randint(len(text_ids), (sum(lengths),), generator=generator)]
    views = sum(rows.num_views for shown in images for rows in shown)
    pixels = torch.randn(views, 3, size, size, generator=generator)
    slots = []
    for number, (own, shown) in enumerate(zip(ids.split(lengths), images, strict=True)):
        rows, start = own.numpy().copy(), 1
        for image in shown:
            rows[start : start + len(image)] = IMAGE
            start += len(image) + 1
        encoded = EncodedSample(
            dialogue=rows, labels=np.full(len(rows), IGNORE), images=tuple(shown), truncated=False,
            tokenization_mismatch=False,
        )  # fmt: skip
        slots.append(PackSlot(sample_id=number, encoded=encoded, image_keys=(0,) * len(shown)))
    batch = pack(
        slots, pixels, visual_tokens=config.visual_tokens, pad_multiple=1, parts=Parts(images="none", texts=False)
    )
    targets = torch.ones(batch.num_rows, dtype=torch.bool)
    targets[batch.image_rows] = False
    target_rows = targets.nonzero().flatten()
    read_rows, read_lengths = rows_to_read(batch.cu_seqlens, target_rows)
    return replace(
        batch, target_rows=target_rows, target_ids=ids[targets], read_rows=read_rows, read_lengths=read_lengths,
        lengths=None,
    )  # fmt: skip


def images_for_transformers(config: ModelConfig, batch: PackedBatch, dialogue: int) -> dict[str, Tensor]:
    """What transformers' model is given of the images of one dialogue of `random_batch`."""
    counts = [[rows.num_views for rows in _images(config, number)] for number in range(2)]
    views = batch.pixel_values.split([sum(of_dialogue) for of_dialogue in counts])[dialogue]
    if config.tiles is None:
        return {"pixel_values": views}
    images, most = views.split(counts[dialogue]), max(counts[dialogue])
    given = {
        "pixel_values": torch.stack([F.pad(image, (0, 0) * 3 + (0, most - len(image))) for image in images]),
        "image_sizes": torch.tensor([(height, width) for width, height in TILED_SIZES[dialogue]]),
    }
    if config.tiles.only_alone:
        given["batch_num_images"] = torch.tensor([len(images)])
    return given


def _images(config: ModelConfig, dialogue: int) -> list[ImageRows]:
    layout = config.image_layout
    sizes = TILED_SIZES[dialogue] if layout.needs_sizes else (None,)
    return [layout.rows(size, alone=len(sizes) == 1) for size in sizes]
