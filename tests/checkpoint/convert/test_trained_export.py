"""From a converted checkpoint through training to Hugging Face: transformers sees the loss that the trainer saw."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hacl_megatron.batch import PackedBatch
from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE
from hacl_megatron.checkpoint.run.folder import ASSETS_FOLDER, locate_checkpoint, read_run_config
from hacl_megatron.data.loader import build_loader
from hacl_megatron.data.step_maker import MicroBatching
from hacl_megatron.data.tokenizer import load_tokenizer
from hacl_megatron.model.fresh import fresh_parts
from hacl_megatron.training.state import saved_progress
from tests.checkpoint.hf.round_trip_files import assert_same, save_adapter, write_parts
from tests.tool_runs import to_hf, to_megatron
from tests.training.runs import layout_flags, make_inputs, metrics, train

STEPS = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step more than `STEPS` at TP 2 from a converted checkpoint; one step from a LLaMA, a CLIP and an adapter."""
    folder = make_inputs(tmp_path_factory.mktemp("trained"), samples=36)
    to_megatron(folder / "llava", folder / "converted")
    llama, clip, _ = write_parts(folder / "sources", whole_clip=False)
    for file in (folder / "llava").glob("tokenizer*"):
        shutil.copy(file, llama)
    save_adapter(folder / "mm_projector.bin", "mm_projector.")
    size, flags = layout_flags("tp2")

    def command(name: str, *more: str) -> list[str]:
        return ["--config", str(folder / "finetune.yaml"), "--save", str(folder / name), *flags, *more]

    from_converted = ["--pretrained-checkpoint", str(folder / "converted")]
    from_parts = ["--pretrained-checkpoint", str(llama), "--vision-tower", str(clip)]
    adapter = ["--pretrain-mm-mlp-adapter", str(folder / "mm_projector.bin")]
    # A rate this low leaves in the checkpoint what the run started from.
    still = ["--train-iters", "1", "--lr", "1e-30"]
    train(
        [
            command("run", *from_converted, "--train-iters", str(STEPS + 1), "--save-interval", str(STEPS)),
            command("parts", *from_parts, *still, "--seed", "5"),
            command("adapter", *from_converted, *adapter, *still),
        ],
        size,
    )
    return folder


def next_batch(checkpoint: Path) -> PackedBatch:
    """The batch that the run goes on with, from its own configuration and data state."""
    run = read_run_config(checkpoint)
    loader = build_loader(
        run, load_tokenizer(checkpoint / ASSETS_FOLDER),
        global_batch_size=run.training.global_batch_size,
        micro_batching=MicroBatching(micro_batch_size=run.training.global_batch_size),
        data_parallel_rank=0, data_parallel_size=1, pad_multiple=1, data_state=saved_progress(checkpoint)[1],
    )  # fmt: skip
    try:
        (batch,) = next(loader).micro_batches
    finally:
        loader.close()
    return batch.main


@torch.no_grad()
def transformers_loss(model: LlavaForConditionalGeneration, batch: PackedBatch) -> float:
    """Teacher-forced cross entropy over the batch's target tokens, each dialogue run alone."""
    visual = model.config.image_seq_length
    total = 0.0
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        targets = (batch.target_rows >= start) & (batch.target_rows < stop)
        if not targets.any():
            continue
        inside = (batch.image_rows >= start) & (batch.image_rows < stop)
        ids = batch.token_ids[start:stop].clone()
        ids[batch.image_rows[inside] - start] = model.config.image_token_id
        images = (batch.feature_rows[inside] // visual).unique()
        pixels = batch.pixel_values[images] if len(images) else None
        logits = model(input_ids=ids[None], pixel_values=pixels).logits[0]
        rows = logits[batch.target_rows[targets] - start]
        total += float(F.cross_entropy(rows, batch.target_ids[targets], reduction="sum"))
    return total / batch.num_targets


def test_transformers_has_the_loss_that_training_had(trained, tmp_path):
    """Weights after k steps, exported; the loss of step k + 1 was computed with these very weights."""
    checkpoint = trained / "run" / f"iter_{STEPS:07d}"
    out = to_hf(checkpoint, tmp_path / "out")
    batch = next_batch(checkpoint)
    assert batch.num_images > 0 and batch.num_targets > 20
    expected = metrics(trained / "run")[STEPS]
    assert expected["iteration"] == STEPS + 1
    loss = {}
    for name, folder in (("trained", out), ("before", trained / "llava")):
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        loss[name] = transformers_loss(model, batch)
    assert math.isclose(loss["trained"], expected["lm loss"], rel_tol=1e-4), (loss, expected)
    assert abs(loss["before"] - expected["lm loss"]) > 1e-2  # the steps changed something


def test_export_is_whole(trained, tmp_path):
    """Carried layers came through two checkpoints; the processor pads as the run did; heads are the trained ones."""
    out = to_hf(trained / "run", tmp_path / "out")  # the newest: STEPS + 1
    before, after = (LlavaForConditionalGeneration.from_pretrained(folder) for folder in (trained / "llava", out))
    assert_same(after.model.vision_tower.state_dict(), before.model.vision_tower.state_dict())  # frozen
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)
    processor = AutoProcessor.from_pretrained(out)
    assert processor.image_processor.do_pad and processor.image_token_id == before.config.image_token_id
    reader = ShardedReader(locate_checkpoint(trained / "run"))
    heads = {f"heads.{name}": value for name, value in load_file(out / HEADS_FILE).items()}
    assert_same(heads, {name: reader.read(name) for name in heads})
    last = metrics(trained / "run")[-1]
    assert last["temperature"] != 0.07 and reader.read("heads.temperature").item() != pytest.approx(0.07, abs=1e-6)


def test_run_starts_from_a_llama_and_a_clip(trained, tmp_path):
    reader = ShardedReader(locate_checkpoint(trained / "parts"))
    fresh = fresh_parts(reader.model_config, 5)
    assert_same({name: reader.read(name) for name in fresh}, fresh)
    source = LlavaForConditionalGeneration.from_pretrained(trained / "sources" / "llava")
    out = LlavaForConditionalGeneration.from_pretrained(to_hf(trained / "parts", tmp_path / "out"))
    assert_same(out.model.vision_tower.state_dict(), source.model.vision_tower.state_dict())
    rows = source.config.text_config.vocab_size
    assert torch.equal(out.lm_head.weight[:rows], source.lm_head.weight)


def test_adapter_is_laid_over_a_checkpoint_of_ours(trained):
    adapter = torch.load(trained / "mm_projector.bin", weights_only=True)
    reader = ShardedReader(locate_checkpoint(trained / "adapter"))
    found = {name: reader.read(name.replace("mm_projector", "connector")) for name in adapter}
    assert_same(found, adapter)


def test_converted_weights_are_no_run_to_resume(trained):
    with pytest.raises(ValueError, match=r"converted weights and no run to resume.*--pretrained-checkpoint"):
        saved_progress(locate_checkpoint(trained / "converted"))
