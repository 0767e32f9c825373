"""Bytes of weights, gradients and optimiser state on one rank: exact, buffers' padding included.

megatron-core lays the trained parameters of one dtype into one buffer, last parameter first. With the distributed
optimiser every parameter starts at a multiple of 64 elements, every bucket ends at a multiple of 128 and of the
data-parallel size, and each data-parallel rank owns one slice of every bucket
(megatron/core/distributed/param_and_grad_buffer.py, optimizer/param_layout.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hacl_megatron.assemble.parameters import PlannedParameter
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig

FP32 = 4


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What one rank holds from the first step to the last, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    """Adam's two moments and, beside bf16 weights, the fp32 master copy."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass
class _Bucket:
    begin: int
    end: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    """[begin, end) of each parameter in the buffer."""


def state_bytes(
    parameters: Sequence[PlannedParameter], config: RunConfig, layout: Layout, *, stage: int, dp_rank: int = 0
) -> StateBytes:
    """Exact bytes on data-parallel rank `dp_rank` of a stage with these `parameters`.

    Context-parallel ranks are data-parallel ones here, `dp_rank` counts both. With the distributed optimiser these
    ranks differ by the padding that falls into their slices.
    """
    distributed, dp = config.parallel.use_distributed_optimizer, layout.dp * layout.cp
    weights = sum(p.num_bytes for p in parameters if not p.trained)
    gradients = optimizer = 0
    for bytes_each in sorted({p.bytes_each for p in parameters if p.trained}):
        members = [p for p in parameters if p.trained and p.bytes_each == bytes_each]
        buckets = _buckets(members, config, dp, stage)
        numel = buckets[-1].end
        gradients += numel * _gradient_bytes_each(config, bytes_each)
        weights += (numel if distributed else sum(p.numel for p in members)) * bytes_each
        owned = sum(_owned(bucket, dp, dp_rank) if distributed else _used(bucket) for bucket in buckets)
        optimizer += owned * (2 + (bytes_each < FP32)) * FP32  # moments, master copy
    return StateBytes(weights=weights, gradients=gradients, optimizer=optimizer)


def optimizer_checkpoint_bytes_each(config: RunConfig) -> int:
    """Bytes of optimiser state that a checkpoint holds for each trained parameter: moments, and the master copy.

    The distributed optimiser saves the master copy of fp32 weights too.
    """
    return 3 * FP32 if config.parallel.use_distributed_optimizer else 2 * FP32


def _gradient_bytes_each(config: RunConfig, bytes_each: int) -> int:
    return FP32 if config.ddp.get("grad_reduce_in_fp32", True) else bytes_each


def _buckets(members: Sequence[PlannedParameter], config: RunConfig, dp: int, stage: int) -> list[_Bucket]:
    distributed = config.parallel.use_distributed_optimizer
    limit = None
    if config.parallel.overlap_grad_reduce and stage == 0:  # elsewhere megatron-core makes a single bucket
        limit = config.ddp.get("bucket_size") or max(40_000_000, 1_000_000 * dp)
    divisor = math.lcm(dp, 128, 2**16) if config.ddp.get("pad_buckets_for_high_nccl_busbw") else math.lcm(dp, 128)

    def padded(index: int, multiple: int) -> int:
        return -(-index // multiple) * multiple if distributed else index

    buckets, bucket, position = [], _Bucket(0), 0

    def close(at: int) -> _Bucket:
        bucket.end = padded(at, divisor)
        buckets.append(bucket)
        return _Bucket(bucket.end)

    for parameter in reversed(members):
        begin = padded(position, 64)
        alone = parameter.shared and distributed
        if alone and bucket.spans:
            bucket = close(begin)
            begin = bucket.begin
        position = begin + parameter.numel
        bucket.spans.append((begin, position))
        if alone or (limit is not None and position - bucket.begin >= limit):
            bucket = close(position)
            position = bucket.begin
    if bucket.spans:
        close(position)
    return buckets


def _used(bucket: _Bucket) -> int:
    return sum(end - begin for begin, end in bucket.spans)


def _owned(bucket: _Bucket, dp: int, rank: int) -> int:
    """Elements of parameters in this data-parallel rank's slice of the bucket."""
    share = (bucket.end - bucket.begin) // dp
    low = bucket.begin + rank * share
    return sum(max(0, min(end, low + share) - max(begin, low)) for begin, end in bucket.spans)
