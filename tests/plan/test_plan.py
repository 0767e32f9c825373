"""Plans are held against what they predict: real ranks' buffers, what autograd keeps, packs, and files."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.config.run import RunConfig, from_yaml, parse_run_config
from hacl_megatron.model.hf_parts import HFVisionTower, QFormerConnector
from hacl_megatron.plan.compute import stage_flops
from hacl_megatron.plan.workload import Samples, micro_batch_shape
from hacl_megatron.training.flops import qformer_flops, step_flops, tower_flops, vision_flops
from hacl_megatron.training.loop import Trainer
from hacl_megatron.training.packs import pack_plan
from hacl_megatron.training.sample_cost import sample_cost
from tests.distributed import run_distributed
from tests.model.hf_architecture import architecture as hf_architecture
from tests.plan.example_plans import plan_of
from tests.plan.plan_cases import (
    RECOMPUTE,
    activations_on_this_rank,
    make_micro_batch,
    shape_of,
    slots_of,
    state_on_this_rank,
    without_padding,
)
from tests.tiny import FAMILY_SIZES, tiny_blip2_config, tiny_dinov2_config, tiny_llava_config, tiny_siglip_config
from tests.training.runs import latest_checkpoint, layout_flags, make_inputs, tensors, train, write_hf_stages

DINOV2 = {
    "dinov2": tiny_dinov2_config(image=42),
    "registers": tiny_dinov2_config(image=42, registers=3, swiglu=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = make_inputs(tmp_path_factory.mktemp("plan"))
    make_inputs(inputs / "tied", tie=True)
    make_inputs(inputs / "even", groups=6)
    for family in ("qwen2", "qwen3"):
        make_inputs(inputs / family, samples=4, **FAMILY_SIZES[family])
    make_inputs(inputs / "qwen3even", samples=4, groups=6, **FAMILY_SIZES["qwen3"])
    siglip = tiny_llava_config(groups=6)
    siglip.vision_config = tiny_siglip_config()
    write_hf_stages(inputs / "siglip", siglip)
    write_hf_stages(inputs / "tiled", siglip)
    for stage in ("pretrain", "finetune"):
        file = inputs / "tiled" / f"{stage}.yaml"
        settings = yaml.safe_load(file.read_text())
        settings["model"]["tiles"] = {"pinpoints": [[50, 100], [100, 50]], "max_tiles": 3, "only_alone": True}
        file.write_text(yaml.safe_dump(settings))
    for name, tower in DINOV2.items():
        dinov2 = tiny_llava_config(groups=6)
        dinov2.vision_config = tower
        write_hf_stages(inputs / name, dinov2)
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
        ("cp2-dist", ["--bf16", *OVERLAP]), ("tp2-share", ["--bf16"]), ("tp2-share-dist", ["--freeze-ViT", "false"]),
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
            cases += [(family, "finetune", "tp2", ["--bf16"]) for family in ("qwen2", "qwen3")]
            cases += [("qwen3", "finetune", "pp2", []), ("qwen2", "finetune", "dp2-dist", ["--lora-rank", "3"])]
            cases += [("siglip", "finetune", "tp2", ALL_TRAIN), ("siglip", "pretrain", "dp2-dist", [])]
            cases += [("tiled", "pretrain", "dp2-dist", ["--bf16", *OVERLAP]), ("tiled", "finetune", "pp2", [])]
            cases += [("dinov2", "pretrain", "pp2", ALL_TRAIN), ("registers", "finetune", "tp2", ALL_TRAIN)]
        commands = [command(folder / where, stage, layout, *extra) for where, stage, layout, extra in cases]
        ranks = run_distributed(state_on_this_rank, world_size, commands)
        for number, (where, stage, layout, extra) in enumerate(cases):
            found[" ".join(filter(None, [where, stage, layout, *extra]))] = [rank[number] for rank in ranks]
    return found


def test_planned_parameters_are_the_models(states):
    assert len(states) == 52
    newlines = [p for rank in states["tiled finetune pp2"] for p in rank["parameters"] if "newline" in p[0]]
    assert newlines == [("connector.image_newline", (48,), True, 4)]
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
PHRASE = ["--preference-loss", "phrase"]
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
            ("finetune", [*NO_PAIRS, *PHRASE], ["none"], ["pairs"], [1]),
            ("even finetune", [*PROMPT, *PHRASE], ["none", "attention"], ["pairs"], [3]),
            ("finetune", ["--freeze-ViT", "false"], ["none", "full"], ["images"], [1, 3]),
            ("pretrain", ["--mm-projector-type", "mlp4x_gelu"], ["full"], ["images"], [1]),
            ("minigpt4 pretrain", [], ["none"], ["pairs"], [1, 3]),
            ("minigpt4 pretrain", ALL_TRAIN, ["full"], ["images"], [1, 3]),
            ("minigpt4 pretrain", ALL_TRAIN[:2], ["full"], ["images"], [1]),
            ("minigpt4 pretrain", ALL_TRAIN[2:], ["full"], ["images"], [1]),
            *((f"{tower} pretrain", ALL_TRAIN, ["full"], ["images"], [1]) for tower in ("siglip", *DINOV2)),
            ("qwen2 finetune", [], ["none"], ["pairs"], [1]),
            ("qwen3 finetune", [], ["none", "full", "attention"], ["pairs"], [1]),
            ("qwen3 pretrain", ["--bf16"], ["none", "attention"], ["pairs"], [1]),
            ("qwen3even finetune", PROMPT, ["none", "attention"], ["pairs"], [1]),
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
    ]
    + [("qwen3 finetune", layout, [], "none", "pairs", 1) for layout in ("tp2-sp", "pp2-first1")]
    + [
        ("finetune", "tp2-share", ALL_TRAIN[:2], "none", "pairs", 1),
        ("siglip pretrain", "tp2-sp", ALL_TRAIN, "full", "pairs", 1),
        ("minigpt4 pretrain", "tp2", ALL_TRAIN, "full", "pairs", 3),
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
    assert len(seen) == 76 + 2 * 29
    for run, found in seen:
        assert found["planned"] == pytest.approx(found["kept"], rel=0.05), run
        assert found["planned loss"] == pytest.approx(found["loss"], rel=0.05), run


CONTEXT_RUNS = [
    (stage, extra, recompute, samples)
    for stage, extra, recompute, samples in (
        ("even finetune", [], "none", "record"),
        ("even finetune", [], "full", "record"),
        ("even finetune", PROMPT, "none", "pairs"),
        ("even pretrain", [], "none", "long"),
    )
]


def test_memory_falls_with_context_parallel_ranks_as_planned(folder: Path):
    """Fails where a rank keeps others' keys and values, the projection that its own are views of, or other rows."""
    kept: dict[int, list[float]] = {}
    for ranks in (1, 4):
        cases = [
            (in_folder(folder, stage, f"cp{ranks}", *extra), recompute, samples, 1)
            for stage, extra, recompute, samples in CONTEXT_RUNS
        ]
        found = run_distributed(activations_on_this_rank, ranks, cases)
        for number, run in enumerate(CONTEXT_RUNS):
            fullest = max((rank[number] for rank in found), key=lambda one: one["kept"])
            print(ranks, run, [{k: round(v) for k, v in rank[number].items()} for rank in found])
            assert fullest["planned"] == pytest.approx(fullest["kept"], rel=0.1), (ranks, run)
            most = max(rank[number]["loss"] for rank in found)
            assert fullest["planned loss"] == pytest.approx(most, rel=0.1), (ranks, run)
            kept.setdefault(ranks, []).append(fullest["kept"])
    assert kept[4][0] < 0.3 * kept[1][0]


# ------------------------------------------------------------------------------------------------------------ workload

WORKLOADS = {
    "pretrain": [],
    "finetune": [],
    "shared prefix": PROMPT,
    "no pairs": NO_PAIRS,
    "trained tower": ["--freeze-ViT", "false"],
    "twins": PHRASE,
    "twins and a shared prefix": [*PHRASE, *PROMPT],
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
        stages = [stage_flops(config, shape_of(micro_batch), stage) for stage in range(2)]
        assert sum(stage.model for stage in stages) == pytest.approx(expected, rel=1e-9)
        caches = number > 1 and name != "no pairs" and samples != "long"
        assert (sum(stage.repeated for stage in stages) > 0) == caches


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("name", WORKLOADS)
def test_costs_of_samples_add_up_to_the_planned_work(folder: Path, name: str, number: int):
    """By which samples are dealt out: fails where rows weigh otherwise against views than in the plan, where a pass, a
    repeated one or a tower that each tensor-parallel rank has whole is forgotten, or rows are counted as not packed."""
    runs = [("finetune", "dp2", []), ("finetune", "tp2-pp2", ["--freeze-LM"]), ("siglip finetune", "tp2-dp2", [])]
    runs += [("finetune", "pp2", ["--lora-rank", "3"]), ("minigpt4 pretrain", "dp2", ALL_TRAIN)]
    for stage, layout, extra in runs:
        config = parse_run_config(in_folder(folder, stage, layout, *extra, *WORKLOADS[name]))
        config.architecture = config.architecture or read_model_config(folder / "llava")
        config.transformer = {"recompute_granularity": "full"} if layout == "dp2" else {}
        parallel = config.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        cost = sample_cost(config, SimpleNamespace(dp=2, pp=pp))
        plan = pack_plan(config, number, with_gradients=True)
        for samples in ("pairs", "images", *["long"] * (plan.ahead is None)):  # without a pair no tower runs ahead
            planned = without_padding(shape_of(make_micro_batch(samples, config, number)))
            stages = [stage_flops(config, planned, stage).hardware for stage in range(pp)]
            costs = [cost(slot.encoded, plan) for slot in slots_of(samples, config)]
            assert {len(each) for each in costs} == {pp}
            total = sum(map(sum, costs))
            assert total == pytest.approx(sum(stages), rel=1e-9), (stage, tp, samples)
            if pp == 2:  # the last layer runs for read rows alone, which is not told apart
                assert sum(first for first, _ in costs) == pytest.approx(stages[0], rel=0.35)


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
    stages = [stage_flops(config, shape_of(micro_batch), stage) for stage in range(2)]
    assert sum(stage.model for stage in stages) == pytest.approx(expected, rel=1e-9)
    logged = SimpleNamespace(
        config=config, run=SimpleNamespace(layout=SimpleNamespace(tp=1, cp=1, pp=2), device=torch.device("cpu")),
        step=SimpleNamespace(own_time=SimpleNamespace(take=lambda: 0.0)),
    )  # fmt: skip
    assert Trainer._own_numbers(logged, [micro_batch], 0.0).flops == pytest.approx(expected / 2, rel=1e-9)
    forward = tower_flops(model) * (not flags.freeze_ViT) + sum(qformer_flops(model)) * bool(extra)
    of_layers = stage_flops(replace(tiny(folder, "pp2"), architecture=model), shape_of(micro_batch), 0).repeated
    assert stages[0].repeated - of_layers == pytest.approx(forward * 2 * (number > 1), rel=1e-9)
    config.parallel.tensor_model_parallel_size = 3
    images = vision_flops(
        model, 2, trained=not flags.freeze_ViT, trains_qformer=not flags.freeze_qformer
    ) + forward * 2 * (number > 1)  # fmt: skip
    shared = stage_flops(config, shape_of(micro_batch), 0)
    assert shared.repeated == stages[0].repeated, "no rank repeats another's"
    assert shared.waited == pytest.approx(images / 2, rel=1e-9), "one of three ranks has no image"


@pytest.mark.parametrize("number", [1, 3])
def test_a_tower_that_is_split_has_its_connector_on_each_rank(folder: Path, number: int):
    """Fails where a plan counts the connector once, and so finds a split tower faster than it is."""
    config = tiny(folder, "tp2-split", "--freeze-ViT", "false")
    shape = shape_of(make_micro_batch("images", config, number))
    split = stage_flops(config, shape, 0)
    config.parallel.vision_parallel = "share"
    shared = stage_flops(config, shape, 0)
    model = config.architecture
    connector = vision_flops(model, 5, trained=True) - 5 * 3 * tower_flops(model)
    assert split.model == shared.model and split.waited == 0
    assert split.repeated - shared.repeated == pytest.approx(connector, rel=1e-9)
    image = vision_flops(model, 1, trained=True) + tower_flops(model) * (number > 1)
    assert shared.waited == pytest.approx(image, rel=1e-9), "3 images on the one, 2 on the other"
    # An average: three of four micro-batches have 4 images and nobody waits, the fourth has 5.
    average = replace(shape, main=replace(shape.main, images=4.25))
    assert stage_flops(config, average, 0).waited == pytest.approx(0.25 * image, rel=1e-9)


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


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", DINOV2)
def test_flops_of_dinov2_are_those_that_torch_counts(name: str, trained: bool):
    """Catches registers that are no rows, a SwiGLU counted as two products, and the size of the positions, 42, taken
    for that of the images."""
    config = tiny_llava_config()
    config.vision_config = DINOV2[name]
    model = hf_architecture(config)
    model = replace(model, vision=replace(model.vision, image_size=50))
    tower = HFVisionTower(model, seed=1, dtype=torch.float32).requires_grad_(trained)
    tower.model.config._attn_implementation = "eager"
    pixels = torch.randn(3, 3, 50, 50)
    with FlopCounterMode(display=False) as counter:
        features = tower(pixels)
        if trained:
            features.sum().backward()
    excess = 3 * 2 * 36 * 3 * 64 * 30 if trained else 0  # a gradient of the pixels
    assert 3 * tower_flops(model) * (3 if trained else 1) - excess == counter.get_total_flops()


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
    planned = micro_batch_shape(config, samples, 5, number)
    found = shape_of(make_micro_batch("images", config, number))
    assert (planned.ahead is None) == (found.ahead is None)
    assert (planned.pairs, planned.hallucinated) == (found.pairs, found.hallucinated)
    for ours, packed in ((planned.main, found.main), (planned.ahead, found.ahead)):
        if ours is None:
            continue
        for kind in ("dialogue", "image", "text"):
            both = [
                [
                    sum(getattr(part, quantity) for part in parts)
                    for quantity in ("rows", "read_rows", "count", "context_rows")
                ]
                for parts in (ours.of_kind(kind), packed.of_kind(kind))
            ]
            assert both[0] == both[1], kind
        for quantity in ("image_rows", "images", "target_rows"):
            if quantity != "images" or ours is planned.main:  # what runs ahead borrows the main pack's
                assert getattr(ours, quantity) == getattr(packed, quantity), quantity


def tiny(folder: Path, layout: str, *extra: str) -> RunConfig:
    config = parse_run_config(command(folder, "pretrain", layout, *extra))
    config.architecture = read_model_config(folder / "llava")
    return config


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
