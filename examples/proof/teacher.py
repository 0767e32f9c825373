"""What the contrast could teach: what the states at </s> tell apart when nothing stands between scene and model.

    python examples/proof/teacher.py --data output/proof/data --parts output/proof/parts

Images are told in notes without error, as in ceiling.py, in the place and context where HACL reads them. The trainer's
heads, from the same values, learn its contrastive loss, without twins and with own ones, on stage 1's pairs, for much
longer than stage 1. On held-out pairs: how often is an image nearer to its caption than to the twin, and nearest to it
among 64; beside it, how often the language model finds the caption likelier than the twin. Where likelihoods know more
than states do, the contrast has little to add to L_G; where twins add nothing to heads, they add nothing to a run.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from draw_world import read_scenes
from language import Document, LanguageTask
from make_parts import new_library
from run_arms import REGIMES, captions_of, languages_in
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from hacl_megatron.model.heads import ContrastiveHeads
from hacl_megatron.objective.contrastive import HallucinationNegatives, contrastive_loss
from hacl_megatron.objective.negatives import PairEmbeddings

ROWS = 64
"""Pairs a step, and pool of the retrieval."""
PAIRS = 3840
"""Those of stage 1."""
BOS, EOS = 1, 2


class Told:
    """Pairs of one split as the frozen language model holds them.

    Args:
        captions: the split's file of pairs, one twin each.
    """

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: AutoTokenizer, data: Path, split: str, captions: Path, limit: int
    ) -> None:
        library = new_library(data, tokenizer, seed=0, split=split)
        self.task = LanguageTask(model.model, model.lm_head, library.notes)
        samples = json.loads(captions.read_text())[:limit]
        names = [name for name in read_scenes(data) if name.startswith(split)]
        self.scenes = [names.index(sample["image"]) for sample in samples]
        self.texts = [library.ids(sample["text"]) for sample in samples]
        self.twins = [library.ids(sample["Hallucination caption"][0]) for sample in samples]

    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """Last hidden states at </s> of images, captions and twins, each [N, H]."""
        images = [Document([BOS], scene, [EOS], [], None) for scene in self.scenes]
        texts = [Document([], None, [BOS, *ids, EOS], [], None) for ids in self.texts]
        twins = [Document([], None, [BOS, *ids, EOS], [], None) for ids in self.twins]
        return self._ends(images), self._ends(texts), self._ends(twins)

    def _ends(self, rows: list[Document]) -> Tensor:
        return torch.cat([self.task.ends(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)])

    def preferred(self) -> float:
        """Share of captions likelier than their twins behind the scene, in sum over tokens."""
        sums = [
            [self._loss(scene, ids) * len(ids) for scene, ids in zip(self.scenes, rows, strict=True)]
            for rows in (self.texts, self.twins)
        ]
        return statistics.fmean(text < twin for text, twin in zip(*sums, strict=True))

    def _loss(self, scene: int, ids: list[int]) -> float:
        return self.task([Document([BOS], scene, ids, [True] * len(ids), None)])[0].item()


def pairs_of(heads: ContrastiveHeads, images: Tensor, captions: Tensor, twins: Tensor) -> PairEmbeddings:
    number = torch.arange(len(images))
    return PairEmbeddings(
        image=heads.embed_images(images), caption=heads.embed_texts(captions), hallucinated=heads.embed_texts(twins),
        hallucinated_owner=number, image_keys=number, caption_keys=number, hallucinated_keys=number + len(number),
    )  # fmt: skip


def train_heads(
    states: tuple[Tensor, Tensor, Tensor], twins: HallucinationNegatives, steps: int, seed: int
) -> ContrastiveHeads:
    """Heads of hidden / 4, as stage 1's, taught by the contrastive loss alone."""
    generator = torch.Generator().manual_seed(seed)
    width = states[0].shape[1]
    heads = ContrastiveHeads(
        width, width // 4, temperature=0.07, generator=generator, dtype=torch.float32, same_init=True
    )
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        chosen = torch.randperm(len(states[0]), generator=generator)[:ROWS]
        pairs = pairs_of(heads, *(kind[chosen] for kind in states))
        terms = contrastive_loss(
            pairs, pairs, 0, heads.temperature, hallucination_negatives=twins, mask_duplicates=False
        )
        optimizer.zero_grad()
        ((terms.image_to_text_sum + terms.text_to_image_sum) / (2 * len(chosen))).backward()
        optimizer.step()
        schedule.step()
    return heads


@torch.no_grad()
def measure(heads: ContrastiveHeads, states: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """(nearer to the caption than to the twin, nearest to it in pools of ROWS), shares of the pairs in whole pools."""
    if len(states[0]) < ROWS:
        raise SystemExit(f"{len(states[0])} held-out pairs are no pool of {ROWS}: draw more with draw_world.py")
    pools = range(0, len(states[0]) - ROWS + 1, ROWS)
    nearer = nearest = 0.0
    for start in pools:
        pairs = pairs_of(heads, *(kind[start : start + ROWS] for kind in states))
        terms = contrastive_loss(
            pairs, pairs, 0, heads.temperature, hallucination_negatives="none", mask_duplicates=False
        )
        nearer += terms.hallucination_correct_sum.item()
        nearest += terms.correct_i2t_sum.item()
    return nearer / (len(pools) * ROWS), nearest / (len(pools) * ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("output/proof/data"))
    parser.add_argument("--parts", type=Path, default=Path("output/proof/parts"))
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for captions, language in dict.fromkeys((regime.captions, regime.language) for regime in REGIMES.values()):
        if language not in languages_in(args.parts):
            continue
        tokenizer = AutoTokenizer.from_pretrained(args.parts / language)
        model = LlamaForCausalLM.from_pretrained(args.parts / language).eval()
        with torch.no_grad():
            told = {
                split: Told(model, tokenizer, args.data, split, Path(captions_of(args.data, split, captions)), PAIRS)
                for split in ("pretrain", args.split)
            }
            likelier = told[args.split].preferred()
            learned, held_out = told["pretrain"].states(), told[args.split].states()
        for steps, twins in ((0, "none"), (args.steps, "none"), (args.steps, "own")):
            nearer, nearest = measure(train_heads(learned, twins, steps, seed=1), held_out)
            print(
                f"{language}, captions {captions}, told without error, heads of {steps} steps, twins {twins}: nearer "
                f"to the caption than to its twin {nearer:.3f}, nearest among {ROWS} {nearest:.3f}; by likelihood "
                f"{likelier:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
