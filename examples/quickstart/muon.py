"""Muon for matrices, AdamW for everything else: small transformers learn in half of the steps.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the rate is scaled to AdamW's as in
J. Liu et al., "Muon is scalable for LLM training" (2025, arXiv 2502.16982). `torch.optim.Muon` is the same in bfloat16
and one matrix at a time, which is slow on a CPU: here it is float32, and equal shapes go together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration that brings all singular values near 1."""
ITERATIONS = 5


def orthogonal(update: Tensor) -> Tensor:
    """[N, rows, columns] -> matrices of the same singular vectors whose singular values are all about 1."""
    a, b, c = NEWTON_SCHULZ
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal; for matrices alone.

    Args:
        parameters: matrices [rows, columns].
        lr: as AdamW's; an update's entries have a root mean square of about 0.2 lr.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes[weight.shape].append(weight)
            for (rows, columns), weights in shapes.items():
                moments = []
                for weight in weights:
                    state = self.state[weight]
                    if not state:
                        state["momentum"] = torch.zeros_like(weight)
                    state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                    moments.append(weight.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov's
                updates = orthogonal(torch.stack(moments)).unbind()
                scale = 0.2 * max(rows, columns) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * scale)
