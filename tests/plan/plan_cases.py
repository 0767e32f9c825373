"""Measures on real gloo ranks what `plan` predicts: parameters, bytes of state, bytes that autograd keeps."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hacl_megatron.assemble.forward import losses_of_tokens
from hacl_megatron.assemble.module import build_module
from hacl_megatron.assemble.parameters import stage_parameters
from hacl_megatron.assemble.processes import initialize_parallelism
from hacl_megatron.assemble.row_shares import share_of_rows
from hacl_megatron.assemble.start_from import resolve_architecture
from hacl_megatron.batch import MicroBatch, PackedBatch, SegmentLengths
from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.layout import world_size_from_environment
from hacl_megatron.config.run import RunConfig, parse_run_config, with_architecture
from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import IGNORE, IMAGE, EncodedPair, EncodedSample
from hacl_megatron.data.packing import PackSlot, pack
from hacl_megatron.data.preferences import RejectedAnswer
from hacl_megatron.plan.activations import cpu_kernels, stage_activations
from hacl_megatron.plan.state import StateBytes, state_bytes
from hacl_megatron.plan.workload import MicroBatchShape, PackShape, Segments
from hacl_megatron.platform.processes import start_platform
from hacl_megatron.training.packs import pack_plan
from hacl_megatron.training.trainee import Trainee, build_trainee
from tests.distributed import leave_groups

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": FULL,
    "full by 2": {**FULL, "recompute_num_layers": 2},
    "block": {**FULL, "recompute_method": "block"},
    "attention": {"recompute_granularity": "selective"},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors` (on the meta device too, where there are no addresses)."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def state_of(trainee: Trainee) -> StateBytes:
    """Bytes that a rank really holds: storages of parameters, gradient buffers, and the optimiser's own tensors."""
    parameters = list(trainee.module.parameters())
    weights = {p.untyped_storage()._cdata for p in parameters}
    parts = getattr(trainee.optimizer, "chained_optimizers", [trainee.optimizer])
    own = []
    for part in parts:
        inner = part.optimizer
        if inner is None:  # nothing trains on this rank
            continue
        masters = [p for group in inner.param_groups for p in group["params"]]
        states = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
        own += [t for t in (*masters, *states) if t.numel() and t.untyped_storage()._cdata not in weights]
    return StateBytes(
        weights=storage_bytes(parameters),
        gradients=storage_bytes(buffer.grad_data for buffer in trainee.model.buffers),
        optimizer=storage_bytes(own),
    )


def described(module: torch.nn.Module) -> list[tuple[str, tuple[int, ...], bool, int]]:
    return [(name, tuple(p.shape), p.requires_grad, p.element_size()) for name, p in module.named_parameters()]


def state_on_this_rank(commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """For each run: parameters and bytes of state as planned and as they are."""
    found = []
    for arguments in commands:
        config, layout, device, groups = _prepare(arguments)
        module = build_module(config, groups, device)
        trainee = build_trainee(module, config, 1)
        stage, dp_rank = groups.pp.rank(), groups.dp_cp.rank()
        planned = stage_parameters(config, stage)
        found.append(
            {
                "planned parameters": [(p.name, p.shape, p.trained, p.bytes_each) for p in planned],
                "parameters": described(module),
                "planned": state_bytes(planned, config, layout, stage=stage, dp_rank=dp_rank),
                "state": state_of(trainee),
            }
        )
        leave_groups()
    return found


def _prepare(arguments: Sequence[str]):
    config = parse_run_config(arguments)
    layout = check_flags(config, world_size_from_environment())
    config = with_architecture(config, resolve_architecture(config, None))
    if config.architecture.tiles is not None:
        config.data.image_aspect_ratio = "pad"  # the stages' YAML has the shape of other models' pictures
    check_architecture(config, layout)
    device = start_platform("cpu")
    return config, layout, device, initialize_parallelism(config, layout)


# --------------------------------------------------------------------------------------------------------- activations

MICRO_BATCHES: dict[str, list[tuple[int, int, bool, int, tuple[int, ...]]]] = {
    "pairs": [(49, 1, True, 7, (9,)), (60, 10, True, 9, ()), (25, 5, False, 0, ())],
    "long": [(161, 70, True, 0, ()), (95, 95, False, 0, ())],
    "images": [(38, 1, True, 6, ())] * 5,
    "record": [(1501, 420, True, 0, ())],
}
"""Samples of micro-batches of different make: (rows of the dialogue, targets at its end, has an image, rows of the
caption or 0, rows of each hallucinated caption)."""


def make_micro_batch(name: str, config: RunConfig, num_micro_batches: int) -> MicroBatch:
    """Packs of those samples as the trainer would cut them in a step of `num_micro_batches`."""
    size, visual = config.architecture.vision.image_size, config.architecture.visual_tokens
    pixels = torch.randn(sum(has_image for _, _, has_image, _, _ in MICRO_BATCHES[name]), 3, size, size)
    slots = slots_of(name, config)
    plan = pack_plan(config, num_micro_batches, with_gradients=True)
    multiple = 2 * config.parallel.context_parallel_size
    packs = [
        None if parts is None else pack(slots, pixels, visual_tokens=visual, pad_multiple=multiple, parts=parts)
        for parts in (plan.main, plan.ahead)
    ]
    return MicroBatch(main=packs[0], ahead=packs[1])


def slots_of(name: str, config: RunConfig) -> list[PackSlot]:
    """Those samples, encoded."""
    shares_prefix = config.objective.contrastive_image_context == "prompt"
    visual = config.architecture.visual_tokens
    return [
        _slot(index, *sample, visual, shares_prefix=shares_prefix) for index, sample in enumerate(MICRO_BATCHES[name])
    ]


def _slot(
    index: int, rows: int, targets: int, has_image: bool, caption: int, hallucinated: tuple[int, ...],
    visual: int, *, shares_prefix: bool,
) -> PackSlot:  # fmt: skip
    ids = np.arange(rows, dtype=np.int64) % 200 + 3
    if has_image:
        ids[1 : 1 + visual] = IMAGE
    labels = np.full(rows, IGNORE, dtype=np.int64)
    labels[rows - targets :] = ids[rows - targets :]
    context = ids[0 if shares_prefix else 1 : 1 + visual]  # BOS is the prefix
    pair = EncodedPair(
        image=0, image_segment=np.append(context, 2), caption_segment=ids[-1] + np.arange(caption),
        hallucinated_segments=tuple(np.arange(3, 3 + length) for length in hallucinated),
    )  # fmt: skip
    pairs = (pair,) if caption else ()
    encoded = EncodedSample(
        dialogue=ids, labels=labels, pairs=pairs, truncated=False, tokenization_mismatch=False,
        images=(ImageLayout(visual_tokens=visual).rows(None, alone=True),) if has_image else (),
        rejected=tuple(_rejected(ids, rows - targets, length) for length in hallucinated) if targets > 1 else (),
    )  # fmt: skip
    return PackSlot(sample_id=index, encoded=encoded, image_keys=(index,) if has_image else ())


def _rejected(dialogue: np.ndarray, begin: int, length: int) -> RejectedAnswer:
    """Of so many tokens, the first of them the true answer's too."""
    tokens = 250 - np.arange(length)
    tokens[0] = dialogue[begin]
    positions = np.arange(begin, begin + length)
    return RejectedAnswer(
        rows=np.concatenate([dialogue[:begin], tokens[:-1]]), shared=begin + 1,
        chosen=np.arange(begin, len(dialogue)), rejected=positions, rejected_ids=tokens,
    )  # fmt: skip


def shape_of(micro_batch: MicroBatch) -> MicroBatchShape:
    """The exact shape of real packs."""
    return MicroBatchShape(
        main=pack_shape_of(micro_batch.main),
        ahead=None if micro_batch.ahead is None else pack_shape_of(micro_batch.ahead),
        pairs=micro_batch.main.num_pairs,
        hallucinated=micro_batch.main.hallucinated_keys.numel(),
    )


def without_padding(shape: MicroBatchShape) -> MicroBatchShape:
    """The same without padding, which is no sample's."""
    main, ahead = (
        pack and replace(pack, segments=tuple(part for part in pack.segments if part.kind != "padding"))
        for pack in (shape.main, shape.ahead)
    )
    return replace(shape, main=main, ahead=ahead)


def pack_shape_of(batch: PackedBatch) -> PackShape:
    lengths = SegmentLengths.of(batch)
    first = [own[0].item() for own in batch.branch_rows.split(lengths.branch_sizes)] if lengths.branches else []
    begins, contexts = batch.cu_seqlens.tolist(), dict(zip(first, lengths.branches, strict=True))
    kinds = dict.fromkeys(range(len(lengths.segments)), "dialogue")
    for kind, rows in (
        ("image", batch.image_eos_rows), ("text", batch.caption_eos_rows), ("text", batch.hallucinated_eos_rows),
    ):  # fmt: skip
        kinds.update(dict.fromkeys((torch.searchsorted(batch.cu_seqlens, rows, right=True) - 1).tolist(), kind))
    images = set(batch.image_eos_rows.tolist())
    kinds |= {at: "rejected" for at, begin in enumerate(begins) if begin in contexts and begin not in images}
    if batch.num_padding_rows:
        kinds[len(lengths.segments) - 1] = "padding"
    return PackShape(
        segments=tuple(
            Segments(kind=kinds[at], count=1, length=length, read=read, context=contexts.get(begins[at], 0))
            for at, (length, read) in enumerate(zip(lengths.segments, lengths.read, strict=True))
        ),
        images=batch.num_images,
        image_rows=batch.image_rows.numel(),
        target_rows=batch.num_targets + batch.rejected_rows.numel(),
    )


def kept_by_autograd(module, micro_batch: MicroBatch, vocab_size: int, set_input) -> tuple[int, int]:
    """(bytes kept by the model, by the language-model loss): storages that autograd saves, weights left out."""
    main, ahead = micro_batch.main, micro_batch.ahead
    texts = features = None
    if ahead is not None:
        with torch.no_grad():
            ahead = replace(ahead, pixel_values=main.pixel_values)
            if ahead.image_rows.numel() and module.pre_process and not module.vision_tower_is_trained:
                features = module.tower_features(main.pixel_values)
            set_input(ahead)
            output = module(ahead, SegmentLengths.of(ahead), tower_features=features)
            if module.post_process and not main.num_text_rows:
                texts = output.texts
    set_input(main)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor  # holding it, so that no other storage gets the address
        return tensor

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = module(main, SegmentLengths.of(main), tower_features=features, texts=texts)
        of_model = total()
        if not module.post_process:
            return of_model, 0
        losses_of_tokens(output, main, vocab_size=vocab_size, tp_group=module.groups.tp).sum()
        return of_model, total() - of_model


def activations_on_this_rank(cases: Sequence[tuple[Sequence[str], str, str, int]]) -> list[dict[str, float]]:
    """For each (run, recompute, samples, micro-batches): what the plan says autograd keeps, and what it keeps."""
    found = []
    for arguments, recompute, samples, num_micro_batches in cases:
        config, layout, device, groups = _prepare(arguments)
        config.transformer.update(RECOMPUTE[recompute])
        module = build_module(config, groups, device)
        module.freeze(
            language_model=config.language_model_is_frozen,
            vision_tower=config.model.freeze_ViT,
            qformer=config.model.freeze_qformer,
        )
        micro_batch = make_micro_batch(samples, config, num_micro_batches)
        shape = shape_of(micro_batch)
        if layout.cp > 1:
            main = micro_batch.main
            micro_batch = replace(micro_batch, main=replace(main, share=share_of_rows(main, groups.cp)))

        def set_input(batch: PackedBatch, module=module, config=config, layout=layout) -> None:
            if not module.pre_process:
                rows = batch.num_rows // (layout.tp if config.parallel.sequence_parallel else 1)
                hidden = torch.randn(rows, 1, config.architecture.language.hidden_size).to(module.config.params_dtype)
                module.set_input_tensor([hidden.requires_grad_()])

        model_bytes, loss_bytes = kept_by_autograd(
            module, micro_batch, config.architecture.language.vocab_size, set_input
        )  # fmt: skip
        planned = stage_activations(config, shape, groups.pp.rank(), kernels=cpu_kernels(config))
        found.append({"kept": model_bytes, "planned": planned.kept, "loss": loss_bytes, "planned loss": planned.logits})
        leave_groups()
    return found
