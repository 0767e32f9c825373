"""The same batch through `peft` on transformers' LLaVA in one process, and through our adapters at any layout.

`write_reference` draws adapters whose B is not zero, and stores outputs and gradients under Hugging Face's names;
`compare` gives our model the same adapters, cut for this rank, and returns how outputs and gradients differ.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hacl_megatron.config.lora import TARGETS
from hacl_megatron.config.tiles import ImageLayout
from tests.model.parity_batches import LAYERS, PADDED_VOCAB, VISUAL, VOCAB, loss_weights, make_batches
from tests.model.parity_cases import TEMPERATURE, Layout, _heads, _segment_hidden, load, run_schedule, wrap
from tests.tiny import randomise, write_tiny_llava

RANK, ALPHA = 3, 5.0
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Variant:
    """What makes another reference."""

    targets: tuple[str, ...] = TARGETS
    text_alone: bool = False
    """The text-only micro-batch alone, with a frozen connector: nothing in front of the layers trains."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """Arguments of `write_tiny_llava`."""


@dataclass(frozen=True)
class Case:
    """One run of ours."""

    variant: str
    layout: Layout
    transformer: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.variant}, {self.layout}{', recompute' if self.transformer else ''}"


def batches_of(variant: Variant, multiple: int = 1):
    batches = make_batches(multiple)
    return batches[1:] if variant.text_alone else batches


def peft_config(targets: tuple[str, ...], **fields: Any):
    from peft import LoraConfig

    # CLIP's layers have projections of the same names.
    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=rf".*language_model.*\.({'|'.join(targets)})", **fields
    )  # fmt: skip


def hf_name(name: str) -> tuple[str, str] | None:
    """peft's parameter name -> ("3.q_proj", "A"); None for others."""
    found = re.search(r"language_model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.", name)
    return None if found is None else (f"{found[1]}.{found[2]}", found[3])


def write_reference(folder: Path, variant: Variant) -> None:
    """Write `folder/weights` (a Hugging Face LLaVA with heads) and `folder/expected.pt`."""
    from peft import get_peft_model
    from safetensors.torch import save_file
    from transformers import LlavaForConditionalGeneration

    weights = write_tiny_llava(folder / "weights", **variant.sizes)
    heads = _heads()
    save_file({**heads, "temperature": torch.full([1], TEMPERATURE)}, weights / "hacl_heads.safetensors")
    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32)
    wrapped = get_peft_model(model, peft_config(variant.targets)).eval()
    adapters = {hf_name(name): p for name, p in wrapped.named_parameters() if hf_name(name) is not None}
    assert len(adapters) == 2 * LAYERS * len(variant.targets)
    randomise(torch.nn.ParameterDict({"-".join(key).replace(".", "-"): p for key, p in adapters.items()}), 7)
    with torch.no_grad():
        for (_, kind), parameter in adapters.items():
            parameter.mul_(0.3 if kind == "B" else 1.0)  # so that logits stay of order 1
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.requires_grad_(not variant.text_alone)
    heads = {name: value.clone().requires_grad_() for name, value in heads.items()}

    expected, loss = [], 0.0
    layout = ImageLayout(visual_tokens=VISUAL)
    for index, batch in enumerate(batches_of(variant)):
        hidden = torch.cat([_segment_hidden(model, batch, s, layout) for s in range(len(batch.cu_seqlens) - 1)])

        def embed(rows: Tensor, name: str, hidden: Tensor = hidden) -> Tensor:
            return F.normalize(F.linear(hidden[rows], heads[f"{name}.weight"], heads[f"{name}.bias"]), dim=-1)

        outputs = {
            "logits": model.lm_head(hidden[batch.target_rows]),
            "image": embed(batch.image_eos_rows, "vision_projector"),
            "caption": embed(batch.caption_eos_rows, "text_projector"),
            "hallucinated": embed(batch.hallucinated_eos_rows, "text_projector"),
        }
        loss = loss + sum((outputs[key] * w).sum() for key, w in loss_weights(index, batch).items())
        expected.append({key: value.detach() for key, value in outputs.items()})
    loss.backward()
    linears = {"0": "linear_1", "2": "linear_2"}
    connector = model.model.multi_modal_projector
    torch.save(
        {
            "outputs": expected,
            "weights": {".".join(key): p.detach().clone() for key, p in adapters.items()},
            "gradients": {".".join(key): p.grad for key, p in adapters.items()},
            "connector": {
                f"connector.{ours}.{kind}": getattr(getattr(connector, theirs), kind).grad
                for ours, theirs in linears.items()
                for kind in ("weight", "bias")
            },
            "heads": {f"heads.{name}": value.grad for name, value in heads.items()},
        },
        folder / "expected.pt",
    )


# ---------------------------------------------------------------------------------------------------------- our answer


def build(folder: Path, case: Case, variant: Variant, device: torch.device, *, bf16: bool = False, **lora: Any):
    """Our model of a Hugging Face folder on this rank, its weights loaded and its adapters fresh."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from hacl_megatron.assemble.module import build_module
    from hacl_megatron.checkpoint.hf.config_read import read_model_config
    from hacl_megatron.config.flags import LoraFlags, ModelFlags, ParallelFlags
    from hacl_megatron.config.run import RunConfig

    layout = case.layout
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    parallel = ParallelFlags(
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, sequence_parallel=layout.sp,
        decoder_first_pipeline_num_layers=layout.first,
    )  # fmt: skip
    flags = LoraFlags(lora_rank=RANK, lora_alpha=ALPHA, lora_target_modules=list(variant.targets), **lora)
    architecture = read_model_config(folder)
    config = RunConfig(
        parallel=parallel, lora=flags, model=ModelFlags(bf16=bf16), transformer=dict(case.transformer),
        architecture=architecture,
    )  # fmt: skip
    module = build_module(config, groups, device)
    load(module, folder, architecture, layout, groups)
    module.freeze(language_model=True, vision_tower=True)
    return module, groups


def adapter_parameters(module, layout: Layout, rank: int) -> dict[str, torch.nn.Parameter]:
    """ "3.q_proj.A" -> this rank's parameter, by the layer's number in the whole model."""
    offset = 0 if rank == 0 or layout.pp == 1 else (layout.first or LAYERS // layout.pp)
    found = {}
    for name, parameter in module.named_parameters():
        if match := re.fullmatch(r".*\.layers\.(\d+)\..*_lora\.(\w+)_([AB])", name):
            found[f"{int(match[1]) + offset}.{match[2]}.{match[3]}"] = parameter
    return found


def cut(key: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """A rank's part of an adapter: what the frozen matrix beside it shares over ranks, and nothing else, is cut."""
    _, target, kind = key.split(".")
    if target in ("o_proj", "down_proj"):
        return whole.chunk(size, dim=1)[rank] if kind == "A" else whole
    return whole.chunk(size, dim=0)[rank] if kind == "B" else whole


def compare(folder: Path, case: Case, variant: Variant, device: torch.device, *, bf16: bool = False) -> dict[str, Any]:
    """`outputs`: absolute differences; `gradients`: relative to each tensor's largest entry; `trained`: names."""
    layout = case.layout
    expected = torch.load(folder / "expected.pt", weights_only=True)
    module, groups = build(folder / "weights", case, variant, device, bf16=bf16)
    adapters = adapter_parameters(module, layout, groups.pp.rank())
    rank = groups.tp.rank()
    with torch.no_grad():
        for key, parameter in adapters.items():
            parameter.copy_(cut(key, expected["weights"][key], rank, layout.tp))
    if variant.text_alone and module.pre_process:
        module.connector.requires_grad_(False)
    batches = [batch.to(device) for batch in batches_of(variant, layout.tp if layout.sp else 1)]
    if not module.pre_process:
        batches = [replace(batch, pixel_values=batch.pixel_values.to("meta")) for batch in batches]
    collected = run_schedule(wrap(module, groups), batches)

    outputs = {}
    columns = slice(rank * PADDED_VOCAB // layout.tp, min(VOCAB, (rank + 1) * PADDED_VOCAB // layout.tp))
    for index, (ours, theirs) in enumerate(zip(collected, expected["outputs"] if collected else [], strict=True)):
        width = columns.stop - columns.start
        ours, theirs = {**ours, "logits": ours["logits"][:, :width]}, {**theirs, "logits": theirs["logits"][:, columns]}
        for key, value in theirs.items():
            assert ours[key].shape == value.shape, (key, ours[key].shape, value.shape)
            if value.numel():
                outputs[f"{key} {index}"] = float((ours[key].float().cpu() - value).abs().max())

    gradients = {}
    trained = {key: (p, cut(key, expected["gradients"][key], rank, layout.tp)) for key, p in adapters.items()}
    parts = () if variant.text_alone else ("connector.", "heads.")
    for name, parameter in module.named_parameters():
        if name.startswith(parts) and name != "heads.temperature":
            trained[name] = parameter, {**expected["connector"], **expected["heads"]}[name]
    for key, (parameter, theirs) in trained.items():
        assert parameter.requires_grad and float(theirs.abs().max()) > 0, key
        size = float(theirs.abs().max()) or 1.0
        gradients[key] = float((parameter.main_grad.cpu() - theirs).abs().max()) / size
    others = [n for n, p in module.named_parameters() if p.requires_grad and n.startswith("language_model.")]
    return {
        "outputs": outputs,
        "gradients": gradients,
        "adapters": len(adapters),
        "others in training": [name for name in others if "_lora." not in name],
    }


def gradients_under_dropout(folder: str, cases: list[Case]) -> list[dict[str, Tensor]]:
    """Each case's gradients of this rank's adapters, a good part of whose inputs is dropped; the same seed for all."""
    from hacl_megatron.platform.processes import start_platform

    device, found = start_platform("cpu"), []
    expected = torch.load(Path(folder) / "expected.pt", weights_only=True)
    for case in cases:
        module, groups = build(Path(folder) / "weights", case, Variant(), device, lora_dropout=0.4)
        adapters = adapter_parameters(module, case.layout, groups.pp.rank())
        with torch.no_grad():
            for key, parameter in adapters.items():
                parameter.copy_(cut(key, expected["weights"][key], groups.tp.rank(), case.layout.tp))
        run_schedule(wrap(module, groups), make_batches(2))
        found.append({key: parameter.main_grad.clone() for key, parameter in adapters.items()})
    return found


def compare_all(jobs: list[tuple[str, Case, Variant]]) -> list[dict[str, Any]]:
    """`compare` for every job of this world size, one after another, on the CPU."""
    from hacl_megatron.platform.processes import start_platform

    device = start_platform("cpu")
    return [compare(Path(folder), case, variant, device) for folder, case, variant in jobs]
