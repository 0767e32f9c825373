"""A tiny Q-Former learns to tell, query by query, what the drawings show: BLIP-2's first stage on drawings.

BLIP-2 teaches its Q-Former behind a frozen vision tower to match images with texts, until the query outputs hold what
texts say of images and a linear projection into a frozen language model is enough. Here every query gets a patch of its
own to tell the attributes of, which it has to find among the tower's features.
"""

from pathlib import Path

import torch
from fitting import batches, fit
from scenes import Aspect, load_scenes, mirror
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration
from vision_tower import PatchTask


class QFormerTask(nn.Module):
    """Query k tells the attributes of patch k."""

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.query_tokens, self.qformer = model.query_tokens, model.qformer
        self.patch_task = PatchTask(model.config.qformer_config.hidden_size)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`PatchTask`'s (loss, accuracy) of the tower's features [B, 1 + P, hidden_size]."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        outputs = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return self.patch_task(outputs, labels)


@torch.no_grad()
def tower_features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """[B, 1 + P, hidden_size] of images [B, 3, H, W]; the tower rests, so that this is computed once."""
    return torch.cat([tower(part.float()).last_hidden_state for part in pixels.split(256)])


def train_qformer(model: Blip2ForConditionalGeneration, data: Path, aspect: Aspect, steps: int, seed: int) -> float:
    """Trains query tokens and Q-Former in place behind the tower; returns the accuracy on the held-out drawings."""
    tower, size = model.vision_model, model.config.vision_config.image_size
    task = QFormerTask(model)
    if steps:
        seen = load_scenes(data, "train", size, aspect)
        both = [(tower_features(tower, pixels), labels) for pixels, labels in (seen, mirror(*seen))]
        index = list(batches(len(seen[0]), 64, steps, seed))

        def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
            features, labels = both[step % 2]
            loss, accuracy = task(features[index[step]], labels[index[step]])
            return loss, {"loss": loss.item(), "patches right": accuracy.item()}

        fit(task, loss_of, steps, 2e-3, "Q-Former", line=0, matrices_lr=3e-3)
    pixels, labels = load_scenes(data, "valid", size, aspect)
    with torch.no_grad():
        return task(tower_features(tower, pixels), labels)[1].item()
