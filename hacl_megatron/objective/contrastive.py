"""The contrastive losses L_v and L_t of HACL (arXiv 2312.06968), as sums over this rank's pairs.

With v, t, u the L2-normalised embeddings of images, captions and hallucinated captions, s(a, b) = a·b / τ:

    L_v = -1/N Σ_i log  e^{s(v_i,t_i)} / ( Σ_k e^{s(v_i,t_k)} + Σ_{(j,m) ∈ H_i} e^{s(v_i,u_jm)} )
    L_t = -1/N Σ_i log  e^{s(t_i,v_i)} /   Σ_k e^{s(t_i,v_k)}

i runs over this rank's pairs, k and (j, m) over the pool. H_i by `hallucination_negatives`: `own`, pair i's own (the
paper's equation); `all`, every one in the pool (the released code); `none`, plain contrastive.

How a trainer combines them. With N_global the pairs of the global batch, over all ranks and micro-batches, known
before the first one runs, a rank's share of λ (L_v + L_t) / 2 is

    contrastive_weight * (image_to_text_sum + text_to_image_sum) / (2 * max(N_global, 1))

The loss is the SUM of the shares over data-parallel ranks, and so is its gradient: what reaches a rank's embeddings
is complete already (`gather_pairs` has summed the other ranks' parts), while parameters, τ among them, get this
rank's part. Data parallelism averages gradients, so the trainer multiplies the share by the data-parallel size (and
by the number of micro-batches, by which megatron-core's schedules divide). Every rank calls `contrastive_loss` and
runs backward through its terms, with or without pairs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hacl_megatron.objective.negatives import PairEmbeddings

HallucinationNegatives = Literal["own", "all", "none"]

MIN_TEMPERATURE = 0.001
MAX_TEMPERATURE = 0.5


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
    """Σ of v·t - v·u (cosines, not divided by τ) over the pairs' own hallucinated captions."""
    margin_count: Tensor
    """Hallucinated captions of this rank's pairs."""
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
    mask_duplicates: bool,
) -> ContrastiveTerms:
    """L_v and L_t restricted to this rank's pairs (see the module's head for the equations and their use).

    Args:
        local: this rank's pairs; none is fine.
        pool: every pair that k and (j, m) run over, this rank's included, as `gather_pairs` gives it.
        first_pair: `local`'s pair i is the pool's pair `first_pair + i`.
        temperature: τ, [1], same dtype as the embeddings. Its gradient is this rank's share.
        hallucination_negatives: `own`, `all` or `none`.
        mask_duplicates: another pair whose caption key or image key equals pair i's is no negative in L_v or L_t; a
            hallucinated caption (of any pair) whose key equals caption i's is none either. The positive stays.

    Without pairs, here or anywhere, the terms are zeros that still have a gradient path to `local`, `pool` and τ.
    """
    assert hallucination_negatives in ("own", "all", "none"), hallucination_negatives
    assert 0 <= first_pair <= pool.num_pairs - local.num_pairs, (first_pair, local.num_pairs, pool.num_pairs)
    assert temperature.shape == (1,) and temperature.dtype == local.image.dtype == pool.image.dtype

    # One block of all rows. A form for pools whose [N_local, N + M] similarities do not fit runs smaller blocks under
    # activation checkpointing and adds up what they return.
    image_to_text_sum, text_to_image_sum, correct_sum = _row_block_sums(
        local, slice(0, local.num_pairs), pool, first_pair, temperature,
        hallucination_negatives=hallucination_negatives, mask_duplicates=mask_duplicates,
    )  # fmt: skip
    return ContrastiveTerms(
        image_to_text_sum=image_to_text_sum,
        text_to_image_sum=text_to_image_sum,
        correct_i2t_sum=correct_sum,
        pairs=correct_sum.new_full((), local.num_pairs),
        **_hallucination_metrics(local),
    )


def _row_block_sums(
    local: PairEmbeddings,
    rows: slice,
    pool: PairEmbeddings,
    first_pair: int,
    temperature: Tensor,
    *,
    hallucination_negatives: HallucinationNegatives,
    mask_duplicates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sums (image to text, text to image) and retrieval hits of the pairs `rows` of `local`; each [].

    Rows are independent of each other given the pool, so that sums over disjoint blocks add up. B pairs in the
    block, N and M in the pool.
    """
    images, captions = local.image[rows], local.caption[rows]  # [B, d]
    image_keys, caption_keys = local.image_keys[rows, None], local.caption_keys[rows, None]  # [B, 1]
    own = torch.arange(first_pair + rows.start, first_pair + rows.stop, device=images.device)[:, None]  # [B, 1]
    is_own = own == torch.arange(pool.num_pairs, device=images.device)  # [B, N]
    is_duplicate = ((caption_keys == pool.caption_keys) | (image_keys == pool.image_keys)) & ~is_own

    cosines = images @ pool.caption.T  # [B, N]
    image_to_text = cosines / temperature
    text_to_image = captions @ pool.image.T / temperature  # [B, N]
    image_candidates, caption_candidates = image_to_text, text_to_image
    if mask_duplicates:
        image_candidates = image_candidates.masked_fill(is_duplicate, float("-inf"))
        caption_candidates = caption_candidates.masked_fill(is_duplicate, float("-inf"))
    if hallucination_negatives != "none":
        hallucinated = images @ pool.hallucinated.T / temperature  # [B, M]
        is_no_negative = torch.zeros_like(hallucinated, dtype=torch.bool)
        if hallucination_negatives == "own":
            is_no_negative |= own != pool.hallucinated_owner
        if mask_duplicates:
            is_no_negative |= caption_keys == pool.hallucinated_keys
        image_candidates = torch.cat([image_candidates, hallucinated.masked_fill(is_no_negative, float("-inf"))], 1)

    # The positive is never masked, so each row's logsumexp is finite.
    image_to_text_sum = (image_candidates.logsumexp(1) - image_to_text.gather(1, own).squeeze(1)).sum()
    text_to_image_sum = (caption_candidates.logsumexp(1) - text_to_image.gather(1, own).squeeze(1)).sum()
    return image_to_text_sum, text_to_image_sum, _retrieval_hits(cosines.detach(), is_own | is_duplicate)


def _retrieval_hits(cosines: Tensor, is_accepted: Tensor) -> Tensor:
    """Rows of [B, N] whose largest cosine stands in an accepted column; []."""
    if cosines.shape[1] == 0:  # argmax refuses an empty pool
        return cosines.new_zeros(())
    nearest = cosines.argmax(1, keepdim=True)
    return is_accepted.gather(1, nearest).sum().to(cosines.dtype)


@torch.no_grad()
def _hallucination_metrics(local: PairEmbeddings) -> dict[str, Tensor]:
    """Metrics of each pair against its own hallucinated captions, whatever the loss uses as negatives."""
    owner = local.hallucinated_owner
    to_caption = (local.image * local.caption).sum(1)  # [N]
    to_hallucinated = (local.image[owner] * local.hallucinated).sum(1)  # [M]
    nearest = torch.full_like(to_caption, float("-inf")).scatter_reduce(0, owner, to_hallucinated, "amax")
    has_hallucinated = nearest > float("-inf")
    return {
        "margin_sum": (to_caption[owner] - to_hallucinated).sum(),
        "margin_count": to_caption.new_full((), local.num_hallucinated),
        "hallucination_correct_sum": ((to_caption > nearest) & has_hallucinated).sum().to(to_caption.dtype),
        "hallucination_pairs": has_hallucinated.sum().to(to_caption.dtype),
    }


@torch.no_grad()
def clamp_temperature_(temperature: Tensor, low: float = MIN_TEMPERATURE, high: float = MAX_TEMPERATURE) -> Tensor:
    """Keep τ in [low, high], in place; to be called after the optimiser step, on the fp32 master parameter."""
    return temperature.clamp_(low, high)
