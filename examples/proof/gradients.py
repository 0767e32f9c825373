"""Why an arm fares as it does: what each loss asks of the connector, and whether held-out dialogues ask for the same.

    python examples/proof/gradients.py --load output/proof/runs/web/HACL-own-1/pretrain --data output/proof/data

For every checkpoint in the folder, over batches of held-out pairs: the lengths of the connector's gradients of L_G, of
the contrastive loss and of the phrase loss, and how far each agrees with itself from one batch to the next (mean
cosine).
Then the gradient of stage 2's loss on dialogues about held-out pictures: its cosine with L_G's gradient, and with that
part of the others' which is orthogonal to L_G's. A second loss brings something of its own where that is above 0. Of
the contrast's softmax: the share that the twin has of all that is not the caption's. By transformers' autograd on the
exported model.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from draw_world import dialogue_sample, read_scene, read_scenes
from make_parts import SYSTEM
from safetensors.torch import load_file
from torch import Tensor

from hacl_megatron.checkpoint.convert.megatron_to_hf import export_checkpoint
from hacl_megatron.evaluation.answers.answerer import Answerer


class Losses:
    """L_G in the template `plain` and (L_v + L_t) / 2 with own twins, as functions of the connector."""

    def __init__(self, hf: Path, images: Path) -> None:
        self.answerer = Answerer(hf, images, device="cpu")
        self.model, self.tokenizer = self.answerer.model, self.answerer.tokenizer
        heads = hf / "hacl_heads.safetensors"
        self.heads = load_file(heads) if heads.exists() else None
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

    def contrast(self, samples: Sequence[dict[str, Any]], pixels: Tensor) -> tuple[Tensor, float]:
        """(loss, the twins' share of what L_v's softmax gives to anything but the caption)."""
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        v = self.represented([[bos, *self.places, eos]] * len(samples), "vision_projector", pixel_values=pixels)
        with torch.no_grad():
            t, u = (
                self.represented([[*self.tokenizer.encode(text, bos=True), eos] for text in texts], "text_projector")
                for texts in ([s["text"] for s in samples], [s["Hallucination caption"][0] for s in samples])
            )
        tau, here = float(self.heads["temperature"]), torch.arange(len(samples))
        own = (v * u).sum(-1, keepdim=True)
        likeness = torch.cat([v @ t.T, own], dim=1) / tau
        given = likeness.detach().softmax(-1)
        share = (given[:, -1] / (1 - given[here, here]).clamp(min=1e-6)).mean()
        loss = F.cross_entropy(likeness, here) + F.cross_entropy(t @ v.T / tau, here)
        return loss / 2, float(share)

    def phrase(self, samples: Sequence[dict[str, Any]], pixels: Tensor) -> Tensor:
        """The caption's words against the twin's, where the two differ."""
        front = [self.tokenizer.bos_id, *self.places]
        said = {key: [] for key in ("true", "false")}
        differ: dict[str, list[list[int]]] = {"true": [], "false": []}
        for sample in samples:
            true, false = (
                self.tokenizer.encode(text + "\n", bos=False)
                for text in (sample["text"], sample["Hallucination caption"][0])
            )
            changes = [
                one for one in SequenceMatcher(a=true, b=false, autojunk=False).get_opcodes() if one[0] != "equal"
            ]
            said["true"].append(front + true)
            said["false"].append(front + false)
            differ["true"].append([at for _, begin, end, _, _ in changes for at in range(begin, end)])
            differ["false"].append([at for _, _, _, begin, end in changes for at in range(begin, end)])
        sums = []
        for key in ("true", "false"):
            ids, _ = self.padded(said[key])
            places = [(row, len(front) + at) for row, here in enumerate(differ[key]) for at in here]
            row, at = (torch.tensor(one) for one in zip(*places, strict=True))
            logits = self.model(input_ids=ids, pixel_values=pixels).logits[row, at - 1]
            terms = -F.cross_entropy(logits, ids[row, at], reduction="none")
            sums.append(torch.zeros(len(samples)).index_add(0, row, terms))
        return -F.logsigmoid(sums[0] - sums[1]).mean()

    def dialogue(self, samples: Sequence[dict[str, Any]], pixels: Tensor) -> Tensor:
        """Stage 2's loss: the answers' tokens, in the template v1."""
        rows, wanted = [], []
        for sample in samples:
            row = [self.tokenizer.bos_id, *self.tokenizer.encode(SYSTEM + "USER: ", bos=False), *self.places]
            learned = [False] * len(row)
            turns = [turn["value"].removeprefix("<image>\n") for turn in sample["conversations"]]
            for number, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
                asked = self.tokenizer.encode(("USER: " if number else "\n") + question + " ASSISTANT:", bos=False)
                answered = [*self.tokenizer.encode(answer, bos=False), self.tokenizer.eos_id]
                row += asked + answered
                learned += [False] * len(asked) + [True] * len(answered)
            rows.append(row)
            wanted.append(learned)
        ids, _ = self.padded(rows)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for number, learned in enumerate(wanted):
            mask[number, : len(learned)] = torch.tensor(learned)
        logits = self.model(input_ids=ids, pixel_values=pixels).logits[:, :-1][mask[:, 1:]]
        return F.cross_entropy(logits, ids[:, 1:][mask[:, 1:]])

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self.connector)])


def measure(hf: Path, data: Path, batch_size: int, batches: int) -> dict[str, float]:
    """The numbers named at the top of this file, over `batches` of `batch_size` pairs of the split dev."""
    losses = Losses(hf, data / "images")
    samples = json.loads((data / "dev-web.json").read_text())
    if len(samples) < batch_size * batches:
        raise SystemExit(
            f"{data / 'dev-web.json'}: {len(samples)} pairs, expected {batch_size * batches} for --batch-size "
            f"{batch_size} and --batches {batches}: lower one of them"
        )
    scenes = read_scenes(data, "dev")
    asked: dict[str, list[Tensor]] = {"L_G": [], "contrast": [], "phrase": [], "dialogues": []}
    shares = []
    for start in range(0, batch_size * batches, batch_size):
        chosen = samples[start : start + batch_size]
        pixels = losses.pixels(chosen)
        asked["L_G"].append(losses.gradient(losses.generation(chosen, pixels)))
        asked["phrase"].append(losses.gradient(losses.phrase(chosen, pixels)))
        if losses.heads is not None:
            loss, share = losses.contrast(chosen, pixels)
            asked["contrast"].append(losses.gradient(loss))
            shares.append(share)
        names = [sample["image"] for sample in chosen]
        dialogues = [dialogue_sample(random.Random(name), name, read_scene(scenes[name])) for name in names]
        asked["dialogues"].append(losses.gradient(losses.dialogue(dialogues, pixels)))
    losses.answerer.close()

    means = {name: torch.stack(gradients).mean(0) for name, gradients in asked.items() if gradients}
    numbers = {f"{name} length": statistics.fmean(float(one.norm()) for one in asked[name]) for name in means}
    for name in means:
        pairs = itertools.combinations(asked[name], 2)
        numbers[f"{name} with itself"] = statistics.fmean(cosine(a, b) for a, b in pairs)
    numbers["dialogues with L_G"] = cosine(means["dialogues"], means["L_G"])
    along = F.normalize(means["L_G"], dim=0)
    for name in ("contrast", "phrase"):
        if name in means:
            numbers[f"L_G with {name}"] = cosine(means["L_G"], means[name])
            beside = means[name] - (means[name] @ along) * along
            numbers[f"dialogues with {name} beside L_G"] = cosine(means["dialogues"], beside)
    if shares:
        numbers["twins' share"] = statistics.fmean(shares)
    return numbers


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, nargs="+", required=True, help="--save folders of stage 1")
    parser.add_argument("--data", type=Path, default=Path("output/proof/data"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for checkpoint in (one for load in args.load for one in sorted(load.glob("iter_*"))):
        with tempfile.TemporaryDirectory() as folder:
            export_checkpoint(checkpoint, Path(folder) / "export")
            numbers = measure(Path(folder) / "export", args.data, args.batch_size, args.batches)
        print(
            json.dumps({"checkpoint": str(checkpoint)} | {name: round(one, 4) for name, one in numbers.items()}),
            flush=True,
        )


if __name__ == "__main__":
    main()
