"""The objective's equations as nested loops over one process's full batch: slow, and nothing to get wrong."""

import torch
from torch import Tensor

from hacl_megatron.objective.negatives import PairEmbeddings


def losses_by_loops(
    pairs: PairEmbeddings, temperature: Tensor, *, hallucination_negatives: str, mask_duplicates: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """-log of both softmaxes for every pair: (image to text, text to image), differentiable."""
    image_to_text, text_to_image = [], []
    for i in range(pairs.num_pairs):
        v, t = pairs.image[i], pairs.caption[i]
        positive = torch.exp(v.dot(t) / temperature[0])
        image_denominator, caption_denominator = positive, positive
        for k in range(pairs.num_pairs):
            same = pairs.caption_keys[k] == pairs.caption_keys[i] or pairs.image_keys[k] == pairs.image_keys[i]
            if k == i or (mask_duplicates and same):
                continue
            image_denominator = image_denominator + torch.exp(v.dot(pairs.caption[k]) / temperature[0])
            caption_denominator = caption_denominator + torch.exp(t.dot(pairs.image[k]) / temperature[0])
        for m in range(pairs.num_hallucinated):
            if hallucination_negatives == "none":
                continue
            if hallucination_negatives == "own" and pairs.hallucinated_owner[m] != i:
                continue
            if mask_duplicates and pairs.hallucinated_keys[m] == pairs.caption_keys[i]:
                continue
            image_denominator = image_denominator + torch.exp(v.dot(pairs.hallucinated[m]) / temperature[0])
        image_to_text.append(-torch.log(positive / image_denominator))
        text_to_image.append(-torch.log(positive / caption_denominator))
    return image_to_text, text_to_image


def metrics_by_loops(pairs: PairEmbeddings, start: int, stop: int, *, mask_duplicates: bool = True) -> dict[str, float]:
    """The metric sums of pairs `start` to `stop` against the whole batch."""
    sums = dict.fromkeys(
        ("correct_i2t_sum", "margin_sum", "margin_count", "hallucination_correct_sum", "hallucination_pairs"), 0.0
    )
    for i in range(start, stop):
        v = pairs.image[i]
        scores = [float(v.dot(t)) for t in pairs.caption]
        best = scores.index(max(scores))
        sums["correct_i2t_sum"] += float(
            best == i
            or pairs.caption_keys[best] == pairs.caption_keys[i]
            or pairs.image_keys[best] == pairs.image_keys[i]
        )
        twins = zip(pairs.hallucinated, pairs.hallucinated_keys, pairs.hallucinated_owner, strict=True)
        equal = pairs.caption_keys[i] if mask_duplicates else None
        own = [float(v.dot(u)) for u, key, j in twins if j == i and (equal is None or key != equal)]
        sums["margin_sum"] += sum(scores[i] - score for score in own)
        sums["margin_count"] += len(own)
        sums["hallucination_correct_sum"] += float(bool(own) and all(scores[i] > score for score in own))
        sums["hallucination_pairs"] += float(bool(own))
    return sums
