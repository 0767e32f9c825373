"""LoRA out to Hugging Face: `peft` and transformers compute from the export what the trained model computes."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE
from hacl_megatron.checkpoint.run.folder import locate_checkpoint
from hacl_megatron.evaluation.agreement import TOLERANCE, our_logits, random_batch
from tests.checkpoint.hf.adapter_files import logits_of
from tests.distributed import run_distributed
from tests.tool_runs import run_tool, to_hf
from tests.training.runs import layout_flags, make_inputs, train

TARGETS = ["q_proj", "v_proj", "gate_proj", "o_proj", "down_proj"]  # not all: parts of fused matrices stay as they are


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps at TP 2, fast enough that the adapters and the connector matter."""
    folder = make_inputs(tmp_path_factory.mktemp("export"), samples=16)
    size, flags = layout_flags("tp2")
    files = ["--config", str(folder / "finetune.yaml"), "--save", str(folder / "run")]
    lora = ["--lora-rank", "3", "--lora-alpha", "7.5", "--lora-target-modules", *TARGETS]
    train([[*files, *flags, *lora, "--lr", "3e-2", "--train-iters", "3", "--save-interval", "2"]], size)
    to_hf(folder / "run", folder / "adapter", "--format", "peft")
    run_distributed(export_verified, 1, folder)
    return folder


def export_verified(folder: Path) -> None:
    """Merged weights, and our own logits beside them; in another process, which takes on the host's platform."""
    to_hf(folder / "run", folder / "merged", "--verify")
    reader = ShardedReader(locate_checkpoint(folder / "run"))
    torch.save(our_logits(reader, random_batch(reader.model_config), None).detach(), folder / "logits.pt")


def base_model(trained: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(trained / "llava", dtype=torch.float32).eval()


def test_adapter_and_merged_weights_give_our_logits(trained: Path) -> None:
    batch = random_batch(ShardedReader(locate_checkpoint(trained / "run")).model_config)
    ours = torch.load(trained / "logits.pt", weights_only=True)
    base = base_model(trained)
    image_token, rows = base.config.image_token_id, base.config.text_config.vocab_size
    before = logits_of(base, batch, image_token)
    adapted = logits_of(PeftModel.from_pretrained(base, trained / "adapter").eval(), batch, image_token)
    merged = LlavaForConditionalGeneration.from_pretrained(trained / "merged", dtype=torch.float32).eval()
    tolerance = TOLERANCE * max(1.0, float(ours[:, :rows].abs().max()))
    assert (adapted - before).abs().max() > 0.1, "there is something to adapt"
    assert (adapted - ours[:, :rows]).abs().max() <= tolerance
    assert (logits_of(merged, batch, image_token) - ours[:, :rows]).abs().max() <= tolerance


def test_peft_merges_to_the_same_weights(trained: Path) -> None:
    wrapped = PeftModel.from_pretrained(base_model(trained), trained / "adapter").merge_and_unload().state_dict()
    merged = LlavaForConditionalGeneration.from_pretrained(trained / "merged", dtype=torch.float32).state_dict()
    assert wrapped.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, wrapped[name], rtol=0, atol=1e-6)


def test_adapter_folder_says_what_it_is(trained: Path) -> None:
    settings = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 7.5)
    assert settings["base_model_name_or_path"] == str(trained / "llava")
    assert settings["modules_to_save"] == ["multi_modal_projector"]
    names = set(load_file(trained / "adapter" / "adapter_model.safetensors"))
    assert len(names) == 4 * 2 * len(TARGETS) + 4
    assert "temperature" in load_file(trained / "adapter" / HEADS_FILE)


def test_original_layout_is_merged_and_the_base_is_not(trained: Path, tmp_path: Path) -> None:
    llava = load_file(to_hf(trained / "run", tmp_path / "llava", "--format", "llava") / "model.safetensors")
    merged = LlavaForConditionalGeneration.from_pretrained(trained / "merged", dtype=torch.float32).model.language_model
    base = base_model(trained).model.language_model
    alone = to_hf(trained / "run", tmp_path / "base", "--leave-lora-out")
    left_out = LlavaForConditionalGeneration.from_pretrained(alone, dtype=torch.float32).model.language_model
    for target in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        before, after, without = (m.layers[2].get_submodule(target).weight for m in (base, merged, left_out))
        assert torch.equal(before, after) == (target.partition(".")[2] not in TARGETS)
        assert torch.equal(llava[f"model.layers.2.{target}.weight"], after)
        assert torch.equal(without, before)


def test_inspection_shows_adapters_and_how_they_differ(trained: Path, capsys: pytest.CaptureFixture) -> None:
    run_tool(
        "inspect_checkpoint", "--max-lines", 99, trained / "run" / "iter_0000002", trained / "run" / "iter_0000003"
    )
    printed = capsys.readouterr().out
    assert "LoRA of rank 3, alpha 7.5, on q_proj v_proj o_proj gate_proj down_proj" in printed
    assert "adapters 6,336" in printed  # 3 x (in + out) of each, in 4 layers
    different = [line for line in printed.splitlines() if "values differ" in line]
    assert sum("_lora." in line for line in different) == 4 * 2 * len(TARGETS)
    assert not any("language_model" in line and "_lora." not in line for line in different)


def test_what_cannot_be_written_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    export = ["convert_megatron_to_hf", "--load", trained / "run", "--hf-path", tmp_path / "out"]
    assert run_tool(*export, "--format", "peft", "--verify") != 0
    assert "verify --format hf" in capsys.readouterr().err
    assert run_tool(*export, "--format", "peft", "--leave-lora-out") != 0
    assert "--leave-lora-out" in capsys.readouterr().err
    assert run_tool("convert_hf_to_megatron", "--hf-path", trained / "llava", "--save", tmp_path / "plain") == 0
    refused = ["convert_megatron_to_hf", "--load", tmp_path / "plain", "--hf-path", tmp_path / "out"]
    assert run_tool(*refused, "--format", "peft") != 0
    assert "has no LoRA" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
