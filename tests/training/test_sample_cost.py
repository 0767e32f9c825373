"""Samples dealt out by what they cost: real packs of every rank, from the loaders that the trainer opens."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from hacl_megatron.assemble.start_from import resolve_architecture
from hacl_megatron.batch import StepBatches
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig, parse_run_config, with_architecture
from hacl_megatron.data.tokenizer import load_tokenizer
from hacl_megatron.training import build
from hacl_megatron.training.flops import step_flops, vision_flops
from tests.measure.measure_stragglers import flags_of, write_inputs

RANKS, STEPS = 4, 3
TOWER = {"hidden": 192, "ffn": 768, "layers": 6, "heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("cost"), records=(STEPS + 1) * 16, tower=TOWER)


def config_of(folder: Path, *flags: str) -> RunConfig:
    config = parse_run_config(flags_of(folder, folder / "save", "--train-iters", "3", "--prefetch-steps", "1", *flags))
    return with_architecture(config, resolve_architecture(config, None))


def draw(config: RunConfig) -> list[list[StepBatches]]:
    """Of each rank the first steps."""
    tokenizer, found = load_tokenizer(config.model.pretrained_checkpoint), []
    for rank in range(RANKS):
        groups = SimpleNamespace(dp=SimpleNamespace(rank=lambda rank=rank: rank))
        run = SimpleNamespace(config=config, layout=Layout.of(config, RANKS), groups=groups)
        with build.open_loader(run, tokenizer) as loader:
            found.append([next(loader) for _ in range(STEPS)])
    return found


def most_over_mean(ranks: list[list[StepBatches]], config: RunConfig) -> tuple[float, float]:
    """Means over the steps of what the busiest rank has over the mean rank: of the tower's FLOPs, and of all."""
    found = []
    for step in zip(*ranks, strict=True):
        images = [sum(batch.main.num_images for batch in rank.micro_batches) for rank in step]
        tower = [vision_flops(config.architecture, number, trained=True) for number in images]
        trains = {"trains_language_model": True, "trains_vision_tower": True}
        flops = [step_flops(config.architecture, rank.micro_batches, **trains) for rank in step]
        found.append([max(each) * len(each) / sum(each) for each in (tower, flops)])
    return tuple(sum(each) / len(found) for each in zip(*found, strict=True))


@pytest.mark.parametrize("how", [(), ("--micro-batch-size", "1"), ("--micro-batch-tokens", "1500")], ids=" ".join)
def test_ranks_have_as_much_to_do_where_pictures_differ_in_views(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    """Fails where the tower's work does not reach the assignment, or where a sample gets lost or trains twice on the
    way; the global batches stay what they are, and so does the state to go on from."""
    config = config_of(folder, "--freeze-ViT", "false", *how)
    ranks = draw(config)
    monkeypatch.setattr(build, "sample_cost", lambda *_, **__: None)
    before = draw(config)
    tower, flops = most_over_mean(ranks, config)
    tower_before, flops_before = most_over_mean(before, config)
    print(f"{how}: tower {tower_before:.3f} -> {tower:.3f}, all {flops_before:.3f} -> {flops:.3f}")
    assert flops < 1.08 < 1.2 < flops_before and tower < tower_before - 0.1

    def samples(of: list[list[StepBatches]], step: int) -> list[int]:
        packs = [batch.main for rank in of for batch in rank[step].micro_batches]
        return sorted(sample for pack in packs for sample in pack.sample_ids.tolist())

    for step in range(STEPS):
        assert samples(ranks, step) == samples(before, step) and len(samples(ranks, step)) == 16
        assert ranks[0][step].data_state == before[0][step].data_state
        assert len({len(rank[step].micro_batches) for rank in ranks}) == 1
        hashes = {batch.main.shared_out_by for rank in ranks for batch in rank[step].micro_batches}
        assert len(hashes) == 1, "all ranks weighed the same samples"


def test_no_cost_where_no_rank_waits_for_another(folder: Path) -> None:
    """One process: even rows, which decide its memory, as ever."""
    config = config_of(folder)
    assert build.sample_cost(config, SimpleNamespace(dp=1, pp=1)) is None
    assert build.sample_cost(config, SimpleNamespace(dp=1, pp=2)) and build.sample_cost(
        config, SimpleNamespace(dp=2, pp=1)
    )
