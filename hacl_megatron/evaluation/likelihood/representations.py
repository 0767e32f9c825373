"""Global representations of images, captions and hallucinated captions: HACL's Figure 1, as arrays and as numbers.

Two spaces: the last layer's hidden states at the EOS tokens, which the paper draws, and the embeddings that the heads
project them to, which the contrastive loss compares. Vectors count by their direction alone, as in that loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.distributed import ProcessGroup

from hacl_megatron.batch import PackedBatch, Parts
from hacl_megatron.data.encoding import EncodedSample, UnusableSample, encode, text_keys
from hacl_megatron.data.manifest import Sample
from hacl_megatron.evaluation.likelihood.item_packs import PackResult, result_of_pack
from hacl_megatron.evaluation.likelihood.task import ItemOutput, ManifestTask, twins
from hacl_megatron.evaluation.likelihood.task_run import from_text, to_text
from hacl_megatron.model.hacl import HaclModel, ModelOutput

Space = Literal["hidden states", "embeddings"]
SPACES: tuple[Space, ...] = ("hidden states", "embeddings")


class Representations(ManifestTask):
    """Samples with an image, a caption and a hallucinated caption."""

    name = "representations"
    parts = Parts(dialogues=False)
    needs = "an image, a caption and a hallucinated caption"

    def takes(self, sample: Sample) -> bool:
        return len(sample.images) == len(sample.pairs) == 1 and len(twins(sample)) > 0

    def encode(self, key: int, size: tuple[int, int]) -> list[EncodedSample]:
        encoded = encode(self.manifest[key], self.tokenizer, self.settings, [size])
        (pair,) = encoded.pairs
        if all(twin == pair.caption_key for twin in pair.hallucinated_keys):
            raise UnusableSample("each of its hallucinated captions is its caption, token for token")
        return [encoded]

    def measured(self, key: int, output: ItemOutput) -> dict[str, Any]:
        embeddings = output.image, output.caption, output.hallucinated
        (pair,) = self.manifest[key].pairs
        caption_key, *hallucinated_keys = text_keys(pair, self.tokenizer, self.settings)
        # One that is the caption itself, token for token, is at its very place: it says nothing.
        differs = [twin != caption_key for twin in hallucinated_keys]
        return {
            space: [to_text(image), to_text(caption), *map(to_text, hallucinated[differs])]
            for space, (image, caption, hallucinated) in zip(SPACES, (output.states, embeddings), strict=True)
        }


class CollectStates:
    """Makes pack results that hold the heads' inputs too. For the last stage; elsewhere it is never called."""

    def __init__(self, module: HaclModel, *, vocab_size: int, tp_group: ProcessGroup) -> None:
        self._result = partial(result_of_pack, vocab_size=vocab_size, tp_group=tp_group)
        self._states: tuple[Tensor, ...] = ()
        if module.post_process:
            module.heads.register_forward_pre_hook(self._remember)

    def _remember(self, module: Any, states: tuple[Tensor, ...]) -> None:
        self._states = states

    def __call__(self, output: ModelOutput, batch: PackedBatch) -> PackResult:
        image, caption, hallucinated = (states.float().cpu() for states in self._states)
        return replace(self._result(output, batch), states=(image, caption, hallucinated))


@dataclass(frozen=True, kw_only=True)
class PointCloud:
    """Unit vectors of one space, fp32."""

    images: np.ndarray
    """[N, d]"""
    captions: np.ndarray
    """[N, d]"""
    hallucinated: np.ndarray
    """[M, d]"""
    owners: np.ndarray
    """int64 [M]: which pair each hallucinated caption belongs to."""

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], space: Space) -> "PointCloud":
        """From the records of `Representations`; those with an error are left out.

        Raises:
            ValueError: none is left.
        """
        rows = [[from_text(text) for text in record[space]] for record in records if "error" not in record]
        if not rows:
            raise ValueError(f"none of the {len(records)} samples could be used: {records[0]['error']}")
        counts = [len(row) - 2 for row in rows]
        return cls(
            images=_unit(np.stack([row[0] for row in rows])),
            captions=_unit(np.stack([row[1] for row in rows])),
            hallucinated=_unit(np.stack([vector for row in rows for vector in row[2:]])),
            owners=np.repeat(np.arange(len(rows)), counts),
        )

    def measures(self) -> dict[str, float]:
        """Numbers beside the picture.

        modality gap: distance between the centroids of images and captions (Liang et al. 2022, arXiv 2203.02053).
        caption-hallucination distance: distance between the centroids of captions and hallucinated captions.
        image-caption cosine, image-hallucinated cosine, caption-hallucinated cosine: means over pairs.
        hallucination accuracy: share of hallucinated captions further from their image than its caption is.
        hallucination AUC: chance that any caption is nearer to its image than any hallucinated caption to its own.
        """
        from sklearn.metrics import roc_auc_score

        true = (self.images * self.captions).sum(1)
        false = (self.images[self.owners] * self.hallucinated).sum(1)
        between = (self.captions[self.owners] * self.hallucinated).sum(1)
        labels = np.concatenate([np.ones(len(true)), np.zeros(len(false))])
        centres = [part.mean(0) for part in (self.images, self.captions, self.hallucinated)]
        return {
            "modality gap": float(np.linalg.norm(centres[0] - centres[1])),
            "caption-hallucination distance": float(np.linalg.norm(centres[1] - centres[2])),
            "image-caption cosine": float(true.mean()),
            "image-hallucinated cosine": float(false.mean()),
            "caption-hallucinated cosine": float(between.mean()),
            "hallucination accuracy": float((true[self.owners] > false).mean()),
            "hallucination AUC": float(roc_auc_score(labels, np.concatenate([true, false]))),
        }


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
