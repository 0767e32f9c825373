"""The same batch through transformers and through this package's model, at any layout: values and gradients.

`write_reference` computes both with `LlavaForConditionalGeneration` or `Blip2ForConditionalGeneration` in one process,
segment by segment, and stores the gradients *as a checkpoint*: loaded as the weights are, they fall apart over ranks
exactly as these do, so that every rank can compare its own shard. `compare` runs the model on this process's ranks and
returns the differences.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from hacl_megatron.batch import PackedBatch, SegmentLengths
from hacl_megatron.config.tiles import ImageLayout
from tests.model.hf_architecture import architecture as hf_architecture
from tests.model.parity_batches import (
    HIDDEN,
    IMAGE_SIZE,
    LAYERS,
    PADDED_VOCAB,
    VISUAL,
    VOCAB,
    loss_weights,
    make_batches,
    pictures_and_segments,
)
from tests.tiny import (
    image_token_id,
    randomise,
    tiny_dinov2_config,
    tiny_llava_config,
    tiny_siglip_config,
    write_tiny_blip2,
    write_tiny_llava,
)
from tests.tiny_tiles import write_tiny_next, write_tiny_onevision

TEMPERATURE = 0.07
TEMPERATURE_GRADIENT = 0.25
HEADS = ("vision_projector.weight", "vision_projector.bias", "text_projector.weight", "text_projector.bias")


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; `first` is the number of LLaMA layers on the first of two pipeline stages."""

    tp: int = 1
    pp: int = 1
    sp: bool = False
    first: int | None = None
    shares: bool = False
    """`--vision-parallel share`, for the tower of megatron-core."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        uneven = f" ({self.first}+{LAYERS - self.first})" if self.first else ""
        return f"TP{self.tp}{'+SP' if self.sp else ''} PP{self.pp}{uneven}{' share' * self.shares}"


@dataclass(frozen=True)
class Variant:
    """A tiny model: arguments of `write_tiny_llava`, `write_tiny_blip2` or a tower, and what is trained beside the
    rest."""

    sizes: dict[str, Any] = field(default_factory=dict)
    trains_vision: bool = False
    family: Literal["llava", "siglip", "dinov2", "blip2", "next", "onevision"] = "llava"
    trains_qformer: bool = False

    @property
    def frozen(self) -> tuple[str, ...]:
        """Beginnings of transformers' names."""
        towers = () if self.trains_vision else ("model.vision_tower.", "vision_model.")
        return (*towers, *(() if self.trains_qformer else ("qformer.", "query_tokens")))


# ----------------------------------------------------------------------------------------------- transformers' answer


def _heads() -> dict[str, Tensor]:
    """Random heads under the names of `hacl_heads.safetensors`."""
    heads = {"vision_projector": torch.nn.Linear(HIDDEN, HIDDEN // 4), "text_projector": torch.nn.Linear(HIDDEN, 12)}
    for seed, linear in enumerate(heads.values()):
        randomise(linear, 50 + seed)
    return {f"{name}.{key}": value.detach() for name, m in heads.items() for key, value in m.state_dict().items()}


def write_reference(folder: Path, variant: Variant) -> None:
    """Write `folder/weights`, `folder/gradients` (Hugging Face folders with heads) and `folder/expected.pt`."""
    from safetensors.torch import save_file

    weights = _write_model(folder / "weights", variant)
    heads = _heads()
    temperature = torch.full([1], TEMPERATURE)
    save_file({**heads, "temperature": temperature}, weights / "hacl_heads.safetensors")

    model = _reference_model(weights)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(variant.frozen))
    heads = {name: value.clone().requires_grad_() for name, value in heads.items()}

    lm_head = getattr(model, "lm_head", None) or model.language_model.lm_head
    expected, loss = [], 0.0
    layout = _image_layout(model, weights)
    for index, batch in enumerate(make_batches(layout=layout)):
        hidden = torch.cat([_segment_hidden(model, batch, s, layout) for s in range(len(batch.cu_seqlens) - 1)])

        def embed(rows: Tensor, name: str, hidden: Tensor = hidden) -> Tensor:
            linear = F.linear(hidden[rows], heads[f"{name}.weight"], heads[f"{name}.bias"])
            return F.normalize(linear, dim=-1)

        outputs = {
            "logits": lm_head(hidden[batch.target_rows]),
            "image": embed(batch.image_eos_rows, "vision_projector"),
            "caption": embed(batch.caption_eos_rows, "text_projector"),
            "hallucinated": embed(batch.hallucinated_eos_rows, "text_projector"),
        }
        loss = loss + sum((outputs[key] * w).sum() for key, w in loss_weights(index, batch).items())
        expected.append({key: value.detach() for key, value in outputs.items()})
    loss.backward()
    torch.save(expected, folder / "expected.pt")

    # `save_pretrained` of the gradients puts them under the very names that the weights have.
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder / "gradients")
    gradients = {name: value.grad for name, value in heads.items()}
    gradients["temperature"] = torch.full([1], TEMPERATURE_GRADIENT)
    save_file(gradients, folder / "gradients" / "hacl_heads.safetensors")
    (folder / "variant.json").write_text(json.dumps(asdict(variant)))


def _write_model(folder: Path, variant: Variant) -> Path:
    from transformers import LlavaForConditionalGeneration

    if variant.family == "llava":
        return write_tiny_llava(folder, **variant.sizes)
    if variant.family == "blip2":
        return write_tiny_blip2(folder, **variant.sizes)
    if variant.family in ("next", "onevision"):
        return (write_tiny_next if variant.family == "next" else write_tiny_onevision)(folder, **variant.sizes)
    config = tiny_llava_config()
    if variant.family == "siglip":
        config.vision_config = tiny_siglip_config(image=IMAGE_SIZE, **variant.sizes)
        config.vision_feature_select_strategy = "full"
    else:  # of 9 x 9 positions, which transformers interpolates to those of the batch's images
        config.vision_config = tiny_dinov2_config(**variant.sizes)
    model = LlavaForConditionalGeneration(config)
    randomise(model, 0)
    model.save_pretrained(folder)
    return folder


def _reference_model(folder: Path):
    """transformers' model of a folder, fp32."""
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def _image_layout(model, folder: Path) -> ImageLayout:
    from hacl_megatron.checkpoint.hf.config_read import read_model_config

    if hasattr(model.config, "image_grid_pinpoints"):
        return read_model_config(folder).image_layout
    registers = getattr(model.config.vision_config, "num_register_tokens", 0)
    return ImageLayout(visual_tokens=getattr(model.config, "num_query_tokens", VISUAL + registers))


def _images(batch: PackedBatch, segment: int, layout: ImageLayout) -> dict[str, Any]:
    """What transformers' model is given of the images that stand in a segment."""
    pictures, segments = pictures_and_segments(layout)
    shown = segments[segment][2] if len(batch.pixel_values) and segment < len(segments) else ()
    if not shown:
        return {"pixel_values": None}
    counts = [layout.rows(picture.size, alone=picture.alone).num_views for picture in pictures]
    views = batch.pixel_values.split(counts)
    if layout.tiles is None:
        return {"pixel_values": torch.cat([views[image] for image in shown])}
    most = max(counts[image] for image in shown)
    padded = [F.pad(views[image], (0, 0, 0, 0, 0, 0, 0, most - counts[image])) for image in shown]
    inputs = {
        "pixel_values": torch.stack(padded),
        "image_sizes": torch.tensor([pictures[image].size[::-1] for image in shown]),
    }
    if layout.tiles.only_alone:  # a pair's image may stand here without the others of its record
        inputs["batch_num_images"] = torch.tensor([1 if pictures[shown[0]].alone else 4])
    return inputs


def _segment_hidden(model, batch: PackedBatch, segment: int, layout: ImageLayout) -> Tensor:
    """transformers' final-norm hidden states [length, hidden] of one segment, run alone."""
    start, stop = batch.cu_seqlens[segment].item(), batch.cu_seqlens[segment + 1].item()
    ids = batch.token_ids[start:stop].clone()
    inside = (batch.image_rows >= start) & (batch.image_rows < stop)
    ids[batch.image_rows[inside] - start] = image_token_id(VOCAB)
    inputs = dict(
        input_ids=ids[None], position_ids=batch.position_ids[start:stop][None],
        attention_mask=torch.ones_like(ids)[None],  # without it transformers takes a gap for the border of a sequence
        use_cache=False,
    )  # fmt: skip
    images = _images(batch, segment, layout)
    if hasattr(model, "model"):
        return model.model(**inputs, **images).last_hidden_state[0]
    if images["pixel_values"] is None:  # Blip2ForConditionalGeneration takes no text alone
        return model.language_model.model(**inputs).last_hidden_state[0]
    output = model(**inputs, **images, output_hidden_states=True)
    hidden = output.language_model_outputs.hidden_states[-1]
    assert torch.equal(model.language_model.lm_head(hidden), output.logits), "the states behind the final norm"
    return hidden[0]


# ---------------------------------------------------------------------------------------------------------- our answer


def build(folder: Path, layout: Layout, device: torch.device, *, dtype: torch.dtype = torch.float32, seed: int = 1):
    """The model of a Hugging Face folder on this rank, its weights not loaded, and its architecture and groups."""
    import transformers
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from hacl_megatron.checkpoint.hf.config_read import read_model_config
    from hacl_megatron.config.flags import ParallelFlags
    from hacl_megatron.config.image_sharing import shares_images
    from hacl_megatron.model.hacl import HaclModel
    from hacl_megatron.model.transformer_configs import language_transformer_config, vision_transformer_config

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = transformers.AutoConfig.from_pretrained(folder)
    plain = config.vision_config.model_type == "clip_vision_model" or hasattr(config, "image_grid_pinpoints")
    architecture = read_model_config(folder) if plain else hf_architecture(config)
    architecture = replace(architecture, vision=replace(architecture.vision, image_size=IMAGE_SIZE))
    parallel = ParallelFlags(
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, sequence_parallel=layout.sp,
        decoder_first_pipeline_num_layers=layout.first, vision_parallel="share" if layout.shares else None,
    )  # fmt: skip
    module = HaclModel(
        architecture,
        language_config=language_transformer_config(architecture, parallel, device=device, dtype=dtype, overrides={}),
        vision_config=vision_transformer_config(architecture, parallel, device=device, dtype=dtype),
        padded_vocab_size=PADDED_VOCAB, initial_temperature=TEMPERATURE, seed=seed, device=device, groups=groups,
        shares_images=shares_images(architecture, parallel),
    )  # fmt: skip
    return module, architecture, groups


def load(module, folder: Path, architecture, layout: Layout, groups) -> None:
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from hacl_megatron.checkpoint.hf.import_weights import load_hf_weights

    by_table = architecture.vision.kind.file_names or architecture.tiles is not None
    if architecture.vision.backend == "hf" and not by_table:
        _load_by_name(module, folder, architecture, groups)
        return
    report = load_hf_weights(
        module, folder, architecture, tp_rank=groups.tp.rank(), tp_size=layout.tp,
        layer_offset=get_transformer_layer_offset(module.config, None, groups.pp.rank()),
        padded_vocab_size=PADDED_VOCAB, whole=("vision_tower.",) if module.shares_images else (),
    )  # fmt: skip
    assert not report.fresh, report.fresh


@torch.no_grad()
def _load_by_name(module, folder: Path, architecture, groups) -> None:
    """A model with parts of transformers: these under their own names, the LLaMA and heads by the importer's table."""
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
    from safetensors.torch import load_file

    from hacl_megatron.checkpoint.hf.import_weights import global_name
    from hacl_megatron.checkpoint.hf.names import NameTable

    clip = replace(architecture.vision, backend="megatron", hf=None)
    table = NameTable(replace(architecture, vision=clip, qformer=None, projector_type="linear"))
    heads = {f"heads.{key}": value for key, value in load_file(folder / "hacl_heads.safetensors").items()}
    named = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for theirs, ours in (
            ("vision_tower.vision_model.", "vision_tower.model."), ("vision_tower.", "vision_tower.model."),
            ("vision_model.", "vision_tower.model."), ("qformer.", "connector.qformer."),
            ("query_tokens", "connector.query_tokens"), ("language_projection.", "connector.projection."),
            ("multi_modal_projector.linear_1.", "connector.0."), ("multi_modal_projector.linear_2.", "connector.2."),
        ):  # fmt: skip
            if name.startswith(theirs):
                named[ours + name.removeprefix(theirs)] = value
                break
        else:
            heads[table.canonical(name)] = value

    def read(canonical: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        value = heads[canonical]
        return value[rows, columns] if value.dim() == 2 else value[rows]

    offset = get_transformer_layer_offset(module.config, None, groups.pp.rank())
    for local, parameter in module.named_parameters():
        if local.startswith(("vision_tower.", "connector.")):
            parameter.copy_(named[local])
        else:
            sizes = dict(tp_rank=groups.tp.rank(), tp_size=groups.tp.size(), padded_vocab_size=PADDED_VOCAB)
            parameter.copy_(table.rules[global_name(local, offset)].read_shard(read, **sizes))


def wrap(module, groups):
    """The data-parallel wrap and the schedule's hooks, as a run has them."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from hacl_megatron.training.optimizer.image_gradients import finalize_shared_image_grads

    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=False)
    model = DistributedDataParallel(module.config, config, module, pg_collection=groups)
    finish = finalize_shared_image_grads if module.shares_images else finalize_model_grads
    module.config.finalize_model_grads_func = finish
    model.train()
    model.zero_grad_buffer()
    return model


def run_schedule(model, batches: list[PackedBatch], *, forward_only: bool = False) -> list[dict[str, Tensor]]:
    """Both micro-batches through megatron-core's schedule under the test's loss; outputs on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    groups = model.module.groups
    shard = PADDED_VOCAB // groups.tp.size()
    first_column = groups.tp.rank() * shard

    def forward_step(data, model):
        index, batch = next(data)
        output = model(batch, SegmentLengths.of(batch))

        def loss_function(output):
            weights = {key: w.to(output.logits.device) for key, w in loss_weights(index, batch).items()}
            # The loss over a split vocabulary: each rank adds what its own columns contribute.
            columns = F.pad(weights["logits"], (0, PADDED_VOCAB - VOCAB))[:, first_column : first_column + shard]
            outputs = {
                "logits": output.logits,
                "image": output.image_embeddings,
                "caption": output.caption_embeddings,
                "hallucinated": output.hallucinated_embeddings,
            }
            loss = sum((outputs[key].float() * {**weights, "logits": columns}[key]).sum() for key in outputs)
            if index == 0:
                loss = loss + TEMPERATURE_GRADIENT * output.temperature.squeeze()
            else:
                loss = loss + 0.0 * output.temperature.squeeze()
            # The schedule divides by the number of micro-batches.
            return loss * len(batches), {key: value.detach() for key, value in outputs.items()}

        return output, loss_function

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(batches)),
        model=model,
        num_microbatches=len(batches),
        seq_length=batches[0].num_rows,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def compare(folder: Path, layout: Layout, device: torch.device) -> dict[str, Any]:
    """Differences on this rank: `outputs` absolute, `gradients` relative to each tensor's largest entry.

    Also `replicated`: the gradients of what all tensor-parallel ranks hold, as bytes, and `initial`: its fresh values.
    """
    module, architecture, groups = build(folder / "weights", layout, device)
    drawn = ("connector.", "heads.", *(("vision_tower.",) if architecture.vision.backend == "hf" else ()))
    initial = {name: value.detach().clone() for name, value in module.named_parameters() if name.startswith(drawn)}
    replicas = (*drawn, "vision_tower.") if module.shares_images else drawn
    load(module, folder / "weights", architecture, layout, groups)
    variant = Variant(**json.loads((folder / "variant.json").read_text()))
    module.freeze(language_model=False, vision_tower=not variant.trains_vision, qformer=not variant.trains_qformer)
    batches = make_batches(layout.tp if layout.sp else 1, layout=architecture.image_layout)
    on_device = [batch.to(device) for batch in batches]
    if not module.pre_process:  # what a stage without the vision tower receives: the pixels' shape alone
        on_device = [replace(batch, pixel_values=batch.pixel_values.to("meta")) for batch in on_device]
    model = wrap(module, groups)
    collected = run_schedule(model, on_device)
    gradients = {name: p.main_grad.clone() for name, p in module.named_parameters() if p.requires_grad}

    expected = torch.load(folder / "expected.pt", weights_only=True)
    first_column = groups.tp.rank() * PADDED_VOCAB // layout.tp
    differences: dict[str, float] = {}
    if module.post_process:
        for index, (ours, theirs) in enumerate(zip(collected, expected, strict=True)):
            theirs["logits"] = theirs["logits"][:, first_column:][:, : PADDED_VOCAB // layout.tp]
            ours["logits"] = ours["logits"][:, : theirs["logits"].shape[1]]
            for key, value in theirs.items():
                assert ours[key].shape == value.shape, (key, ours[key].shape, value.shape)
                if value.numel():
                    differences[f"{key} {index}"] = float((ours[key].cpu() - value).abs().max())
    else:
        assert not collected

    load(module, folder / "gradients", architecture, layout, groups)
    relative, empty = {}, []
    offset = layout.first * groups.pp.rank() if layout.first else LAYERS // layout.pp * groups.pp.rank()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            size = float(parameter.detach().abs().max())
            error = float((gradients[name] - parameter.detach()).abs().max())
            if name.endswith((".key.bias", ".k_proj.bias")):  # shifts all scores alike: its gradient is all rounding
                size = float(gradients[name.replace(".bias", ".weight")].abs().max())
            relative[f"{name} (stage from layer {offset})"] = error / size if size else error
            if not size:
                empty.append(name)
    return {
        "layers": len(module.language_model.decoder.layers),
        "outputs": differences,
        "gradients": relative,
        "zero in transformers": empty,
        "replicated": {n: value.cpu().numpy().tobytes() for n, value in gradients.items() if n.startswith(replicas)},
        "initial": {name: value.cpu().numpy().tobytes() for name, value in initial.items()},
    }


def compare_all(jobs: list[tuple[str, Layout]]) -> list[dict[str, Any]]:
    """`compare` for every (folder, layout) of this world size, one after another, on the CPU."""
    from hacl_megatron.platform.processes import start_platform

    device = start_platform("cpu")
    results = []
    for folder, layout in jobs:
        assert layout.world_size == dist.get_world_size()
        results.append(compare(Path(folder), layout, device))
    return results
