"""What a run shows: TensorBoard, `metrics.jsonl`, lines and bar on the terminal, and the arithmetic behind TFLOP/s."""

import contextlib
import fcntl
import io
import math
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hacl_megatron.batch import SegmentLengths
from hacl_megatron.train import run
from hacl_megatron.training.flops import language_flops, qformer_flops, step_flops, vision_flops
from hacl_megatron.training.loop import Trainer
from tests.distributed import run_distributed
from tests.training.runs import layout_flags, make_inputs, metrics, train, weights

MEGATRON_TAGS = {
    "lm loss", "learning-rate", "grad-norm", "batch-size", "iteration-time", "throughput", "params-norm", "num-zeros",
}  # fmt: skip
OWN_TAGS = {
    "contrastive loss", "contrastive loss i2t", "contrastive loss t2i", "contrastive weight", "temperature",
    "retrieval accuracy i2t", "hallucination margin", "hallucination accuracy", "samples-per-second",
    "tokens-per-second-per-gpu", "model-tflops-per-gpu",
}  # fmt: skip
OPTIONAL = ["--log-params-norm", "--log-num-zeros-in-grad"]


def command(folder: Path, stage: str, layout: str, save: str, *extra: str) -> list[str]:
    _, flags = layout_flags(layout)
    return ["--config", str(folder / f"{stage}.yaml"), "--save", str(folder / save), *flags, *extra]


def _terminal(arguments: Sequence[str]) -> str:
    """What a run prints when its output is a pipe."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(arguments)
    return printed.getvalue()


def _pseudo_terminal(arguments: Sequence[str]) -> str:
    """What a run draws on stderr when that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))  # rows, columns
    drawn: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 4096):
                drawn.append(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(theirs, "w") as terminal, mock.patch.object(sys, "stderr", terminal):
        run(arguments)
    reader.join(10)
    return b"".join(drawn).decode()


def _attention_flops(query, key, value, dropout_p=0.0, is_causal=False, **_) -> int:
    """PyTorch has no formula for its CPU kernel; the lower triangle alone is the model's, whatever a kernel does."""
    return sdpa_flop_count(query, key, value) // (2 if is_causal else 1)


def _attention_backward_flops(grad, query, key, value, out, logsumexp, dropout_p, is_causal, **_) -> int:
    """Twice the forward: a kernel that computes the scores again does so for its own sake."""
    return 2 * _attention_flops(query, key, value, dropout_p, is_causal)


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _flops(arguments: Sequence[str]) -> list[tuple[float, float]]:
    """(counted by PyTorch, by our formula) for forward and backward of each step of a run."""
    from hacl_megatron.training.step import Step

    found: list[list[float]] = []
    of_images: list[float] = []
    start_images, forward_backward, scalars = Step.start_images, Step.forward_backward, Trainer._scalars

    def images_counted(self: Step, *inputs):
        """Of a frozen tower; a step's images start while the step before it is under way."""
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            result = start_images(self, *inputs)
        of_images.append(float(counter.get_total_flops()))
        return result

    def counted(self: Step, *inputs, **options):
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            result = forward_backward(self, *inputs, **options)
        assert counter.get_flop_counts()["Global"].keys() >= _CPU_ATTENTION.keys(), "attention ran as another operator"
        found.append([of_images[len(found)] + float(counter.get_total_flops())])
        return result

    def noted(self: Trainer, metrics, result, micro_batches, *times):
        trains = {"trains_language_model": not self.config.model.freeze_LM, "trains_vision_tower": False}
        found[-1].append(step_flops(self.config.architecture, micro_batches, **trains))
        return scalars(self, metrics, result, micro_batches, *times)

    with (
        mock.patch.object(Step, "start_images", images_counted),
        mock.patch.object(Step, "forward_backward", counted),
        mock.patch.object(Trainer, "_scalars", noted),
    ):
        run(arguments)
    return [(counted, ours) for counted, ours in found]


def _one_rank(folder: Path) -> dict:
    flags = {"pretrain": [], "finetune": ["--freeze-ViT", "false"]}
    found = {
        "lines": _terminal(command(folder, "finetune", "tp1", "lines", "--log-interval", "2")),
        "bar": _pseudo_terminal(command(folder, "finetune", "tp1", "bar")),
    }
    for stage, extra in flags.items():
        found[f"{stage} flops"] = _flops(command(folder, stage, "tp1", f"{stage}-flops", "--train-iters", "2", *extra))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = make_inputs(tmp_path_factory.mktemp("metrics"))
    validation = [
        "--valid-data-path",
        str(folder / "data" / "pretrain.json"),
        "--eval-interval",
        "2",
        "--eval-iters",
        "3",
    ]
    two = [
        command(folder, "pretrain", "tp2", "pretrain-tp2", *OPTIONAL, *validation),
        command(folder, "finetune", "tp2", "finetune-tp2", *OPTIONAL),
        command(folder, "finetune", "pp2", "finetune-pp2", *OPTIONAL),
        command(folder, "finetune", "dp2-dist", "finetune-dp2", *OPTIONAL),
    ]
    train(two, 2)
    (printed,) = run_distributed(_one_rank, 1, folder)
    return folder, printed


def events(save: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars: tag -> iteration -> value."""
    accumulator = EventAccumulator(str(save / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}


@pytest.mark.parametrize("name", ["pretrain-tp2", "finetune-tp2", "finetune-pp2", "finetune-dp2"])
def test_tensorboard_and_jsonl_hold_the_same_numbers_under_the_documented_tags(finished, name: str) -> None:
    save = finished[0] / name
    shown, rows = events(save), metrics(save)
    assert shown.keys() >= MEGATRON_TAGS | OWN_TAGS
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        for tag, value in row.items():
            if tag != "iteration":
                assert shown[tag][row["iteration"]] == pytest.approx(value, rel=1e-6), tag
    assert sum(len(values) for values in shown.values()) == sum(len(row) - 1 for row in rows)


def test_tensorboard_groups_the_tags_on_a_page_of_their_own(finished) -> None:
    """`Custom Scalars`: every chart finds a tag; of what a run may leave out only those below."""
    accumulator = EventAccumulator(str(finished[0] / "pretrain-tp2" / "tensorboard"), size_guidance={"tensors": 0})
    (layout,) = accumulator.Reload().Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    assert [category.title for category in page.category] == ["Losses", "Contrast", "Optimiser", "Speed"]
    shown = events(finished[0] / "pretrain-tp2").keys()
    missing = set()
    for chart in (chart for category in page.category for chart in category.chart):
        found = {pattern: [tag for tag in shown if re.match(pattern, tag)] for pattern in chart.multiline.tag}
        assert any(found.values()) and all(len(tags) <= 1 for tags in found.values()), chart.title
        missing |= {pattern.strip("^$").replace("\\", "") for pattern, tags in found.items() if not tags}
    apart = {"grad-norm others", "grad-norm heads"}  # with --clip-heads-apart
    assert missing <= {"mfu", "mem-max-allocated-bytes", "save-stall-seconds", *apart}


def test_scalars_agree_with_one_another(finished) -> None:
    for row in metrics(finished[0] / "finetune-tp2"):
        assert row["batch-size"] == 8
        assert row["contrastive loss"] == pytest.approx((row["contrastive loss i2t"] + row["contrastive loss t2i"]) / 2)
        assert row["samples-per-second"] == pytest.approx(8 / row["iteration-time"])
        assert row["throughput"] == row["model-tflops-per-gpu"] > 0
        assert 0 <= row["data-wait-share"] < 1 and 0 <= row["retrieval accuracy i2t"] <= 1


def test_validation_is_logged_beside_the_iteration_and_repeats_its_samples(finished) -> None:
    rows = {row["iteration"]: row for row in metrics(finished[0] / "pretrain-tp2")}
    for iteration, row in rows.items():
        assert ("lm loss validation" in row) == (iteration in (2, 4)), iteration
    assert rows[2].keys() >= {f"{tag} validation" for tag in ("lm loss", "contrastive loss", "hallucination accuracy")}
    # The same 24 samples at both times, on weights that moved a little: near each other, but not the same.
    first, second = (rows[iteration]["lm loss validation"] for iteration in (2, 4))
    assert first != second and math.isclose(first, second, rel_tol=0.1)
    assert 0.1 < rows[2]["contrastive loss validation"] < 20


@pytest.mark.parametrize("name", ["pretrain-tp2", "finetune-tp2", "finetune-pp2", "finetune-dp2"])
def test_params_norm_is_the_norm_of_the_trained_weights(finished, name: str) -> None:
    save = finished[0] / name
    parts = ("connector.", "heads.") if name.startswith("pretrain") else ("connector.", "heads.", "language_model.")
    trained = [tensor.double() for key, tensor in weights(save).items() if key.startswith(parts)]
    logged = metrics(save)[-1]["params-norm"]
    assert logged == pytest.approx(math.sqrt(sum(tensor.square().sum().item() for tensor in trained)), rel=1e-5)


def test_lines_where_there_is_no_terminal(finished) -> None:
    lines = [line for line in finished[1]["lines"].splitlines() if line.startswith("iteration ")]
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"], "every --log-interval, and the last"
    assert all(" lm " in line and "contrastive" in line and "samples/s" in line for line in lines)
    assert [row["iteration"] for row in metrics(finished[0] / "lines")] == [2, 4, 5]


def test_progress_bar_on_a_terminal(finished) -> None:
    bar = finished[1]["bar"]
    assert "5/5" in bar and "100%" in bar and "contrastive" in bar and "\r" in bar
    assert "iteration 1/5" not in bar


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_model_flops_are_those_that_pytorch_counts(finished, stage: str) -> None:
    """PyTorch counts every matrix product that runs, masked ones of the last layer's attention whole; the formula
    leaves out the heads and the similarities, and takes the tower's first layer to need a gradient of its input."""
    for counted, ours in finished[1][f"{stage} flops"]:
        assert ours == pytest.approx(counted, rel=0.05), counted / ours


def test_flops_of_a_llama_worked_out_by_hand() -> None:
    from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, VisionConfig

    model = ModelConfig(
        language=LanguageConfig(
            num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=4, num_query_groups=2, vocab_size=32
        ),
        vision=VisionConfig(
            num_layers=3, hidden_size=4, ffn_hidden_size=8, num_attention_heads=2, image_size=4, patch_size=2
        ),
        image=ImageConfig(size=4),
        vision_select_layer=-2,
    )
    # A layer: q 8x8, k and v 8x4 each, out 8x8, three of 8x16. Two segments of 3 and 5 rows.
    layer = 64 + 2 * 32 + 64 + 3 * 128
    # In the last one, 3 rows are read: the first segment's last and the second's last two.
    linear = 2 * 8 * layer + 2 * (8 * 2 * 32 + 3 * (layer - 2 * 32))
    # Scores and values, width 8: 6 + 15 pairs of rows in the first layer; 3, and 4 + 5, in the last.
    attention = 2 * 2 * 8 * ((6 + 15) + (3 + 4 + 5))
    lm_head = 2 * 2 * 8 * 32  # 2 target rows
    lengths = SegmentLengths(segments=(3, 5), read=(1, 2), branches=(), branch_sizes=())
    assert language_flops(model, lengths, 2, passes=3) == 3 * (linear + attention + lm_head)
    assert language_flops(model, lengths, 2, passes=2) == 2 * (linear + lm_head) + 3 * attention
    assert language_flops(model, lengths, 2, passes=1) == linear + attention + lm_head
    branched = SegmentLengths(segments=(3, 5), read=(1, 2), branches=(4, 5), branch_sizes=(1, 2))
    more = language_flops(model, branched, 2, passes=1) - language_flops(model, lengths, 2, passes=1)
    # In both layers one query over 3 rows that are not its segment's, and two queries over 3 such rows each.
    assert more == 2 * 2 * 2 * 8 * (3 + 2 * 3)
    # Tower: 4 patches of 12 values, then 2 of 3 layers over 5 rows. Connector 4x8, 8x8 on 4 rows, trained.
    tower = 2 * 4 * 12 * 4 + 2 * (2 * 5 * (4 * 16 + 2 * 32) + 2 * 2 * 25 * 4)
    connector = 3 * 2 * 4 * (32 + 64)
    assert vision_flops(model, 7, trained=False) == 7 * (tower + connector)
    assert vision_flops(model, 7, trained=True) == 7 * (3 * tower + connector)
    assert qformer_flops(model) == (0, 0, 0), "there is none"


def test_cut_dialogues_are_counted_over_all_ranks(tmp_path: Path) -> None:
    """36 visual tokens leave 8 rows for a caption of more: LLaVA cuts it silently, here the log says so."""
    folder = make_inputs(tmp_path)
    train([command(folder, "pretrain", "dp2", "cut", "--model-max-length", "44", "--train-iters", "2")], 2)
    assert [row["truncated-dialogues"] for row in metrics(folder / "cut")] == [8, 16]
    assert metrics(folder / "cut")[-1]["tokenization-mismatches"] == 0
