"""What the host layer costs: one step with the wrapped tensor factories against the same step with torch's own.

Run alone, on an idle machine (it is no test: its result is a time):

    OMP_NUM_THREADS=1 python -m tests.measure.measure_host_cost --repetitions 40

One process builds a LLaMA of 4 layers and width 256 with a small vision tower, runs forward and backward over one
packed micro-batch of 512 rows, and swaps the wrappers of `hacl_megatron.platform.cpu.stand_ins` for the originals
between repetitions, in turns. Everything else that `install` does replaces functions and costs nothing per call. The
last line counts the wrapper calls of a step and prices one of them: the same answer without the noise of the machine.
"""

import argparse
import statistics
import time
import timeit

import torch

from hacl_megatron.batch import PackedBatch, SegmentLengths, rows_to_read
from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, VisionConfig
from hacl_megatron.config.flags import ParallelFlags
from hacl_megatron.platform.cpu import stand_ins

LENGTHS = (130, 37, 20, 24, 110, 37, 15, 30, 72, 37)
IMAGES, VISUAL = 3, 36

ORIGINALS = {name: getattr(torch, name) for name in stand_ins._FACTORIES}
ORIGINAL_TYPE = torch.Tensor.type


def micro_batch() -> PackedBatch:
    rows = sum(LENGTHS)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    image_rows = torch.cat([torch.arange(VISUAL) + starts[segment] for segment in (1, 5, 9)])
    pair = torch.tensor([0, 1, 2])
    cu_seqlens, none = starts.to(torch.int32), torch.zeros(0, dtype=torch.int64)
    read_rows, read_lengths = rows_to_read(cu_seqlens, torch.arange(130), starts[[2, 3, 4, 6, 7, 8, 10]] - 1)
    return PackedBatch(
        sample_ids=pair, token_ids=torch.randint(3, 900, (rows,)),
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]), cu_seqlens=cu_seqlens,
        max_seqlen=max(LENGTHS), pixel_values=torch.randn(IMAGES, 3, 48, 48), image_rows=image_rows,
        feature_rows=torch.arange(IMAGES * VISUAL), target_rows=torch.arange(130), target_ids=torch.arange(130),
        image_eos_rows=starts[torch.tensor([2, 6, 10])] - 1, caption_eos_rows=starts[torch.tensor([3, 4, 7])] - 1,
        hallucinated_eos_rows=starts[torch.tensor([8])] - 1, hallucinated_owner=torch.tensor([0]), image_keys=pair,
        caption_keys=pair, hallucinated_keys=torch.tensor([0]), read_rows=read_rows, read_lengths=read_lengths,
        branch_rows=none, branch_sizes=none.int(), branch_lengths=none.int(), branch_context_rows=none,
        num_padding_rows=0, num_text_rows=0,
    )  # fmt: skip


def build_model(device: torch.device):
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from hacl_megatron.model.hacl import HaclModel
    from hacl_megatron.model.transformer_configs import language_transformer_config, vision_transformer_config

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    architecture = ModelConfig(
        language=LanguageConfig(
            num_layers=4, hidden_size=256, ffn_hidden_size=688, num_attention_heads=8, num_query_groups=8,
            vocab_size=1000,
        ),
        vision=VisionConfig(
            num_layers=4, hidden_size=128, ffn_hidden_size=512, num_attention_heads=4, image_size=48, patch_size=8
        ),
        image=ImageConfig(size=48),
    )  # fmt: skip
    config = dict(device=device, dtype=torch.float32)
    return HaclModel(
        architecture,
        language_config=language_transformer_config(architecture, ParallelFlags(), **config, overrides={}),
        vision_config=vision_transformer_config(architecture, ParallelFlags(), **config),
        padded_vocab_size=1024, initial_temperature=0.07, seed=1, device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )  # fmt: skip


class CountedCalls:
    """Counts calls of the wrapped factories and of `Tensor.type` while it is active."""

    def __init__(self, wrapped: dict) -> None:
        self.wrapped, self.calls = wrapped, 0

    def _counting(self, function):
        def count(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        return count

    def __enter__(self) -> "CountedCalls":
        put({name: self._counting(function) for name, function in self.wrapped.items()})
        return self

    def __exit__(self, *exc_info) -> None:
        put(self.wrapped)


def put(functions: dict) -> None:
    """Set torch's factories and `Tensor.type` (under the key `type`)."""
    for name, function in functions.items():
        setattr(torch.Tensor if name == "type" else torch, name, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=40, help="Steps on each side.")
    repetitions = parser.parse_args().repetitions

    from hacl_megatron.platform.processes import start_platform

    device = start_platform("cpu")
    torch.set_num_threads(1)
    module, batch = build_model(device), micro_batch()
    lengths = SegmentLengths.of(batch)
    module.freeze(language_model=False, vision_tower=True)
    original = {**ORIGINALS, "type": ORIGINAL_TYPE}
    wrapped = {**{name: getattr(torch, name) for name in ORIGINALS}, "type": torch.Tensor.type}
    assert all(wrapped[name] is not original[name] for name in original)

    def step() -> float:
        start = time.perf_counter()
        out = module(batch, lengths)
        loss = out.logits.square().mean() + out.image_embeddings.sum() + out.caption_embeddings.sum()
        loss.backward()
        module.zero_grad()
        return time.perf_counter() - start

    for _ in range(5):
        step()
    times: dict[str, list[float]] = {"wrapped": [], "original": []}
    for repetition in range(repetitions):
        sides = [("wrapped", wrapped), ("original", original)]
        for name, functions in sides if repetition % 2 else reversed(sides):
            put(functions)
            times[name].append(step())
    put(wrapped)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["wrapped"], times["original"], strict=True)]
    print(f"rows {sum(LENGTHS)}, threads 1, {repetitions} repetitions, forward + backward, median")
    for name, median in medians.items():
        print(f"{name:<9} {median * 1e3:7.2f} ms")
    print(
        f"ratio of medians {medians['wrapped'] / medians['original']:.4f}, "
        f"median of ratios {statistics.median(ratios):.4f}"
    )

    with CountedCalls(wrapped) as counted:
        step()
    number = 100_000
    empty = [
        min(timeit.repeat(lambda f=f: f(1), number=number, repeat=5)) for f in (wrapped["empty"], original["empty"])
    ]
    price = (empty[0] - empty[1]) / number
    share = counted.calls * price / medians["original"]
    print(f"{counted.calls} wrapped calls a step, {price * 1e6:.2f} us more each: {share:.3%} of a step")


if __name__ == "__main__":
    main()
