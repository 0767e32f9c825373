"""A LLaMA and a CLIP tower as a beginning, and a projector of its own laid over the connector or written alone."""

import pytest
import torch
from safetensors.torch import load_file

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.export import export_projector
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE, open_sources
from hacl_megatron.config.checks.files import check_inputs
from hacl_megatron.config.flags import DataFlags, ModelFlags
from hacl_megatron.config.run import RunConfig
from tests.checkpoint.hf.round_trip_files import assert_same, load_exactly, save_adapter, write_heads, write_parts
from tests.checkpoint.rank_modules import ImportedModel, import_everywhere
from tests.tiny import write_tiny_llava


@pytest.mark.parametrize("whole_clip", [False, True])
def test_two_part_start_leaves_connector_and_heads_fresh(tmp_path, whole_clip):
    llama, clip, _ = write_parts(tmp_path / "parts", whole_clip=whole_clip)
    config = read_model_config(llama, vision_tower=clip)
    whole = import_everywhere(tmp_path / "parts" / "llava", read_model_config(tmp_path / "parts" / "llava"), tp_size=2)
    imported = import_everywhere(llama, config, tp_size=2)
    report = imported.reports[0, 0]
    assert {name.partition(".")[0] for name in report.fresh} == {"connector", "heads"}
    assert_same(
        imported.merged, {name: value for name, value in whole.merged.items() if not name.startswith("connector.")}
    )
    assert any(reason == "the text side of CLIP or SigLIP" for reason in report.ignored.values()) == whole_clip


def test_adapter_may_be_the_folder_of_a_first_stage(tmp_path):
    """Catches a refusal of what LLaVA's first stage and --format projector leave."""
    write_parts(tmp_path / "parts", whole_clip=False)
    (tmp_path / "stage1").mkdir()
    adapter = save_adapter(tmp_path / "stage1" / "mm_projector.bin", "model.mm_projector.")
    config = read_model_config(tmp_path / "parts" / "llava")
    sources = open_sources(tmp_path / "parts" / "llava", config, adapter=tmp_path / "stage1")
    assert all(torch.equal(sources.read(f"projector.{name}"), value) for name, value in adapter.items())
    flags = ModelFlags(pretrained_checkpoint=str(tmp_path), pretrain_mm_mlp_adapter=str(tmp_path / "stage1"))
    data = DataFlags(image_folder=str(tmp_path), data_path=[str(tmp_path / "stage1" / "mm_projector.bin")])
    check_inputs(RunConfig(model=flags, data=data))
    flags.pretrain_mm_mlp_adapter = str(tmp_path / "parts")
    with pytest.raises(ValueError, match="no such file, or no folder with one"):
        check_inputs(RunConfig(model=flags, data=data))


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."])
@pytest.mark.parametrize("start", ["llava", "llama"])
def test_adapter_is_laid_over_the_connector(tmp_path, prefix, start):
    write_parts(tmp_path / "parts", whole_clip=False)
    adapter = save_adapter(tmp_path / "mm_projector.bin", prefix)
    folder = tmp_path / "parts" / start
    config = read_model_config(folder, vision_tower=tmp_path / "parts" / "clip" if start == "llama" else None)
    imported = import_everywhere(folder, config, adapter=tmp_path / "mm_projector.bin")
    for name, value in adapter.items():
        assert torch.equal(imported.merged[f"connector.{name}"], value)
    assert str(tmp_path / "mm_projector.bin") in imported.reports[0, 0].summary()


def test_projector_alone_round_trips_as_an_adapter(tmp_path):
    source = write_tiny_llava(tmp_path / "in")
    heads = write_heads(source)
    config = read_model_config(source)
    imported: ImportedModel = import_everywhere(source, config)
    export_projector(imported.provider, config, tmp_path / "out", dtype=torch.float32)
    stored = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    expected = load_exactly(source).model.multi_modal_projector.state_dict()
    names = {
        "0.weight": "linear_1.weight",
        "0.bias": "linear_1.bias",
        "2.weight": "linear_2.weight",
        "2.bias": "linear_2.bias",
    }
    assert_same(stored, {f"model.mm_projector.{ours}": expected[theirs] for ours, theirs in names.items()})
    assert_same(load_file(tmp_path / "out" / HEADS_FILE), heads)

    other = write_tiny_llava(tmp_path / "other", seed=9)
    again = import_everywhere(other, read_model_config(other), adapter=tmp_path / "out" / "mm_projector.bin")
    for name in names:
        assert torch.equal(again.merged[f"connector.{name}"], imported.merged[f"connector.{name}"])
