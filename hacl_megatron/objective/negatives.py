"""Where negatives come from: the pairs of all data-parallel ranks, gathered so that gradients find their way back.

    host     this rank's keys and owners ──── gather ────→ every rank's, before the step's first micro-batch
    device   this rank's embeddings, padded ─ all-gather ─→ the pool, on every rank
                                                 ↑ backward: reduce-scatter, SUM over ranks

Pairs of earlier steps come from `queue`, without gradients and without communication.

How many pairs each rank has is known on the host, so the device is never waited for: all indices are computed on the
host. One collective of the device forward and one backward, always, whatever the counts are: a rank without a single
pair enters the same ones, with the same shapes, as the others.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from hacl_megatron.platform.device import to_device
from hacl_megatron.platform.host_groups import gather_integers

# torch 2.13 renamed both and warns about the old names, which are all that earlier releases have.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, kw_only=True)
class PairIntegers:
    """What is known of N image-caption pairs and their M hallucinated captions without a model. All on the host."""

    hallucinated_owner: Tensor
    """int64 [M]: which of these N pairs each hallucinated caption belongs to."""
    image_keys: Tensor
    """int64 [N]: equal keys mean equal images."""
    caption_keys: Tensor
    """int64 [N]: equal keys mean equal caption token ids."""
    hallucinated_keys: Tensor
    """int64 [M]: comparable with `caption_keys`."""

    def __post_init__(self) -> None:
        assert self.caption_keys.shape == self.image_keys.shape and self.image_keys.dim() == 1
        assert self.hallucinated_owner.shape == self.hallucinated_keys.shape and self.hallucinated_owner.dim() == 1
        for integers in (self.image_keys, self.caption_keys, self.hallucinated_keys, self.hallucinated_owner):
            assert integers.dtype == torch.int64 and integers.device.type == "cpu", (integers.dtype, integers.device)

    @property
    def num_pairs(self) -> int:
        return self.image_keys.numel()

    @property
    def num_hallucinated(self) -> int:
        return self.hallucinated_keys.numel()


_INTEGERS = tuple(item.name for item in fields(PairIntegers))


@dataclass(frozen=True, kw_only=True)
class PairEmbeddings(PairIntegers):
    """Contrastive embeddings of N image-caption pairs and their M hallucinated captions, with their integers.

    Embeddings are L2-normalised and fp32 (a test may use fp64), on any device; d is hidden / 4.
    """

    image: Tensor
    """[N, d]: v_i, the images' global representations."""
    caption: Tensor
    """[N, d]: t_i, the captions'."""
    hallucinated: Tensor
    """[M, d]: u_im, the hallucinated captions'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        width = self.image.shape[1]
        assert self.image.shape == self.caption.shape == (self.num_pairs, width), (self.image.shape, self.num_pairs)
        assert self.hallucinated.shape == (self.num_hallucinated, width), (self.hallucinated.shape, self.image.shape)
        for embeddings in (self.image, self.caption, self.hallucinated):
            assert embeddings.dtype == self.image.dtype and embeddings.dtype in (torch.float32, torch.float64)

    def detach(self) -> "PairEmbeddings":
        """The same pairs without gradients."""
        names = ("image", "caption", "hallucinated")
        return replace(self, **{name: getattr(self, name).detach() for name in names})

    def select(self, pairs: Tensor | slice, hallucinated: Tensor, owner: Tensor) -> "PairEmbeddings":
        """Some of the pairs, in any order; gradients pass. All arguments are on the host.

        Args:
            pairs: int64 [n] or a slice: which of the N, in their new order.
            hallucinated: int64: which of the M go along.
            owner: int64 [M]: new number of the pair of each of those M (of the others it does not matter).
        """
        device = self.image.device
        pairs_there = pairs if isinstance(pairs, slice) else to_device(pairs, device)
        return PairEmbeddings(
            image=self.image[pairs_there],
            caption=self.caption[pairs_there],
            hallucinated=self.hallucinated[to_device(hallucinated, device)],
            hallucinated_owner=owner[hallucinated],
            image_keys=self.image_keys[pairs],
            caption_keys=self.caption_keys[pairs],
            hallucinated_keys=self.hallucinated_keys[hallucinated],
        )


def concatenate_pairs(parts: Sequence[PairEmbeddings]) -> PairEmbeddings:
    """The pairs of all parts, in their order, as new tensors; owners shifted accordingly. Gradients pass."""
    names = ("image", "caption", "hallucinated")
    return PairEmbeddings(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
        **vars(concatenate_integers(parts)),
    )


def concatenate_integers(parts: Sequence[PairIntegers]) -> PairIntegers:
    """The integers of the pairs of all parts, in their order; owners shifted accordingly."""
    first_pairs = itertools.accumulate((part.num_pairs for part in parts), initial=0)
    owners = [part.hallucinated_owner + first for part, first in zip(parts, first_pairs, strict=False)]
    names = ("image_keys", "caption_keys", "hallucinated_keys")
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return PairIntegers(**whole, hallucinated_owner=torch.cat(owners))


def gather_integers_of_pairs(parts: Sequence[PairIntegers], group: ProcessGroup | None) -> list[list[PairIntegers]]:
    """Of every rank of `group` what it passes, rank 0 first.

    Args:
        parts: say, of each of the step's micro-batches; as many on every rank.
        group: data-parallel group that takes tensors on the host. None or a single rank: no communication.
    """
    if group is None or group.size() == 1:
        return [list(parts)]
    sizes = [getattr(part, name).numel() for part in parts for name in _INTEGERS]
    own = [torch.tensor(sizes, dtype=torch.int64)]
    own += [getattr(part, name) for part in parts for name in _INTEGERS]
    everyone = []
    for values in gather_integers(torch.cat(own), group):
        split = iter(values[len(sizes) :].split(values[: len(sizes)].tolist()))
        everyone.append([PairIntegers(**{name: next(split) for name in _INTEGERS}) for _ in parts])
    return everyone


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


def _real_rows(counts: Sequence[int], padded_count: int) -> tuple[Tensor, Tensor]:
    """Which rank, and which of its rows, each real row of [ranks, padded_count] is; both int64, on the host.

    counts [2, 0, 1] padded to 2: ranks [0, 0, 2], rows [0, 1, 0].
    """
    real = torch.arange(padded_count) < torch.tensor(counts)[:, None]
    ranks, rows = real.nonzero(as_tuple=True)
    return ranks, rows


def gather_pairs(
    local: PairEmbeddings, group: ProcessGroup | None, everyone: Sequence[PairIntegers] | None = None
) -> GatheredPairs:
    """All ranks' pairs on every rank of `group`, with gradients summed over ranks on the way back.

    Args:
        local: this rank's pairs; N and M may differ per rank and be 0. d, dtype and device kind are the same on all.
        group: data-parallel group (context-parallel ranks counted once). None or a single rank: no communication.
        everyone: every rank's integers of these pairs, as `gather_integers_of_pairs` gave them. None: they are
            gathered here, if `group` takes tensors on the host.

    Every rank must call it, and every rank must run backward through the pool when one does (`contrastive_loss`
    keeps that path for a rank without pairs); with gradients enabled the pool always requires one. Where gradients
    are off on one rank they must be off on all.
    """
    if group is None or group.size() == 1:
        return GatheredPairs(pool=local, first_pair=0)
    if everyone is None:
        everyone = [part for (part,) in gather_integers_of_pairs([local], group)]
    device = local.image.device
    pair_counts = [part.num_pairs for part in everyone]
    hallucinated_counts = [part.num_hallucinated for part in everyone]
    max_pairs, max_hallucinated = max(pair_counts), max(hallucinated_counts)
    assert pair_counts[group.rank()] == local.num_pairs and hallucinated_counts[group.rank()] == local.num_hallucinated

    # One payload, laid out alike on every rank: [images | captions | hallucinated]. One row more, so that a step
    # without any pair sends something too.
    missing_pairs, missing_hallucinated = max_pairs - local.num_pairs, max_hallucinated - local.num_hallucinated
    embeddings = torch.cat(
        [
            F.pad(local.image, (0, 0, 0, missing_pairs)),
            F.pad(local.caption, (0, 0, 0, missing_pairs)),
            F.pad(local.hallucinated, (0, 0, 0, missing_hallucinated + 1)),
        ]
    )
    anchor = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
    all_embeddings = _GatherRows.apply(embeddings, anchor, group)

    pair_ranks, pair_rows = _real_rows(pair_counts, max_pairs)
    hallucinated_ranks, hallucinated_rows = _real_rows(hallucinated_counts, max_hallucinated)

    def pick(ranks: Tensor, rows: Tensor, offset: int) -> Tensor:
        index = ranks * embeddings.shape[0] + offset + rows
        return all_embeddings.index_select(0, to_device(index, device))

    pool = PairEmbeddings(
        image=pick(pair_ranks, pair_rows, 0),
        caption=pick(pair_ranks, pair_rows, max_pairs),
        hallucinated=pick(hallucinated_ranks, hallucinated_rows, 2 * max_pairs),
        **vars(concatenate_integers(everyone)),
    )
    return GatheredPairs(pool=pool, first_pair=sum(pair_counts[: group.rank()]))
