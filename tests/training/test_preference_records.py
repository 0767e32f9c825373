"""Runs on preference records: the same as on HACL's twins, beside plain and contrastive samples, over a resume."""

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hacl_megatron.train import run
from tests.tiny_data import swap_twins
from tests.tool_runs import run_tool
from tests.training.runs import make_inputs, metrics, train

PHRASE = ["--preference-loss", "phrase"]
BITWISE = ("lm loss", "preference loss", "preference accuracy", "preference margin", "grad-norm")


def as_preference(record: dict[str, Any], number: int) -> dict[str, Any]:
    """An image with a question, a caption and its twins, as one of three formats says it."""
    twins = record["Hallucination caption"]
    question, answer = (turn["value"] for turn in record["conversations"])
    plain = question.replace("<image>", "").strip()
    if number % 3 == 0:
        return {"id": record["id"], "prompt": plain, "image": record["image"], "chosen": answer, "rejected": twins}
    messages = [[{"role": "assistant", "content": twin}] for twin in ([twins] if isinstance(twins, str) else twins)]
    if number % 3 == 1:
        return {
            "id": record["id"], "images": [record["image"]], "chosen": [{"role": "assistant", "content": answer}],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": plain}]}],
            "rejected": messages[0] if len(messages) == 1 else messages,
        }  # fmt: skip
    return {
        "ds_name": "RLAIF-V", "origin_dataset": "COCO", "idx": record["id"], "image_path": record["image"],
        "question": plain, "chosen": answer, "rejected": twins,
    }  # fmt: skip


def said(arguments: list[str], path: str) -> None:
    """Trains, and writes what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        run(arguments)
    Path(path).write_text(printed.getvalue())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`records`: every third record plain LLaVA, the others preferences; `twins`: the same as HACL's twins.

    `alone` has no rejected answers, `ignored` has them and no loss for them. `mixed` adds contrastive pairs and is
    interrupted in `half` and `rest`.
    """
    folder = make_inputs(tmp_path_factory.mktemp("records"), samples=9)
    swap_twins(folder / "data")
    twins = json.loads((folder / "data" / "pretrain.json").read_text())
    records, alone = [], []
    for number, record in enumerate(twins):
        record["conversations"][1]["value"] = record.pop("text", record["conversations"][1]["value"])
        has_twins = "Hallucination caption" in record
        records.append(as_preference(record, number // 3) if has_twins else record)
        alone.append({key: value for key, value in record.items() if key != "Hallucination caption"})
    assert sum("rejected" in record for record in records) == 6
    for name, some in (("records", records), ("twins", twins), ("alone", alone)):
        (folder / "data" / f"{name}.json").write_text(json.dumps(some))
        paths = ["--input", folder / "data" / f"{name}.json", "--output", folder / "data" / name]
        assert run_tool("prepare_data", *paths, "--image-folder", folder / "data" / "images", "--write-shards") == 0

    def command(name: str, data: str, *more: str) -> list[str]:
        flags = ["--data-path", str(folder / "data" / data), "--save", str(folder / name), "--micro-batch-size", "8"]
        return ["--config", str(folder / "pretrain.yaml"), "--version", "v1", *flags, "--train-iters", "3", *more]

    no_pairs = ["--contrastive-weight", "0"]
    pairs = ["--contrastive-data-path", str(folder / "data" / "contrastive.json"), *PHRASE]
    pairs += ["--global-batch-size", "18", "--micro-batch-size", "9"]
    rest = ["--load", str(folder / "half")]
    train(
        [
            command("twins", "twins", *no_pairs, *PHRASE),
            command("records", "records", *no_pairs, *PHRASE),
            command("alone", "alone", *no_pairs),
            partial(said, command("ignored", "records.json", *no_pairs), str(folder / "ignored.txt")),
            partial(said, command("mixed", "records.json", *pairs), str(folder / "mixed.txt")),
            command("half", "records.json", *pairs, "--exit-interval", "1"),
            command("half", "records.json", *pairs, *rest),
        ],
        1,
    )
    return folder


def test_losses_are_those_of_the_same_pairs_written_as_twins(runs: Path) -> None:
    """Bit for bit, from a folder with shards: any other place, blank or image tag would change them."""
    found, expected = metrics(runs / "records"), metrics(runs / "twins")
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert {tag: one[tag] for tag in BITWISE} == {tag: other[tag] for tag in BITWISE}
        assert one["preference loss"] > 0.05 and one["uncompared-twins"] == one["bad-samples"] == 0


def test_without_the_loss_they_are_ignored_and_that_is_said_once(runs: Path) -> None:
    """A run on the very records without their rejected answers has the same losses, bit for bit."""
    for one, other in zip(metrics(runs / "ignored"), metrics(runs / "alone"), strict=True):
        assert [one[tag] for tag in ("lm loss", "grad-norm")] == [other[tag] for tag in ("lm loss", "grad-norm")]
        assert "preference loss" not in one
    words = "6 of 9 records (pretrain-1, pretrain-2, pretrain-4, ...): rejected answers are ignored, for --preference"
    assert (runs / "ignored.txt").read_text().count(words) == 1
    assert "ignored" not in (runs / "mixed.txt").read_text()


def test_beside_plain_and_contrastive_samples_over_a_resume(runs: Path) -> None:
    """Each step has all three kinds: it is an epoch of all 18 samples."""
    whole, parts = metrics(runs / "mixed"), metrics(runs / "half")
    assert len(whole) == len(parts) == 3
    tags = (*BITWISE, "contrastive loss")
    for one, other in zip(whole, parts, strict=True):
        assert {tag: one[tag] for tag in tags} == {tag: other[tag] for tag in tags}
        assert one["preference loss"] > 0.05 and one["contrastive loss"] > 0 and one["bad-samples"] == 0
