"""The contrastive losses L_v and L_t of HACL (arXiv 2312.06968), as sums over this rank's pairs.

With v, t, u the L2-normalised embeddings of images, captions and hallucinated captions, s(a, b) = a·b / τ:

    L_v = -1/N Σ_i log  e^{s(v_i,t_i)} / ( Σ_k e^{s(v_i,t_k)} + w Σ_{(j,m) ∈ H_i} e^{s(v_i,u_jm)} )
    L_t = -1/N Σ_i log  e^{s(t_i,v_i)} /   Σ_k e^{s(t_i,v_k)}

i runs over this rank's pairs, k and (j, m) over the pool: what `gather_pairs` gave and, if there is one, the queue of
earlier pairs. H_i by `hallucination_negatives`: `own`, pair i's own (the paper's equation); `all`, every one in the
pool (the released code); `none`, plain contrastive. w, 1 in both, is `hallucination_weight`. `row_blocks` computes both
sums in bounded memory.

How a trainer combines them. With N_global the pairs of the global batch, over all ranks and micro-batches, known
before the first one runs, a rank's share of λ (L_v + L_t) / 2 is

    contrastive_weight * (image_to_text_sum + text_to_image_sum) / (2 * max(N_global, 1))

The loss is the SUM of the shares over data-parallel ranks, and so is its gradient: what reaches a rank's embeddings
is complete already (`gather_pairs` has summed the other ranks' parts), while parameters, τ among them, get this
rank's part. Data parallelism averages gradients, so the trainer multiplies the share by the data-parallel size (and
by the number of micro-batches, by which megatron-core's schedules divide). Every rank calls `contrastive_loss` and
runs backward through its terms, with or without pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hacl_megatron.config.flags import TEMPERATURE_RANGE
from hacl_megatron.objective.negatives import PairEmbeddings
from hacl_megatron.objective.row_blocks import BLOCK_BYTES, Columns, softmax_loss_sum
from hacl_megatron.platform.device import to_device

HallucinationNegatives = Literal["own", "all", "none"]


@dataclass(frozen=True, kw_only=True)
class ContrastiveTerms:
    """Sums over this rank's pairs, each of shape [] in the embeddings' dtype; add them over ranks, then divide.

    Only the first two carry gradients.
    """

    image_to_text_sum: Tensor
    """Σ_i of -log softmax at v_i's own caption; over all ranks it is N * L_v."""
    text_to_image_sum: Tensor
    """Σ_i of -log softmax at t_i's own image; over all ranks it is N * L_t."""
    correct_i2t_sum: Tensor
    """Pairs whose image is nearest, among the pool's captions, to its own caption or to that of a duplicate pair."""
    margin_sum: Tensor
    """Σ of v·t - v·u (cosines, not divided by τ) over the pairs' own hallucinated captions that differ from theirs."""
    margin_count: Tensor
    """Hallucinated captions of this rank's pairs; with `mask_duplicates`, here and below, those alone that differ from
    their caption."""
    hallucination_correct_sum: Tensor
    """Pairs with v·t above v·u for every own hallucinated caption, of which there is at least one."""
    hallucination_pairs: Tensor
    """Pairs with at least one own hallucinated caption."""
    pairs: Tensor
    """Pairs of this rank."""


def contrastive_loss(
    local: PairEmbeddings,
    pool: PairEmbeddings,
    first_pair: int,
    temperature: Tensor,
    *,
    hallucination_negatives: HallucinationNegatives,
    hallucination_weight: float = 1.0,
    mask_duplicates: bool,
    queue: PairEmbeddings | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> ContrastiveTerms:
    """L_v and L_t restricted to this rank's pairs (see the module's head for the equations and their use).

    Args:
        local: this rank's pairs; none is fine.
        pool: every pair that k and (j, m) run over, this rank's included, as `gather_pairs` gives it.
        first_pair: `local`'s pair i is the pool's pair `first_pair + i`.
        temperature: τ, [1], same dtype as the embeddings. Its gradient is this rank's share.
        hallucination_negatives: `own`, `all` or `none`.
        hallucination_weight: w, above 0: each hallucinated caption counts as this many.
        mask_duplicates: another pair whose caption key or image key equals pair i's is no negative in L_v or L_t; a
            hallucinated caption (of any pair) whose key equals caption i's is none either. The positive stays.
        queue: pairs of earlier steps, over which k, and with `all` (j, m), run too (`NegativeQueue.pairs`). They
            get no gradient unless they ask for one.
        block_bytes: most memory to take beside the gradients of the embeddings; rows go in as many blocks as it
            takes (`row_blocks`).

    Gradients are made here, not in backward, which may run once (without `torch.is_grad_enabled()`, none are).
    Without pairs, here or anywhere, the terms are zeros that still have a gradient path to `local`, `pool` and τ.
    """
    assert hallucination_negatives in ("own", "all", "none"), hallucination_negatives
    assert 0 <= first_pair <= pool.num_pairs - local.num_pairs, (first_pair, local.num_pairs, pool.num_pairs)
    assert temperature.shape == (1,) and temperature.dtype == local.image.dtype == pool.image.dtype

    pairs = [pool] if queue is None else [pool, queue]
    keys, pool_keys = _Keys.of(local), [_Keys.of(others) for others in pairs]
    captions, images = [], []
    for others, their in zip(pairs, pool_keys, strict=True):
        equal_keys = ()
        if mask_duplicates:
            equal_keys = ((keys.caption, their.caption), (keys.image, their.image))
        captions.append(Columns(embeddings=others.caption, equal_keys=equal_keys))
        images.append(Columns(embeddings=others.image, equal_keys=equal_keys))
    hallucinated = []
    if hallucination_negatives != "none":
        # No pair of this step owns what the queue holds.
        for others, their in list(zip(pairs, pool_keys, strict=True))[
            : None if hallucination_negatives == "all" else 1
        ]:
            owner = others.hallucinated_owner - first_pair if hallucination_negatives == "own" else None
            equal_keys = ((keys.caption, their.hallucinated),) if mask_duplicates else ()
            columns = Columns(
                embeddings=others.hallucinated, equal_keys=equal_keys, owner=owner, weight=hallucination_weight
            )
            hallucinated.append(columns)

    image_to_text_sum, nearest = softmax_loss_sum(
        local.image, captions + hallucinated, first_pair, temperature,
        num_ranked=len(captions), block_bytes=block_bytes,
    )  # fmt: skip
    text_to_image_sum, _ = softmax_loss_sum(local.caption, images, first_pair, temperature, block_bytes=block_bytes)
    correct_sum = _retrieval_hits(nearest, keys, pool_keys, first_pair).to(local.image.dtype)
    return ContrastiveTerms(
        image_to_text_sum=image_to_text_sum,
        text_to_image_sum=text_to_image_sum,
        correct_i2t_sum=correct_sum,
        pairs=correct_sum.new_full((), local.num_pairs),
        **_hallucination_metrics(local, keys, mask_duplicates=mask_duplicates),
    )


@dataclass(frozen=True)
class _Keys:
    """Keys of pairs on the device of their embeddings, int64 [N], [N] and [M]."""

    image: Tensor
    caption: Tensor
    hallucinated: Tensor

    @classmethod
    def of(cls, pairs: PairEmbeddings) -> "_Keys":
        keys = (pairs.image_keys, pairs.caption_keys, pairs.hallucinated_keys)
        return cls(*(to_device(part, pairs.image.device) for part in keys))


def _retrieval_hits(nearest: Tensor, local: _Keys, pairs: Sequence[_Keys], first_pair: int) -> Tensor:
    """How many of the captions nearest to this rank's images are their own, or a duplicate pair's; int64 [].

    nearest: int64 [N local], counting through the captions of `pairs`.
    """
    own = torch.arange(first_pair, first_pair + nearest.numel(), device=nearest.device)
    same_caption = torch.cat([others.caption for others in pairs])[nearest] == local.caption
    same_image = torch.cat([others.image for others in pairs])[nearest] == local.image
    return ((nearest == own) | same_caption | same_image).sum()


@torch.no_grad()
def _hallucination_metrics(local: PairEmbeddings, keys: _Keys, *, mask_duplicates: bool) -> dict[str, Tensor]:
    """Metrics of each pair against its own hallucinated captions, whatever the loss uses as negatives.

    With `mask_duplicates`, one whose tokens are the caption's own does not count: nothing could tell the two apart.
    """
    owner = to_device(local.hallucinated_owner, local.image.device)
    to_caption = (local.image * local.caption).sum(1)  # [N]
    to_hallucinated = (local.image[owner] * local.hallucinated).sum(1)  # [M]
    counts = torch.ones_like(owner, dtype=torch.bool)
    if mask_duplicates:
        counts = keys.hallucinated != keys.caption[owner]
    compared = to_hallucinated.masked_fill(~counts, float("-inf"))
    nearest = torch.full_like(to_caption, float("-inf")).scatter_reduce(0, owner, compared, "amax")
    has_hallucinated = nearest > float("-inf")
    return {
        "margin_sum": (to_caption[owner] - to_hallucinated).masked_fill(~counts, 0.0).sum(),
        "margin_count": counts.sum().to(to_caption.dtype),
        "hallucination_correct_sum": ((to_caption > nearest) & has_hallucinated).sum().to(to_caption.dtype),
        "hallucination_pairs": has_hallucinated.sum().to(to_caption.dtype),
    }


@torch.no_grad()
def clamp_temperature_(temperature: Tensor) -> Tensor:
    """Keep τ in its range, in place; to be called after the optimiser step, on the fp32 master parameter."""
    return temperature.clamp_(*TEMPERATURE_RANGE)
