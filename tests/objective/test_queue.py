"""The queue of negatives: a Python deque says what it holds, the equations over step and queue what the loss is.

The mistakes these tests would catch: slots that were never filled, hallucinated captions that outlive their pair or
keep the number of another one, the oldest kept instead of the newest, a queue that differs between ranks, gradients
into earlier steps or none into this one, queue pairs counted in the mean, keys forgotten across steps, a resume that
sums in another order.
"""

import functools
import io
from collections import deque
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hacl_megatron.objective.contrastive import contrastive_loss
from hacl_megatron.objective.negatives import PairEmbeddings, concatenate_pairs, gather_pairs
from hacl_megatron.objective.queue import NegativeQueue
from tests.distributed import run_distributed
from tests.objective.equations import losses_by_loops, metrics_by_loops
from tests.objective.pair_cases import (
    HOLES,
    MANY_AND_NONE,
    SPREAD,
    WIDTH,
    WORLD_SIZES,
    Case,
    global_batch,
    rank_pairs,
    rank_rows,
    weighted_loss,
)

NUM_STEPS = 4
FIELDS = [item.name for item in fields(PairEmbeddings)]
CASES = {
    f"{mode} mask {mask} size {size}": (
        Case(
            sizes=HOLES if mask else SPREAD,
            hallucinated=MANY_AND_NONE,
            duplicates=True,
            hallucination_negatives=mode,
            mask_duplicates=mask,
            block_bytes=block_bytes,
        ),
        size,
    )
    for mode in ("own", "all", "none")
    for mask, size, block_bytes in ((True, 10, 500), (False, 10, 1), (True, 4, 1), (False, 100, 2**20))
}


def _run_steps(
    case: Case, size: int, rank: int, world_size: int, *, resume_at: int | None = None
) -> list[dict[str, Any]]:
    """Steps of a training run: terms, gradients, and what the queue held before each."""
    queue, results = NegativeQueue(size, WIDTH, dtype=case.dtype), []
    for step in range(NUM_STEPS):
        if step == resume_at:
            saved = io.BytesIO()
            torch.save(queue.state_dict(), saved)
            saved.seek(0)
            queue = NegativeQueue(size, WIDTH, dtype=case.dtype)
            queue.load_state_dict(torch.load(saved, weights_only=True))
        local = rank_pairs(replace(case, step=step), world_size, rank)
        temperature = torch.tensor([case.temperature], dtype=case.dtype, requires_grad=True)
        gathered = gather_pairs(local, dist.group.WORLD if dist.is_initialized() else None)
        terms = contrastive_loss(
            local, gathered.pool, gathered.first_pair, temperature, queue=queue.pairs,
            hallucination_negatives=case.hallucination_negatives, mask_duplicates=case.mask_duplicates,
            block_bytes=case.block_bytes,
        )  # fmt: skip
        weighted_loss(case, terms.image_to_text_sum, terms.text_to_image_sum).backward()
        results.append(
            {
                "queue": queue.state_dict(),
                "image_to_text": terms.image_to_text_sum.detach(),
                "text_to_image": terms.text_to_image_sum.detach(),
                "correct_i2t_sum": terms.correct_i2t_sum,
                "pairs": terms.pairs,
                "image": local.image.grad,
                "caption": local.caption.grad,
                "hallucinated": local.hallucinated.grad,
                "temperature": temperature.grad,
            }
        )
        queue.push(gathered.pool)
    return results


def _run_all() -> dict[str, list[dict[str, Any]]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return {name: _run_steps(case, size, rank, world_size) for name, (case, size) in CASES.items()}


@functools.cache
def _results(world_size: int) -> list[dict[str, list[dict[str, Any]]]]:
    return run_distributed(_run_all, world_size)


def _deque_of_steps(case: Case, size: int, num_steps: int) -> deque[dict[str, Any]]:
    """One entry a pair, with all that is the pair's."""
    held: deque[dict[str, Any]] = deque(maxlen=size)
    for step in range(num_steps):
        batch = global_batch(replace(case, step=step))
        for i in range(batch.num_pairs):
            own = [m for m, owner in enumerate(batch.hallucinated_owner.tolist()) if owner == i]
            held.append(
                {
                    "image": batch.image[i],
                    "caption": batch.caption[i],
                    "hallucinated": [batch.hallucinated[m] for m in own],
                    "image_keys": batch.image_keys[i],
                    "caption_keys": batch.caption_keys[i],
                    "hallucinated_keys": [batch.hallucinated_keys[m] for m in own],
                }
            )
    return held


def _expected_queue(case: Case, size: int, num_steps: int) -> dict[str, torch.Tensor]:
    held = _deque_of_steps(case, size, num_steps)
    empty = NegativeQueue(size, WIDTH, dtype=case.dtype).state_dict()
    expected = {name: [pair[name] for pair in held] for name in ("image", "caption", "image_keys", "caption_keys")}
    for name in ("hallucinated", "hallucinated_keys"):
        expected[name] = [row for pair in held for row in pair[name]]
    expected["hallucinated_owner"] = [torch.tensor(i) for i, pair in enumerate(held) for _ in pair["hallucinated"]]
    return {name: torch.stack(rows) if rows else empty[name] for name, rows in expected.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_holds_the_newest_pairs_on_every_rank(world_size: int, name: str) -> None:
    case, size = CASES[name]
    for results in _results(world_size):
        for step, result in enumerate(results[name]):
            expected = _expected_queue(case, size, step)
            assert result["queue"].keys() == expected.keys() == set(FIELDS)
            for field in FIELDS:
                torch.testing.assert_close(result["queue"][field], expected[field], rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_loss_and_gradients_are_those_of_the_equations(world_size: int, name: str) -> None:
    """Over step and queue as one batch, of which the step's pairs alone are summed and get gradients."""
    case, size = CASES[name]
    tolerance = {"rtol": 1e-12, "atol": 1e-12}
    for step in range(NUM_STEPS):
        batch = global_batch(replace(case, step=step))
        leaves = {kind: getattr(batch, kind).requires_grad_() for kind in ("image", "caption", "hallucinated")}
        temperature = torch.tensor([case.temperature], dtype=case.dtype, requires_grad=True)
        both = concatenate_pairs([batch, PairEmbeddings(**_expected_queue(case, size, step))])
        image_to_text, text_to_image = losses_by_loops(
            both, temperature,
            hallucination_negatives=case.hallucination_negatives, mask_duplicates=case.mask_duplicates,
        )  # fmt: skip
        image_to_text, text_to_image = image_to_text[: case.num_pairs], text_to_image[: case.num_pairs]
        weighted_loss(case, sum(image_to_text), sum(text_to_image)).backward()

        ranks = [results[name][step] for results in _results(world_size)]
        total = {key: sum(result[key] for result in ranks) for key in ("image_to_text", "text_to_image", "pairs")}
        torch.testing.assert_close(total["image_to_text"], sum(image_to_text).detach(), **tolerance)
        torch.testing.assert_close(total["text_to_image"], sum(text_to_image).detach(), **tolerance)
        assert total["pairs"] == case.num_pairs
        torch.testing.assert_close(sum(result["temperature"] for result in ranks), temperature.grad, **tolerance)
        for rank, result in enumerate(ranks):
            pairs, hallucinated = rank_rows(case, world_size, rank)
            for kind, rows in (("image", pairs), ("caption", pairs), ("hallucinated", hallucinated)):
                expected = torch.zeros_like(leaves[kind]) if leaves[kind].grad is None else leaves[kind].grad
                actual = torch.zeros_like(expected[rows]) if result[kind] is None else result[kind]
                torch.testing.assert_close(actual, expected[rows], **tolerance)
            with torch.no_grad():
                metrics = metrics_by_loops(both, pairs.start, pairs.stop, mask_duplicates=case.mask_duplicates)
            assert result["correct_i2t_sum"] == metrics["correct_i2t_sum"]


def test_the_steps_tell_right_from_wrong() -> None:
    """The queue changes L_v, L_t, and whose caption is nearest; masks across steps matter; `own` differs from `all`."""
    last = {name: results[-1] for name, results in _results(1)[0].items()}
    for key in ("image_to_text", "text_to_image"):
        assert len({round(float(last[f"all mask True size {size}"][key]), 6) for size in (4, 10)}) == 2
    assert len({float(last[f"{mode} mask True size 10"]["image_to_text"]) for mode in ("own", "all", "none")}) == 3
    first = _results(1)[0]["all mask True size 10"][0]
    assert first["queue"]["image"].shape == (0, WIDTH)
    case, _ = CASES["all mask True size 10"]
    newest = global_batch(replace(case, step=NUM_STEPS - 1))
    held = _expected_queue(case, 10, NUM_STEPS - 1)
    assert torch.isin(held["caption_keys"], newest.caption_keys).any()
    assert not torch.isin(held["caption_keys"], newest.caption_keys).all()
    assert torch.isin(held["hallucinated_keys"], newest.caption_keys).any()


@pytest.mark.parametrize("resume_at", (0, 1, 3))
def test_a_resumed_queue_gives_the_same_bits(resume_at: int) -> None:
    case, size = CASES["all mask True size 10"]
    case = replace(case, dtype=torch.float32)
    whole = _run_steps(case, size, 0, 1)
    resumed = _run_steps(case, size, 0, 1, resume_at=resume_at)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def _filled(size: int, num_steps: int, case: Case) -> NegativeQueue:
    queue = NegativeQueue(size, WIDTH, dtype=case.dtype)
    for step in range(num_steps):
        queue.push(global_batch(replace(case, step=step)))
    return queue


def test_another_length_keeps_the_newest() -> None:
    case = Case(sizes={}, hallucinated=MANY_AND_NONE)
    state = _filled(100, 3, case).state_dict()
    for size in (1, 8, 21, 50):
        queue = NegativeQueue(size, WIDTH, dtype=case.dtype)
        queue.load_state_dict(state)
        torch.testing.assert_close(queue.state_dict(), _expected_queue(case, size, 3), rtol=0, atol=0)
        queue.push(global_batch(replace(case, step=3)))
        torch.testing.assert_close(queue.state_dict(), _expected_queue(case, min(size, 28), 4), rtol=0, atol=0)


def test_a_step_without_pairs_changes_nothing() -> None:
    case = Case(sizes={}, hallucinated=MANY_AND_NONE)
    queue, before = _filled(10, 2, case), _filled(10, 2, case)
    queue.push(global_batch(replace(case, hallucinated=())))
    torch.testing.assert_close(queue.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_holds_copies_without_gradients_or_spare_memory() -> None:
    case = Case(sizes={1: (7,)}, hallucinated=MANY_AND_NONE)
    pool = rank_pairs(case, 1, 0)
    for size in (4, 7, 10):
        queue = NegativeQueue(size, WIDTH, dtype=case.dtype)
        queue.push(pool)
        earlier = queue.pairs
        expected = {name: getattr(earlier, name).clone() for name in FIELDS}
        with torch.no_grad():
            pool.image.add_(1.0)
            pool.image_keys.add_(1)
        queue.push(pool)
        for name, tensor in expected.items():  # neither the pool nor a later push reaches a record handed out
            torch.testing.assert_close(getattr(earlier, name), tensor, rtol=0, atol=0)
        for tensor in queue.state_dict().values():
            assert not tensor.requires_grad and tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_foreign_state_is_refused() -> None:
    state = NegativeQueue(4, WIDTH).state_dict()
    with pytest.raises(ValueError, match=r"found \['caption', .*expected .*'image'"):
        NegativeQueue(4, WIDTH).load_state_dict({name: state[name] for name in state if name != "image"})
    with pytest.raises(ValueError, match=rf"image is torch.float32 \[0, {WIDTH}\], expected torch.float32 \[.., 16\]"):
        NegativeQueue(4, 16).load_state_dict(state)
    with pytest.raises(ValueError, match=r"expected torch\.float64"):
        NegativeQueue(4, WIDTH, dtype=torch.float64).load_state_dict(state)
