"""A softmax loss over more columns than fit at once: block of rows by block of rows, with gradients made on the way.

    sum of losses = Σ_i ( log Σ_c w_c e^{s(i,c)} - s(i, own(i)) ),    s(i, c) = row_i · column_c / τ

The plain form keeps all [R, C] similarities and their softmax until backward has read them, several copies of what may
be gigabytes. The loss is a scalar, so its gradients can be made in the forward, up to the scalar that will arrive:

    for each block of B rows:   E = w e^{s - max},  z = Σ_c E        one buffer [B, C], overwritten in place
                                d row    = (E @ columns / z - own column) / τ
                                d column += Eᵀ @ (row / (τ z)),  own column -= row / τ
                                d τ      -= Σ row · d row / τ
    backward:                   every gradient times the incoming scalar, in place

The three matrix products are those of the plain form, nothing is computed twice, and beside the gradients of its
inputs it holds one block.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hacl_megatron.platform.device import to_device

BLOCK_BYTES = 160 * 2**20
"""Most that one block may take, similarities and mask together: 256 rows of 131,072 fp32 columns. Every block reads and
writes the columns' gradients once, which smaller ones spend their time on: 1,024 rows took 17.3, 13.7, 11.6 and 9.9
core seconds with 20, 40, 80, 160 MiB, 9.4 in the plain form (tests/objective/measure_contrastive.py --local 1024)."""

_MASK_BYTES = 1
"""Bytes a similarity that masks take: they are made and applied one by one."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """C candidates for all rows or each for one row, and what takes a candidate out of a row's softmax."""

    embeddings: Tensor
    """[C, d]"""
    equal_keys: tuple[tuple[Tensor, Tensor], ...] = ()
    """(int64 [R], int64 [C]): a column whose key equals the row's is no candidate of that row."""
    owner: Tensor | None = None
    """int64 [C], on the host: the only row that each column is a candidate of; below 0 or at R and above, none. None:
    all rows."""
    weight: float = 1.0
    """w: each candidate counts as this many."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that the blocks need and autograd need not see."""

    columns: tuple[Columns, ...]
    first_positive: int
    num_ranked: int
    block_bytes: int
    with_gradients: bool


def softmax_loss_sum(
    rows: Tensor,
    columns: Sequence[Columns],
    first_positive: int,
    temperature: Tensor,
    *,
    num_ranked: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """Sum over rows of -log softmax at each row's own column (see the module's head).

    Args:
        rows: [R, d], fp32 or fp64; R = 0 gives a zero with a gradient path.
        columns: the candidates. Row i's own one is row `first_positive + i` of the first element's embeddings; it
            stays a candidate whatever its keys are.
        temperature: τ, [1].
        num_ranked: the nearest column is looked for in this many first elements of `columns`, keys or not.
        block_bytes: most that one block may take.

    Returns:
        The sum, [], and the index of each row's nearest column, int64 [R], counting through the ranked elements of
        `columns`; None without ranked ones. Only the sum carries gradients, to all embeddings and τ. Without
        `torch.is_grad_enabled()` none are made. Backward may run through it once: it overwrites what it returns.
    """
    assert columns[0].owner is None and columns[0].weight == 1, "the positives are candidates of their rows"
    assert 0 <= first_positive <= columns[0].embeddings.shape[0] - rows.shape[0], (first_positive, rows.shape)
    assert all(group.owner is None for group in columns[:num_ranked])
    plan = _Plan(
        columns=tuple(columns),
        first_positive=first_positive,
        num_ranked=num_ranked,
        block_bytes=block_bytes,
        with_gradients=torch.is_grad_enabled(),  # in a Function's forward it is always off
    )
    loss_sum, nearest = _SoftmaxLossSum.apply(rows, temperature, plan, *(group.embeddings for group in columns))
    return loss_sum, nearest if num_ranked else None


class _SoftmaxLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, temperature: Tensor, plan: _Plan, *embeddings: Tensor) -> tuple[Tensor, Tensor]:
        needs_rows, needs_temperature, _, *needs_columns = (
            needed and plan.with_gradients for needed in ctx.needs_input_grad
        )
        row_gradient = torch.zeros_like(rows) if needs_rows else None
        temperature_gradient = torch.zeros_like(temperature) if needs_temperature else None
        column_gradients = [
            torch.zeros_like(columns) if needed else None
            for columns, needed in zip(embeddings, needs_columns, strict=True)
        ]
        loss_sum = rows.new_zeros(())
        nearest = torch.zeros(rows.shape[0] if plan.num_ranked else 0, dtype=torch.int64, device=rows.device)

        ranked = sum(columns.shape[0] for columns in embeddings[: plan.num_ranked])
        for block in _blocks(rows, plan):
            scaled = rows[block.rows] / temperature  # [B, d]
            own = slice(plan.first_positive + block.rows.start, plan.first_positive + block.rows.stop)
            candidates = [
                columns if index is None else columns.index_select(0, index)
                for columns, index in zip(embeddings, block.indices, strict=True)
            ]
            parts = block.similarities.split([part.shape[0] for part in candidates], dim=1)  # [B, C_group] each
            for part, columns in zip(parts, candidates, strict=True):
                torch.mm(scaled, columns.T, out=part)
            if ranked:
                nearest[block.rows] = block.similarities[:, :ranked].argmax(1)

            own_diagonal = parts[0][:, own].diagonal()
            positive = own_diagonal.clone()
            for part, group, index, owner in zip(parts, plan.columns, block.indices, block.owners, strict=True):
                _mask_(part, group, block.rows, index, owner)
            own_diagonal.copy_(positive)

            # The positive is never masked, so each row's maximum is finite, and its sum at least 1.
            largest = block.similarities.amax(1, keepdim=True)
            block.similarities.sub_(largest).exp_()
            sums = block.similarities.sum(1, keepdim=True)  # [B, 1]
            loss_sum += (sums.log() + largest).squeeze(1).sub_(positive).sum()

            if needs_rows or needs_temperature:
                gradient = torch.zeros_like(scaled)
                for part, columns in zip(parts, candidates, strict=True):
                    gradient.addmm_(part, columns)
                gradient.div_(sums).sub_(embeddings[0][own])  # of the loss by `scaled`
                if row_gradient is not None:
                    torch.div(gradient, temperature, out=row_gradient[block.rows])
                if temperature_gradient is not None:
                    temperature_gradient -= (gradient * scaled).sum() / temperature
            weighted = scaled / sums
            for part, total, index in zip(parts, column_gradients, block.indices, strict=True):
                if total is None:
                    continue
                if index is None:
                    total.addmm_(part.T, weighted)
                else:  # no column has two owners: nothing to add to
                    total.index_copy_(0, index, part.T @ weighted)
            if column_gradients[0] is not None:
                column_gradients[0][own] -= scaled

        ctx.gradients = [row_gradient, temperature_gradient, None, *column_gradients]
        ctx.mark_non_differentiable(nearest)
        return loss_sum, nearest

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the contrastive loss keeps its gradients for one backward; compute the loss anew")
        return tuple(None if gradient is None else gradient.mul_(loss_gradient) for gradient in gradients)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """B rows and the columns that they are compared with."""

    rows: slice
    indices: list[Tensor | None]
    """For each element of `columns`, which of its columns; None: all, in their order."""
    owners: list[Tensor | None]
    """Whose candidates those are."""
    similarities: Tensor
    """[B, all these columns], not initialised; the blocks share its memory."""


def _blocks(rows: Tensor, plan: _Plan) -> Iterator[_Block]:
    """Blocks as large as `block_bytes` allows, but at least one row."""
    num_rows = rows.shape[0]
    shared = sum(group.embeddings.shape[0] for group in plan.columns if group.owner is None)
    owned = sum(group.embeddings.shape[0] for group in plan.columns if group.owner is not None)
    bytes_each = rows.element_size() + _MASK_BYTES
    block_rows = num_rows
    # Columns with an owner are as many a row in a block as in all rows; those of no row here make it overestimate.
    while block_rows > 1 and block_rows * (shared + owned * block_rows / num_rows) * bytes_each > plan.block_bytes:
        block_rows = (block_rows + 1) // 2
    starts = range(0, num_rows, max(block_rows, 1))
    slices = [slice(start, min(start + block_rows, num_rows)) for start in starts]

    indices = [_owned_by_block(group.owner, slices) for group in plan.columns]
    widths = [
        shared + sum(index.shape[0] for group in indices if (index := group[block]) is not None)
        for block in range(len(slices))
    ]
    buffer = rows.new_empty(
        max((part.stop - part.start) * n for part, n in zip(slices, widths, strict=True)) if slices else 0
    )
    for block, part in enumerate(slices):
        shape = (part.stop - part.start, widths[block])
        chosen = [group[block] for group in indices]
        owners = [
            None if index is None else group.owner[index] for index, group in zip(chosen, plan.columns, strict=True)
        ]
        yield _Block(
            rows=part,
            indices=[None if index is None else to_device(index, rows.device) for index in chosen],
            owners=[None if owner is None else to_device(owner, rows.device) for owner in owners],
            similarities=buffer[: shape[0] * shape[1]].view(shape),
        )


def _owned_by_block(owner: Tensor | None, slices: Sequence[slice]) -> list[Tensor | None]:
    """Indices of the columns that rows of each block own, on the host as `owner` is."""
    if owner is None or not slices:
        return [None] * len(slices)
    owners, order = owner.sort(stable=True)
    borders = torch.tensor([part.start for part in slices] + [slices[-1].stop])
    borders = torch.searchsorted(owners, borders).tolist()
    return [order[start:stop] for start, stop in itertools.pairwise(borders)]


def _mask_(similarities: Tensor, group: Columns, rows: slice, index: Tensor | None, owner: Tensor | None) -> None:
    """The weight, and -inf where a column is no candidate of the row, in place. similarities: [B, C of the block]."""
    if group.weight != 1:
        similarities.add_(math.log(group.weight))
    if owner is not None:
        numbers = torch.arange(rows.start, rows.stop, device=similarities.device)
        similarities.masked_fill_(owner != numbers[:, None], float("-inf"))
    for row_keys, column_keys in group.equal_keys:
        keys = column_keys if index is None else column_keys[index]
        similarities.masked_fill_(row_keys[rows, None] == keys, float("-inf"))
