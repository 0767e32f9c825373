"""Precision, clipping, weight decay, rates and the temperature's bounds: what an optimiser step does to parameters."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from hacl_megatron.assemble.module import build_module, load_pretrained
from hacl_megatron.assemble.processes import initialize_parallelism
from hacl_megatron.assemble.start_from import resolve_architecture
from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.layout import world_size_from_environment
from hacl_megatron.config.run import parse_run_config, with_architecture
from hacl_megatron.platform.processes import start_platform
from hacl_megatron.training.trainee import Trainee, build_trainee
from tests.distributed import run_distributed
from tests.training.runs import LOSSES, layout_flags, make_inputs, metrics, tensors, train, weights

ITERATIONS, WARM_UP_FRACTION, WARM_UP = 12, 0.3, 3
RATES = {"default": 1e-2, "connector": 3e-2, "heads": 5e-3}
MIN_RATE = 1e-3
# An epsilon far above the gradients makes Adam's step proportional to them, so that their clipping shows.
CLIPPED = ["--clip-grad", "0.5", "--adam-eps", "1", "--lr", "0.5", "--lr-decay-style", "constant"]
CLIPPED += ["--lr-warmup-fraction", "0"]
APART = ["--clip-heads-apart", "--clip-grad", "0.2"]


def command(folder: Path, stage: str, layout: str, save: str | None, *extra: str) -> list[str]:
    _, flags = layout_flags(layout)
    where = ["--save", str(folder / save)] if save else []
    return ["--config", str(folder / f"{stage}.yaml"), *where, *flags, *extra]


def build(arguments: Sequence[str]) -> Trainee:
    """Model, optimiser and schedule as a run builds them."""
    config = parse_run_config(arguments)
    layout = check_flags(config, world_size_from_environment())
    config = with_architecture(config, resolve_architecture(config, None))
    check_architecture(config, layout)
    device = start_platform("cpu")
    groups = initialize_parallelism(config, layout)
    module = build_module(config, groups, device)
    load_pretrained(module, config)
    return build_trainee(module, config, config.training.train_iters)


# ------------------------------------------------------------------------------------------------- runs as a whole


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("precision"))


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    folder = inputs
    slow = ["--heads-lr", "1e-5"]
    one = [
        command(folder, stage, "tp1", f"{stage}-{precision}", *slow, *flags)
        for stage in ("pretrain", "finetune")
        for precision, flags in (("fp32", []), ("bf16", ["--bf16"]))
    ]
    fp32 = ["--pretrained-checkpoint", str(folder / "pretrain-fp32"), "--lr", "1e-30"]
    one += [
        command(folder, "finetune", "tp1", "from-fp32", "--bf16", "--train-iters", "1", *fp32),
        command(folder, "finetune", "tp1", "clipped-tp1", *CLIPPED),
        command(folder, "finetune", "tp1", "unclipped", *CLIPPED, "--clip-grad", "0", "--train-iters", "2"),
    ]
    one += [command(folder, "finetune", "tp1", "apart-tp1", *CLIPPED, *APART)]
    two = [
        command(folder, "finetune", layout, f"{name}-{layout}", *CLIPPED, *flags)
        for layout in ("tp2-sp", "pp2", "dp2-dist")
        for name, flags in (("clipped", []), ("apart", APART))
    ]
    train(one, 1)
    train(two, 2)
    return folder


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_bf16_follows_fp32(finished: Path, stage: str) -> None:
    exact, rounded = metrics(finished / f"{stage}-fp32"), metrics(finished / f"{stage}-bf16")
    for one, other in zip(exact, rounded, strict=True):
        for tag in LOSSES:
            assert math.isclose(one[tag], other[tag], rel_tol=0.05), (tag, one, other)
    assert any(one["lm loss"] != other["lm loss"] for one, other in zip(exact, rounded, strict=True))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_bf16_steps_are_taken_in_fp32(finished: Path, stage: str) -> None:
    state = tensors(finished / f"{stage}-bf16")
    prefix = "optimizer.state.param."
    masters = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    trained = {"connector.0.weight", "heads.text_projector.weight"}
    trained |= {"language_model.output_layer.weight"} if stage == "finetune" else set()
    assert trained <= masters.keys()
    assert torch.equal(masters.pop("heads.temperature"), state["heads.temperature"])
    for name, master in masters.items():
        assert master.dtype == torch.float32 and state[name].dtype == torch.bfloat16, name
        assert torch.equal(master.bfloat16(), state[name]), name
    assert any(not torch.equal(master, state[name].float()) for name, master in masters.items())


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_temperature_is_fp32_and_moves_by_less_than_bf16_could(finished: Path, stage: str) -> None:
    temperature = weights(finished / f"{stage}-bf16")["heads.temperature"]
    assert temperature.dtype == torch.float32
    # 5 Adam steps of at most 1e-5, where neighbours in bf16 are 5e-4 apart.
    assert 0 < abs(temperature.item() - 0.07) < 1e-4
    exact = weights(finished / f"{stage}-fp32")["heads.temperature"].item()
    assert temperature.item() - 0.07 == pytest.approx(exact - 0.07, rel=0.1)


def test_bf16_run_takes_the_weights_of_an_fp32_checkpoint(finished: Path) -> None:
    exact, taken = weights(finished / "pretrain-fp32"), weights(finished / "from-fp32")
    assert exact.keys() == taken.keys()
    for name, tensor in exact.items():
        assert torch.equal(tensor.to(taken[name].dtype), taken[name]), name


@pytest.mark.parametrize("clipped", ["clipped", "apart"])
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "dp2-dist"])
def test_gradients_are_clipped_by_the_norm_over_all_axes(finished: Path, layout: str, clipped: str) -> None:
    one, many = metrics(finished / f"{clipped}-tp1"), metrics(finished / f"{clipped}-{layout}")
    assert all(row["grad-norm"] > 1 for row in one), "nothing to clip"
    apart = ("grad-norm others", "grad-norm heads") if clipped == "apart" else ()
    assert all(one[0][norm] > 0.2 for norm in apart), "one part is not clipped"
    for row, other in zip(one, many, strict=True):
        for tag in (*LOSSES, "grad-norm", *apart):
            assert math.isclose(row[tag], other[tag], rel_tol=1e-4), (tag, row, other)
    expected, found = weights(finished / f"{clipped}-tp1"), weights(finished / f"{clipped}-{layout}")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
    # Without clipping the same steps lead elsewhere.
    assert not math.isclose(metrics(finished / "unclipped")[1]["lm loss"], one[1]["lm loss"], rel_tol=1e-3)


# ------------------------------------------------------------------------------- the optimiser, group by group


def _groups(arguments: Sequence[str]) -> list[tuple[list[str], dict[str, float]]]:
    """(names of the parameters, settings) of every group."""
    trainee = build(arguments)
    names = {id(parameter): name for name, parameter in trainee.module.named_parameters()}
    trained = {name for name, parameter in trainee.module.named_parameters() if parameter.requires_grad}
    found = [
        (
            [names[id(parameter)] for parameter in group["params"]],
            {key: group[key] for key in ("weight_decay", "max_lr")},
        )
        for group in trainee.optimizer.param_groups
    ]
    assert sorted(name for group, _ in found for name in group) == sorted(trained)
    shapes = {name: parameter.dim() for name, parameter in trainee.module.named_parameters()}
    parallel_state.destroy_model_parallel()
    return [([(name, shapes[name]) for name in group], settings) for group, settings in found]


def _rates(commands: Sequence[Sequence[str]]) -> list[dict[str, list[float]]]:
    """Rate of each kind of group before every iteration, as the schedule sets them."""
    found = []
    for arguments in commands:
        trainee = build(arguments)
        names = {id(parameter): name for name, parameter in trainee.module.named_parameters()}
        rates: dict[str, list[float]] = {"default": [], "connector": [], "heads": []}
        for _ in range(ITERATIONS):
            now: dict[str, set[float]] = {kind: set() for kind in rates}
            for group in trainee.optimizer.param_groups:
                for parameter in group["params"]:
                    part = names[id(parameter)].partition(".")[0]
                    now[part if part in now else "default"].add(group["lr"])
            for kind, values in now.items():
                (value,) = values
                rates[kind].append(value)
            trainee.scheduler.step(increment=1)
        found.append(rates)
        parallel_state.destroy_model_parallel()
    return found


def _bounded(commands: Sequence[tuple[Sequence[str], float]]) -> list[tuple[float, float | None]]:
    """For each (flags, gradient of the temperature): its value in the model and, on the rank that holds it, the
    optimiser's own fp32 value, after one step of rate 10."""
    found = []
    for arguments, gradient in commands:
        trainee = build(arguments)
        trainee.model.zero_grad_buffer()
        trainee.optimizer.zero_grad()
        trainee.module.heads.temperature.main_grad.fill_(gradient)
        trainee.scheduler.step(increment=1)
        trainee.optimizer.step()
        masters = [
            parameter.item()
            for group in trainee.optimizer.param_groups
            if group.get("is_temperature")
            for parameter in group["params"]
            if parameter.numel()
        ]
        found.append((trainee.module.heads.temperature.item(), masters[0] if masters else None))
        parallel_state.destroy_model_parallel()
    return found


def test_weight_decay_spares_biases_vectors_and_the_temperature(inputs: Path) -> None:
    flags = ["--weight-decay", "0.25", "--freeze-ViT", "false", "--connector-lr", "3e-3", "--vision-lr", "2e-6"]
    (groups,) = run_distributed(_groups, 1, command(inputs, "finetune", "tp1", None, *flags))
    decayed = set()
    for members, settings in groups:
        for name, dims in members:
            spared = dims == 1 or name.endswith(".bias") or name == "heads.temperature"
            assert settings["weight_decay"] == (0.0 if spared else 0.25), name
            assert settings["max_lr"] == {"connector": 3e-3, "vision_tower": 2e-6}.get(name.partition(".")[0], 1e-3), (
                name
            )
            if not spared:
                decayed.add(name.partition(".")[0])
    assert decayed == {"connector", "heads", "language_model", "vision_tower"}


def expected_rate(style: str, done: int, peak: float) -> float:
    """Rate of the step after `done` steps: up from 0 in a line, then from `peak` down to MIN_RATE at ITERATIONS."""
    if done <= WARM_UP:
        return peak * done / WARM_UP
    share = (done - WARM_UP) / (ITERATIONS - WARM_UP)
    left = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 1.0}[style]
    return MIN_RATE + (peak - MIN_RATE) * left


def test_rates_follow_the_schedule(inputs: Path) -> None:
    styles = ("cosine", "linear", "constant")
    flags = ["--train-iters", str(ITERATIONS), "--lr-warmup-fraction", str(WARM_UP_FRACTION), "--min-lr", str(MIN_RATE)]
    flags += [f"--lr={RATES['default']}", f"--connector-lr={RATES['connector']}", f"--heads-lr={RATES['heads']}"]
    commands = [command(inputs, "finetune", "tp1", None, *flags, "--lr-decay-style", style) for style in styles]
    (found,) = run_distributed(_rates, 1, commands)
    for style, rates in zip(styles, found, strict=True):
        for kind, peak in RATES.items():
            expected = [expected_rate(style, done, peak) for done in range(ITERATIONS)]
            assert rates[kind] == pytest.approx(expected, rel=1e-9), (style, kind)


def test_the_logged_rate_is_that_of_the_step_just_made(finished: Path) -> None:
    # train-iters 5, cosine from 1e-3 to 0, warm-up int(0.03 * 5) = 0 steps.
    expected = [1e-3 * (1 + math.cos(math.pi * done / 5)) / 2 for done in range(5)]
    assert [row["learning-rate"] for row in metrics(finished / "finetune-fp32")] == pytest.approx(expected)


def test_temperature_is_kept_in_its_bounds_after_the_step_in_fp32(inputs: Path) -> None:
    flags = ["--heads-lr", "10", "--lr-warmup-fraction", "0", "--lr-decay-style", "constant"]
    cases = [
        (command(inputs, "pretrain", "dp2" + kind, None, *flags, *precision), gradient)
        for kind in ("", "-dist")
        for precision in ([], ["--bf16"])
        for gradient in (1.0, -1.0)
    ]
    ranks = run_distributed(_bounded, 2, cases)
    lower, upper = torch.tensor(0.001).item(), 0.5
    for (arguments, gradient), *values in zip(cases, *ranks, strict=True):
        bound = lower if gradient > 0 else upper
        assert [value for value, _ in values] == [bound, bound], arguments
        masters = {master for _, master in values if master is not None}
        assert masters == {bound}, arguments
