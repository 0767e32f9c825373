"""Packed batches of random tokens and pixels whose every row is compared, and the gradient of the test's loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hacl_megatron.batch import PackedBatch, rows_to_read
from hacl_megatron.config.tiles import NEWLINE, ImageLayout, ImageRows

VOCAB, PADDED_VOCAB, HIDDEN, LAYERS = 331, 384, 48, 4
VISUAL, IMAGE_SIZE = 36, 48


@dataclass(frozen=True)
class Picture:
    """An image of a micro-batch."""

    size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
    """(width, height)"""
    alone: bool = True
    """Whether it is the only one of its record."""


Segments = list[tuple[str, int, tuple[int, ...]]]
"""(kind, rows of text, images) of each segment; kinds: dialogue, image (its rows and EOS), caption, hallucinated."""

PICTURES = [Picture(), Picture()]
MIXED: Segments = [
    ("dialogue", 13, (1,)), ("image", 1, (0,)), ("caption", 7, ()), ("hallucinated", 9, ()),
    ("image", 1, (1,)), ("caption", 5, ()), ("dialogue", 11, ()), ("dialogue", 7, (0,)),
]  # fmt: skip
TEXT: Segments = [("dialogue", 13, ()), ("dialogue", 4, ())]

TILED_PICTURES = [
    Picture((330, 90)), Picture((50, 120), alone=False), Picture((97, 60), alone=False),
    Picture((48, 48), alone=False), Picture((31, 170)), Picture((48, 48)), Picture((230, 229)),
]  # fmt: skip
"""Wide, tall, as large as a view, larger than all grids; 1, 2 and 3 of a record."""
TILED: Segments = [
    ("dialogue", 13, (0,)), ("dialogue", 9, (1, 2, 3)), ("image", 1, (2,)), ("caption", 7, ()),
    ("hallucinated", 9, ()), ("image", 1, (4,)), ("caption", 5, ()), ("dialogue", 11, ()), ("dialogue", 7, (5,)),
    ("dialogue", 5, (6,)),
]  # fmt: skip


def pictures_and_segments(layout: ImageLayout) -> tuple[list[Picture], Segments]:
    """Of the first micro-batch of `make_batches`."""
    return (PICTURES, MIXED) if layout.tiles is None else (TILED_PICTURES, TILED)


def _pack(
    segments: Segments,
    images: list[ImageRows],
    *,
    visual: int,
    seed: int,
    multiple: int,
    uneven: bool = False,
) -> PackedBatch:
    """Lay out segments one after another. In a dialogue each image stands behind a row of text, the rest at the end."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [text + sum(len(images[image]) for image in shown) for _, text, shown in segments]
    views = [0, *torch.tensor([rows.num_views for rows in images], dtype=torch.int64).cumsum(0).tolist()]
    newline, pooled = views[-1] * visual, [0, *(torch.tensor([len(rows.pooled) for rows in images]).cumsum(0).tolist())]

    def features(image: int) -> Tensor:
        sources = torch.from_numpy(images[image].sources)
        own = views[image + 1] * visual - views[image] * visual
        in_views, pools = sources + views[image] * visual, sources - own + newline + 1 + pooled[image]
        return torch.where(sources == NEWLINE, newline, torch.where(sources < own, in_views, pools))

    if padding := -sum(lengths) % multiple:
        lengths.append(padding)
    total = sum(lengths)
    ids = torch.randint(3, VOCAB - 20, (total - padding,), generator=generator)
    ids = torch.cat([ids, ids.new_zeros(padding)])  # none is drawn for padding: pixels are the same with and without
    image_rows, feature_rows, targets, start = [], [], [], 0
    ends: dict[str, list[int]] = {"image": [], "caption": [], "hallucinated": []}
    for (kind, _, shown), length in zip(segments, lengths, strict=False):
        first = start
        for image in shown:
            first += kind == "dialogue"
            image_rows += range(first, first + len(images[image]))
            feature_rows += features(image).tolist()
            first += len(images[image])
        if kind == "dialogue":  # every row has a target, so that every row's logits are compared
            targets += range(start, start + length)
        else:
            ends[kind].append(start + length - 1)
        start += length
    ids[image_rows] = 0
    pixels = torch.randn(views[-1], 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    pooled_rows = [torch.from_numpy(rows.pooled) + first * visual for rows, first in zip(images, views, strict=False)]
    pooled_weights = [torch.from_numpy(rows.weights) for rows in images]
    # Rotary attention sees differences of positions alone, so only uneven ones show that a row takes its own.
    positions = torch.cat([torch.arange(n) + (torch.arange(n) ** 2 // 7 if uneven else 0) for n in lengths])
    owners = [0] * len(ends["hallucinated"])

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    read_rows, read_lengths = rows_to_read(cu_seqlens, *map(integers, (targets, *ends.values())))
    return PackedBatch(
        sample_ids=integers([0]), token_ids=ids, position_ids=positions,
        cu_seqlens=cu_seqlens, max_seqlen=max(lengths),
        pooled_rows=torch.cat([torch.empty(0, 4, dtype=torch.int64), *pooled_rows]),
        pooled_weights=torch.cat([torch.empty(0, 4), *pooled_weights]),
        pixel_values=pixels, image_rows=integers(image_rows), feature_rows=integers(feature_rows),
        target_rows=integers(targets), target_ids=ids[targets].clone(), image_eos_rows=integers(ends["image"]),
        caption_eos_rows=integers(ends["caption"]), hallucinated_eos_rows=integers(ends["hallucinated"]),
        hallucinated_owner=integers(owners), image_keys=integers([*range(len(ends["image"]))]),
        caption_keys=integers([*range(len(ends["caption"]))]), hallucinated_keys=integers(owners),
        read_rows=read_rows, read_lengths=read_lengths, branch_rows=integers([]),
        branch_sizes=integers([]).int(), branch_lengths=integers([]).int(), branch_context_rows=integers([]),
        num_padding_rows=padding, num_text_rows=0,
    )  # fmt: skip


def make_batches(multiple: int = 1, visual: int = VISUAL, layout: ImageLayout | None = None) -> list[PackedBatch]:
    """Two micro-batches of different length: images, pairs and text; then text alone, its positions with gaps.

    Args:
        layout: what decides the rows of images. Default: `visual` of each.
    """
    layout = layout or ImageLayout(visual_tokens=visual)
    pictures, segments = pictures_and_segments(layout)
    images = [layout.rows(picture.size, alone=picture.alone) for picture in pictures]
    options = {"visual": layout.visual_tokens, "multiple": multiple}
    return [_pack(segments, images, seed=1, **options), _pack(TEXT, [], seed=2, uneven=True, **options)]


def loss_weights(index: int, batch: PackedBatch) -> dict[str, Tensor]:
    """Gradient of the test's loss with respect to each output of micro-batch `index`; of order 1 in all."""
    generator = torch.Generator().manual_seed(100 + index)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / max(rows * columns, 1) ** 0.5

    return {
        "logits": draw(batch.target_rows.numel(), VOCAB),
        "image": draw(batch.image_eos_rows.numel(), HIDDEN // 4),
        "caption": draw(batch.caption_eos_rows.numel(), HIDDEN // 4),
        "hallucinated": draw(batch.hallucinated_eos_rows.numel(), HIDDEN // 4),
    }
