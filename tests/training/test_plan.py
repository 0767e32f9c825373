"""Plans are held against what they predict: real ranks' buffers, what autograd keeps, files, and figures measured."""

import json
import runpy
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig

from hacl_megatron.checkpoint.hf_config import read_model_config
from hacl_megatron.config.checks import check_architecture, check_flags
from hacl_megatron.config.run import RunConfig, from_yaml, parse_run_config
from hacl_megatron.model.hf_parts import HFVisionTower, QFormerConnector
from hacl_megatron.training.flops import qformer_flops, step_flops, tower_flops, vision_flops
from hacl_megatron.training.plan.compute import stage_flops
from hacl_megatron.training.plan.hardware import GIB, GPUS, Cluster
from hacl_megatron.training.plan.planner import Plan, make_plan
from hacl_megatron.training.plan.suggest import suggest_layouts
from hacl_megatron.training.plan.workload import (
    MicroBatchShape,
    PackShape,
    Samples,
    Segments,
    assumed_samples,
    micro_batch_shape,
)
from tests.distributed import run_distributed
from tests.model.hf_architecture import architecture as hf_architecture
from tests.tiny import tiny_blip2_config, tiny_llava_config, tiny_siglip_config
from tests.training.plan_cases import (
    FULL,
    RECOMPUTE,
    activations_on_this_rank,
    make_micro_batch,
    shape_of,
    state_on_this_rank,
)
from tests.training.runs import latest_checkpoint, layout_flags, make_inputs, tensors, train, write_hf_stages

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples" / "llava_1_5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = make_inputs(tmp_path_factory.mktemp("plan"))
    make_inputs(inputs / "tied", tie=True)
    make_inputs(inputs / "even", groups=6)
    siglip = tiny_llava_config(groups=6)
    siglip.vision_config = tiny_siglip_config()
    write_hf_stages(inputs / "siglip", siglip)
    write_hf_stages(inputs / "minigpt4", tiny_blip2_config(groups=6))
    ddp = {"grad_reduce_in_fp32": False, "bucket_size": 9_000, "pad_buckets_for_high_nccl_busbw": True}
    lean = {**yaml.safe_load((inputs / "finetune.yaml").read_text()), "ddp": ddp}
    (inputs / "lean.yaml").write_text(yaml.safe_dump(lean))
    return inputs


def in_folder(folder: Path, stage: str, layout: str, *extra: str) -> list[str]:
    """`command` for `STAGE` or `SUBFOLDER STAGE`."""
    *where, stage = stage.split()
    return command(folder.joinpath(*where), stage, layout, *extra)


def command(folder: Path, stage: str, layout: str, *extra: str) -> list[str]:
    return ["--config", str(folder / f"{stage}.yaml"), *layout_flags(layout)[1], *extra]


# --------------------------------------------------------------------------------------------------------------- state

OVERLAP = ["--overlap-grad-reduce"]
ALL_TRAIN = ["--freeze-ViT", "false", "--freeze-qformer", "false"]
STATE_RUNS: dict[int, list[tuple[str, list[str]]]] = {
    1: [("tp1", []), ("tp1-dist", []), ("tp1", ["--bf16"]), ("tp1", ["--freeze-ViT", "false", "--bf16"])],
    2: [
        ("tp2", []), ("tp2-sp", ["--bf16"]), ("pp2", []), ("pp2", ["--bf16"]), ("pp2-first1", []),
        ("dp2", []), ("dp2-dist", []), ("dp2-dist", ["--bf16"]), ("dp2-dist", ["--bf16", *OVERLAP]), ("dp2", OVERLAP),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def states(folder: Path) -> dict[str, list[dict]]:
    """By run, what each of its ranks planned and held."""
    found = {}
    for world_size, runs in STATE_RUNS.items():
        cases = [("", stage, *run) for stage in ("pretrain", "finetune") for run in runs]
        if world_size == 2:
            cases += [
                ("tied", "finetune", layout, extra) for layout in ("pp2", "dp2-dist") for extra in ([], ["--bf16"])
            ]
            cases += [("", "lean", layout, ["--bf16", *OVERLAP]) for layout in ("dp2-dist", "pp2")]
            cases += [("minigpt4", "pretrain", "pp2", ["--bf16"]), ("minigpt4", "pretrain", "tp2", ALL_TRAIN)]
            cases += [("siglip", "finetune", "tp2", ALL_TRAIN), ("siglip", "pretrain", "dp2-dist", [])]
        commands = [command(folder / where, stage, layout, *extra) for where, stage, layout, extra in cases]
        ranks = run_distributed(state_on_this_rank, world_size, commands)
        for number, (where, stage, layout, extra) in enumerate(cases):
            found[" ".join(filter(None, [where, stage, layout, *extra]))] = [rank[number] for rank in ranks]
    return found


def test_planned_parameters_are_the_models(states):
    assert len(states) == 38
    for run, ranks in states.items():
        for rank in ranks:
            assert rank["planned parameters"] == rank["parameters"], run


def test_bytes_of_weights_gradients_and_optimizer_are_exact(states):
    for run, ranks in states.items():
        for number, rank in enumerate(ranks):
            assert rank["planned"] == rank["state"], f"{run}, rank {number}"
    # The runs differ in what they hold, so that the equalities above mean something.
    first = {run: ranks[0]["state"] for run, ranks in states.items()}
    assert first["finetune dp2-dist"].optimizer < 0.6 * first["finetune dp2"].optimizer
    assert first["finetune tp1 --bf16"].weights < 0.6 * first["finetune tp1-dist"].weights
    assert first["pretrain tp1"].gradients < 0.2 * first["finetune tp1"].gradients
    in_bf16 = first["lean dp2-dist --bf16 --overlap-grad-reduce"]
    assert in_bf16.gradients > 4 * 65536 * 2, "several buckets of 2^16 gradients each"
    assert states["pretrain pp2"][0]["state"].gradients != states["pretrain pp2"][1]["state"].gradients


# --------------------------------------------------------------------------------------------------------- activations

PROMPT = ["--contrastive-image-context", "prompt"]
NO_PAIRS = ["--contrastive-weight", "0"]
ACTIVATION_RUNS = {
    1: [
        (stage, "tp1", extra, recompute, samples, number)
        for stage, extra, recomputes, makes, numbers in (
            ("pretrain", [], RECOMPUTE, ["pairs"], [1]),
            ("finetune", [], RECOMPUTE, ["pairs"], [1]),
            ("even pretrain", [], RECOMPUTE, ["pairs"], [1]),
            ("even finetune", [], RECOMPUTE, ["pairs"], [1]),
            ("pretrain", ["--bf16"], ["none", "full"], ["pairs", "long", "images"], [1]),
            ("finetune", ["--bf16"], ["none", "full"], ["pairs", "long", "images"], [1]),
            ("even pretrain", [], ["none"], ["long", "images"], [1]),
            ("even finetune", [], ["none"], ["long", "images"], [1]),
            ("even pretrain", PROMPT, ["none"], ["pairs", "images"], [1, 3]),
            ("even finetune", PROMPT, ["none", "attention"], ["pairs"], [1, 3]),
            ("finetune", [*PROMPT, "--bf16"], ["none", "full"], ["pairs"], [3]),
            ("finetune", NO_PAIRS, ["none"], ["pairs"], [1]),
            ("finetune", ["--freeze-ViT", "false"], ["none"], ["images"], [1, 3]),
            ("pretrain", ["--mm-projector-type", "mlp4x_gelu"], ["full"], ["images"], [1]),
            ("minigpt4 pretrain", [], ["none"], ["pairs"], [1, 3]),
            ("minigpt4 pretrain", ALL_TRAIN, ["full"], ["images"], [1, 3]),
            ("minigpt4 pretrain", ALL_TRAIN[:2], ["full"], ["images"], [1]),
            ("minigpt4 pretrain", ALL_TRAIN[2:], ["full"], ["images"], [1]),
            ("siglip pretrain", ALL_TRAIN, ["full"], ["images"], [1]),
        )
        for recompute in recomputes
        for samples in makes
        for number in numbers
    ],
    2: [
        (stage, layout, extra, recompute, "pairs", 1)
        for stage, extra in (("pretrain", ["--bf16"]), ("finetune", ["--bf16"]), ("even finetune", PROMPT))
        for layout in ("tp2", "tp2-sp", "pp2", "pp2-first1")
        for recompute in ("none", "full")
    ],
}


def test_activations_are_near_what_autograd_keeps(folder: Path):
    """`even`: as many key-value heads as query heads, which the CPU has its own attention for."""
    seen = []
    for world_size, runs in ACTIVATION_RUNS.items():
        cases = [
            (in_folder(folder, stage, layout, *extra), recompute, samples, number)
            for stage, layout, extra, recompute, samples, number in runs
        ]  # fmt: skip
        for rank in run_distributed(activations_on_this_rank, world_size, cases):
            seen += list(zip(runs, rank, strict=True))
    assert len(seen) == 61 + 2 * 24
    for run, found in seen:
        assert found["planned"] == pytest.approx(found["kept"], rel=0.05), run
        assert found["planned loss"] == pytest.approx(found["loss"], rel=0.05), run


# ------------------------------------------------------------------------------------------------------------- examples


def example(name: str) -> RunConfig:
    return from_yaml((EXAMPLES / f"{name}.yaml").read_text(), name)


def plan_of(
    config: RunConfig, world_size: int, gpu: str = "a100-80g", micro_batch: MicroBatchShape | None = None
) -> Plan:
    layout = check_flags(config, world_size, files=False)
    check_architecture(config, config.architecture, layout)
    cluster, samples = Cluster(gpu_name=gpu, gpus_per_node=8), assumed_samples(config)
    return make_plan(config, config.architecture, layout, cluster, samples, micro_batch)


PUBLISHED = {
    "pretrain_7b": dict(global_batch_size=256, lr=1e-3, version="plain", freeze_LM=True, contrastive_weight=0.0),
    "pretrain_13b": dict(global_batch_size=256, lr=1e-3, version="plain", freeze_LM=True, contrastive_weight=0.0),
    "finetune_7b": dict(global_batch_size=128, lr=2e-5, version="v1", freeze_LM=False, contrastive_weight=0.0),
    "finetune_13b": dict(global_batch_size=128, lr=2e-5, version="v1", freeze_LM=False, contrastive_weight=0.0),
    "hacl_pretrain_7b": dict(
        global_batch_size=512, micro_batch_size=32, lr=1e-3, version="plain", freeze_LM=True, contrastive_weight=1.0,
        contrastive_negatives="queue", queue_size=16_384, initial_temperature=0.07,
    ),
}  # fmt: skip
ALWAYS = dict(
    num_train_epochs=1, lr_decay_style="cosine", lr_warmup_fraction=0.03, model_max_length=2048, bf16=True,
    weight_decay=0.0, freeze_ViT=True,
)  # fmt: skip


def test_every_example_is_held_against_what_was_published():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_examples_have_the_published_hyper_parameters_and_fit(name):
    config = example(name)
    groups = (config.model, config.data, config.objective, config.optimizer, config.training)
    flags = {key: value for group in groups for key, value in vars(group).items()}
    expected = {**ALWAYS, **PUBLISHED[name]}
    assert {key: flags[key] for key in expected} == expected
    plan = plan_of(config, 16 if name.startswith("hacl") else 8)
    assert plan.fits, plan.memory / GIB
    assert (
        plan.layout.global_batch_size == plan.layout.dp * plan.layout.micro_batch_size * plan.layout.num_micro_batches
    )


@pytest.mark.parametrize(("name", "sizes"), [("pretrain_7b", (4096, 11008, 32)), ("pretrain_13b", (5120, 13824, 40))])
def test_model_sections_are_what_the_weights_will_say(name, sizes, tmp_path):
    """A run refuses weights of other sizes than its `model:` section: it must be Vicuna's and CLIP's to the letter."""
    hidden, ffn, layers = sizes
    llama = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=layers,
        num_key_value_heads=layers, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    clip = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768, architectures=["CLIPVisionModel"],
    )  # fmt: skip
    for part, published in (("vicuna", llama), ("clip", clip)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(published.to_dict(), default=str))
    processor = {
        "crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}, "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(processor))
    read, written = read_model_config(tmp_path / "vicuna", tmp_path / "clip"), example(name).architecture
    assert replace(read, extra={}) == written
    assert example(name.replace("pretrain", "finetune")).architecture == written


def test_parameters_of_llava_7b_and_13b():
    """LLaMA's counts are the ones Meta published (6,738,415,616 and 13,015,864,320)."""
    for name, llama in (("finetune_7b", 6_738_415_616), ("finetune_13b", 13_015_864_320)):
        parts = plan_of(example(name), 8).parts
        assert parts["language_model"] == (llama, 0)
        assert parts["vision_tower"][0] == 0


def test_parts_add_up_over_stages_and_tensor_parallel_ranks():
    config = example("finetune_7b")
    config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size = 2, 4
    plan = plan_of(config, 8)
    embedding, norms = 32000 * 4096, 4096
    total = sum(stage.parts["language_model"][0] for stage in plan.stages)
    assert total == (plan.parts["language_model"][0] + (2 * 32 + 1) * norms) / 2
    assert plan.stages[0].parts["language_model"][0] - plan.stages[1].parts["language_model"][0] == embedding / 2
    assert [stage.micro_batches_in_flight for stage in plan.stages] == [4, 3, 2, 1]


# ---------------------------------------------------------------------------------------------------- figures measured


@pytest.mark.parametrize(
    ("micro_batch", "recompute", "samples_per_second", "gib"),
    [(8, {}, 14.2, 47), (32, FULL, 10.4, 31), (64, FULL, 10.5, 48)],
)
def test_estimates_are_near_what_was_measured_on_one_h100(micro_batch, recompute, samples_per_second, gib):
    """LLaVA-1.5 7B, freeze-LM, bf16, 1,229 packed rows a sample, measured when the step still ran everything in one
    pack and read all rows of the last layer."""
    config = example("pretrain_7b")
    config.objective.contrastive_weight = 1.0
    config.training.micro_batch_size = config.training.global_batch_size = micro_batch
    config.transformer = dict(recompute)
    rows = 12_740 / 10.4 - 2 * 577
    segments = tuple(
        Segments(kind=kind, count=micro_batch, length=length, read=length)
        for kind, length in (("dialogue", 576 + rows / 4), ("image", 577), ("text", rows * 3 / 4))
    )
    pack = PackShape(
        segments=segments, images=micro_batch, image_rows=2 * 576 * micro_batch, target_rows=rows / 4 * micro_batch
    )
    shape = MicroBatchShape(main=pack, ahead=None, pairs=micro_batch, hallucinated=0)
    plan = plan_of(config, 1, "h100-80g", shape)
    # What torch allocates: without the reserve for the CUDA context.
    assert (plan.memory - plan.cluster.reserve) / GIB == pytest.approx(gib, rel=0.05)
    assert plan.samples_per_second == pytest.approx(samples_per_second, rel=0.1)


# ------------------------------------------------------------------------------------------------------------ workload

WORKLOADS = {
    "pretrain": [],
    "finetune": [],
    "shared prefix": PROMPT,
    "no pairs": NO_PAIRS,
    "trained tower": ["--freeze-ViT", "false"],
}


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", WORKLOADS)
def test_flops_of_the_stages_are_what_the_trainer_reports(folder: Path, name: str, frozen: bool, number: int):
    config = tiny(folder, "pp2", "--freeze-LM", str(frozen).lower(), *WORKLOADS[name])
    model = config.architecture
    for samples in ("pairs", "long", "images"):
        micro_batch = make_micro_batch(samples, config, number)
        expected = step_flops(
            model, [micro_batch], trains_language_model=not frozen, trains_vision_tower=not config.model.freeze_ViT
        )
        stages = [stage_flops(config, model, shape_of(micro_batch), stage) for stage in range(2)]
        assert sum(stage.model for stage in stages) == pytest.approx(expected, rel=1e-9)
        caches = number > 1 and name != "no pairs" and samples != "long"
        assert (sum(stage.repeated for stage in stages) > 0) == caches


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("extra", [[], ALL_TRAIN[:2], ALL_TRAIN[2:], ALL_TRAIN])
def test_flops_of_a_q_former_in_the_stages(folder: Path, extra: list[str], number: int):
    """What runs twice beside the image segments in the LLM: whatever of tower and Q-Former has a trained part."""
    config = parse_run_config(command(folder / "minigpt4", "pretrain", "pp2", *extra))
    model, flags = config.architecture, config.model
    micro_batch = make_micro_batch("pairs", config, number)
    expected = step_flops(
        model, [micro_batch], trains_language_model=False, trains_vision_tower=not flags.freeze_ViT,
        trains_qformer=not flags.freeze_qformer,
    )  # fmt: skip
    stages = [stage_flops(config, model, shape_of(micro_batch), stage) for stage in range(2)]
    assert sum(stage.model for stage in stages) == pytest.approx(expected, rel=1e-9)
    forward = tower_flops(model) * (not flags.freeze_ViT) + sum(qformer_flops(model)) * bool(extra)
    of_layers = stage_flops(tiny(folder, "pp2"), model, shape_of(micro_batch), 0).repeated
    assert stages[0].repeated - of_layers == pytest.approx(forward * 2 * (number > 1), rel=1e-9)
    config.parallel.tensor_model_parallel_size = 3
    images = vision_flops(
        model, 2, trained=not flags.freeze_ViT, trains_qformer=not flags.freeze_qformer
    ) + forward * 2 * (number > 1)  # fmt: skip
    more = stage_flops(config, model, shape_of(micro_batch), 0).repeated - stages[0].repeated
    assert more == pytest.approx(2 * images, rel=1e-9), "on each of three ranks"


@pytest.mark.parametrize("trains_qformer", [True, False])
@pytest.mark.parametrize("trains_tower", [True, False])
def test_flops_of_transformers_parts_are_those_that_torch_counts(trains_tower: bool, trains_qformer: bool):
    """The formula gives a trained tower's pixels a gradient, and the queries of a frozen Q-Former behind it."""
    model = hf_architecture(tiny_blip2_config())
    tower = HFVisionTower(model, seed=1, dtype=torch.float32).requires_grad_(trains_tower)
    connector = QFormerConnector(model.qformer, 48, seed=1, generator=torch.Generator(), dtype=torch.float32)
    for part in (tower.model, connector.qformer):
        part.config._attn_implementation = "eager"  # matrix products that torch counts on any device
    if not trains_qformer:
        connector.freeze_qformer()
    with FlopCounterMode(display=False) as counter:
        connector(tower(torch.randn(3, 3, 48, 48))).sum().backward()
    found = vision_flops(model, 3, trained=trains_tower, trains_qformer=trains_qformer)
    excess = 3 * 2 * 36 * 3 * 64 * 30 if trains_tower else 0  # of the pixels
    if trains_tower and not trains_qformer:  # of the first layer's self-attention, and queries behind the image's
        excess += 3 * (2 * 5 * 5 * 24 * 24 + 2 * 4 * 5 * 5 * 24 + 2 * 5 * 37 * 24)
    assert found - excess == counter.get_total_flops()


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", WORKLOADS)
def test_the_average_micro_batch_is_that_of_the_packer(folder: Path, name: str, frozen: bool, number: int):
    """Of equal samples the averages are exact: rows of each kind in each pack, read rows, branches, image rows."""
    config = tiny(folder, "tp1", "--freeze-LM", str(frozen).lower(), *WORKLOADS[name])
    samples = Samples(
        num_samples=None, image_share=1.0, text_tokens=2, target_tokens=1, question_tokens=0, pair_share=1.0,
        caption_tokens=6, hallucinated_per_pair=0.0,
    )  # fmt: skip
    planned = micro_batch_shape(config, config.architecture, samples, 5, number)
    found = shape_of(make_micro_batch("images", config, number))
    assert (planned.ahead is None) == (found.ahead is None)
    assert (planned.pairs, planned.hallucinated) == (found.pairs, found.hallucinated)
    for ours, packed in ((planned.main, found.main), (planned.ahead, found.ahead)):
        if ours is None:
            continue
        for kind in ("dialogue", "image", "text"):
            both = [
                (sum(part.rows for part in parts), sum(part.read_rows for part in parts))
                for parts in (ours.of_kind(kind), packed.of_kind(kind))
            ]
            assert both[0] == both[1], kind
        for quantity in ("branches", "context_rows", "image_rows", "images", "target_rows"):
            if quantity != "images" or ours is planned.main:  # what runs ahead borrows the main pack's
                assert getattr(ours, quantity) == getattr(packed, quantity), quantity


def tiny(folder: Path, layout: str, *extra: str) -> RunConfig:
    config = parse_run_config(command(folder, "pretrain", layout, *extra))
    config.architecture = read_model_config(folder / "llava")
    return config


def test_what_the_step_does_shows_in_the_plan():
    """Captions of a frozen LLM cost memory nothing; negatives over several micro-batches cost a second forward pass."""

    def plan(**flags) -> Plan:
        config = example("hacl_pretrain_7b")
        for name, value in flags.items():
            (group,) = (group for group in (config.model, config.objective, config.training) if hasattr(group, name))
            setattr(group, name, value)
        return plan_of(config, 16)

    base = plan()
    assert [part.kind for part in base.micro_batch.ahead.segments] == ["text"]
    assert plan(contrastive_weight=0.0).micro_batch.ahead is None
    shared = plan(contrastive_image_context="prompt")
    assert base.micro_batch.main.rows - shared.micro_batch.main.rows == 32 * 576
    several = plan(micro_batch_size=8)
    repeated = several.stages[0].flops.repeated * 4 - base.stages[0].flops.repeated
    images = 8 * 4 * 577 / base.micro_batch.main.rows
    assert repeated == pytest.approx(base.stages[0].flops.repeated * images, rel=0.02), "the image segments, once more"
    assert several.time.compute > base.time.compute
    alone = plan(micro_batch_size=8, contrastive_negatives="micro-batch")
    assert alone.time.compute == pytest.approx(base.time.compute, rel=1e-6)
    # 4 micro-batches of 8 images of 576 patches of 1,024 bf16 numbers, one of them in flight
    kept = (several.stages[0].memory.activations - alone.stages[0].memory.activations) / (8 * 2 * 576 * 1024)
    assert kept == pytest.approx(3)
    tokens = plan(micro_batch_size=1, micro_batch_tokens=7_000)
    assert tokens.layout.num_micro_batches == 6, "1,213 rows a sample, 32 samples a replica"
    assert tokens.samples_per_micro_batch == pytest.approx(32 / 6)
    assert base.stages[0].memory.contrastive > plan(queue_size=1024).stages[0].memory.contrastive


def test_checkpoint_sizes_are_those_of_a_saved_run(folder: Path):
    runs = {"fp32": [], "dist": ["--use-distributed-optimizer"], "bf16": ["--bf16"]}
    flags = ["--train-iters", "1", "--micro-batch-size", "8"]
    commands = [
        command(folder, "finetune", "tp1", *extra, *flags, "--save", str(folder / "saved" / name))
        for name, extra in runs.items()
    ]
    train(commands, 1)
    for name in runs:
        save = folder / "saved" / name
        config = from_yaml((latest_checkpoint(save) / "run_config.yaml").read_text())
        plan = plan_of(config, 1)
        found = tensors(save)
        size = {
            kind: sum(t.nbytes for key, t in found.items() if key.startswith("optimizer.") == (kind == "optimizer"))
            for kind in ("weights", "optimizer")
        }
        assert size["weights"] == plan.weights_checkpoint, name
        assert size["optimizer"] == plan.optimizer_checkpoint, name


# ------------------------------------------------------------------------------------------------------------- the tool


def run_tool(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["plan_run.py", *arguments])
        runpy.run_path(str(REPOSITORY / "tools" / "plan_run.py"), run_name="__main__")
    captured = capsys.readouterr()
    return left.value.code, captured.out + captured.err


def test_tool_prints_every_part_of_a_plan(capsys):
    code, text = run_tool(capsys, "--config", str(EXAMPLES / "pretrain_7b.yaml"), "--gpu", "a100-80g")
    assert code == 0, text
    for words in (
        "6,738,415,616", "fits: stage 0", "GB sent a GPU a step", "published for LLaVA-1.5 7B pretrain", "3.5 h",
        "checkpoint:", "50% of the peak", "run: 2,181 iterations",
    ):  # fmt: skip
        assert words in text, words


def test_tool_takes_flags_over_the_file_and_says_when_a_run_does_not_fit(capsys):
    file = ["--config", str(EXAMPLES / "finetune_7b.yaml"), "--gpu", "a100-40g"]
    code, text = run_tool(capsys, *file)
    assert code == 1 and "DOES NOT FIT: stage 0" in text and "most of it gradients" in text
    code, text = run_tool(capsys, *file, "--tensor-model-parallel-size", "4", "--sequence-parallel", "--nodes", "2")
    assert code == 0 and "4 x 1 x 4" in text
    code, text = run_tool(capsys, *file, "--tensor-model-parallel-size", "5")
    assert code == 2 and text.count("\n") == 1 and "16" not in text and "multiple of 5" in text
    code, text = run_tool(capsys, *file, "--data-path", "mine.json", "--bf16", "false")
    assert code == 1 and "length unknown; give --num-samples" in text and ", fp32" in text
    code, text = run_tool(capsys, *file, "--data-path", "mine.json", "--num-samples", "1280")
    assert "run: 10 iterations" in text and "published" not in text
    code, text = run_tool(capsys, *file, "--no-such-flag", "1")
    assert code == 2 and "--no-such-flag" in text


def test_suggestions_fit_are_ranked_and_can_be_run(capsys):
    config = example("finetune_13b")
    cluster = Cluster(gpu_name="a100-80g", gpus_per_node=8)
    found = suggest_layouts(config, config.architecture, 16, cluster, assumed_samples(config))
    assert len(found) > 10 and all(plan.fits for plan in found)
    speeds = [plan.samples_per_second for plan in found]
    assert all(slower <= faster + 1e-3 for faster, slower in pairwise(speeds))
    assert {plan.layout.global_batch_size for plan in found} == {128}
    sizes = {plan.layout.tp * plan.layout.pp for plan in found}
    assert min(sizes) == 2, "26 GB of weights and 52 of gradients are too much for one GPU"
    code, text = run_tool(capsys, "--config", str(EXAMPLES / "finetune_13b.yaml"), "--suggest", "--gpu", "a100-80g")
    assert code == 0 and "The first: --tensor-model-parallel-size" in text


def test_nothing_is_suggested_where_nothing_fits(capsys, tmp_path):
    file = tmp_path / "70b.yaml"
    file.write_text(yaml.safe_dump(seventy_billion()))
    code, text = run_tool(capsys, "--config", str(file), "--suggest", "--gpus-per-node", "1", "--gpu", "a100-40g")
    assert code == 1 and "No layout of these GPUs fits" in text


def seventy_billion() -> dict:
    """The 7B example with Llama-2 70B's sizes (grouped-query attention)."""
    values = yaml.safe_load((EXAMPLES / "finetune_7b.yaml").read_text())
    values["model"]["language"].update(
        {"num-layers": 80, "hidden-size": 8192, "ffn-hidden-size": 28672, "num-attention-heads": 64,
         "num-query-groups": 8}
    )  # fmt: skip
    return values


def test_seventy_billion_parameters():
    """68,976,648,192 is what transformers counts in Llama-2 70B."""
    config = from_yaml(yaml.safe_dump(seventy_billion()), "70b")
    config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size = 8, 4
    config.parallel.sequence_parallel, config.training.micro_batch_size = True, 1
    plan = plan_of(config, 1024)
    assert plan.parts["language_model"] == (68_976_648_192, 0)
    assert plan.fits
    assert plan.stages[0].memory.activations > plan.stages[3].memory.activations


def test_memory_grows_with_what_it_should(folder: Path):
    base = plan_of(example("finetune_7b"), 8)

    def changed(**flags) -> Plan:
        config = example("finetune_7b")
        for name, value in flags.items():
            group = config.training if hasattr(config.training, name) else config.parallel
            setattr(group, name, value)
        return plan_of(config, 8)

    smaller = changed(micro_batch_size=8)
    assert smaller.stages[0].memory.activations == pytest.approx(base.stages[0].memory.activations / 2, rel=1e-6)
    assert smaller.time.weights > base.time.weights and smaller.time.compute == pytest.approx(base.time.compute)
    split = changed(tensor_model_parallel_size=2, sequence_parallel=True)
    assert split.stages[0].memory.weights < 0.55 * base.stages[0].memory.weights
    assert split.stages[0].sent.tensor_parallel > 0 == base.stages[0].sent.tensor_parallel
    assert GPUS["a100-40g"].memory < base.memory < GPUS["a100-80g"].memory
