"""How the tensor-parallel ranks of the first stage run the vision tower: `--vision-parallel split | share`.

split   each layer's matrices are divided over them, as the language model's are; all see every image
share   each has the whole tower and connector, and sees its part of a micro-batch's images
"""

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.flags import ParallelFlags

TOWER_SIZES = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
"""What must divide by the ranks that a tower is split over, where a tower has it."""


def possible_ways(model: ModelConfig, tensor_ranks: int) -> tuple[str, ...]:
    """The values that `--vision-parallel` may have; the first is taken where nothing is said."""
    vision = model.vision
    divides = all(getattr(vision, name, tensor_ranks) % tensor_ranks == 0 for name in TOWER_SIZES)
    return ("split", "share") if vision.backend == "megatron" and divides else ("share",)


def shares_images(model: ModelConfig, parallel: ParallelFlags) -> bool:
    """Whether tensor-parallel ranks share images out; False where there is one."""
    ranks = parallel.tensor_model_parallel_size
    return ranks > 1 and (parallel.vision_parallel or possible_ways(model, ranks)[0]) == "share"


def tower_ranks(model: ModelConfig, parallel: ParallelFlags) -> int:
    """Over how many tensor-parallel ranks the tower's matrices are divided; 1: whole on each."""
    is_whole = model.vision.backend == "hf" or shares_images(model, parallel)
    return 1 if is_whole else parallel.tensor_model_parallel_size
