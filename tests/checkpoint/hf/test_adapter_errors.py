"""Adapter folders that cannot be represented, or are not whole, are refused in one line that names what and where.

Each case catches a silent misreading: a setting that changes the model and is skipped, a tensor without a place or
missing, a base that is another model.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hacl_megatron.checkpoint.hf.adapters.folder import find_model_base, open_adapted_sources, read_adapted_config
from hacl_megatron.checkpoint.hf.adapters.settings import AdapterSettings
from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.train import run
from tests.checkpoint.hf.adapter_files import LANGUAGE, draw_connector, llava_of, write_adapter, write_all
from tests.tiny import write_tiny_llava
from tests.tool_runs import run_tool

Q = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("adapters"))


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def model(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(edit: Callable[[dict], Any], file: str = "adapter_model.bin") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = torch.load(folder / file, weights_only=True)
        edit(state)
        torch.save(state, folder / file)

    return change


class Code:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/hacl-adapters-ran",)


def heads_beside(folder: Path) -> None:
    save_file({"mystery": torch.ones(1)}, folder / "hacl_heads.safetensors")


BROKEN = {
    "DoRA": (settings(use_dora=True), "use_dora is True", "merge_and_unload"),
    "ranks by module": (settings(rank_pattern={"q_proj": 8}), "rank_pattern is {'q_proj': 8}", "merge_and_unload"),
    "alphas by module": (settings(alpha_pattern={"q_proj": 8}), "alpha_pattern", "merge_and_unload"),
    "PiSSA": (settings(init_lora_weights="pissa"), "init_lora_weights is 'pissa'", "merge_and_unload"),
    "biases": (settings(bias="all"), "bias is 'all'", "merge_and_unload"),
    "another method": (settings(peft_type="LOHA"), "peft_type is 'LOHA'", "merge_and_unload"),
    "a setting to come": (settings(use_newlora=True), "use_newlora is True", "merge_and_unload"),
    "rank": (settings(r=8), "is [4, 48], but adapter_config.json (r 8)", "make it [8, 48]"),
    "alpha": (settings(lora_alpha="ten"), "lora_alpha is 'ten'", "above 0"),
    "pattern": (settings(target_modules="(q_proj"), "no regular expression", "(q_proj"),
    "unmatched tensor": (settings(target_modules=["q_proj"]), "target_modules does not match", "k_proj"),
    "saved modules": (settings(modules_to_save=["lm_head"]), "modules_to_save names lm_head", "no tensor"),
    "a missing A": (tensors(lambda state: state.pop(Q)), "model.layers.2.self_attn.q_proj.lora_A.weight", "missing"),
    "a missing layer": (
        tensors(lambda state: [state.pop(Q), state.pop(Q.replace("_A", "_B"))]),
        "LoRA of model.layers.2.self_attn.q_proj is missing",
        "incomplete",
    ),
    "an extra key": (tensors(lambda state: state.update(mystery=torch.ones(3))), "mystery", "no part of this model"),
    "an unknown target": (
        tensors(lambda state: state.update({Q.replace("q_proj", "qkv_proj"): torch.ones(4, 48)})),
        "belongs to no linear layer",
        "self_attn.q_proj",
    ),
    "an embedding's LoRA": (
        tensors(lambda state: state.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3)})),
        "lora_embedding_A is no A or B of a linear layer",
        "merge_and_unload",
    ),
    "code": (lambda folder: torch.save({"a": Code()}, folder / "adapter_model.bin"), "its code is never run", "bin"),
    "a cut connector": (
        tensors(lambda state: state.popitem(), "non_lora_trainables.bin"), "its connector lacks", "mm_projector",
    ),
    "no connector": (lambda folder: (folder / "non_lora_trainables.bin").unlink(), "trainables.bin is missing", "no"),
    "no LoRA": (lambda folder: (folder / "adapter_model.bin").unlink(), "adapter_model.safetensors", "no LoRA weights"),
    "whole weights": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"), "model.safetensors", "-base",
    ),
    "foreign heads": (heads_beside, "mystery", "expected vision_projector.weight"),
    "another base": (model(rope_theta=5e5, rope_parameters=None), "rotary_base is 500000", "10000"),
    "another size": (model(num_hidden_layers=5), "num_layers is 5", "the base's is 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_refused_by_name(folders: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture) -> None:
    change, *words = BROKEN[case]
    folder = shutil.copytree(folders / "llava-lora", tmp_path / "lora")
    change(folder)
    assert refused(folder, folders / "parts" / "llama", tmp_path, capsys, words)
    assert not Path("/tmp/hacl-adapters-ran").exists()


def refused(folder: Path, base: Path | None, tmp_path: Path, capsys, words: list[str], *flags: object) -> bool:
    """One line that holds `words`, and nothing left behind."""
    given = [] if base is None else ["--model-base", base]
    code = run_tool("convert_hf_to_megatron", "--hf-path", folder, "--save", tmp_path / "save", *given, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hacl_megatron: error: ")]
    assert code != 0 and len(lines) == 1 and not (tmp_path / "save").exists()
    assert all(word in lines[0] for word in words), lines[0]
    return True


def test_bases_and_flags_that_do_not_fit(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts = folders / "parts"
    folder = shutil.copytree(folders / "llava-lora", tmp_path / "lora")
    settings(base_model_name_or_path="lmsys/vicuna-7b-v1.5")(folder)
    model(_name_or_path="lmsys/vicuna-7b-v1.5")(folder)
    assert refused(folder, None, tmp_path, capsys, ["lmsys/vicuna-7b-v1.5 is no folder here", "--model-base"])
    assert refused(folder, folders / "peft", tmp_path, capsys, ["a part of a model itself"])
    assert refused(parts / "llava", parts / "llama", tmp_path, capsys, ["needs no base"])
    assert refused(parts / "llava", None, tmp_path, capsys, ["has no LoRA"], "--lora", "keep")
    assert refused(folders / "stage1", parts / "llama", tmp_path, capsys, ["has no LoRA"], "--lora", "merge")
    assert refused(folders / "peft", parts / "llava", tmp_path, capsys, ["cannot be kept"], "--lora", "keep")
    write_tiny_llava(tmp_path / "wider", ffn=96)
    assert refused(folders / "language", tmp_path / "wider", tmp_path, capsys, ["is [3, 88]", "[3, 96]"])


def test_a_folder_of_adapters_alone_names_the_command(folders: Path, tmp_path: Path) -> None:
    """To train from or to evaluate: catches "no such file" where the answer is a conversion."""
    for name in ("llava-lora", "language", "stage1"):
        with pytest.raises(
            ValueError, match=r"alone, no whole model; .*convert_hf_to_megatron.py --hf-path .*--model-"
        ):
            read_model_config(folders / name)
    command = ["--pretrained-checkpoint", str(folders / "llava-lora"), "--image-folder", str(tmp_path)]
    with pytest.raises(ValueError, match="LoRA adapters alone, no whole model"):
        run([*command, "--data-path", str(folders / "llava-lora" / "config.json"), "--train-iters", "1"])


def test_layers_that_are_left_out_on_purpose_are_none_missing(folders: Path, tmp_path: Path) -> None:
    """peft's own rule decides: catches a refusal of layers_to_transform, or of a pattern for some layers."""
    llava = folders / "parts" / "llava"
    for index, given in enumerate(
        (
            {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [1, 2]},
            {"target_modules": r".*language_model.*layers\.(0|3)\..*o_proj"},
            {"target_modules": ["q_proj"], "exclude_modules": r".*(vision_tower|layers\.1\.).*"},
        )
    ):
        out = tmp_path / str(index)
        wrapped = write_adapter(llava_of(llava), out, 5, r=3, lora_alpha=5, **given)
        sources = open_adapted_sources(out, llava, read_adapted_config(out, llava))
        merged = PeftModel.from_pretrained(llava_of(llava), out).merge_and_unload()
        found = [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
        assert len(found) == len(sources.merged) > 0
        for canonical in sources.merged:
            name = sources.table.spelled(canonical, "hf").replace("language_model.model.", "language_model.")
            weight = merged.get_parameter("model." + name.replace("vision_tower.vision_model.", "vision_tower."))
            torch.testing.assert_close(sources.read(canonical), weight, rtol=0, atol=1e-6)


def test_the_base_that_a_folder_names_is_found(folders: Path) -> None:
    llama = folders / "parts" / "llama"
    assert find_model_base(folders / "stage1", None) == llama  # by _name_or_path, as LLaVA's config has it
    assert find_model_base(folders / "language", None) == folders / "parts" / "llava"
    assert AdapterSettings.of_folder(folders / "language").target_modules == LANGUAGE


def test_names_of_older_libraries_are_read(folders: Path, tmp_path: Path) -> None:
    """transformers before 4.52 nests otherwise, peft's raw state has its adapter's name: catches a refusal of them."""
    folder = shutil.copytree(folders / "language", tmp_path / "old")
    old = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        name = name.replace("model.model.language_model.", "model.language_model.model.")
        name = name.replace(
            "model.model.multi_modal_projector.", "model.multi_modal_projector.modules_to_save.default."
        )
        old[name.replace("lora_A.", "lora_A.default.")] = value
    save_file(old, folder / "adapter_model.safetensors")
    llava = folders / "parts" / "llava"
    new, read = (open_adapted_sources(f, llava, read_adapted_config(f, llava)) for f in (folders / "language", folder))
    assert new.merged.keys() == read.merged.keys()
    for canonical in [*new.merged, "projector.0.weight"]:
        assert torch.equal(new.read(canonical), read.read(canonical))
    assert not torch.equal(new.read("projector.0.weight"), draw_connector(3)["0.weight"])
