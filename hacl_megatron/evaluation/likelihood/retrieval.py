"""Retrieval by the contrastive embeddings: image to caption and back, with and without hallucinated distractors.

The set is shuffled once, by a fixed seed, and cut into pools: how hard retrieval is depends on the pool's size, so a
number means something only with it. A candidate with the very image or caption of the query is never wrong.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hacl_megatron.batch import Parts
from hacl_megatron.data.encoding import EncodedSample, EncodingSettings, encode, text_keys
from hacl_megatron.data.manifest import Manifest, Sample
from hacl_megatron.data.tokenizer import Tokenizer
from hacl_megatron.evaluation.likelihood.task import ItemOutput, ManifestTask, with_unusable
from hacl_megatron.evaluation.likelihood.task_run import from_text, to_text
from hacl_megatron.evaluation.scores import Scores, ratio

RECALL_AT = (1, 5)
BLOCK = 1024
"""Queries whose similarities are held at once."""


class Retrieval(ManifestTask):
    """Samples with an image and a caption.

    Args:
        pool_size: pairs that a query's answer is looked for among; None: the whole set.
    """

    name = "retrieval"
    parts = Parts(dialogues=False)
    needs = "an image and a caption"

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        settings: EncodingSettings,
        *,
        limit: int | None = None,
        pool_size: int | None = None,
    ) -> None:
        if pool_size is not None and pool_size < 2:
            raise ValueError(f"--pool-size {pool_size}, expected at least 2 pairs to choose from")
        self.pool_size = pool_size
        super().__init__(manifest, tokenizer, settings, limit=limit)

    def takes(self, sample: Sample) -> bool:
        return len(sample.images) == len(sample.pairs) == 1

    def encode(self, key: int, size: tuple[int, int]) -> list[EncodedSample]:
        return [encode(self.manifest[key], self.tokenizer, self.settings, [size])]

    def measured(self, key: int, output: ItemOutput) -> dict[str, Any]:
        (pair,) = self.manifest[key].pairs
        caption_key, *hallucinated_keys = text_keys(pair, self.tokenizer, self.settings)
        return {
            "image_embedding": to_text(output.image),
            "caption_embedding": to_text(output.caption),
            "hallucinated_embeddings": [to_text(row) for row in output.hallucinated],
            "caption_key": caption_key,
            "hallucinated_keys": hallucinated_keys,
        }

    def score(self, records: Sequence[dict[str, Any]]) -> Scores:
        good = [record for record in records if "error" not in record]
        recalled = {f"{kind} recall@{k}": 0 for kind in ("i2t", "i2t among hallucinated", "t2i") for k in RECALL_AT}
        for pool, first in _pools(good, self.pool_size):
            for kind, ranks in _ranks(pool, first).items():
                for k in RECALL_AT:
                    recalled[f"{kind} recall@{k}"] += int((ranks < k).sum())
        margins = [_margins(record) for record in good]
        twins = [margin for own in margins for margin in own.tolist()]
        with_twins = [own for own in margins if len(own)]
        scores = Scores(
            task=self.name,
            metrics={
                **{name: ratio(number, len(good)) for name, number in recalled.items()},
                "hallucination margin": ratio(sum(twins), len(twins)),
                "hallucination accuracy": ratio(sum(bool((own > 0).all()) for own in with_twins), len(with_twins)),
            },
            counts={
                "pairs": len(good),
                "pairs with hallucinated captions": len(with_twins),
                "hallucinated captions": len(twins),
                "pool size": min(self.pool_size or len(good), len(good)),
            },
        )
        return with_unusable(scores, records, "are left out")


def _pools(records: list[dict[str, Any]], size: int | None) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Pools of one size, and which of a pool's pairs is the first to be asked for.

    What is left over at the end is asked for in a pool that is filled up with the pairs before.
    """
    shuffled = list(records)
    random.Random(0).shuffle(shuffled)  # neighbours in a file may be alike
    size = min(size or len(shuffled), len(shuffled))
    for start in range(0, len(shuffled), max(size, 1)):
        begin = min(start, len(shuffled) - size)
        yield shuffled[begin : begin + size], start - begin


def _ranks(pool: list[dict[str, Any]], first: int) -> dict[str, np.ndarray]:
    """How many wrong candidates are at least as near as the right one, for each pair from `first` on: int64 [n]."""
    images = np.stack([from_text(record["image_embedding"]) for record in pool])
    captions = np.stack([from_text(record["caption_embedding"]) for record in pool])
    hallucinated = [from_text(text) for record in pool for text in record["hallucinated_embeddings"]]
    hallucinated = np.stack(hallucinated) if hallucinated else captions[:0]
    caption_keys = np.array([record["caption_key"] for record in pool])
    twin_keys = np.array([key for record in pool for key in record["hallucinated_keys"]], dtype=np.int64)
    names = np.array([record["image"] for record in pool])
    ranks: dict[str, list[np.ndarray]] = {"i2t": [], "i2t among hallucinated": [], "t2i": []}
    for start in range(first, len(pool), BLOCK):
        rows = slice(start, min(start + BLOCK, len(pool)))
        # Pairs of the same image or caption, the query's own among them.
        same = (caption_keys[rows, None] == caption_keys) | (names[rows, None] == names)
        right = np.einsum("nd,nd->n", images[rows], captions[rows])[:, None]
        nearer = ((images[rows] @ captions.T >= right) & ~same).sum(1)
        nearer_twins = (images[rows] @ hallucinated.T >= right) & (twin_keys != caption_keys[rows, None])
        ranks["i2t"].append(nearer)
        ranks["i2t among hallucinated"].append(nearer + nearer_twins.sum(1))
        ranks["t2i"].append(((captions[rows] @ images.T >= right) & ~same).sum(1))
    return {kind: np.concatenate(parts) for kind, parts in ranks.items()}


def _margins(record: dict[str, Any]) -> np.ndarray:
    """v·t - v·u of each hallucinated caption u of a pair that is not its caption, token for token: fp32 [M]."""
    image, caption = from_text(record["image_embedding"]), from_text(record["caption_embedding"])
    keyed = zip(record["hallucinated_keys"], record["hallucinated_embeddings"], strict=True)
    twins = [from_text(text) for key, text in keyed if key != record["caption_key"]]
    return np.array([image @ caption - image @ twin for twin in twins], dtype=np.float32)
