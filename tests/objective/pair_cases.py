"""Contrastive cases that run on 1, 2 and 4 real ranks, and the code that each rank runs for them.

The whole global batch is drawn from a seed in every process; a rank takes its rows of it. So the pytest process can
compute any oracle on the full batch and compare it with what the ranks return.
"""

import functools
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from hacl_megatron.objective.contrastive import ContrastiveTerms, contrastive_loss
from hacl_megatron.objective.negatives import PairEmbeddings, gather_pairs
from hacl_megatron.objective.row_blocks import BLOCK_BYTES
from tests.distributed import run_distributed

WIDTH = 8
WORLD_SIZES = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One global batch, how it is split over ranks, and the objective's settings."""

    sizes: dict[int, tuple[int, ...]]
    """Pairs of each rank, by world size."""
    hallucinated: tuple[int, ...]
    """Hallucinated captions of each pair of the global batch."""
    duplicates: bool = False
    """Some pairs share images or captions with others, some hallucinated captions equal captions."""
    hallucination_negatives: str = "all"
    mask_duplicates: bool = True
    temperature: float = 0.07
    dtype: torch.dtype = torch.float64
    weights: tuple[float, float] = (0.7, 0.3)
    """Of L_v and L_t in what is differentiated; unequal, so that the two taken for each other would show."""
    frozen_ranks: tuple[int, ...] = ()
    """Ranks whose embeddings need no gradient."""
    block_bytes: int = BLOCK_BYTES
    """1: every row a block of its own."""
    step: int = 0
    """Steps differ in all embeddings; a pair's keys are those of the pair three places on in the step before."""

    @property
    def num_pairs(self) -> int:
        return len(self.hallucinated)


SPREAD = {1: (7,), 2: (3, 4), 4: (2, 1, 1, 3)}
HOLES = {1: (7,), 2: (7, 0), 4: (0, 4, 0, 3)}  # ranks without a single pair
MANY_AND_NONE = (2, 0, 3, 1, 0, 1, 2)  # hallucinated captions a pair: M differs per rank, 0 for some

ORACLE_CASES = {  # no hallucinations: open_clip's ClipLoss knows the answer
    f"{str(dtype)[6:]} tau {temperature} mask {mask} {name}": Case(
        sizes=sizes,
        hallucinated=(0,) * 7,
        temperature=temperature,
        dtype=dtype,
        mask_duplicates=mask,
        weights=(0.5, 0.5),
    )
    for name, sizes in (("spread", SPREAD), ("holes", HOLES))
    for dtype in (torch.float64, torch.float32)
    for temperature, mask in ((0.07, True), (0.07, False), (0.001, True))
}
EQUATION_CASES = (
    {
        f"{mode} mask {mask} {name}": Case(
            sizes=sizes,
            hallucinated=MANY_AND_NONE,
            duplicates=True,
            hallucination_negatives=mode,
            mask_duplicates=mask,
        )
        for mode in ("own", "all", "none")
        for mask in (True, False)
        for name, sizes in (("spread", SPREAD), ("holes", HOLES))
    }
    | {
        f"{mode} mask {mask} blocks of {block_bytes} bytes": Case(
            sizes=SPREAD,
            hallucinated=MANY_AND_NONE,
            duplicates=True,
            hallucination_negatives=mode,
            mask_duplicates=mask,
            block_bytes=block_bytes,
        )
        for mode in ("own", "all", "none")
        for mask in (True, False)
        for block_bytes in (1, 350)  # blocks of one row, and of two to four
    }
    | {
        "fp32": Case(sizes=SPREAD, hallucinated=MANY_AND_NONE, duplicates=True, dtype=torch.float32),
        "no hallucinations": Case(sizes=HOLES, hallucinated=(0,) * 7, duplicates=True),
        "frozen empty ranks": Case(
            sizes={1: (7,), 2: (7, 0), 4: (0, 4, 0, 3)}, hallucinated=MANY_AND_NONE, frozen_ranks=(0, 1, 2)
        ),
        "frozen empty ranks, blocks": Case(
            sizes=HOLES, hallucinated=MANY_AND_NONE, frozen_ranks=(0, 1, 2), block_bytes=1
        ),
        "one pair": Case(sizes={1: (1,), 2: (0, 1), 4: (0, 0, 1, 0)}, hallucinated=(2,)),
    }
)
EMPTY_CASES = {
    mode: Case(sizes={1: (0,), 2: (0, 0), 4: (0, 0, 0, 0)}, hallucinated=(), hallucination_negatives=mode)
    for mode in ("own", "all", "none")
}


def global_batch(case: Case) -> PairEmbeddings:
    """Every pair of the case; captions and hallucinated captions lean towards their images, some not enough."""
    generator = torch.Generator().manual_seed(25 + case.step)

    def noise(rows: int) -> torch.Tensor:
        return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)

    num_pairs = case.num_pairs
    owner = torch.repeat_interleave(torch.arange(num_pairs), torch.tensor(case.hallucinated, dtype=torch.int64))
    image = noise(num_pairs)
    caption = image + 1.3 * noise(num_pairs)
    hallucinated = image[owner] + 1.3 * noise(owner.numel())
    image_keys = 100 + 3 * case.step + torch.arange(num_pairs)
    caption_keys = 200 + 3 * case.step + torch.arange(num_pairs)
    hallucinated_keys = 300 + 3 * case.step + torch.arange(owner.numel())
    if case.duplicates:
        image_keys[5] = image_keys[1]  # same image, other caption
        caption_keys[6] = caption_keys[0]  # same caption, other image
        caption_keys[4], image_keys[4] = caption_keys[3], image_keys[3]  # the same pair twice
        if owner.numel():
            hallucinated_keys[0] = caption_keys[0]  # pair 0's own, equal to its caption: and to pair 6's
            hallucinated_keys[3] = caption_keys[5]  # pair 2's, equal to another pair's caption
            hallucinated_keys[5] = hallucinated_keys[1]  # equal to another pair's hallucinated caption: stays
    normalise = torch.nn.functional.normalize
    return PairEmbeddings(
        image=normalise(image, dim=1).to(case.dtype),
        caption=normalise(caption, dim=1).to(case.dtype),
        hallucinated=normalise(hallucinated, dim=1).to(case.dtype),
        hallucinated_owner=owner,
        image_keys=image_keys,
        caption_keys=caption_keys,
        hallucinated_keys=hallucinated_keys,
    )


def rank_rows(case: Case, world_size: int, rank: int) -> tuple[slice, slice]:
    """Which pairs and which hallucinated captions of the global batch are the rank's."""
    start = sum(case.sizes[world_size][:rank])
    stop = start + case.sizes[world_size][rank]
    return slice(start, stop), slice(sum(case.hallucinated[:start]), sum(case.hallucinated[:stop]))


def rank_pairs(case: Case, world_size: int, rank: int) -> PairEmbeddings:
    """The rank's part of the global batch as leaves."""
    batch, (pairs, hallucinated) = global_batch(case), rank_rows(case, world_size, rank)
    trains = rank not in case.frozen_ranks
    return PairEmbeddings(
        image=batch.image[pairs].clone().requires_grad_(trains),
        caption=batch.caption[pairs].clone().requires_grad_(trains),
        hallucinated=batch.hallucinated[hallucinated].clone().requires_grad_(trains),
        hallucinated_owner=batch.hallucinated_owner[hallucinated] - pairs.start,
        image_keys=batch.image_keys[pairs],
        caption_keys=batch.caption_keys[pairs],
        hallucinated_keys=batch.hallucinated_keys[hallucinated],
    )


def weighted_loss(case: Case, image_to_text_sum: torch.Tensor, text_to_image_sum: torch.Tensor) -> torch.Tensor:
    """What the cases differentiate: means over the global batch, as the trainer takes them."""
    return (case.weights[0] * image_to_text_sum + case.weights[1] * text_to_image_sum) / max(case.num_pairs, 1)


class CollectiveRecorder(TorchDispatchMode):
    """Names and tensor shapes of all collectives that PyTorch dispatches, whichever function started them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [value for value in torch.utils._pytree.tree_leaves(args) if isinstance(value, torch.Tensor)]
            self.calls.append((func.__name__, [tuple(tensor.shape) for tensor in tensors]))
        return func(*args, **(kwargs or {}))


def run_cases(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """On one rank: every case forward and backward; its terms, gradients, pool and collectives."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    results = {}
    for name, case in cases.items():
        local = rank_pairs(case, world_size, rank)
        temperature = torch.tensor([case.temperature], dtype=case.dtype, requires_grad=True)
        with CollectiveRecorder() as recorder:
            gathered = gather_pairs(local, dist.group.WORLD)
            terms = contrastive_loss(
                local, gathered.pool, gathered.first_pair, temperature,
                hallucination_negatives=case.hallucination_negatives, mask_duplicates=case.mask_duplicates,
                block_bytes=case.block_bytes,
            )  # fmt: skip
            num_forward = len(recorder.calls)
            weighted_loss(case, terms.image_to_text_sum, terms.text_to_image_sum).backward()
        results[name] = {
            "terms": {item.name: getattr(terms, item.name).detach() for item in fields(ContrastiveTerms)},
            "needs_gradient": {item.name: getattr(terms, item.name).requires_grad for item in fields(ContrastiveTerms)},
            "gradients": {
                "image": local.image.grad,
                "caption": local.caption.grad,
                "hallucinated": local.hallucinated.grad,
                "temperature": temperature.grad,
            },
            "pool": {item.name: getattr(gathered.pool, item.name).detach() for item in fields(PairEmbeddings)},
            "first_pair": gathered.first_pair,
            "collectives": recorder.calls,
            "num_forward_collectives": num_forward,
        }
    return results


@functools.cache
def results_of_ranks(world_size: int) -> list[dict[str, dict[str, Any]]]:
    """Every case on `world_size` ranks: one group of processes for all tests of this folder."""
    cases = {f"oracle {name}": case for name, case in ORACLE_CASES.items()}
    cases |= {f"equation {name}": case for name, case in EQUATION_CASES.items()}
    cases |= {f"empty {name}": case for name, case in EMPTY_CASES.items()}
    return run_distributed(run_cases, world_size, cases)
