"""`--vision-parallel`, given and not given: what a configuration makes of it."""

from dataclasses import replace

import pytest

from hacl_megatron.config.flags import ParallelFlags
from hacl_megatron.config.image_sharing import possible_ways, shares_images, tower_ranks
from tests.config.test_architecture_checks import BLIP2, LLAVA_7B

ODD = replace(LLAVA_7B, vision=replace(LLAVA_7B.vision, num_attention_heads=15, ffn_hidden_size=4095))


@pytest.mark.parametrize(
    ("model", "ranks", "given", "shares", "split_over"),
    [
        (LLAVA_7B, 2, None, False, 2), (LLAVA_7B, 2, "split", False, 2), (LLAVA_7B, 2, "share", True, 1),
        (LLAVA_7B, 1, None, False, 1), (LLAVA_7B, 1, "share", False, 1),
        (BLIP2, 2, None, True, 1), (BLIP2, 1, None, False, 1), (ODD, 2, None, True, 1), (ODD, 3, None, False, 3),
    ],
)  # fmt: skip
def test_what_is_possible_is_done(model, ranks: int, given: str | None, *, shares: bool, split_over: int) -> None:
    """Fails where a tower that cannot be split is, or where one rank looks for others to share with."""
    parallel = ParallelFlags(tensor_model_parallel_size=ranks, vision_parallel=given)
    assert (shares_images(model, parallel), tower_ranks(model, parallel)) == (shares, split_over)
    assert (given or possible_ways(model, ranks)[0]) in possible_ways(model, ranks)
