"""The training loop that every part of the tiny models shares."""

from collections.abc import Callable, Iterator

import torch
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


def fit(model: nn.Module, loss_of: LossOf, steps: int, lr: float, title: str, line: int) -> None:
    """AdamW with a short warm-up and a cosine decay; `loss_of(step)` gives (loss, what the bar shows)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 1) + 1, pct_start=0.1)
    with tqdm(range(steps), desc=title, unit="step", position=line, mininterval=1.0) as bar:
        for step in bar:
            loss, shown = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 10 == 0 or step == steps - 1:
                bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items()}, refresh=False)
