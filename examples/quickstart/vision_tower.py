"""A tiny vision tower learns what every patch of the drawings shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from fitting import batches, fit
from scenes import ATTRIBUTES, Aspect, load_scenes, mirror
from torch import Tensor, nn
from transformers import Blip2VisionModel


class PatchTask(nn.Module):
    """Tells the attributes of every patch from a row of features for each patch."""

    def __init__(self, hidden_size: int, attributes: Mapping[str, Sequence[str]] = ATTRIBUTES) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(hidden_size, 1 + len(values)) for values in attributes.values())

    def forward(self, patches: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, accuracy) of features [B, P, hidden_size] with labels [B, A, P].

        Accuracy is the share of the things' patches whose colour and shape are both right.
        """
        patches = F.layer_norm(patches, patches.shape[-1:])
        loss, right = torch.zeros(()), labels[:, 0] > 0
        number = right.sum()
        for row, head in enumerate(self.heads):
            logits = head(patches)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels[:, row].flatten())
            if row < 2:
                right = right & (logits.argmax(-1) == labels[:, row])
        return loss, right.sum() / number


class TowerTask(nn.Module):
    """What the tower learns from: the attributes of every patch, told from the features that the connector will read.

    LLaVA reads hidden state -2 of a CLIP tower: the last layer is taken off meanwhile, stays random and costs no time.
    A Q-Former reads the last hidden state of BLIP-2's.
    """

    def __init__(self, tower: nn.Module, attributes: Mapping[str, Sequence[str]] = ATTRIBUTES) -> None:
        super().__init__()
        self.tower = tower
        self.patch_task = PatchTask(tower.config.hidden_size, attributes)

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 1 + P, hidden_size]: the class token's row first."""
        if isinstance(self.tower, Blip2VisionModel):
            return self.tower(pixels).last_hidden_state
        encoder = getattr(self.tower, "vision_model", self.tower).encoder  # transformers 4 and 5
        layers, encoder.layers = encoder.layers, encoder.layers[:-1]
        features = self.tower(pixels).last_hidden_state
        encoder.layers = layers
        return features

    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`PatchTask`'s (loss, accuracy) of images [B, 3, H, W]."""
        return self.patch_task(self.features(pixels)[:, 1:], labels)


def train_tower(tower: nn.Module, data: Path, aspect: Aspect, steps: int, seed: int) -> float:
    """Trains `tower` in place on the training drawings; returns the accuracy on the held-out ones."""
    size = tower.config.image_size
    task = TowerTask(tower)
    if steps:
        pixels, labels = load_scenes(data, ("parts", "train"), size, aspect)
        index = list(batches(len(pixels), 64, steps, seed))

        def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
            x, y = pixels[index[step]].float(), labels[index[step]]
            if step % 2:
                x, y = mirror(x, y)
            loss, accuracy = task(x, y)
            return loss, {"loss": loss.item(), "patches right": accuracy.item()}

        fit(task, loss_of, steps, 3e-3, "vision tower", line=0, matrices_lr=4e-3)
    with torch.no_grad():
        pixels, labels = load_scenes(data, "valid", size, aspect)
        return task(pixels.float(), labels)[1].item()
