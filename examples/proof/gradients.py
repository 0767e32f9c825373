"""Why an arm fares as it does: the connector's gradients of L_G and of the contrastive loss, at a checkpoint.

    python examples/proof/gradients.py --load output/proof/runs/web/HACL-own-1/pretrain --data output/proof/data

For batches of held-out pairs: both gradients' lengths, the cosine between them, and how far each agrees with itself
from one batch to the next (the mean cosine over pairs of batches). A loss teaches the connector quickly where its
gradient agrees with itself; a second loss helps where it points the same way. By transformers' autograd on the
exported model.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from hacl_megatron.checkpoint.convert.megatron_to_hf import export_checkpoint
from hacl_megatron.checkpoint.run.folder import locate_checkpoint
from hacl_megatron.evaluation.answers.answerer import Answerer


class Losses:
    """L_G in the template `plain` and (L_v + L_t) / 2 with own twins, as functions of the connector."""

    def __init__(self, hf: Path, images: Path) -> None:
        self.answerer = Answerer(hf, images, device="cpu")
        self.model, self.tokenizer = self.answerer.model, self.answerer.tokenizer
        self.heads = load_file(hf / "hacl_heads.safetensors")
        self.model.requires_grad_(False)
        self.connector = [weight.requires_grad_(True) for weight in self.model.model.multi_modal_projector.parameters()]
        vision = self.model.config.vision_config
        self.places = [self.model.config.image_token_id] * (vision.image_size // vision.patch_size) ** 2

    def pixels(self, samples: Sequence[dict[str, Any]]) -> Tensor:
        files = [self.answerer.store.read(sample["image"]) for sample in samples]
        return torch.as_tensor(self.answerer.decoder.decode(files).pixel_values)

    def padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """[N, L] ids padded behind, and each row's last place [N]."""
        longest = max(map(len, rows))
        ids = [row + [self.tokenizer.pad_id] * (longest - len(row)) for row in rows]
        return torch.tensor(ids), torch.tensor([len(row) - 1 for row in rows])

    def generation(self, samples: Sequence[dict[str, Any]], pixels: Tensor) -> Tensor:
        front = [self.tokenizer.bos_id, *self.places]
        ids, last = self.padded([front + self.tokenizer.encode(sample["text"] + "\n", bos=False) for sample in samples])
        at = torch.arange(ids.shape[1])
        targets = ids.masked_fill((at < len(front)) | (at > last[:, None]), -100)
        logits = self.model(input_ids=ids, pixel_values=pixels).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    def represented(self, rows: list[list[int]], head: str, **inputs: Tensor) -> Tensor:
        ids, last = self.padded(rows)
        states = self.model.model(input_ids=ids, **inputs).last_hidden_state[torch.arange(len(rows)), last]
        return F.normalize(F.linear(states, self.heads[f"{head}.weight"], self.heads[f"{head}.bias"]), dim=-1)

    def contrast(self, samples: Sequence[dict[str, Any]], pixels: Tensor) -> Tensor:
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        v = self.represented([[bos, *self.places, eos]] * len(samples), "vision_projector", pixel_values=pixels)
        with torch.no_grad():
            t, u = (
                self.represented([[*self.tokenizer.encode(text, bos=True), eos] for text in texts], "text_projector")
                for texts in ([s["text"] for s in samples], [s["Hallucination caption"][0] for s in samples])
            )
        tau, here = float(self.heads["temperature"]), torch.arange(len(samples))
        own = (v * u).sum(-1, keepdim=True)
        i2t = F.cross_entropy(torch.cat([v @ t.T, own], dim=1) / tau, here)
        return (i2t + F.cross_entropy(t @ v.T / tau, here)) / 2

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self.connector)])


def measure(hf: Path, data: Path, batch_size: int, batches: int) -> dict[str, float]:
    """The numbers named at the top of this file, over `batches` of `batch_size` pairs of the split dev."""
    losses = Losses(hf, data / "images")
    samples = json.loads((data / "dev.json").read_text())
    if len(samples) < batch_size * batches:
        raise SystemExit(
            f"{data / 'dev.json'}: {len(samples)} pairs, expected {batch_size * batches} for --batch-size "
            f"{batch_size} and --batches {batches}: lower one of them"
        )
    generation, contrast = [], []
    for start in range(0, batch_size * batches, batch_size):
        chosen = samples[start : start + batch_size]
        pixels = losses.pixels(chosen)
        generation.append(losses.gradient(losses.generation(chosen, pixels)))
        contrast.append(losses.gradient(losses.contrast(chosen, pixels)))
    losses.answerer.close()

    def agreement(gradients: list[Tensor]) -> float:
        pairs = itertools.combinations(gradients, 2)
        return statistics.fmean(float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs)

    sides = zip(generation, contrast, strict=True)
    return {
        "L_G length": statistics.fmean(float(one.norm()) for one in generation),
        "contrast length": statistics.fmean(float(one.norm()) for one in contrast),
        "cosine between them": statistics.fmean(float(F.cosine_similarity(a, b, dim=0)) for a, b in sides),
        "L_G with itself": agreement(generation),
        "contrast with itself": agreement(contrast),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, nargs="+", required=True, help="--save folders of stage 1")
    parser.add_argument("--data", type=Path, default=Path("output/proof/data"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6)
    args = parser.parse_args()
    for load in args.load:
        with tempfile.TemporaryDirectory() as folder:
            export_checkpoint(locate_checkpoint(load), Path(folder) / "export")
            numbers = measure(Path(folder) / "export", args.data, args.batch_size, args.batches)
        print(f"{load}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()), flush=True)


if __name__ == "__main__":
    main()
