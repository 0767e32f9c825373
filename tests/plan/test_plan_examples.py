"""Plans of the shipped examples against published and measured figures; `tools/plan_run.py`."""

import json
import re
import runpy
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import yaml
from transformers import CLIPVisionConfig, LlamaConfig

from hacl_megatron import train
from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.run import from_yaml, to_yaml, with_architecture
from hacl_megatron.plan.planner import Plan
from hacl_megatron.plan.suggest import suggest_layouts
from hacl_megatron.plan.vision_parallel import COUNTED_ON, faster_way, plans_by_way, with_vision_parallel
from hacl_megatron.plan.workload import (
    MicroBatchShape,
    PackShape,
    Samples,
    Segments,
    assumed_samples,
    micro_batch_shape,
)
from hacl_megatron.platform.hardware import GIB, GPUS, Cluster
from tests.plan.example_plans import EXAMPLES, REPOSITORY, example, plan_of, seventy_billion
from tests.plan.plan_cases import FULL

PUBLISHED = {
    "pretrain_7b": dict(global_batch_size=256, lr=1e-3, version="plain", freeze_LM=True, contrastive_weight=0.0),
    "pretrain_13b": dict(global_batch_size=256, lr=1e-3, version="plain", freeze_LM=True, contrastive_weight=0.0),
    "finetune_7b": dict(global_batch_size=128, lr=2e-5, version="v1", freeze_LM=False, contrastive_weight=0.0),
    "finetune_13b": dict(global_batch_size=128, lr=2e-5, version="v1", freeze_LM=False, contrastive_weight=0.0),
    "hacl_pretrain_7b": dict(
        global_batch_size=512, micro_batch_size=32, lr=1e-3, version="plain", freeze_LM=True, contrastive_weight=1.0,
        contrastive_negatives="queue", queue_size=16_384, initial_temperature=0.07,
    ),
    "dpo_7b": dict(
        preference_loss="dpo", preference_beta=0.1, generation_weight=0.0, contrastive_weight=0.0, lr=2e-6,
        connector_lr=0.0, global_batch_size=128, micro_batch_size=16, version="v1", lora_rank=128, lora_alpha=256,
        lora_dropout=0.0, lora_target_modules=[],
    ),
    "mdpo_7b": dict(
        preference_loss="mdpo", preference_beta=0.1, generation_weight=0.0, contrastive_weight=0.0, lr=1e-5,
        connector_lr=0.0, global_batch_size=32, micro_batch_size=4, version="v1", lora_rank=64, lora_alpha=128,
        lora_dropout=0.0, lora_target_modules=[], num_train_epochs=3, lr_warmup_fraction=0.1, weight_decay=0.05,
        adam_beta2=0.98,
    ),
    "phrase_7b": dict(
        preference_loss="phrase", generation_weight=1.0, contrastive_weight=0.0, lr=5e-6, connector_lr=0.0,
        global_batch_size=64, micro_batch_size=4, version="v1", lora_rank=128, lora_alpha=256, lora_dropout=0.0,
        lora_target_modules=[],
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
    groups = (
        config.model, config.lora, config.data, config.objective, config.preference, config.optimizer, config.training
    )  # fmt: skip
    flags = {key: value for group in groups for key, value in vars(group).items()}
    expected = {**ALWAYS, **PUBLISHED[name]}
    assert {key: flags[key] for key in expected} == expected
    plan = plan_of(config, 16 if name.startswith("hacl") else 8)
    assert plan.fits, plan.memory / GIB
    samples = plan.layout.dp * plan.samples_per_micro_batch * plan.layout.num_micro_batches
    assert samples == pytest.approx(plan.layout.global_batch_size)


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
    plan = plan_of(config, 1, "h100-80g", shape, compute_efficiency=0.5)  # without Transformer Engine and flash-attn
    # What torch allocates: without the reserve for the CUDA context.
    assert (plan.memory - plan.cluster.reserve) / GIB == pytest.approx(gib, rel=0.05)
    assert plan.samples_per_second == pytest.approx(samples_per_second, rel=0.1)


@pytest.mark.parametrize(
    ("stage", "context", "fp8", "seconds", "gib"),
    [
        ("hacl_pretrain_7b", "image", False, 0.888, 75.1),
        ("hacl_pretrain_7b", "prompt", False, 0.509, 49.7),
        ("hacl_pretrain_7b", "image", True, 0.607, 89.5),
        ("finetune_7b", "image", False, 0.864, 87.2),
    ],
)
def test_estimates_are_near_what_was_measured_on_one_h200(stage, context, fp8, seconds, gib):
    """LLaVA-1.5 7B's sizes (16 layers in stage 2), bf16, Transformer Engine and flash-attn, 2026-11-26: 16 samples, in
    stage 2 in two micro-batches; lengths are those of what ran (tests/gpu/measure_package.py)."""
    config = example(stage)
    first = stage == "hacl_pretrain_7b"
    config.objective.contrastive_weight, config.objective.contrastive_image_context = 1.0, context
    if not first:
        config.objective.contrastive_negatives = "micro-batch"
        language = replace(config.architecture.language, num_layers=16)
        config = with_architecture(config, replace(config.architecture, language=language))
    config.training.micro_batch_size, config.training.global_batch_size = (16 if first else 8), 16
    config.transformer = {"fp8": "hybrid"} if fp8 else {}
    samples = Samples(
        num_samples=256, image_share=1, text_tokens=19.2 if first else 334.9, target_tokens=18.2 if first else 128.6,
        question_tokens=1 if first else 200, pair_share=1, caption_tokens=19.4, hallucinated_per_pair=1,
    )  # fmt: skip
    size = config.training.micro_batch_size
    plan = plan_of(config, 1, "h200-141g", micro_batch_shape(config, samples, size, 16 // size))
    assert plan.time.total == pytest.approx(seconds, rel=0.06)
    assert (plan.memory - plan.cluster.reserve) / GIB == pytest.approx(gib, rel=0.06)


@pytest.mark.parametrize("name", ["dpo_7b", "mdpo_7b", "phrase_7b"])
def test_twins_of_the_training_data_are_planned(name):
    """Catches a plan of a likelihood objective that has no rows for its twins, because no pairs are mixed in; and one
    of mdpo without the answers behind crops, which are whole dialogues."""
    config = example(name)
    plan = plan_of(config, 8)
    rejected, *crops = plan.micro_batch.main.of_kind("rejected")
    assert [crop.length for crop in crops] == [576 + 205] * (name == "mdpo_7b")
    assert rejected.count == config.training.micro_batch_size and rejected.length == 150
    config.data.contrastive_data_path = ["twins.json"]  # beside LLaVA's own: as many
    mixed, *_ = plan_of(config, 8).micro_batch.main.of_kind("rejected")
    assert mixed.count == config.training.micro_batch_size / 2 and mixed.length == 18
    config.data.contrastive_data_path, config.preference.preference_loss = [], "none"
    config.preference.generation_weight = 1.0
    assert not plan_of(config, 8).micro_batch.main.of_kind("rejected")


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


def test_seventy_billion_parameters():
    """68,976,648,192 is what transformers counts in Llama-2 70B."""
    config = from_yaml(yaml.safe_dump(seventy_billion()), "70b")
    config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size = 8, 4
    config.parallel.sequence_parallel, config.training.micro_batch_size = True, 1
    plan = plan_of(config, 1024)
    assert plan.parts["language_model"] == (68_976_648_192, 0)
    assert plan.fits
    assert plan.stages[0].memory.activations > plan.stages[3].memory.activations


def test_memory_grows_with_what_it_should():
    base = plan_of(example("finetune_7b"), 8)

    def changed(**flags) -> Plan:
        config = example("finetune_7b")
        for name, value in flags.items():
            group = config.training if hasattr(config.training, name) else config.parallel
            setattr(group, name, value)
        return plan_of(config, 8)

    smaller = changed(micro_batch_size=4)
    assert smaller.stages[0].memory.activations == pytest.approx(base.stages[0].memory.activations / 2, rel=1e-6)
    assert smaller.time.weights > base.time.weights and smaller.time.compute == pytest.approx(base.time.compute)
    split = changed(tensor_model_parallel_size=2, sequence_parallel=True)
    assert split.stages[0].memory.weights < 0.55 * base.stages[0].memory.weights
    assert split.stages[0].sent.tensor_parallel > 0 == base.stages[0].sent.tensor_parallel
    assert GPUS["a100-40g"].memory < base.memory < GPUS["a100-80g"].memory


@pytest.mark.parametrize(("size", "faster"), [(1, "split"), (8, "share")])
def test_the_faster_way_of_a_vision_tower_is_chosen_and_said(size: int, faster: str):
    """One image keeps one of two ranks waiting; of several each has its own, and no sums of layers to wait for."""
    config = example("finetune_7b")
    config.parallel.tensor_model_parallel_size, config.training.micro_batch_size = 2, size
    layout = check_flags(config, 8, files=False)
    chosen, line = with_vision_parallel(config, layout)
    assert chosen.parallel.vision_parallel == faster and config.parallel.vision_parallel is None
    assert line.startswith(f"--vision-parallel {faster} is chosen: by the plan") and "\n" not in line
    ways = plans_by_way(config, layout, COUNTED_ON, assumed_samples(config))
    assert min(ways.values(), key=lambda plan: plan.time.total) is ways[faster]
    split, share = ((plan.stages[0], plan.time) for plan in (ways["split"], ways["share"]))
    assert f"{ways['split'].time.total:.4g} s" in line and f"{ways['share'].time.total:.4g} s" in line
    assert share[0].sent.tensor_parallel < split[0].sent.tensor_parallel
    assert share[0].memory.weights > split[0].memory.weights + 2 * 140e6, "the other half of a frozen ViT-L in bf16"
    assert with_vision_parallel(chosen, layout) == (chosen, None)


def test_a_chosen_way_is_written_as_chosen_and_chosen_anew_at_another_layout(tmp_path, monkeypatch, capsys):
    """What --print-config prints, as run_config.yaml has it, taken as --config: catches a choice that looks like the
    user's, one that a larger layout refuses (16 heads over 32 ranks), and one that was given and is lost."""
    config = example("finetune_7b")
    config.parallel.tensor_model_parallel_size, config.training.micro_batch_size = 2, 1
    (tmp_path / "given.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(train, "resolved", lambda config: (config, check_flags(config, 8, files=False)))
    train.run(["--config", str(tmp_path / "given.yaml"), "--print-config"])
    printed = capsys.readouterr().out
    assert "\nvision_parallel: null  # split is chosen here\n" in printed
    again = from_yaml(printed)
    assert again == config
    again.parallel.tensor_model_parallel_size = 32
    layout = check_flags(again, 32, files=False)
    check_architecture(again, layout)
    assert with_vision_parallel(again, layout)[0].parallel.vision_parallel == "share"
    config.parallel.vision_parallel = "share"
    given, _ = with_vision_parallel(config, check_flags(config, 8, files=False))
    assert from_yaml(to_yaml(given)) == given == config and given.parallel.vision_parallel == "share"


@pytest.mark.parametrize(
    ("split", "share", "chosen"),
    [((2.0, True), (1.0, False), "split"), ((2.0, False), (3.0, True), "share"), ((1.0, True), (0.999, True), "split"),
     ((1.0, True), (0.99, True), "share"), ((1.0, False), (0.9, False), "share")],
)  # fmt: skip
def test_a_way_must_fit_and_be_clearly_faster(split: tuple, share: tuple, chosen: str):
    """Catches a run that took more memory than there is, or gigabytes of it for less time than the plan can tell."""
    plans = {
        way: SimpleNamespace(time=SimpleNamespace(total=total), fits=fits)
        for way, (total, fits) in {"split": split, "share": share}.items()
    }
    assert faster_way(plans) == chosen


def test_sums_of_a_trained_towers_gradients_are_planned_once_a_step():
    config = example("finetune_7b")
    config.parallel.tensor_model_parallel_size, config.parallel.vision_parallel = 2, "share"
    frozen = plan_of(config, 8)
    config.model.freeze_ViT = False
    trained = plan_of(config, 8)
    more = trained.stages[0].sent.tensor_parallel - frozen.stages[0].sent.tensor_parallel
    assert more == pytest.approx(4 * 290_909_184), "fp32, an all-reduce of two ranks"


# ------------------------------------------------------------------------------------------------------------- the tool


def run_tool(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["plan_run.py", *arguments])
        runpy.run_path(str(REPOSITORY / "tools" / "plan_run.py"), run_name="__main__")
    captured = capsys.readouterr()
    return left.value.code, captured.out + captured.err


@pytest.mark.parametrize(
    ("example", "row", "names"),
    [
        ("llava_1_5", "plan", ["pretrain_7b", "pretrain_13b", "finetune_7b", "finetune_13b"]),
        ("backbones", "hours", ["pretrain_qwen2_5_7b", "qwen2_5_7b", "pretrain_llama3_1_8b", "llama3_1_8b"]),
    ],
)
def test_readmes_say_the_hours_that_the_tool_says(capsys, example, row, names):
    folder = REPOSITORY / "examples" / example
    (line,) = re.findall(rf"^\| {row} \|(.*)\|$", (folder / "README.md").read_text(), flags=re.M)
    said = []
    for name in names:
        _, text = run_tool(capsys, "--config", str(folder / f"{name}.yaml"), "--gpu", "a100-80g")
        said += re.findall(r"^run: .*, (\S+) h$", text, flags=re.M)
    assert [cell.strip().removesuffix(" h") for cell in line.split("|")] == said


def test_tool_prints_every_part_of_a_plan(capsys):
    code, text = run_tool(capsys, "--config", str(EXAMPLES / "pretrain_7b.yaml"), "--gpu", "a100-80g")
    assert code == 0, text
    for words in (
        "6,738,415,616", "fits: stage 0", "GB sent a GPU a step", "published for LLaVA-1.5 7B pretrain", "3.5 h",
        "checkpoint:", "55% of the peak", "run: 2,181 iterations",
    ):  # fmt: skip
        assert words in text, words


def test_tool_prints_the_plan_of_a_likelihood_objective(capsys):
    """Catches a report that has no word for the twins' rows."""
    file = ["--config", str(EXAMPLES / "dpo_7b.yaml"), "--gpu", "a100-80g", "--num-samples", "12800"]
    code, text = run_tool(capsys, *file)
    assert code == 0 and "run: 100 iterations" in text and ", twins " in text and "published" not in text, text


def test_fp8_is_planned_by_its_own_peak_and_only_where_a_gpu_has_it(tmp_path, capsys):
    """Catches an efficiency that is asked for and not heard, and A100s among what a run in FP8 fits."""
    values = yaml.safe_load((EXAMPLES / "pretrain_7b.yaml").read_text())
    (tmp_path / "fp8.yaml").write_text(yaml.safe_dump({**values, "transformer": {"fp8": "hybrid"}}))
    command = ("--config", str(tmp_path / "fp8.yaml"), "--gpu")
    code, text = run_tool(capsys, *command, "h100-80g", "--compute-efficiency", "0.3")
    assert code == 0 and "30% of the peak FLOP/s of FP8" in text
    code, text = run_tool(capsys, *command, "a100-80g")
    assert code != 0 and "a100-80g has no FP8 units; leave it out" in text


@pytest.mark.parametrize(
    ("name", "hours"),
    [("pretrain_7b", "3.5 h"), ("pretrain_13b", "5.5 h"), ("finetune_7b", "10 h"), ("finetune_13b", "20 h")],
)
def test_tool_sets_its_hours_beside_the_published_ones(capsys, name, hours):
    """On 8 GPUs; and the same file can be planned for 16, where nothing was published."""
    file = ["--config", str(EXAMPLES / f"{name}.yaml"), "--gpu", "a100-80g"]
    code, text = run_tool(capsys, *file)
    ours, theirs = text.split("\nrun: ")[1].splitlines()[:2]
    assert code == 0 and theirs.startswith("published for LLaVA-1.5") and theirs.endswith(f" {hours}")
    assert 0.4 < float(ours.split()[-2]) / float(hours.split()[0]) < 1.1
    code, text = run_tool(capsys, *file, "--nodes", "2", "--gpus-per-node", "8")
    assert code == 0 and "published" not in text


def test_tool_takes_flags_over_the_file_and_says_when_a_run_does_not_fit(capsys):
    file = ["--config", str(EXAMPLES / "finetune_7b.yaml"), "--gpu", "a100-40g"]
    code, text = run_tool(capsys, *file)
    assert code == 1 and "DOES NOT FIT: stage 0" in text and "most of it gradients" in text
    code, text = run_tool(capsys, *file, "--tensor-model-parallel-size", "4", "--sequence-parallel", "--nodes", "2")
    assert code == 0 and "4 x 1 x 4" in text
    assert text.startswith("--vision-parallel share is chosen") and ", images shared out over tensor-parallel" in text
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
    found = suggest_layouts(config, 16, cluster, assumed_samples(config))
    assert len(found) > 10 and all(plan.fits for plan in found)
    speeds = [plan.samples_per_second for plan in found]
    assert all(slower <= faster + 1e-3 for faster, slower in pairwise(speeds))
    assert {plan.layout.global_batch_size for plan in found} == {128}
    sizes = {plan.layout.tp * plan.layout.pp for plan in found}
    assert min(sizes) == 2, "26 GB of weights and 52 of gradients are too much for one GPU"
    code, text = run_tool(capsys, "--config", str(EXAMPLES / "finetune_13b.yaml"), "--suggest", "--gpu", "a100-80g")
    assert code == 0 and "The first: --tensor-model-parallel-size" in text


def test_suggestions_divide_by_context_parallel_ranks_first():
    """Catches a batch that counts a pack once for each rank that shares it, and "No layout fits" of an uneven size."""
    config = example("finetune_13b")
    config.training.global_batch_size, config.parallel.context_parallel_size = None, 4
    cluster = Cluster(gpu_name="a100-80g", gpus_per_node=8)
    found = suggest_layouts(config, 16, cluster, assumed_samples(config))
    assert {plan.layout.global_batch_size for plan in found} == {4 * config.training.micro_batch_size}
    with pytest.raises(ValueError, match=r"16 processes cannot .* 3 context-parallel ranks .* a multiple of 3"):
        config.parallel.context_parallel_size = 3
        suggest_layouts(config, 16, cluster, assumed_samples(config))


def test_nothing_is_suggested_where_nothing_fits(capsys, tmp_path):
    file = tmp_path / "70b.yaml"
    file.write_text(yaml.safe_dump(seventy_billion()))
    code, text = run_tool(capsys, "--config", str(file), "--suggest", "--gpus-per-node", "1", "--gpu", "a100-40g")
    assert code == 1 and "No layout of these GPUs fits" in text
