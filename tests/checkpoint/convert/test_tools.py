"""The conversion tools: bitwise there and back at every layout, logits as transformers has them, one line per error."""

import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE
from hacl_megatron.checkpoint.run.folder import locate_checkpoint
from hacl_megatron.model.fresh import fresh_parts
from tests.checkpoint.convert.layout_cases import agreements, initial_parts, load_compute_save_all
from tests.checkpoint.hf.round_trip_files import (
    MODELS,
    all_tensors,
    assert_same,
    load_exactly,
    save_adapter,
    write_heads,
    write_parts,
)
from tests.distributed import run_distributed
from tests.model.parity_cases import Layout, Variant, write_reference
from tests.tiny import LLAMA3_ROPE_SCALING, write_tiny_llava, write_tiny_original_llava
from tests.tool_runs import apart, run_tool, to_hf, to_megatron

LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)]


# -------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("model", MODELS)
def test_hf_layout_there_and_back(tmp_path, model):
    source = write_tiny_llava(tmp_path / "in", **MODELS[model], max_shard_size="300KB")
    heads = write_heads(source)
    out = to_hf(to_megatron(source, tmp_path / "save"), tmp_path / "out", "--max-shard-size", "200KB")
    assert_same(load_exactly(out).state_dict(), load_exactly(source).state_dict())
    assert_same(load_file(out / HEADS_FILE), heads)


@pytest.mark.parametrize("options", [
    {"projector_type": "mlp2x_gelu", "dtype": torch.bfloat16},
    {"projector_type": "linear", "pickle": True, "tie": True},
    {"projector_type": "mlp3x_gelu", "select_layer": -1, "rope_scaling": LLAMA3_ROPE_SCALING},
], ids=["mlp2x-bf16", "linear-bin-tied", "mlp3x-llama3"])  # fmt: skip
def test_original_layout_there_and_back(tmp_path, options):
    source, tensors = write_tiny_original_llava(tmp_path / "in", **options)
    heads = write_heads(source)
    save = to_megatron(source, tmp_path / "save", "--workers", 3)
    assert_same(all_tensors(to_hf(save, tmp_path / "out", "--format", "llava")), tensors)
    assert_same(load_file(tmp_path / "out" / HEADS_FILE), heads)
    projector = to_hf(save, tmp_path / "projector", "--format", "projector")
    stored = torch.load(projector / "mm_projector.bin", weights_only=True)
    assert_same(stored, {name: value for name, value in tensors.items() if "mm_projector" in name})


def test_dtype_is_asked_for_or_kept(tmp_path):
    source = write_tiny_llava(tmp_path / "in")
    heads = write_heads(source)
    save = to_megatron(source, tmp_path / "save", "--dtype", "bfloat16")
    expected = {name: value.bfloat16() for name, value in load_exactly(source).state_dict().items()}
    assert_same(load_exactly(to_hf(save, tmp_path / "out")).state_dict(), expected)
    assert_same(load_file(tmp_path / "out" / HEADS_FILE), heads)
    half = to_hf(save, tmp_path / "half", "--dtype", "float16")
    assert_same(load_exactly(half).state_dict(), {name: value.half() for name, value in expected.items()})


def test_weights_of_two_dtypes_stay_so(tmp_path, capsys):
    """Catches an export that rounds the wider ones to the dtype of most, and then disagrees with its own checkpoint."""

    def written(folder: Path) -> dict[str, torch.Tensor]:
        """By the names of the source, which this version of transformers has written."""
        return {name.replace("vision_tower.vision_model.", "vision_tower."): value
                for name, value in all_tensors(folder).items()}  # fmt: skip

    source = write_tiny_llava(tmp_path / "in", vision_layers=2, dtype=torch.bfloat16)
    wide = ("vision_tower.", "multi_modal_projector.", "language_model.lm_head", "language_model.model.norm")
    tensors = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if name.startswith(wide):  # no bf16 numbers
            tensors[name] = value.float() * 1.001
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16, torch.float32}
    save = to_megatron(source, tmp_path / "save")
    out, printed = apart(to_hf, save, tmp_path / "out", "--verify", "--max-shard-size", "200KB")
    assert_same(written(out), tensors)
    several = sum(name.startswith(wide) for name in tensors)
    assert f"note: {several} tensors are float32, as in the checkpoint, the others bfloat16" in printed
    one = to_hf(save, tmp_path / "one", "--dtype", "bfloat16")
    assert_same(written(one), {name: value.bfloat16() for name, value in tensors.items()})
    assert "as in the checkpoint" not in capsys.readouterr().out
    projector = torch.load(to_hf(save, tmp_path / "mm", "--format", "projector") / "mm_projector.bin")
    weight = tensors["multi_modal_projector.linear_1.weight"]
    assert_same({"0": projector["model.mm_projector.0.weight"]}, {"0": weight})


def test_two_part_start_with_an_adapter(tmp_path):
    llama, clip, llava = write_parts(tmp_path / "parts", whole_clip=True)
    start = ("convert_hf_to_megatron", "--language-model", llama, "--vision-tower", clip)
    assert run_tool(*start, "--save", tmp_path / "save", "--seed", 11) == 0
    reader = ShardedReader(locate_checkpoint(tmp_path / "save"))
    for name, value in fresh_parts(reader.model_config, 11).items():
        assert torch.equal(reader.read(name), value), name
    norm = reader.read("language_model.decoder.final_layernorm.weight")
    assert torch.equal(norm, llava.model.language_model.norm.weight)

    adapter = save_adapter(tmp_path / "mm_projector.bin", "model.mm_projector.")
    with_adapter = (*start, "--save", tmp_path / "save", "--pretrain-mm-mlp-adapter", tmp_path / "mm_projector.bin")
    assert run_tool(*with_adapter) == 2  # taken
    assert run_tool(*with_adapter, "--force") == 0
    reader = ShardedReader(locate_checkpoint(tmp_path / "save"))
    for name, value in adapter.items():
        assert torch.equal(reader.read(f"connector.{name}"), value)


def test_large_tensors_are_cut_for_tensor_parallel_ranks(tmp_path, monkeypatch):
    """Tiny tensors are written whole, so that the cut needs a smaller limit: bitwise all the same."""
    monkeypatch.setattr("hacl_megatron.checkpoint.convert.writer.SMALLEST_CHUNK", 256)
    source = write_tiny_llava(tmp_path / "in", heads=8, groups=4, hidden=64)
    save = to_megatron(source, tmp_path / "save")
    reader = ShardedReader(locate_checkpoint(save))
    pieces = {key: len(entry.chunks) for key, entry in reader._tensors.items()}
    layers = "language_model.decoder.layers."
    assert pieces[f"{layers}self_attention.linear_qkv.weight"] == 4 * 4
    assert pieces[f"{layers}mlp.linear_fc1.weight"] == 4 * 2 * 8
    assert pieces["language_model.embedding.word_embeddings.weight"] == 8
    assert_same(load_exactly(to_hf(save, tmp_path / "out")).state_dict(), load_exactly(source).state_dict())


def test_inspect_says_what_differs(tmp_path, capsys):
    source = write_tiny_llava(tmp_path / "in", tie=True)
    write_heads(source)
    save = to_megatron(source, tmp_path / "save")
    assert run_tool("inspect_checkpoint", source, save) == 0
    shown = capsys.readouterr().out
    model = load_exactly(source)
    count = sum(p.numel() for p in model.parameters()) + sum(t.numel() for t in load_file(source / HEADS_FILE).values())
    assert (
        shown.count(f"{count:,}: vision_tower") == 2 and "tied embeddings" in shown and "6 heads in 2 groups" in shown
    )
    tensors = load_file(source / "model.safetensors")
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    tensors[name][5, 7] += 0.5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert run_tool("inspect_checkpoint", save, source) == 1
    shown = capsys.readouterr().out
    assert "differs: language_model.decoder.layers.2.mlp.linear_fc1.weight" in shown and "by up to 0.5" in shown
    assert "1 differences" in shown


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def at_every_layout(tmp_path_factory):
    """Two odd models, converted once and loaded, computed with and saved again at each layout."""
    root = tmp_path_factory.mktemp("layouts")
    models = {"odd": {}, "tied-llama3": {"tie": True, "rope_scaling": LLAMA3_ROPE_SCALING, "select_layer": -1}}
    jobs: dict[int, list[tuple[Path, Path, Path, Layout]]] = {}
    for name, sizes in models.items():
        write_reference(root / name, Variant(sizes))
        with pytest.MonkeyPatch.context() as patch:
            if name == "odd":  # in many chunks, as large models are
                patch.setattr("hacl_megatron.checkpoint.convert.writer.SMALLEST_CHUNK", 256)
            to_megatron(root / name / "weights", root / name / "converted")
        for layout in LAYOUTS:
            save = root / name / str(layout)
            job = (root / name, root / name / "converted", save, layout)
            jobs.setdefault(layout.world_size, []).append(job)
    found = {}
    for size, some in jobs.items():
        ranks = run_distributed(load_compute_save_all, size, some)
        for position, (reference, _, save, layout) in enumerate(some):
            found[reference.name, str(layout)] = (reference, save, [rank[position] for rank in ranks])
    return found


@pytest.mark.parametrize("layout", map(str, LAYOUTS))
@pytest.mark.parametrize("model", ["odd", "tied-llama3"])
def test_loaded_at_this_layout_it_computes_what_transformers_does(at_every_layout, model, layout):
    """Logits and the heads' embeddings at EOS; every value of every rank had to be loaded, for they were NaN."""
    _, _, differences = at_every_layout[model, layout]
    merged = {key: max(rank.get(key, 0.0) for rank in differences) for rank in differences for key in rank}
    assert {key.partition(" ")[0] for key in merged} == {"logits", "image", "caption", "hallucinated"}
    assert all(value <= 2e-4 for value in merged.values()), merged


@pytest.mark.parametrize("layout", map(str, LAYOUTS))
@pytest.mark.parametrize("model", ["odd", "tied-llama3"])
def test_saved_at_this_layout_it_exports_bitwise(at_every_layout, tmp_path, model, layout):
    reference, save, _ = at_every_layout[model, layout]
    out = to_hf(save, tmp_path / "out")
    assert_same(load_exactly(out).state_dict(), load_exactly(reference / "weights").state_dict())
    assert_same(load_file(out / HEADS_FILE), load_file(reference / "weights" / HEADS_FILE))


def test_verify_tells_right_from_wrong(at_every_layout, tmp_path):
    reference = at_every_layout["odd", str(Layout())][0]
    original, _ = write_tiny_original_llava(tmp_path / "original", projector_type="mlp3x_gelu")
    other = shutil.copytree(reference / "weights", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["language_model.model.layers.1.self_attn.k_proj.weight"][:8] *= 1.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    jobs = [
        (reference / "converted", reference / "weights", False),
        (to_megatron(original, tmp_path / "save"), original, True),
        (reference / "converted", other, False),
    ]
    ((right, by_tensors, wrong),) = run_distributed(agreements, 1, jobs)
    assert right[0] and by_tensors[0], (right, by_tensors)
    assert not wrong[0] and wrong[1] > 1e-3


def test_fresh_parts_are_those_of_a_fresh_model(at_every_layout):
    reference = at_every_layout["odd", str(Layout())][0]
    config = ShardedReader(locate_checkpoint(reference / "converted")).model_config
    (built,) = run_distributed(initial_parts, 1, reference, 11)
    assert_same(fresh_parts(config, 11), built)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("errors")
    return to_megatron(write_tiny_llava(root / "in"), root / "save")


def damaged(converted: Path, folder: Path) -> Path:
    """A copy of the checkpoint to spoil."""
    return shutil.copytree(converted, folder) / "iter_0000000"


def error_of(capsys, name: str, *arguments: object) -> str:
    """The tool's one line on stderr; exit status 2."""
    capsys.readouterr()
    assert run_tool(name, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("hacl_megatron: error: "), lines
    return lines[0]


def test_a_damaged_checkpoint_is_one_line(converted, tmp_path, capsys):
    out = tmp_path / "out"

    def export(save: Path) -> str:
        line = error_of(capsys, "convert_megatron_to_hf", "--load", save, "--hf-path", out)
        assert not list(tmp_path.glob("out*"))
        return line

    checkpoint = damaged(converted, tmp_path / "cut")
    file = sorted(checkpoint.glob("*.distcp"))[-1]
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file.name} is cut" in export(checkpoint)
    file.unlink()
    assert f"file {file.name} of the checkpoint is missing" in export(checkpoint)

    checkpoint = damaged(converted, tmp_path / "garbled")
    file = sorted(checkpoint.glob("*.distcp"))[0]
    file.write_bytes(b"\0" * file.stat().st_size)
    assert "bytes 0 to" in (line := export(checkpoint)) and "was written; the checkpoint is damaged" in line

    checkpoint = damaged(converted, tmp_path / "metadata")
    (checkpoint / ".metadata").write_bytes((checkpoint / ".metadata").read_bytes()[:500])
    assert ".metadata: not a whole file" in export(checkpoint)
    (checkpoint / ".metadata").unlink()
    assert ".metadata: no such file" in export(checkpoint)
    assert "holds no checkpoint of this trainer" in export(tmp_path)
    assert "no such folder" in export(tmp_path / "nowhere")

    checkpoint = damaged(converted, tmp_path / "sizes")
    config = checkpoint / "run_config.yaml"
    config.write_text(config.read_text().replace("ffn_hidden_size: 88", "ffn_hidden_size: 96"))
    assert "linear_fc1.weight is [176, 48], run_config.yaml makes it [192, 48]" in export(checkpoint)


class Touch:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_metadata_with_code_in_it_is_never_run(converted, tmp_path, capsys):
    import pickle

    checkpoint = damaged(converted, tmp_path / "evil")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    line = error_of(capsys, "convert_megatron_to_hf", "--load", checkpoint, "--hf-path", tmp_path / "out")
    assert "its code is never run" in line and not (tmp_path / "touched").exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert (tmp_path / "touched").exists()  # the file was loaded gun


def test_nothing_is_replaced_that_is_no_conversion(converted, tmp_path, capsys):
    source, save = converted.parent / "in", tmp_path / "save"
    arguments = ("convert_hf_to_megatron", "--hf-path", source, "--save", save)
    save.mkdir()
    (save / "thesis.tex").write_text("three years of work")
    assert "exists already" in error_of(capsys, *arguments)
    assert "no earlier conversion" in error_of(capsys, *arguments, "--force")
    assert (save / "thesis.tex").exists() and [path.name for path in tmp_path.iterdir()] == ["save"]
    shutil.rmtree(save)
    to_megatron(source, save)
    (save / "metrics.jsonl").touch()  # a run went on here
    assert "holds metrics.jsonl too" in error_of(capsys, *arguments, "--force")


def test_failures_while_writing_leave_nothing(converted, tmp_path, capsys, monkeypatch):
    """A full disk, before; while, a file that may not grow."""
    source = converted.parent / "in"
    arguments = ("convert_hf_to_megatron", "--hf-path", source, "--save", tmp_path / "save")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "0.0 GB free" in error_of(capsys, *arguments)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        assert run_tool(*arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "error: [Errno 27] File too large" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_layers_of_different_dtypes_need_one(tmp_path, capsys):
    source = write_tiny_llava(tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    arguments = ("convert_hf_to_megatron", "--hf-path", source, "--save", tmp_path / "save")
    assert "bfloat16, float32; choose one with --dtype" in error_of(capsys, *arguments)
    assert run_tool(*arguments, "--dtype", "float32") == 0
    tensors[name] = torch.zeros(48, 88, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert "down_proj.weight is stored as I8" in error_of(capsys, *arguments, "--force", "--dtype", "float32")
