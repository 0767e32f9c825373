"""Where negatives come from: the pairs of all data-parallel ranks, gathered so that gradients find their way back.

    this rank's pairs ─┬─ counts ──── all-gather ─→ N_r, M_r of every rank r
                       ├─ keys, owners, padded ──── all-gather ─→ owners shifted to the pool's numbering
                       └─ embeddings, padded ────── all-gather ─→ the pool, on every rank
                                                        ↑ backward: reduce-scatter, SUM over ranks

Pairs of earlier steps come from `queue`, without gradients and without communication.

Three collectives forward and one backward, always, whatever N_r and M_r are: a rank without a single pair enters
the same ones, with the same shapes, as the others.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed both and warns about the old names, which are all that earlier releases have.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, kw_only=True)
class PairEmbeddings:
    """Contrastive embeddings of N image-caption pairs and their M hallucinated captions.

    Embeddings are L2-normalised and fp32 (a test may use fp64); d is hidden / 4.
    """

    image: Tensor
    """[N, d]: v_i, the images' global representations."""
    caption: Tensor
    """[N, d]: t_i, the captions'."""
    hallucinated: Tensor
    """[M, d]: u_im, the hallucinated captions'."""
    hallucinated_owner: Tensor
    """int64 [M]: which of these N pairs each hallucinated caption belongs to."""
    image_keys: Tensor
    """int64 [N]: equal keys mean equal images."""
    caption_keys: Tensor
    """int64 [N]: equal keys mean equal caption token ids."""
    hallucinated_keys: Tensor
    """int64 [M]: comparable with `caption_keys`."""

    def __post_init__(self) -> None:
        (num_pairs, width), num_hallucinated = self.image.shape, self.hallucinated.shape[0]
        assert self.caption.shape == (num_pairs, width), (self.caption.shape, self.image.shape)
        assert self.hallucinated.shape == (num_hallucinated, width), (self.hallucinated.shape, self.image.shape)
        for embeddings in (self.image, self.caption, self.hallucinated):
            assert embeddings.dtype == self.image.dtype and embeddings.dtype in (torch.float32, torch.float64)
        assert self.image_keys.shape == self.caption_keys.shape == (num_pairs,)
        assert self.hallucinated_owner.shape == self.hallucinated_keys.shape == (num_hallucinated,)
        for integers in (self.image_keys, self.caption_keys, self.hallucinated_keys, self.hallucinated_owner):
            assert integers.dtype == torch.int64, integers.dtype

    @property
    def num_pairs(self) -> int:
        return self.image.shape[0]

    @property
    def num_hallucinated(self) -> int:
        return self.hallucinated.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> "PairEmbeddings":
        """The same pairs with `function` applied to every tensor."""
        return PairEmbeddings(**{item.name: function(getattr(self, item.name)) for item in fields(self)})

    def select(self, pairs: Tensor | slice, hallucinated: Tensor, owner: Tensor) -> "PairEmbeddings":
        """Some of the pairs, in any order; gradients pass.

        Args:
            pairs: int64 [n] or a slice: which of the N, in their new order.
            hallucinated: int64 or bool, which of the M go along.
            owner: int64 [M]: new number of the pair of each of those M (of the others it does not matter).
        """
        return PairEmbeddings(
            image=self.image[pairs],
            caption=self.caption[pairs],
            hallucinated=self.hallucinated[hallucinated],
            hallucinated_owner=owner[hallucinated],
            image_keys=self.image_keys[pairs],
            caption_keys=self.caption_keys[pairs],
            hallucinated_keys=self.hallucinated_keys[hallucinated],
        )


def concatenate_pairs(parts: Sequence[PairEmbeddings]) -> PairEmbeddings:
    """The pairs of all parts, in their order, as new tensors; owners shifted accordingly. Gradients pass."""
    first_pairs = itertools.accumulate((part.num_pairs for part in parts), initial=0)
    owners = [part.hallucinated_owner + first for part, first in zip(parts, first_pairs, strict=False)]
    names = [item.name for item in fields(PairEmbeddings) if item.name != "hallucinated_owner"]
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return PairEmbeddings(**whole, hallucinated_owner=torch.cat(owners))


@dataclass(frozen=True, kw_only=True)
class GatheredPairs:
    """The pool of negatives, and where this rank's own pairs stand in it."""

    pool: PairEmbeddings
    """Every rank's pairs, rank 0's first; `hallucinated_owner` counts in the pool's pairs. Same on every rank."""
    first_pair: int
    """This rank's pair i is the pool's pair `first_pair + i`."""


class _GatherRows(torch.autograd.Function):
    """[R, d] of each rank -> [ranks * R, d]; backward sums every rank's gradient of this rank's rows.

    `anchor` only makes the output require a gradient: a rank whose own rows need none (it has no pair, say) must
    still enter the backward's collective, or the others wait for it for ever.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, anchor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty(group.size() * rows.shape[0], rows.shape[1])
        _all_gather(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = gradient.new_empty(gradient.shape[0] // ctx.group.size(), gradient.shape[1])
        _reduce_scatter(own, gradient.contiguous(), op=dist.ReduceOp.SUM, group=ctx.group)
        return own, None, None


def _real_rows(counts: Tensor, padded_count: int) -> tuple[Tensor, Tensor]:
    """Which rank, and which of its rows, each real row of [ranks, padded_count] is; both int64, on the host.

    counts [2, 0, 1] padded to 2: ranks [0, 0, 2], rows [0, 1, 0].
    """
    real = torch.arange(padded_count) < counts[:, None]
    ranks, rows = real.nonzero(as_tuple=True)
    return ranks, rows


def gather_pairs(local: PairEmbeddings, group: ProcessGroup | None) -> GatheredPairs:
    """All ranks' pairs on every rank of `group`, with gradients summed over ranks on the way back.

    Args:
        local: this rank's pairs; N and M may differ per rank and be 0. d, dtype and device kind are the same on all.
        group: data-parallel group (context-parallel ranks counted once). None or a single rank: no communication.

    Every rank must call it, and every rank must run backward through the pool when one does (`contrastive_loss`
    keeps that path for a rank without pairs); with gradients enabled the pool always requires one. Where gradients
    are off on one rank they must be off on all.
    """
    if group is None or group.size() == 1:
        return GatheredPairs(pool=local, first_pair=0)
    device = local.image.device

    num_local = torch.tensor([[local.num_pairs, local.num_hallucinated]], dtype=torch.int64, device=device)
    all_counts = num_local.new_empty(group.size(), 2)
    _all_gather(all_counts, num_local, group=group)
    pair_counts, hallucinated_counts = all_counts.cpu().unbind(1)
    max_pairs, max_hallucinated = int(pair_counts.max()), int(hallucinated_counts.max())
    first_pairs = pair_counts.cumsum(0) - pair_counts

    # One payload of each kind, laid out alike on every rank: [pairs | pairs | hallucinated (| hallucinated)]. One row
    # more, so that a step without any pair sends something too.
    missing_pairs, missing_hallucinated = max_pairs - local.num_pairs, max_hallucinated - local.num_hallucinated
    integers = torch.cat(
        [
            F.pad(local.image_keys, (0, missing_pairs)),
            F.pad(local.caption_keys, (0, missing_pairs)),
            F.pad(local.hallucinated_keys, (0, missing_hallucinated)),
            F.pad(local.hallucinated_owner, (0, missing_hallucinated + 1)),
        ]
    )
    embeddings = torch.cat(
        [
            F.pad(local.image, (0, 0, 0, missing_pairs)),
            F.pad(local.caption, (0, 0, 0, missing_pairs)),
            F.pad(local.hallucinated, (0, 0, 0, missing_hallucinated + 1)),
        ]
    )
    all_integers = integers.new_empty(group.size() * integers.numel())
    _all_gather(all_integers, integers, group=group)
    anchor = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
    all_embeddings = _GatherRows.apply(embeddings, anchor, group)

    pair_ranks, pair_rows = _real_rows(pair_counts, max_pairs)
    hallucinated_ranks, hallucinated_rows = _real_rows(hallucinated_counts, max_hallucinated)
    captions_at, hallucinated_at, owners_at = max_pairs, 2 * max_pairs, 2 * max_pairs + max_hallucinated

    def pick(payload: Tensor, ranks: Tensor, rows: Tensor, offset: int) -> Tensor:
        index = ranks * (payload.shape[0] // group.size()) + offset + rows
        return payload.index_select(0, index.to(device))

    owners = pick(all_integers, hallucinated_ranks, hallucinated_rows, owners_at)
    pool = PairEmbeddings(
        image=pick(all_embeddings, pair_ranks, pair_rows, 0),
        caption=pick(all_embeddings, pair_ranks, pair_rows, captions_at),
        hallucinated=pick(all_embeddings, hallucinated_ranks, hallucinated_rows, hallucinated_at),
        hallucinated_owner=owners + first_pairs[hallucinated_ranks].to(device),
        image_keys=pick(all_integers, pair_ranks, pair_rows, 0),
        caption_keys=pick(all_integers, pair_ranks, pair_rows, captions_at),
        hallucinated_keys=pick(all_integers, hallucinated_ranks, hallucinated_rows, hallucinated_at),
    )
    return GatheredPairs(pool=pool, first_pair=int(first_pairs[group.rank()]))
