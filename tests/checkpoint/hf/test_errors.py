"""What a user can get wrong with weight files: one clear line each, no parameter touched, nothing left on disk."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.export import export_hf, parse_size, why_no_export
from hacl_megatron.checkpoint.hf.fresh_folder import fresh_folder
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE, load_hf_weights
from hacl_megatron.checkpoint.hf.names import NameTable
from tests.checkpoint.rank_modules import import_everywhere, module_of, rank_shapes
from tests.tiny import write_tiny_llava, write_tiny_original_llava


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture
def source(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "in"))


def refused(folder: Path, **options: object) -> str:
    """The message of the import's ValueError; checks that it is one line and that no parameter was changed."""
    config = read_model_config(folder)
    module = module_of(
        rank_shapes(config, tp_size=1, layers=4, first_stage=True, last_stage=True, padded_vocab_size=336),
        torch.float32,
    )
    with pytest.raises(ValueError) as caught:
        load_hf_weights(
            module, folder, config, tp_rank=0, tp_size=1, layer_offset=0, padded_vocab_size=336, **options
        )  # fmt: skip
    assert all(torch.isnan(parameter).all() for parameter in module.parameters())
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "language_model.model.layers.2.input_layernorm.weight"


def test_missing_tensor_is_named(source):
    edit(source, lambda tensors: tensors.pop(NORM))
    message = refused(source)
    assert f"{NORM} [48] is missing" in message and "nearest found: language_model.model.layers." in message


def test_unknown_tensor_is_named_with_the_nearest(source):
    edit(source, lambda tensors: tensors.update({NORM.replace("layernorm", "layrnorm"): tensors.pop(NORM)}))
    message = refused(source)
    assert "layers.2.input_layrnorm.weight is unknown" in message and f"nearest expected: {NORM}" in message


def test_layer_that_the_config_does_not_have(source):
    extra = "language_model.model.layers.4.input_layernorm.weight"
    edit(source, lambda tensors: tensors.update({extra: torch.ones(48)}))
    assert f"{extra} is unknown" in refused(source)


@pytest.mark.parametrize(
    "name", [NORM, "language_model.model.embed_tokens.weight", "vision_tower.encoder.layers.3.mlp.fc1.weight"]
)
def test_wrong_shape_is_named(source, name):
    """The last one is carried only, but a broken tower must not reach an export."""
    edit(source, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    message = refused(source)
    assert name in message and "config.json makes it" in message


def test_same_tensor_under_two_names(source):
    twin = NORM.replace("language_model.model", "model.language_model")
    edit(source, lambda tensors: tensors.update({twin: tensors[NORM].clone()}))
    message = refused(source)
    assert NORM in message and twin in message and "twice" in message


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_cut_safetensors_file(source, keep):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(source)
    assert "model.safetensors" in message and "cut" in message


@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_cut_bin_file(tmp_path, keep):
    folder, _ = write_tiny_original_llava(tmp_path / "in", pickle=True)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(folder)
    assert "pytorch_model.bin" in message and "cut" in message


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickle_with_code_is_not_run(tmp_path, how):
    folder, _ = write_tiny_original_llava(tmp_path / "in", pickle=True)
    marker, state = tmp_path / "ran", {"model.norm.weight": Evil(tmp_path / "ran")}
    if how == "torch":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(state))
    message = refused(folder)
    assert "its code is never run" in message
    assert not marker.exists()
    # The trap is armed: an unsafe load does run it.
    torch.load(folder / "pytorch_model.bin", weights_only=False) if how == "torch" else pickle.loads(
        pickle.dumps(state)
    )
    assert marker.exists()


def test_adapter_with_code_is_not_run(source, tmp_path):
    torch.save({"mm_projector.0.weight": Evil(tmp_path / "ran")}, tmp_path / "mm_projector.bin")
    assert "its code is never run" in refused(source, adapter=tmp_path / "mm_projector.bin")
    assert not (tmp_path / "ran").exists()


def test_adapter_of_another_kind_or_width(source, tmp_path):
    path = tmp_path / "mm_projector.bin"
    torch.save({"mm_projector.weight": torch.zeros(48, 32), "mm_projector.bias": torch.zeros(48)}, path)
    assert "is no mlp2x_gelu connector" in refused(source, adapter=path)
    torch.save({"model.layers.0.weight": torch.zeros(1)}, path)
    assert "is no part of a connector" in refused(source, adapter=path)
    shapes = {"0.weight": (48, 31), "0.bias": (48,), "2.weight": (48, 48), "2.bias": (48,)}
    torch.save({f"mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}, path)
    assert "mm_projector.0.weight is [48, 31]" in refused(source, adapter=path)
    assert "no such file" in refused(source, adapter=tmp_path / "none.bin")
    torch.save([torch.zeros(1)], path)
    assert "dictionary of tensors" in refused(source, adapter=path)


def test_sharded_source_with_a_shard_gone(tmp_path):
    source = write_tiny_llava(tmp_path / "in", max_shard_size="200KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    assert f"shard {shard.name} is missing" in refused(source)
    shard.write_bytes(content)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"][NORM] = "../../etc/passwd"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the folder" in refused(source)
    index["weight_map"][NORM] = shard.name
    index["weight_map"]["ghost"] = shard.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is missing, though" in refused(source)
    (source / "model.safetensors.index.json").write_text("{")
    assert "not valid JSON" in refused(source)


def test_folder_without_weights(source):
    (source / "model.safetensors").unlink()
    assert "no weights there" in refused(source)


def test_heads_file_that_is_none(source):
    save_file({"vision_projector.weight": torch.zeros(12, 48)}, source / HEADS_FILE)
    assert "vision_projector.bias [12] is missing" in refused(source)
    save_file({"queue": torch.zeros(1)}, source / HEADS_FILE)
    assert "queue is unknown" in refused(source)


def test_tower_that_is_nowhere(tmp_path):
    folder, _ = write_tiny_original_llava(tmp_path / "in", vision_tower_inside=False)
    config = read_model_config(folder)
    config.extra["vision_tower_folder"] = None
    with pytest.raises(ValueError, match=r"no vision tower in these weights.*give the folder"):
        load_hf_weights(
            torch.nn.Module(), folder, config, tp_rank=0, tp_size=1, layer_offset=0, padded_vocab_size=320
        )  # fmt: skip


def test_tensor_parallel_size_that_does_not_divide(source):
    rule = NameTable(read_model_config(source)).rules["language_model.decoder.layers.0.mlp.linear_fc1.weight"]
    with pytest.raises(ValueError, match="176 rows, which 3 tensor-parallel ranks cannot share"):
        rule.local_shape(3, 336)


# --------------------------------------------------------------------------------------------------------------- export


@pytest.fixture
def exportable(source):
    shapes = {"vision_projector.weight": (12, 48), "vision_projector.bias": (12,), "text_projector.weight": (12, 48),
              "text_projector.bias": (12,), "temperature": (1,)}  # fmt: skip
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, source / HEADS_FILE)
    config = read_model_config(source)
    return config, import_everywhere(source, config)


def test_export_does_not_overwrite_without_force(exportable, tmp_path):
    config, imported = exportable
    out = tmp_path / "out"
    export_hf(imported.provider, config, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        export_hf(imported.provider, config, out, dtype=torch.float32)
    assert (out / "model.safetensors").read_bytes() == before
    (out / "stale").touch()
    export_hf(imported.provider, config, out, dtype=torch.float32, force=True)
    assert not (out / "stale").exists() and len((out / "model.safetensors").read_bytes()) > len(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_force_does_not_delete_what_is_no_export(exportable, tmp_path):
    config, imported = exportable
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no earlier export"):
        export_hf(imported.provider, config, out, force=True)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_export_that_fails_half_way_leaves_nothing(exportable, tmp_path):
    config, imported = exportable
    imported.merged["language_model.decoder.layers.3.mlp.linear_fc2.weight"] *= 1e6
    with pytest.raises(ValueError, match=r"text.layers.3.mlp.down_proj.weight holds values beyond float16"):
        export_hf(imported.provider, config, tmp_path / "out", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_export_checks_the_disk_first(tmp_path):
    with (
        pytest.raises(ValueError, match=r"GB free, but .* GB are needed"),
        fresh_folder(tmp_path / "x", 10**18, force=False, why_not=why_no_export),
    ):
        pytest.fail("must not get here")
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_read_as_transformers_reads_them():
    assert [parse_size(size) for size in ("5GB", "300MB", "2GiB", "1.5kb", 7)] == [5 * 10**9, 3 * 10**8, 2**31, 1500, 7]
    with pytest.raises(ValueError, match="max_shard_size is 'big'"):
        parse_size("big")
