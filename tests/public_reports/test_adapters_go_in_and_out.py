"""Adapters over a base are what `peft` and LLaVA make of them: merged or kept, at every logit, and back out again."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.run.folder import locate_checkpoint, read_run_config
from hacl_megatron.evaluation.agreement import our_logits, random_batch
from tests.checkpoint.hf.adapter_files import draw_connector, llava_of, logits_of, write_all
from tests.distributed import run_distributed
from tests.tool_runs import run_tool, to_hf, to_megatron
from tests.training.runs import layout_flags, make_inputs, train

IMAGE = 320
CASES = {
    "llava-lora merged": ("llava-lora", "llama", []),
    "llava-lora kept": ("llava-lora", "llama", ["--lora", "keep"]),
    "llava-lora over hf": ("llava-lora", "llava", []),
    "peft merged": ("peft", "llava", []),
    "language kept": ("language", "llava", ["--lora", "keep"]),
    "stage1 over llama": ("stage1", "llama", []),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case converted, and our logits of it in `CASE.pt`."""
    folder = write_all(tmp_path_factory.mktemp("adapters"))
    for case, (name, base, flags) in CASES.items():
        to_megatron(folder / name, folder / case, "--model-base", folder / "parts" / base, *flags)
    run_distributed(compute_all, 1, folder)
    return folder


def compute_all(folder: Path) -> None:
    """In another process, which takes on the host's platform."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        codes = convert_verified(folder)
    (folder / "verified.json").write_text(json.dumps({"codes": codes, "printed": printed.getvalue()}))
    for case in CASES:
        reader = ShardedReader(locate_checkpoint(folder / case))
        logits = our_logits(reader, random_batch(reader.model_config, IMAGE), None)
        torch.save(logits.detach(), folder / f"{case}.pt")


def expected(folder: Path, case: str) -> torch.nn.Module:
    """transformers' LLaVA with what peft's merge_and_unload made."""
    llava, name = folder / "parts" / "llava", CASES[case][0]
    if name == "stage1":
        return llava_of(llava, connector=draw_connector(9))
    if name == "llava-lora":
        language = AutoModelForCausalLM.from_pretrained(folder / "llava-lora-merged", dtype=torch.float32)
        return llava_of(llava, language, draw_connector(3))
    return LlavaForConditionalGeneration.from_pretrained(folder / f"{name}-merged", dtype=torch.float32).eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(adapters: Path, case: str) -> None:
    """Catches a wrong scale (alpha / r, rsLoRA's), A and B mixed up, a connector left at the base's."""
    batch = random_batch(ShardedReader(locate_checkpoint(adapters / case)).model_config, IMAGE)
    ours, theirs = torch.load(adapters / f"{case}.pt"), logits_of(expected(adapters, case), batch, IMAGE)
    base = logits_of(llava_of(adapters / "parts" / "llava"), batch, IMAGE)
    assert (theirs - base).abs().max() > 0.1, "there is something to adapt"
    assert (ours[:, : theirs.shape[1]] - theirs).abs().max() <= 1e-4


def test_what_became_of_the_folder_is_said(adapters: Path) -> None:
    report = json.loads((adapters / "llava-lora merged" / "converted_from.json").read_text())
    assert str(adapters / "llava-lora" / "non_lora_trainables.bin") in report["files"]
    assert any("LoRA of rank 4, alpha 10, merged into 28 matrices" in note for note in report["notes"])
    assert any("not read: training_args.bin" in note for note in report["notes"])
    kept = read_run_config(locate_checkpoint(adapters / "language kept")).lora
    assert (kept.lora_rank, kept.lora_dropout) == (3, 0.1)
    assert kept.lora_alpha == pytest.approx(5 * 3**0.5)  # rank-stabilised, as alpha / rank


@pytest.mark.parametrize(("case", "written"), [("llava-lora kept", True), ("language kept", False)])
def test_peft_export_names_a_base_that_works(
    adapters: Path, tmp_path: Path, case: str, written: bool, capsys: pytest.CaptureFixture
) -> None:
    """Catches a base that is no LLaVA (a LLaMA that LoRA was laid over), and one written though there is one."""
    out = to_hf(adapters / case, tmp_path / "out", "--format", "peft")
    printed = capsys.readouterr().out
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(out / "base" if written else adapters / "parts" / "llava")
    assert (out / "base").exists() == written and ("is written too" in printed) == written
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    image = model.config.image_token_id
    model = PeftModel.from_pretrained(model, out).eval()
    batch = random_batch(ShardedReader(locate_checkpoint(adapters / case)).model_config, IMAGE)
    ours, theirs = torch.load(adapters / f"{case}.pt"), logits_of(model, batch, image)
    rows = min(ours.shape[1], theirs.shape[1], 331)
    assert (ours[:, :rows] - theirs[:, :rows]).abs().max() <= 1e-4
    # Back in, over the base that it names.
    back = to_megatron(out, tmp_path / "back", "--lora", "keep")
    first, second = (ShardedReader(locate_checkpoint(save)) for save in (adapters / case, back))
    for name in [*first.adapter_names(), "connector.0.weight", "heads.temperature"]:
        assert torch.equal(first.read(name), second.read(name)), name


def test_peft_base_is_taken_or_refused(adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches a base of the right sizes and other weights."""
    given = ["--format", "peft", "--peft-base"]
    base = to_hf(adapters / "llava-lora kept", tmp_path / "base", "--leave-lora-out")
    out = to_hf(adapters / "llava-lora kept", tmp_path / "out", *given, base)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not (out / "base").exists()
    command = ["convert_megatron_to_hf", "--load", adapters / "language kept", "--hf-path", tmp_path / "no", *given]
    assert run_tool(*command, adapters / "language-merged") != 0
    assert "is another than the checkpoint's" in capsys.readouterr().err
    assert run_tool(*command, adapters / "parts" / "llama") != 0
    assert "no LlavaForConditionalGeneration" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def convert_verified(folder: Path) -> list[int]:
    """Exit statuses of verified conversions; of the last one the base lacks what the folder was trained on."""
    codes = []
    for index, (name, base, *flags) in enumerate(
        [
            ("llava-lora", "llama", "--dtype", "bfloat16"),
            ("llava-lora", "llama", "--lora", "keep"),
            ("peft", "llava"),
            ("stage1", "llama"),
            ("llava-lora", "llava"),
        ]
    ):
        given = ["--hf-path", folder / name, "--model-base", folder / "parts" / base, "--verify", *flags]
        codes.append(run_tool("convert_hf_to_megatron", *given, "--save", folder / f"verified-{index}"))
    return codes


def test_verification_has_peft_merge(adapters: Path) -> None:
    """Catches a comparison with the base alone, or with our own reading of A and B."""
    codes, printed = json.loads((adapters / "verified.json").read_text()).values()
    assert codes[:4] == [0, 0, 0, 0] and printed.count("same arg-max on 100.00%") == 4, printed
    assert codes[4] != 0 and "cannot have peft read it over this base" in printed, printed


def test_kept_adapters_train_on(adapters: Path, tmp_path: Path) -> None:
    """At TP 2, which cuts A or B: catches adapters that are drawn anew, or chunks that ranks cannot read."""
    folder = make_inputs(tmp_path, samples=16)
    size, flags = layout_flags("tp2")
    start = ["--pretrained-checkpoint", str(adapters / "language kept"), "--lr", "1e-30", "--train-iters", "1"]
    train([["--config", str(folder / "finetune.yaml"), "--save", str(folder / "run"), *start, *flags]], size)
    before, after = (ShardedReader(locate_checkpoint(save)) for save in (adapters / "language kept", folder / "run"))
    assert before.adapter_names() == after.adapter_names() and len(after.adapter_names()) == 4 * 7 * 2
    for name in after.adapter_names():
        assert torch.equal(before.read(name), after.read(name)), name
