"""Packed batches of random tokens and pixels whose every row is compared, and the gradient of the test's loss."""

import torch
from torch import Tensor

from hacl_megatron.batch import PackedBatch, rows_to_read

VOCAB, PADDED_VOCAB, HIDDEN, LAYERS = 331, 384, 48, 4
VISUAL, IMAGE_SIZE = 36, 48


def _pack(
    segments: list[tuple[str, int, int]],
    *,
    images: int,
    seed: int,
    multiple: int,
    visual: int,
    uneven: bool = False,
) -> PackedBatch:
    """Lay out segments (kind, length, image) one after another. In a dialogue the image begins at row 1.

    kinds: dialogue, image (visual tokens and EOS), caption, hallucinated. image -1: none.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [length for _, length, _ in segments]
    if padding := -sum(lengths) % multiple:
        lengths.append(padding)
    total = sum(lengths)
    ids = torch.randint(3, VOCAB - 20, (total,), generator=generator)
    image_rows, feature_rows, targets, start = [], [], [], 0
    ends: dict[str, list[int]] = {"image": [], "caption": [], "hallucinated": []}
    for kind, length, image in segments:
        if image >= 0 and kind in ("dialogue", "image"):
            first = start + (1 if kind == "dialogue" else 0)
            image_rows += range(first, first + visual)
            feature_rows += range(image * visual, (image + 1) * visual)
        if kind == "dialogue":  # every row has a target, so that every row's logits are compared
            targets += range(start, start + length)
        else:
            ends[kind].append(start + length - 1)
        start += length
    ids[start:] = 0
    ids[image_rows] = 0
    pixels = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
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
        pixel_values=pixels, image_rows=integers(image_rows), feature_rows=integers(feature_rows),
        target_rows=integers(targets), target_ids=ids[targets].clone(), image_eos_rows=integers(ends["image"]),
        caption_eos_rows=integers(ends["caption"]), hallucinated_eos_rows=integers(ends["hallucinated"]),
        hallucinated_owner=integers(owners), image_keys=integers([*range(len(ends["image"]))]),
        caption_keys=integers([*range(len(ends["caption"]))]), hallucinated_keys=integers(owners),
        read_rows=read_rows, read_lengths=read_lengths, branch_rows=integers([]),
        branch_sizes=integers([]).int(), branch_lengths=integers([]).int(), branch_context_rows=integers([]),
        num_padding_rows=padding, num_text_rows=0,
    )  # fmt: skip


def make_batches(multiple: int = 1, visual: int = VISUAL) -> list[PackedBatch]:
    """Two micro-batches of different length: images, pairs and text; then text alone, its positions with gaps."""
    mixed = [
        ("dialogue", visual + 13, 1), ("image", visual + 1, 0), ("caption", 7, -1), ("hallucinated", 9, -1),
        ("image", visual + 1, 1), ("caption", 5, -1), ("dialogue", 11, -1), ("dialogue", visual + 7, 0),
    ]  # fmt: skip
    text = [("dialogue", 13, -1), ("dialogue", 4, -1)]
    return [
        _pack(mixed, images=2, seed=1, multiple=multiple, visual=visual),
        _pack(text, images=0, seed=2, multiple=multiple, visual=visual, uneven=True),
    ]


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
