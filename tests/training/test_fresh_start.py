"""What no Hugging Face file holds starts by the run's own flags, whether its weights were converted before or not."""

from pathlib import Path

import pytest
import torch
import yaml

from hacl_megatron.checkpoint.convert.hf_to_megatron import drawn_by_conversion
from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.run.folder import locate_checkpoint
from tests.checkpoint.hf.round_trip_files import write_parts
from tests.tool_runs import run_tool
from tests.training.runs import LOSSES, layout_flags, make_inputs, metrics, train

RESTING = ["--lr", "1e-30"]
"""Saves what the run started from."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps each: from a LLaMA and a CLIP, from these converted with another seed, and on from that run."""
    folder = make_inputs(tmp_path_factory.mktemp("fresh"))
    llama, clip, _ = write_parts(folder / "parts", whole_clip=False)
    parts = ["--language-model", llama, "--vision-tower", clip]
    assert run_tool("convert_hf_to_megatron", *parts, "--save", folder / "converted", "--seed", "5") == 0
    given = yaml.safe_load((folder / "pretrain.yaml").read_text())
    del given["pretrained-checkpoint"]
    (folder / "fresh.yaml").write_text(yaml.safe_dump({**given, "tokenizer": str(folder / "llava"), "train-iters": 2}))

    flags = ["--config", str(folder / "fresh.yaml"), "--seed", "7", *layout_flags("tp1")[1]]
    flags += ["--heads-init", "same", "--initial-temperature", "0.2"]
    converted = ["--pretrained-checkpoint", str(folder / "converted")]
    starts = {
        "from-parts": ["--pretrained-checkpoint", str(llama), "--vision-tower", str(clip)],
        "from-converted": converted,
        "resting": [*converted, *RESTING],
        "from-run": ["--pretrained-checkpoint", str(folder / "from-converted"), "--seed", "9", *RESTING],
    }
    train([[*flags, *start, "--save", str(folder / name)] for name, start in starts.items()], 1)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = ShardedReader(locate_checkpoint(folder))
    return {name: reader.read(name) for name in reader.names()}


def test_a_conversion_and_its_sources_start_the_same_run(runs: Path) -> None:
    for parts, converted in zip(metrics(runs / "from-parts"), metrics(runs / "from-converted"), strict=True):
        assert {tag: parts[tag] for tag in LOSSES} == {tag: converted[tag] for tag in LOSSES}
    expected, found = weights(runs / "from-parts"), weights(runs / "from-converted")
    assert expected.keys() == found.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_heads_and_connector_follow_the_runs_flags_and_the_rest_the_conversion(runs: Path) -> None:
    stored, started = weights(runs / "converted"), weights(runs / "resting")
    drawn = drawn_by_conversion(locate_checkpoint(runs / "converted"))
    assert {name.split(".")[0] for name in drawn} == {"connector", "heads"}
    for name, value in started.items():
        if name not in drawn:
            assert torch.equal(value, stored[name]), name
        elif name.endswith("weight"):
            assert not torch.equal(value, stored[name]), name  # --seed 7, not the conversion's 5
    assert torch.equal(started["heads.vision_projector.weight"], started["heads.text_projector.weight"])
    assert started["heads.temperature"].item() == pytest.approx(0.2)
    assert not torch.equal(stored["heads.vision_projector.weight"], stored["heads.text_projector.weight"])


def test_what_a_run_has_learned_is_kept(runs: Path) -> None:
    trained, started = weights(runs / "from-converted"), weights(runs / "from-run")
    assert [name for name in trained if not torch.equal(trained[name], started[name])] == []
    before = weights(runs / "resting")
    assert not torch.equal(trained["heads.vision_projector.weight"], before["heads.vision_projector.weight"])


def test_a_damaged_report_of_a_conversion_is_one_line(tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000000"
    for text, words in (('{"fresh": [', "not valid JSON"), ('{"fresh": 3}', "expected a list of parameters")):
        (tmp_path / "converted_from.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            drawn_by_conversion(checkpoint)
    assert drawn_by_conversion(tmp_path / "iter_0000001") == []
