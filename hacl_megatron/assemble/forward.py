"""Packs through the model without gradients, at any layout; what the last stage makes of them reaches every rank.

reader's packs ─exchange→ all ranks of the replica ─stage 0 … P-1→ ModelOutput ─collect→ result ─broadcast→ all ranks
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hacl_megatron.assemble.exchange import exchange_step
from hacl_megatron.batch import MicroBatch, PackedBatch
from hacl_megatron.model.hacl import HaclModel, ModelOutput
from hacl_megatron.objective.generation import generation_losses
from hacl_megatron.platform.context_parallel.placed_rows import placed_rows

Result = TypeVar("Result")


def losses_of_tokens(output: ModelOutput, batch: PackedBatch, *, vocab_size: int, tp_group: ProcessGroup) -> Tensor:
    """float32 [K + J]: cross entropy of a pack's targets, then of its rejected tokens, on every rank of the last stage.

    Args:
        vocab_size: tokens of the vocabulary, its padding left out.
    """
    ids = torch.cat([batch.target_ids, batch.rejected_ids]) if batch.rejected_ids.numel() else batch.target_ids
    if batch.share is None:
        return generation_losses(output.logits, ids, vocab_size=vocab_size, tp_group=tp_group)
    places = batch.share.token_places
    own = generation_losses(output.logits, ids.index_select(0, places), vocab_size=vocab_size, tp_group=tp_group)
    return placed_rows(own, places, ids.numel(), batch.share.group)


def run_schedule(
    forward_step: Callable[[int, nn.Module], tuple[Any, Callable]],
    model: nn.Module,
    packs: Sequence[PackedBatch],
    *,
    forward_only: bool,
    keeps_outputs: bool = False,
) -> list[Any] | None:
    """Run megatron-core's pipeline schedule over `packs`, one a micro-batch; every rank of the replica calls it.

    Args:
        forward_step: (index of the pack, model) -> the model's output, and what is to be done with it on the last
            stage: the loss function, or, with `keeps_outputs`, (output, non_loss_data) -> what is kept.

    Returns:
        On the last stage what the second function gave for each pack; nothing that is of use elsewhere.
    """
    stage: HaclModel = getattr(model, "module", model)
    pipeline: dict[str, Any] = {}
    if stage.groups.pp.size() > 1:
        pipeline = {"p2p_communicator": _KnownShapes(stage, packs), "pg_collection": stage.groups}
    return get_forward_backward_func()(
        forward_step_func=lambda indices, model: forward_step(next(indices), model),
        data_iterator=iter(range(len(packs))),
        model=model,
        num_microbatches=len(packs),
        seq_length=packs[0].num_rows,  # a formality: lengths vary
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=keeps_outputs,
        **pipeline,
    )


class _KnownShapes(P2PCommunicator):
    """Sends hidden states between pipeline stages, and their gradients back, one tensor a pack.

    megatron-core sends each tensor's shape ahead of it and reads it back from the device. Here every rank knows it.
    """

    def __init__(self, stage: HaclModel, packs: Sequence[PackedBatch]) -> None:
        super().__init__(stage.groups.pp, stage.config)
        parts = stage.groups.cp.size() * (stage.groups.tp.size() if stage.sequence_parallel else 1)
        shapes = [[pack.num_rows // parts, 1, stage.config.hidden_size] for pack in packs]
        self._hidden, self._gradients = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """Shapes of what is received from the stage before and from the next one; packs come in their order."""
        return next(self._hidden) if recv_prev else [], next(self._gradients) if recv_next else []


class ForwardOnly:
    """Runs packs of one replica through its pipeline.

    Args:
        module: this rank's stage.
        model: the same, wrapped for data parallelism; default: not wrapped.
        device: where the packs go.
    """

    def __init__(self, module: HaclModel, model: nn.Module | None = None, *, device: torch.device) -> None:
        self.module = module
        self.model = module if model is None else model
        self.groups = module.groups
        self.device = device

    @torch.no_grad()
    def __call__(
        self, packs: Sequence[PackedBatch] | None, collect: Callable[[ModelOutput, PackedBatch], Result]
    ) -> list[Result]:
        """`collect` of every pack, on every rank of the replica.

        Args:
            packs: at least one, on rank 0 of the replica; None on its other ranks.
            collect: called on all ranks of the last stage, pack after pack, each directly after its forward pass; what
                it returns is sent on by tensor-parallel rank 0, so its tensors should be on the host.
        """
        mode = self.model.training
        self.model.eval()
        step = None if packs is None else [MicroBatch(main=pack) for pack in packs]
        micro_batches = exchange_step(step, self.module, self.device)
        received = [micro_batch.main for micro_batch in micro_batches]

        def forward_step(index: int, model: nn.Module):
            output = model(received[index], received[index].lengths)
            return output, lambda output, non_loss_data: collect(output, received[index])

        results = run_schedule(forward_step, self.model, received, forward_only=True, keeps_outputs=True)
        self.model.train(mode)
        return self._from_last_stage(results)

    def _from_last_stage(self, results: list[Result]) -> list[Result]:
        group, tp = self.groups.replica, self.groups.tp
        if group.size() == 1:
            return results
        # The pipeline is the outermost axis of the group, so the last `tp` ranks are the last stage's.
        source = group.size() - tp.size()
        box = [results if group.rank() == source else None]
        dist.broadcast_object_list(box, dist.get_global_rank(group, source), group=group)
        return box[0]
