"""The gradients' norm as megatron-core computes it, left on the device.

megatron-core's own reads it back at once; a step reads it together with its losses.
"""

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer, clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

HEADS_APART = "heads_apart"
"""Marks the parameter groups that are clipped by a norm of their own."""


def clipped_parts(optimizer: MegatronOptimizer, heads_apart: bool) -> list[list[Tensor]]:
    """The optimiser's parameters, together or as the contrastive heads' and, before them, all others'."""
    if not heads_apart:
        return [optimizer.get_parameters()]
    sides: list[list[Tensor]] = [[], []]
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in getattr(part.optimizer, "param_groups", ()):
            sides[bool(group.get(HEADS_APART))].extend(group["params"])
    return sides


@torch.no_grad()
def squared_grad_norms(optimizer: MegatronOptimizer, device: torch.device, *, heads_apart: bool = False) -> Tensor:
    """Squares of the global L2 norms of the prepared gradients, fp32 [1], the same on every rank.

    With `heads_apart` [2]: of all but the contrastive heads, and of these.

    Source: `get_grad_norm_fp32` and `ChainedOptimizer.get_grad_norm` of megatron-core.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    group = parts[0].get_grad_stats_parallel_group()
    assert all(part.get_grad_stats_parallel_group() == group for part in parts[1:]), "as without experts"
    gradients = [gradient for part in parts for gradient in _gradients(part)]
    sides = [gradients]
    if heads_apart:
        decoupled = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        _, heads = clipped_parts(optimizer, True)
        of_heads = {id(parameter.decoupled_grad if decoupled else parameter.grad) for parameter in heads}
        sides = [[one for one in gradients if (id(one) in of_heads) == side] for side in (False, True)]
    zero = torch.zeros(1, device=device)
    squared = torch.cat([_l2_norm(side, device) ** 2.0 if side else zero for side in sides])
    dist.all_reduce(squared, group=group)
    return squared


def _gradients(part: MegatronOptimizer) -> list[Tensor]:
    """Those that count: of parameters that tensor-parallel or pipeline ranks share, one rank's."""
    if hasattr(part, "get_main_grads_for_grad_norm"):
        return part.get_main_grads_for_grad_norm()
    return part.get_grads_for_grad_norm()  # megatron-core 0.19


def _l2_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """fp32 [1]. By the kernel of Transformer Engine or Apex; megatron-core's stand-in for it reads every norm back."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        return torch.nn.utils.get_total_norm(gradients).view(1)
    overflow = torch.zeros(1, dtype=torch.int, device=device)
    return clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [gradients], False)[0]
