"""LoRA beside megatron-core's linear layers: a module of its own next to each, added to its output by a forward hook.

    layer.self_attention.linear_qkv          frozen            y = W x
    layer.self_attention.linear_qkv_lora     q_proj_A, q_proj_B, k_proj_A, …     y += alpha / rank * B A dropout(x)

So the layers' classes, weights and names stay what they are. `peft`'s own layers for megatron-core do not serve here:
of 0.21 neither the look-up (`fan_in_fan_out` is missing) nor the forward pass (it multiplies the pair that these layers
return) runs, one A for all of a fused matrix would be another model than the one it exports to, and the gradients of
what is replicated are not summed under sequence parallelism.

Shape legend: T' = T rows, or T / tensor-parallel size under sequence parallelism; r rank, p tensor-parallel size.

    column parallel (q, k, v, gate, up)   A [r, in] on every rank, B [out / p, r]; A x [T', r] is gathered to all rows
    row parallel (o, down)                A [r, in / p], B [out, r] on every rank; A x [T, r] is summed (and cut)

What travels between the ranks has r columns. Whatever is replicated gets the same gradient on every rank, or, where
each rank has seen its own rows alone (sequence parallelism), is marked for megatron-core to sum it.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from hacl_megatron.config.architecture import LanguageConfig
from hacl_megatron.config.lora import FUSED, SUFFIX, Lora, is_lora, split_of, target_shapes
from hacl_megatron.model.init import cpu_generator


class LoraLinear(nn.Module):
    """The adapters of one (fused) linear layer.

    All parameters are its own, none a child's: `--overlap-param-gather` waits for a module's updated parameters when
    it is called.

    Args:
        targets: those of the layer's matrices that have an adapter.
        shapes: (out, in) of each in the whole model.
        seed: initial values depend on it and the target's name alone.
        sequence_parallel: whether a rank's rows are a part of all.
    """

    def __init__(
        self,
        lora: Lora,
        targets: Sequence[str],
        shapes: dict[str, tuple[int, int]],
        *,
        seed: str,
        dtype: torch.dtype,
        sequence_parallel: bool,
        group: ProcessGroup,
    ) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.rank, self.scale, self.dropout = lora.rank, lora.scale, lora.dropout
        self.split = split_of(self.targets[0])
        self.group = group
        self.sequence_parallel = sequence_parallel and group.size() > 1
        for target in self.targets:
            rows, columns = shapes[target]
            for name, whole, cut in (("A", (lora.rank, columns), "row"), ("B", (rows, lora.rank), "column")):
                value = _initial(name, whole, f"{seed}.{target}", dtype)
                if self.split == cut:
                    dim = 1 if name == "A" else 0
                    parameter = nn.Parameter(_shard(value, dim, group))
                    set_tensor_model_parallel_attributes(parameter, True, dim, 1)  # for the gradient's norm
                else:
                    parameter = nn.Parameter(value)
                    parameter.sequence_parallel = self.sequence_parallel  # whether its gradient is to be summed
                self.register_parameter(f"{target}_{name}", parameter)

    def forward(self, x: Tensor, targets: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What each of `targets` (default: all; those without an adapter are left out) adds to its output.

        x [T', 1, in], as the linear layer gets it -> [T, 1, out / p], for row parallel ones [T', 1, out].
        """
        names = [target for target in self.targets if targets is None or target in targets]
        if not names:
            return {}
        down = [getattr(self, f"{name}_A") for name in names]
        if self.training and self.dropout > 0:  # each target drops its own
            low = torch.cat([F.linear(self._dropped(x), one) for one in down], dim=-1)
        else:
            low = F.linear(x, torch.cat(down) if len(down) > 1 else down[0])
        low = self._exchanged(low * self.scale)
        parts = zip(names, low.split(self.rank, dim=-1), strict=True)
        return {name: F.linear(part, getattr(self, f"{name}_B")) for name, part in parts}

    def _exchanged(self, low: Tensor) -> Tensor:
        """A x as the ranks hold it -> as B takes it; with the gradient's counterpart."""
        if self.split == "column":
            if self.sequence_parallel:  # the gradient is summed over ranks, then cut
                return tensor_parallel.gather_from_sequence_parallel_region(
                    low, tensor_parallel_output_grad=True, group=self.group
                )
            return tensor_parallel.copy_to_tensor_model_parallel_region(low, group=self.group)
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(low, group=self.group)

    def _dropped(self, x: Tensor) -> Tensor:
        """Dropout with the same mask on every tensor-parallel rank where x is the same, else with each rank's own."""
        same = self.split == "column" and not self.sequence_parallel
        tracker = get_cuda_rng_tracker()
        with tracker.fork(get_data_parallel_rng_tracker_name()) if same else tracker.fork():
            return F.dropout(x, self.dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """For megatron-core's distributed checkpoints: each target's A and B as Hugging Face's `peft` has them."""
        name, axis = ("B", 0) if self.split == "column" else ("A", 1)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {f"{target}_{name}": axis for target in self.targets},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def add_lora(
    decoder: TransformerBlock, language: LanguageConfig, lora: Lora, *, seed: int, groups: ProcessGroupCollection
) -> None:
    """Put adapters beside the linear layers of `decoder` that `lora` names."""
    shapes = target_shapes(language)
    for layer in decoder.layers:
        for path, fused in FUSED.items():
            targets = [target for target in fused if target in lora.targets]
            if not targets:
                continue
            part, _, name = path.partition(".")
            parent = getattr(layer, part)
            linear = getattr(parent, name)
            adapters = LoraLinear(
                lora,
                targets,
                shapes,
                seed=f"{seed} layers.{layer.layer_number - 1}",
                dtype=layer.config.params_dtype,
                sequence_parallel=layer.config.sequence_parallel,
                group=groups.tp,
            )
            parent.add_module(name + SUFFIX, adapters)
            linear.register_forward_hook(_hook(path, adapters, language, groups.tp.size()))


def lora_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The adapters' parameters anywhere in `module`."""
    return (parameter for name, parameter in module.named_parameters() if is_lora(name))


class _Adds:
    """Forward hook of a linear layer: adds what its adapters say to the output.

    Args:
        groups: how often the layer's output repeats its matrices' rows on one rank: linear_qkv goes by query groups.
    """

    def __init__(self, adapters: LoraLinear, widths: dict[str, int], groups: int) -> None:
        self.adapters, self.widths, self.groups = adapters, widths, groups

    def __call__(self, linear: nn.Module, inputs: tuple, result: tuple[Any, Any]) -> tuple[Any, Any]:
        output, bias = result
        if isinstance(output, tuple):  # the last layer's (`ReadRowsLinear`)
            return self._of_read_rows(*inputs[:2], output), bias
        added = self.adapters(inputs[0])
        if len(self.widths) == 1:
            return output + next(iter(added.values())), bias
        parts = [
            added[target].unflatten(-1, (self.groups, width))
            if target in added
            else output.new_zeros(*output.shape[:-1], self.groups, width)
            for target, width in self.widths.items()
        ]
        return output + torch.cat(parts, dim=-1).flatten(-2), bias

    def _of_read_rows(self, hidden: Tensor, read: Tensor, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Queries [Q, 1, groups, width] of the rows `read`, keys and values [T, 1, groups, width] of all."""
        added = self.adapters(hidden, ("k_proj", "v_proj")) | self.adapters(hidden.index_select(0, read), ("q_proj",))
        return tuple(
            part + added[target].unflatten(-1, (self.groups, -1)) if target in added else part
            for target, part in zip(self.widths, output, strict=True)
        )


def _hook(path: str, adapters: LoraLinear, language: LanguageConfig, tp_size: int) -> _Adds:
    groups = language.num_query_groups // tp_size if path.endswith("linear_qkv") else 1
    shapes = target_shapes(language)
    return _Adds(adapters, {target: shapes[target][0] // (tp_size * groups) for target in FUSED[path]}, groups)


def _initial(name: str, shape: tuple[int, int], seed: str, dtype: torch.dtype) -> Tensor:
    """A uniform within 1 / sqrt(in), as `peft` (and `nn.Linear`) draw it, in fp32 whatever the dtype; B zero."""
    value = torch.zeros(shape, dtype=dtype)
    if name == "A" and not value.is_meta:
        bound = shape[1] ** -0.5
        drawn = torch.empty(shape, dtype=torch.float32)
        value.copy_(drawn.uniform_(-bound, bound, generator=cpu_generator(zlib.crc32(seed.encode()))))
    return value


def _shard(value: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return value.chunk(group.size(), dim=dim)[group.rank()].clone()
