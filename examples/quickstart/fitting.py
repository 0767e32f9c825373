"""The training loop that every part of the tiny models shares."""

from collections.abc import Callable, Iterator

import torch
from muon import Muon
from torch import Tensor, nn
from tqdm import tqdm


def batches(number: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` index batches that go through shuffled epochs."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while order.numel() < size:
            order = torch.cat([order, torch.randperm(number, generator=generator)])
        yield order[:size]
        order = order[size:]


LossOf = Callable[[int], tuple[Tensor, dict[str, float]]]


def optimizers_of(model: nn.Module, lr: float, matrices_lr: float | None) -> list[torch.optim.Optimizer]:
    """AdamW for all; or, with a rate for them, Muon for the matrices of transformer layers and AdamW for the rest."""
    named = dict(model.named_parameters())
    inner = [name for name, weight in named.items() if weight.ndim == 2 and ".layer" in name and matrices_lr]
    rest = [weight for name, weight in named.items() if name not in inner]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))]
    return found + ([Muon([named[name] for name in inner], matrices_lr)] if inner else [])


def fit(
    model: nn.Module, loss_of: LossOf, steps: int, lr: float, title: str, line: int, matrices_lr: float | None = None
) -> None:
    """AdamW, or Muon and AdamW, with a short warm-up and a cosine decay; `loss_of(step)` gives (loss, what is shown).

    The bar is for terminals; into a file goes nothing.
    """
    optimizers = optimizers_of(model, lr, matrices_lr)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, optimizer.defaults["lr"], total_steps=max(steps, 1) + 1, pct_start=0.1
        )
        for optimizer in optimizers
    ]
    with tqdm(range(steps), desc=title, unit="step", position=line, mininterval=1.0, disable=None) as bar:
        for step in bar:
            loss, shown = loss_of(step)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            if step % 10 == 0 or step == steps - 1:
                bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items()}, refresh=False)
