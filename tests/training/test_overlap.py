"""`--overlap-param-gather` in small buckets: whatever uses a parameter has waited for it, and on all ranks alike.

At real sizes a bucket is a part of the model; the tiny models of other tests fit into one, which is gathered whole
before anything runs.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny_blip2_config, tiny_llava_config, tiny_siglip_config
from tests.training.late_gathers import run_with_late_gathers
from tests.training.runs import LOSSES, layout_flags, make_inputs, metrics, train, weights, write_hf_stages

OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
TRAINED_TOWER = ["--freeze-ViT", "false"]
ONE_SAMPLE_EACH = ["--balance-micro-batches", "false"]  # so that ranks' packs differ in what they hold
# At the end alone: it waits for all parameters first, as does whatever else reads them between two steps.
VALIDATION = ["--valid-data-path", "{}/valid.json", "--eval-interval", "2", "--eval-iters", "1"]
# name -> (folder of inputs, stage, samples of a micro-batch over both ranks, flags)
MODELS = {
    "local": ("llava", "finetune", 8, []),
    "one sample each": ("llava", "finetune", 2, [*TRAINED_TOWER, *ONE_SAMPLE_EACH, *VALIDATION]),
    "tied": ("tied", "finetune", 8, []),
    "lora": ("llava", "finetune", 4, ["--lora-rank", "4", "--lr", "1e-2", "--connector-lr", "1e-3"]),
    "q-former": ("minigpt4", "finetune", 8, [*TRAINED_TOWER, "--freeze-qformer", "false"]),
    "siglip": ("siglip", "pretrain", 8, TRAINED_TOWER),
}
RUNS = [*((name, "late") for name in MODELS), ("local", "real"), ("one sample each", "real")]
COMPARED = (*LOSSES, "temperature", "hallucination margin", "grad-norm")


def command(folder: Path, name: str, save: str, *extra: str, bucket_size: int | None = None) -> list[str]:
    inputs, stage, samples, flags = MODELS[name]
    config = folder / inputs / f"{stage}.yaml"
    if bucket_size is not None:
        settings = yaml.safe_load(config.read_text()) | {"ddp": {"bucket_size": bucket_size}}
        config = folder / inputs / f"{stage}-{bucket_size}.yaml"
        config.write_text(yaml.safe_dump(settings))
    files = ["--config", str(config), "--save", str(folder / f"{name} {save}")]
    layout = layout_flags("dp2-dist", samples=samples)[1]
    return [*files, "--train-iters", "2", *layout, *(f.format(folder) for f in flags), *extra]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, on one group of processes."""
    folder = tmp_path_factory.mktemp("overlap")
    make_inputs(folder / "llava")
    make_inputs(folder / "tied", tie=True)
    siglip = tiny_llava_config()
    siglip.vision_config = tiny_siglip_config()
    for name, config in (("minigpt4", tiny_blip2_config()), ("siglip", siglip)):
        write_hf_stages(folder / name, config)
    records = json.loads((folder / "llava" / "data" / "finetune.json").read_text())
    (folder / "valid.json").write_text(json.dumps(records[4:]))  # the one rank's first sample has no image
    commands = [command(folder, name, "plain") for name in MODELS]
    for name, how in RUNS:
        if how == "late":
            one = command(folder, name, how, *OVERLAP, bucket_size=1)
            commands.append(partial(run_with_late_gathers, one))
        else:
            commands.append(command(folder, name, how, *OVERLAP, bucket_size=3800))
    train(commands, 2)
    return folder


@pytest.mark.parametrize(("name", "how"), RUNS)
def test_no_parameter_is_read_before_it_is_there(finished: Path, name: str, how: str) -> None:
    plain, overlapped = metrics(finished / f"{name} plain"), metrics(finished / f"{name} {how}")
    assert len(plain) == len(overlapped) == 2
    for row, other in zip(plain, overlapped, strict=True):
        tags = [tag for tag in row if tag in COMPARED or tag.endswith("validation")]
        assert tags == [tag for tag in other if tag in tags] and {*COMPARED} <= {*tags}
        for tag in tags:
            assert math.isclose(row[tag], other[tag], rel_tol=1e-5, abs_tol=1e-7), (tag, row[tag], other[tag])
    one, other = weights(finished / f"{name} plain"), weights(finished / f"{name} {how}")
    assert one.keys() == other.keys()
    # Entries whose gradient is all rounding go either way, by up to 2 lr a step: a wrong shard would be far off.
    assert all(((value - other[key]).abs() <= 2e-5).float().mean() >= 0.99 for key, value in one.items())
