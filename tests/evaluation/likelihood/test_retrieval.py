"""Recall by scikit-learn's own count, pools of one size, duplicates, and what a collapsed model gets."""

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from hacl_megatron.evaluation.likelihood.retrieval import Retrieval, _pools
from hacl_megatron.evaluation.likelihood.task_run import from_text, to_text

NUM_PAIRS, SIZE = 37, 12


def pairs(num: int = NUM_PAIRS, num_twins: int = 2, seed: int = 0) -> list[dict]:
    """Records as the task makes them: captions near their images, twins near them too."""
    rng = np.random.default_rng(seed)

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)

    images = unit(rng.normal(size=(num, SIZE)))
    captions = unit(images + rng.normal(size=(num, SIZE)) * 0.35)
    twins = unit(images[:, None] + rng.normal(size=(num, num_twins, SIZE)) * 0.45)
    return [
        {
            "key": at, "name": str(at), "image": f"{at}.jpg", "image_embedding": to_text(images[at]),
            "caption_embedding": to_text(captions[at]), "hallucinated_embeddings": [to_text(row) for row in twins[at]],
            "caption_key": at, "hallucinated_keys": [1000 + num_twins * at + n for n in range(num_twins)],
        }
        for at in range(num)
    ]  # fmt: skip


def stacked(records: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, d], [n, d], [n * twins, d]"""
    images, captions = (np.stack([from_text(r[f"{kind}_embedding"]) for r in records]) for kind in ("image", "caption"))
    return images, captions, np.stack([from_text(t) for r in records for t in r["hallucinated_embeddings"]])


def task(pool_size: int | None = None) -> Retrieval:
    made = Retrieval.__new__(Retrieval)  # scoring needs no data
    made.pool_size = pool_size
    return made


@pytest.mark.parametrize("k", [1, 5])
def test_recall_is_scikit_learns(k: int) -> None:
    records = pairs()
    images, captions, twins = stacked(records)
    metrics = task().score(records).metrics
    right = np.arange(NUM_PAIRS)
    expected = {
        "i2t": top_k_accuracy_score(right, images @ captions.T, k=k, labels=right),
        "t2i": top_k_accuracy_score(right, captions @ images.T, k=k, labels=right),
        "i2t among hallucinated": top_k_accuracy_score(
            right, images @ np.concatenate([captions, twins]).T, k=k, labels=np.arange(NUM_PAIRS + len(twins))
        ),
    }
    assert len({*expected.values()}) == 3 and expected["i2t among hallucinated"] < expected["i2t"]
    for kind, value in expected.items():
        assert metrics[f"{kind} recall@{k}"] == pytest.approx(value)


def test_pools_have_one_size_and_ask_for_everything_once() -> None:
    records = pairs()
    asked = []
    for pool, first in _pools(records, 10):
        assert len(pool) == 10 == len({record["key"] for record in pool})
        asked += [record["key"] for record in pool[first:]]
    assert sorted(asked) == list(range(NUM_PAIRS)) and asked != sorted(asked)
    small, whole = task(10).score(records), task().score(records)
    assert small.counts["pool size"] == 10 and whole.counts["pool size"] == NUM_PAIRS
    assert small.metrics["i2t recall@1"] > whole.metrics["i2t recall@1"]
    assert task(1000).score(records).metrics == whole.metrics
    expected = [
        np.mean(np.argmax(images @ captions.T, 1)[first:] == np.arange(first, 10)) * (10 - first)
        for pool, first in _pools(records, 10)
        for images, captions, _ in [stacked(pool)]
    ]
    assert small.metrics["i2t recall@1"] == pytest.approx(sum(expected) / NUM_PAIRS)


def test_the_same_image_or_caption_is_never_wrong() -> None:
    one, two, three = pairs(3, num_twins=1)
    two["caption_embedding"] = three["image_embedding"] = one["image_embedding"]  # nearer than one's own caption
    assert task().score([one, two]).metrics["i2t recall@1"] < 1
    same_caption = {**two, "caption_key": one["caption_key"]}
    assert task().score([one, same_caption]).metrics["i2t recall@1"] == 1
    same_image = {**two, "image": one["image"]}
    assert task().score([one, same_image]).metrics["i2t recall@1"] == 1
    # a twin whose text is the caption itself is none: neither found instead of it, nor an error, nor a margin of 0
    equal = [one["caption_embedding"], *one["hallucinated_embeddings"]]
    twin = {**one, "hallucinated_embeddings": equal, "hallucinated_keys": [one["caption_key"], 1]}
    assert task().score([twin]).metrics == task().score([{**one, "hallucinated_keys": [1]}]).metrics
    twin = {**one, "hallucinated_embeddings": equal[:1], "hallucinated_keys": [one["caption_key"]]}
    scores = task().score([twin])
    assert scores.metrics["i2t among hallucinated recall@1"] == 1 and scores.counts["hallucinated captions"] == 0
    assert scores.metrics["hallucination accuracy"] is None and scores.metrics["hallucination margin"] is None


def test_a_collapsed_model_finds_nothing() -> None:
    records = pairs()
    for record in records:
        record["image_embedding"] = record["caption_embedding"] = records[0]["image_embedding"]
        record["hallucinated_embeddings"] = [records[0]["image_embedding"]] * 2
    metrics = task().score(records).metrics
    assert metrics["i2t recall@1"] == metrics["t2i recall@5"] == metrics["hallucination accuracy"] == 0
    assert metrics["hallucination margin"] == 0


def test_unusable_pairs_are_left_out() -> None:
    records = pairs()
    scores = task().score([{"key": 99, "name": "99", "image": "99.jpg", "error": "cut off"}, *records])
    assert scores.counts["pairs"] == NUM_PAIRS and scores.counts["unusable items"] == 1
    assert scores.metrics == task().score(records).metrics
    empty = task().score([{"key": 99, "name": "99", "image": "99.jpg", "error": "cut off"}])
    assert empty.metrics["i2t recall@1"] is None and empty.counts["pool size"] == 0
