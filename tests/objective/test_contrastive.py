"""The contrastive losses against open_clip and against their equations, on 1, 2 and 4 ranks.

Faults of the released code that these tests would catch:
- hallucinated negatives dropped when gathering: the equations with `all` on several ranks;
- all-gather backward without the other ranks' gradients: gradients on several ranks, both oracles;
- the diagonal taken as target on ranks > 0: ClipLoss and the equations on several ranks;
- mixed batches that crash: ranks without pairs, pairs without hallucinations, a step without pairs.
"""

from dataclasses import replace

import pytest
import torch

from hacl_megatron.objective.contrastive import clamp_temperature_, contrastive_loss
from hacl_megatron.objective.negatives import PairEmbeddings
from tests.objective.equations import losses_by_loops, metrics_by_loops
from tests.objective.open_clip_oracle import open_clip_loss
from tests.objective.pair_cases import (
    EMPTY_CASES,
    EQUATION_CASES,
    ORACLE_CASES,
    WIDTH,
    WORLD_SIZES,
    Case,
    global_batch,
    rank_rows,
    results_of_ranks,
    weighted_loss,
)

FP64_TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
"""Leaves nothing but the order of summation: a wrong term cannot hide. fp64 is what most cases run in."""


def tolerances(case: Case) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Of losses, of the embeddings' gradients and of τ's.

    A cosine near 1 has an fp32 rounding of eps = 6e-8, a similarity one of eps / τ (1e-6 at τ = 0.07, 6e-5 at 0.001),
    and so has the loss. The embeddings' gradients multiply a softmax with that error by 1 / τ, τ's by s / τ.
    """
    if case.dtype == torch.float64:  # of numbers up to 1 / τ, and 1 / τ²
        scale = 0.07 / case.temperature
        return FP64_TOLERANCE, {"rtol": 1e-12, "atol": 1e-12 * scale}, {"rtol": 1e-12, "atol": 1e-12 * scale**2}
    similarity = 4 * 6e-8 / case.temperature
    return (
        {"rtol": 1e-6, "atol": similarity},
        {"rtol": 1e-6, "atol": similarity / case.temperature / case.num_pairs},
        {"rtol": 1e-6, "atol": similarity / case.temperature**2 / case.num_pairs},
    )


@pytest.mark.parametrize("name", ORACLE_CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_without_hallucinations_it_is_open_clips_loss(world_size: int, name: str) -> None:
    case, ranks = ORACLE_CASES[name], [results[f"oracle {name}"] for results in results_of_ranks(world_size)]
    batch = global_batch(case)
    image, caption = batch.image.requires_grad_(), batch.caption.requires_grad_()
    temperature = torch.tensor([case.temperature], dtype=case.dtype, requires_grad=True)
    loss = open_clip_loss().ClipLoss()(image, caption, 1 / temperature)  # (L_v + L_t) / 2 in one process
    loss.backward()
    loss_tolerance, gradient_tolerance, temperature_tolerance = tolerances(case)

    sums = sum(rank["terms"]["image_to_text_sum"] + rank["terms"]["text_to_image_sum"] for rank in ranks)
    torch.testing.assert_close(sums / (2 * case.num_pairs), loss.detach(), **loss_tolerance)
    for rank, result in enumerate(ranks):
        pairs, _ = rank_rows(case, world_size, rank)
        torch.testing.assert_close(result["gradients"]["image"], image.grad[pairs], **gradient_tolerance)
        torch.testing.assert_close(result["gradients"]["caption"], caption.grad[pairs], **gradient_tolerance)
    temperature_gradient = sum(result["gradients"]["temperature"] for result in ranks)
    torch.testing.assert_close(temperature_gradient, temperature.grad, **temperature_tolerance)


@pytest.mark.parametrize("name", EQUATION_CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_losses_and_gradients_are_those_of_the_equations(world_size: int, name: str) -> None:
    case, ranks = EQUATION_CASES[name], [results[f"equation {name}"] for results in results_of_ranks(world_size)]
    batch = global_batch(replace(case, dtype=torch.float64))
    leaves = {kind: getattr(batch, kind).requires_grad_() for kind in ("image", "caption", "hallucinated")}
    temperature = torch.tensor([case.temperature], dtype=torch.float64, requires_grad=True)
    image_to_text, text_to_image = losses_by_loops(
        batch, temperature,
        hallucination_negatives=case.hallucination_negatives, mask_duplicates=case.mask_duplicates,
    )  # fmt: skip
    weighted_loss(case, sum(image_to_text), sum(text_to_image)).backward()
    loss_tolerance, gradient_tolerance, temperature_tolerance = tolerances(case)

    for rank, result in enumerate(ranks):
        pairs, hallucinated = rank_rows(case, world_size, rank)
        zero = torch.zeros((), dtype=torch.float64)
        expected = sum(image_to_text[pairs], zero).detach(), sum(text_to_image[pairs], zero).detach()
        torch.testing.assert_close(
            result["terms"]["image_to_text_sum"], expected[0], **loss_tolerance, check_dtype=False
        )
        torch.testing.assert_close(
            result["terms"]["text_to_image_sum"], expected[1], **loss_tolerance, check_dtype=False
        )
        for kind, rows in (("image", pairs), ("caption", pairs), ("hallucinated", hallucinated)):
            if rank in case.frozen_ranks:
                assert result["gradients"][kind] is None
                continue
            expected_gradient = leaves[kind].grad
            if expected_gradient is None:  # `none`: hallucinated captions do not enter the loss
                expected_gradient = torch.zeros_like(leaves[kind])
            gradient = result["gradients"][kind]
            if gradient is None:  # in one process nothing but the loss leads to them
                assert case.hallucination_negatives == "none" and world_size == 1
                gradient = torch.zeros_like(leaves[kind])
            torch.testing.assert_close(gradient, expected_gradient[rows], **gradient_tolerance, check_dtype=False)
    temperature_gradient = sum(result["gradients"]["temperature"] for result in ranks)
    torch.testing.assert_close(temperature_gradient, temperature.grad, **temperature_tolerance, check_dtype=False)


@pytest.mark.parametrize("name", EQUATION_CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_metrics_are_counted_over_own_rows(world_size: int, name: str) -> None:
    case, ranks = EQUATION_CASES[name], [results[f"equation {name}"] for results in results_of_ranks(world_size)]
    batch = global_batch(case)
    for rank, result in enumerate(ranks):
        pairs, _ = rank_rows(case, world_size, rank)
        expected = metrics_by_loops(batch, pairs.start, pairs.stop, mask_duplicates=case.mask_duplicates)
        expected["pairs"] = float(pairs.stop - pairs.start)
        actual = {metric: float(result["terms"][metric]) for metric in expected}
        assert actual == pytest.approx(expected, abs=1e-6)  # of cosines, so no 1/τ in the error
        assert [metric for metric in expected if result["needs_gradient"][metric]] == []


def test_the_cases_tell_right_from_wrong() -> None:
    """Metrics neither empty nor full, and a loss of its own for every setting: else the tests above prove little."""
    cases = [EQUATION_CASES[f"{mode} mask {mask} spread"] for mode in ("own", "all", "none") for mask in (True, False)]
    batch = global_batch(cases[0])
    metrics = metrics_by_loops(batch, 0, batch.num_pairs)
    num_own_nearest = int(((batch.image @ batch.caption.T).argmax(1) == torch.arange(batch.num_pairs)).sum())
    assert 0 < num_own_nearest < metrics["correct_i2t_sum"] < batch.num_pairs  # some only by a duplicate
    assert 0 < metrics["hallucination_correct_sum"] < metrics["hallucination_pairs"] < batch.num_pairs
    # One pair's own hallucinated caption is its caption, and counts where it is not masked alone.
    assert metrics_by_loops(batch, 0, batch.num_pairs, mask_duplicates=False)["margin_count"] == 9
    assert metrics["margin_count"] == 8
    losses = set()
    for case in cases:
        image_to_text, text_to_image = losses_by_loops(
            global_batch(case), torch.tensor([0.07], dtype=torch.float64),
            hallucination_negatives=case.hallucination_negatives, mask_duplicates=case.mask_duplicates,
        )  # fmt: skip
        losses.add(round(float(sum(image_to_text)), 6))
        losses.add(round(float(sum(text_to_image)), 6))
    assert len(losses) == 6 + 2  # L_v for each setting; L_t, which hallucinations leave alone, with and without mask


@pytest.mark.parametrize("name", EMPTY_CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_step_without_pairs_gives_zeros_with_gradients(world_size: int, name: str) -> None:
    for results in results_of_ranks(world_size):
        result = results[f"empty {name}"]
        assert all(value.item() == 0 for value in result["terms"].values())  # NaN is not 0 either
        assert result["needs_gradient"]["image_to_text_sum"] and result["needs_gradient"]["text_to_image_sum"]
        # A gradient of its own for τ and both heads, though zero: DDP waits for one from every parameter.
        assert result["gradients"]["temperature"].tolist() == [0.0]
        assert result["gradients"]["image"].shape == result["gradients"]["caption"].shape == (0, WIDTH)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_rank_without_pairs_gives_zeros_with_gradients(world_size: int) -> None:
    case = EQUATION_CASES["all mask True holes"]
    for size, results in zip(case.sizes[world_size], results_of_ranks(world_size), strict=True):
        if size == 0:
            result = results["equation all mask True holes"]
            assert all(value.item() == 0 for value in result["terms"].values())
            assert result["gradients"]["temperature"].tolist() == [0.0]
            assert result["gradients"]["image"].shape == (0, WIDTH)


def test_a_twin_as_near_as_its_caption_is_no_hit() -> None:
    """Catches `>=` for `>`: embeddings that collapsed to one would tell every caption from its twin."""
    embeddings = torch.nn.functional.normalize(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]]), dim=1)
    keys = torch.arange(3)
    pairs = PairEmbeddings(
        image=embeddings, caption=embeddings, hallucinated=embeddings[[0, 1, 0]], hallucinated_owner=keys,
        image_keys=keys, caption_keys=keys, hallucinated_keys=keys + 3,
    )  # fmt: skip
    terms = contrastive_loss(
        pairs, pairs, 0, torch.tensor([0.07]), hallucination_negatives="own", mask_duplicates=True
    )  # fmt: skip
    assert terms.hallucination_correct_sum == 1 and terms.hallucination_pairs == 3


def test_temperature_is_kept_in_its_range() -> None:
    temperature = torch.nn.Parameter(torch.tensor([0.7]))
    assert clamp_temperature_(temperature) is temperature
    assert temperature.item() == 0.5 and temperature.requires_grad
    for before, after in ((-1.0, 0.001), (0.0005, 0.001), (0.07, 0.07), (0.5, 0.5)):
        temperature.data.fill_(before)
        clamp_temperature_(temperature)
        torch.testing.assert_close(temperature.data, torch.tensor([after]), rtol=0, atol=0)
