"""The language-model loss L_G: cross entropy over a vocabulary that is split between tensor-parallel ranks."""

import inspect

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup

# megatron-core 0.16 knows the global tensor-parallel group alone; later ones take the group as an argument. (The fused
# form takes it in both, but rounds the gradient to bfloat16 whatever the dtype of the logits.)
_TAKES_GROUP = "tp_group" in inspect.signature(tensor_parallel.vocab_parallel_cross_entropy).parameters


def generation_losses(logits: Tensor, target_ids: Tensor, *, vocab_size: int, tp_group: ProcessGroup) -> Tensor:
    """Cross entropy of each target row: minus the log-likelihood of its token.

    Args:
        logits: [K, padded vocabulary / tensor-parallel size], this rank's columns for the K target rows, any
            floating dtype; left as they are.
        target_ids: int64 [K], global token ids below `vocab_size`; the same on all ranks of `tp_group`.
        vocab_size: columns of the whole vocabulary that are real. Those with a global index at or above it pad the
            vocabulary to a multiple of the tensor-parallel size and count as -inf in the softmax: they add nothing
            to the loss and get gradient 0, whatever they hold.
        tp_group: tensor-parallel group. With megatron-core 0.16 it must be the one of `parallel_state`.

    Returns:
        fp32 [K], the same on every rank of `tp_group`, with a gradient path even for K = 0.
    """
    assert logits.dim() == 2 and target_ids.shape == logits.shape[:1], (logits.shape, target_ids.shape)
    num_columns = logits.shape[1]
    first_column = tp_group.rank() * num_columns
    assert num_columns * tp_group.size() >= vocab_size, (num_columns, tp_group.size(), vocab_size)
    if logits.shape[0] == 0:  # the same on every tensor-parallel rank, so that all of them skip the collectives
        return logits.float().sum(dim=1)

    # A copy even of fp32 logits: below, here and in megatron-core, it is overwritten in place.
    scores = logits.to(torch.float32, copy=True)
    num_real = min(max(vocab_size - first_column, 0), num_columns)
    if num_real < num_columns:
        # A shard may be all padding: its maximum is then -inf, but the subtracted one is the maximum over ranks, and
        # rank 0 always holds real columns. So exp() gives plain zeros, and no inf - inf.
        scores[:, num_real:] = float("-inf")
    if _TAKES_GROUP:
        return tensor_parallel.vocab_parallel_cross_entropy(scores, target_ids, tp_group=tp_group)
    known = parallel_state.get_tensor_model_parallel_group()
    assert torch.distributed.get_process_group_ranks(known) == torch.distributed.get_process_group_ranks(tp_group)
    return tensor_parallel.vocab_parallel_cross_entropy(scores, target_ids)
