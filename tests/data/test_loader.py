"""The whole way from LLaVA JSON and JPEGs to packed steps, with real files, tokenizer and decoder."""

import io
import json
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hacl_megatron.batch import PackedBatch, StepBatches
from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, VisionConfig
from hacl_megatron.config.flags import DataFlags, TrainingFlags
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data import images
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.loader import MicroBatching, StepLoader, build_loader
from hacl_megatron.data.store import image_key
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.data.tiny_tokenizer import write_tokenizer

SIZE, PATCH = 32, 16
V = (SIZE // PATCH) ** 2
MODEL = ModelConfig(
    language=LanguageConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1, vocab_size=600
    ),
    vision=VisionConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, image_size=SIZE, patch_size=PATCH
    ),
    image=ImageConfig(size=SIZE),
)
BACKENDS = [
    pytest.param("dali", marks=pytest.mark.skipif(not images.dali_is_installed(), reason="DALI is not installed")),
    "pillow",
]
NUM_SAMPLES, NUM_CONTRASTIVE = 12, 4
TEXT_ONLY = {5, 8}
"""Samples without an image; all others have one."""


def image_bytes(seed: int, format: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    file = io.BytesIO()
    noise.resize((60 + seed, 50 - seed), Image.BICUBIC).save(file, format)
    return file.getvalue()


def sample(index: int, prefix: str, **more) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat " * (index % 3 + 1)}]
    return {"id": f"{prefix}-{index}", "image": f"{prefix}/{index}.jpg", "conversations": turns, **more}


@pytest.fixture
def dataset(tmp_path) -> Path:
    """`train.json` (12, two of them text only, three with captions), `contrastive.json` (4) and `images/`."""
    train = [sample(index, "train", **({"text": "a red cat"} if index < 3 else {})) for index in range(NUM_SAMPLES)]
    for index in TEXT_ONLY:
        del train[index]["image"]
        train[index]["conversations"][0]["value"] = "What is it?"
    contrastive = [
        sample(index, "pairs", **{"text": f"a cat {index}", "Hallucination caption": ["a dog", "a red dog"]})
        for index in range(NUM_CONTRASTIVE)
    ]
    for name, samples in (("train", train), ("contrastive", contrastive)):
        (tmp_path / f"{name}.json").write_text(json.dumps(samples))
    for seed, record in enumerate([*train, *contrastive]):
        if "image" in record:
            path = tmp_path / "images" / record["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(seed))
    write_tokenizer(tmp_path / "tokenizer", legacy=True)
    return tmp_path


def change_sample(dataset: Path, index: int, **changes) -> None:
    path = dataset / "train.json"
    samples = json.loads(path.read_text())
    samples[index].update(changes)
    path.write_text(json.dumps(samples))


def loader_of(dataset: Path, *, flags: dict | None = None, **changes) -> StepLoader:
    paths = {
        "data_path": changes.pop("data_paths", [str(dataset / "train.json")]),
        "contrastive_data_path": changes.pop("contrastive_paths", [str(dataset / "contrastive.json")]),
    }
    paths["valid_data_path"] = paths["data_path"]
    config = RunConfig(
        data=DataFlags(**{"image_folder": str(dataset / "images"), "model_max_length": 64, **paths, **(flags or {})}),
        training=TrainingFlags(seed=3),
        architecture=MODEL,
    )
    settings = {
        "config": config,
        "tokenizer": load_tokenizer(str(dataset / "tokenizer")),
        "global_batch_size": 4,
        "micro_batching": MicroBatching(micro_batch_size=2),
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "pad_multiple": 4,
        "for_validation": not changes.pop("shuffle", True),
        "data_state": None,
    }
    return build_loader(**{**settings, **changes})


def draw(num_steps: int, *args, **changes) -> list[StepBatches]:
    with loader_of(*args, **changes) as loader:
        return [next(loader) for _ in range(num_steps)]


def mains(step: StepBatches) -> list[PackedBatch]:
    assert all(batch.ahead is None for batch in step.micro_batches)
    return [batch.main for batch in step.micro_batches]


def assert_same_batch(one: PackedBatch, other: PackedBatch) -> None:
    for key, value in vars(one).items():
        theirs = getattr(other, key)
        assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs, key


def pixels_by_sample(steps: list[StepBatches], bad: tuple[int, ...] = ()) -> dict[int, torch.Tensor]:
    """Each sample's pixels, from the rule that a micro-batch's images stand in the order of their good samples."""
    found = {}
    for step in steps:
        for batch in mains(step):
            with_image = [i for i in batch.sample_ids.tolist() if i not in TEXT_ONLY and i not in bad]
            assert batch.num_images == len(with_image)
            found.update(zip(with_image, batch.pixel_values, strict=True))
    return found


# ---- what a step holds


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_holds_every_sample_once_with_its_own_image_and_segments(dataset, backend):
    with loader_of(dataset, flags={"image_backend": backend}) as loader:
        assert loader.num_samples == NUM_SAMPLES + NUM_CONTRASTIVE
        steps = [next(loader) for _ in range(4)]
    batches = [batch for step in steps for batch in mains(step)]
    assert sorted(i for batch in batches for i in batch.sample_ids.tolist()) == list(range(16))
    assert [len(step.micro_batches) for step in steps] == [2] * 4
    assert all(batch.sample_ids.shape == (2,) and batch.num_rows % 4 == 0 for batch in batches)
    assert not any(step.bad_samples or step.num_truncated or step.num_tokenization_mismatches for step in steps)
    assert sum(batch.num_pairs for batch in batches) == 3 + NUM_CONTRASTIVE
    assert sum(batch.hallucinated_eos_rows.numel() for batch in batches) == 2 * NUM_CONTRASTIVE
    assert all(batch.num_targets for batch in batches)

    decoder = ImageDecoder(MODEL.image, aspect_ratio="pad", backend=backend)
    pixels = pixels_by_sample(steps)
    assert sorted(pixels) == sorted(set(range(16)) - TEXT_ONLY)
    for sample_id, ours in pixels.items():
        assert torch.equal(ours, decoder.decode([image_bytes(sample_id)]).pixel_values[0]), sample_id
    decoder.close()
    keys = {key for batch in batches for key in batch.image_keys.tolist()}
    assert keys == {image_key(image_bytes(i)) for i in (0, 1, 2, 12, 13, 14, 15)}


def test_equal_images_of_a_step_are_decoded_once_and_stand_in_every_slot(dataset, monkeypatch):
    same = (dataset / "images/train/0.jpg").read_bytes()
    for index in range(4):
        (dataset / f"images/train/{index}.jpg").write_bytes(same)
    counts = []
    decode = ImageDecoder.decode

    def counted(self, files):
        counts.append(len(files))
        return decode(self, files)

    monkeypatch.setattr(ImageDecoder, "decode", counted)
    (step,) = draw(1, dataset, shuffle=False, contrastive_paths=[], flags={"prefetch_steps": 1})
    assert counts[0] == 1
    first, second = (batch.pixel_values for batch in mains(step))
    assert first.shape[0] == second.shape[0] == 2
    assert all(torch.equal(first[0], other) for other in (first[1], second[0], second[1]))


def test_truncations_and_mismatches_are_counted(dataset):
    long = "a cat " * 100
    change_sample(
        dataset, 1, conversations=[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": long}]
    )
    steps = draw(3, dataset, shuffle=False, contrastive_paths=[])
    assert [step.num_truncated for step in steps] == [1, 0, 0]
    # Three empty answers: LLaVA's rounds then do not add up to the length of the whole, and all labels are ignored.
    empty = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": ""}] * 3
    change_sample(dataset, 6, conversations=empty)
    steps = draw(3, dataset, shuffle=False, contrastive_paths=[])
    assert [step.num_tokenization_mismatches for step in steps] == [0, 1, 0]
    assert not any(step.bad_samples for step in steps)


# ---- bad samples


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_samples_are_reported_and_move_nothing_else(dataset, backend):
    flags = {"image_backend": backend}
    clean = draw(4, dataset, flags=flags)
    folder = dataset / "images" / "train"
    whole = (folder / "1.jpg").read_bytes()
    (folder / "0.jpg").unlink()
    (folder / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "2.jpg").write_text("<html>404</html>")
    (folder / "3.jpg").write_bytes(b"")
    (folder / "4.jpg").unlink()
    (folder / "4.jpg").mkdir()
    change_sample(dataset, 6, image="../train.json")
    change_sample(dataset, 7, conversations=[])
    gif = image_bytes(9, "GIF")
    (folder / "9.jpg").write_bytes(gif)
    bad = (0, 1, 2, 3, 4, 6, 7)

    steps = draw(4, dataset, flags=flags)
    records = {record.sample_id: record for step in steps for record in step.bad_samples}
    assert sorted(records) == list(bad)
    for index, reason in {
        0: "no such file", 1: "cut off", 2: "not an image", 3: "empty", 4: "is a folder", 6: "leaves the image folder",
        7: "no turns",
    }.items():  # fmt: skip
        assert reason in records[index].reason and "\n" not in records[index].reason
        assert records[index].name == f"train-{index}"
    assert records[1].source == str(folder / "1.jpg")
    assert records[7].source == str(dataset / "train.json")

    for before, after in zip(clean, steps, strict=True):
        assert before.data_state | {"digest": ""} == after.data_state | {"digest": ""}  # the JSON has changed
        for one, other in zip(mains(before), mains(after), strict=True):
            assert torch.equal(one.sample_ids, other.sample_ids)
    before, after = pixels_by_sample(clean), pixels_by_sample(steps, bad)
    assert set(after) == set(before) - set(bad)
    for index in set(after) - {9}:
        assert torch.equal(after[index], before[index]), index
    decoder = ImageDecoder(MODEL.image, aspect_ratio="pad", backend=backend)
    assert torch.equal(after[9], decoder.decode([gif]).pixel_values[0])
    decoder.close()

    # Slots of bad samples contribute nothing: no pair of samples 0 .. 2, the contrastive ones' are all there.
    assert sum(batch.num_pairs for step in steps for batch in mains(step)) == NUM_CONTRASTIVE
    for before_step, after_step in zip(clean, steps, strict=True):
        for one, other in zip(mains(before_step), mains(after_step), strict=True):
            if not set(one.sample_ids.tolist()) & {*bad, 9}:
                assert_same_batch(one, other)


def test_a_micro_batch_of_bad_samples_alone_is_still_a_pack(dataset):
    for index in range(4):
        (dataset / f"images/train/{index}.jpg").unlink()
    (step,) = draw(1, dataset, shuffle=False, contrastive_paths=[])
    assert [record.sample_id for record in step.bad_samples] == [0, 1, 2, 3]
    for batch in mains(step):
        assert batch.num_images == batch.num_pairs == batch.num_targets == 0
        assert batch.num_rows == batch.num_padding_rows == 4


# ---- order, state, ranks


def test_going_on_from_a_steps_state_gives_the_uninterrupted_run(dataset):
    """The state of a step knows nothing of what the thread has read ahead since."""
    with loader_of(dataset, flags={"prefetch_steps": 3}) as loader:
        steps = [next(loader) for _ in range(9)]
    for stop in (0, 3, 5):  # in the first epoch, at its end, in the second
        state = json.loads(json.dumps(steps[stop].data_state))
        for step, expected in zip(draw(3, dataset, data_state=state), steps[stop + 1 : stop + 4], strict=True):
            assert step.data_state == expected.data_state
            for one, other in zip(mains(step), mains(expected), strict=True):
                assert_same_batch(one, other)


def test_two_ranks_share_the_global_batches_of_one(dataset):
    alone = draw(5, dataset)
    ranks = [draw(5, dataset, data_parallel_rank=rank, data_parallel_size=2) for rank in (0, 1)]
    for step, *parts in zip(alone, *ranks, strict=True):
        assert [part.data_state for part in parts] == [step.data_state] * 2
        batches = [batch for part in parts for batch in mains(part)]
        assert len(batches) == len(step.micro_batches) == 2
        for one, other in zip(mains(step), batches, strict=True):
            assert_same_batch(one, other)


def test_workers_and_read_ahead_change_nothing(dataset):
    few = draw(4, dataset, flags={"num_workers": 1, "prefetch_steps": 1})
    many = draw(4, dataset, flags={"num_workers": 6, "prefetch_steps": 4})
    for one, other in zip(few, many, strict=True):
        for batch, theirs in zip(mains(one), mains(other), strict=True):
            assert_same_batch(batch, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 3}, "global"),
        ({"flags": {"image_folder": "/nowhere"}}, "--image-folder"),
        ({"data_state": {"consumed_samples": 0}}, "data state"),
        ({"data_paths": ["/nowhere.json"]}, "/nowhere.json"),
    ],
)
def test_mistakes_are_found_before_a_thread_starts(dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        loader_of(dataset, **changes)
    with pytest.raises(ValueError, match="--prefetch-steps"):
        loader_of(dataset, flags={"prefetch_steps": 0})
    assert not any(thread.name == "step-loader" for thread in threading.enumerate())


def test_decoding_on_the_gpu_needs_one_and_is_left_out_with_pillow(dataset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    draw(1, dataset, decode_device="mixed", flags={"image_backend": "pillow"})
    if images.dali_is_installed():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            loader_of(dataset, decode_device="mixed", flags={"image_backend": "dali"})


# ---- the thread


def numbered_step(number: int) -> StepBatches:
    return StepBatches(micro_batches=[], data_state={"step": number})


class Maker:
    """Counts the steps that were made; each takes `seconds`."""

    def __init__(self, seconds: float = 0.0, fail_at: int | None = None):
        self.made, self.seconds, self.fail_at = 0, seconds, fail_at
        self.closed = 0

    def make(self) -> StepBatches:
        if self.made == self.fail_at:
            raise KeyError("the disk is on fire")
        time.sleep(self.seconds)
        self.made += 1
        return numbered_step(self.made - 1)

    def close(self) -> None:
        self.closed += 1

    def loader(self, prefetch_steps: int = 2) -> StepLoader:
        return StepLoader(self.make, prefetch_steps=prefetch_steps, num_samples=1, close=self.close)


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_the_thread_reads_ahead_while_the_consumer_is_busy_and_no_further():
    maker = Maker()
    with maker.loader(prefetch_steps=3) as loader:
        assert wait_until(lambda: maker.made == 3)
        time.sleep(0.05)
        assert maker.made == 3
        assert next(loader).data_state == {"step": 0}
        assert wait_until(lambda: maker.made == 4)
        assert [next(loader).data_state["step"] for _ in range(3)] == [1, 2, 3]


def test_waiting_is_measured_and_vanishes_when_the_consumer_is_slower():
    with Maker(seconds=0.1).loader() as loader:
        next(loader)
        assert loader.wait_seconds > 0.05
        first = loader.wait_seconds
        next(loader)
        assert loader.wait_seconds > first
    with Maker(seconds=0.15).loader() as loader:
        next(loader)
        before = loader.wait_seconds
        for _ in range(2):
            time.sleep(0.5)
            next(loader)
        assert loader.wait_seconds - before < 0.15  # 0.3 if the thread began when asked


def test_an_exception_of_the_thread_comes_after_the_steps_before_it_with_its_traceback():
    maker = Maker(fail_at=2)
    with maker.loader(prefetch_steps=5) as loader:
        assert [next(loader).data_state["step"] for _ in range(2)] == [0, 1]
        for _ in range(2):  # and again, instead of waiting for ever
            with pytest.raises(KeyError, match="on fire") as error:
                next(loader)
            assert any(frame.name == "make" for frame in traceback.extract_tb(error.value.__traceback__))
    assert maker.closed == 1


def test_a_fault_in_the_real_thread_reaches_the_consumer(dataset, monkeypatch):
    """A full disk or a bug is no bad sample."""
    monkeypatch.setattr("hacl_megatron.data.loader.encode", lambda *args: 1 / 0)
    with loader_of(dataset) as loader, pytest.raises(ZeroDivisionError):
        next(loader)


def test_close_is_prompt_wherever_the_thread_is(dataset):
    for taken in (0, 1):
        loader = loader_of(dataset)
        for _ in range(taken):
            next(loader)
        thread = loader._thread
        start = time.monotonic()
        loader.close()
        assert time.monotonic() - start < 5
        assert not thread.is_alive()
        loader.close()
        with pytest.raises(StopIteration):
            next(loader)


def test_close_wakes_a_consumer_in_another_thread():
    cancelled = threading.Event()

    def make() -> StepBatches:
        cancelled.wait(10)
        raise InterruptedError("what cancelling a read raises")

    loader = StepLoader(make, prefetch_steps=1, num_samples=1, cancel=cancelled.set)
    seen = []
    consumer = threading.Thread(target=lambda: seen.extend(loader), daemon=True)
    consumer.start()
    time.sleep(0.05)
    loader.close()
    consumer.join(5)
    assert not consumer.is_alive()


def test_a_forgotten_loader_ends_its_thread():
    maker = Maker()
    loader = maker.loader()
    thread = loader._thread
    assert wait_until(lambda: maker.made == 2)
    del loader
    assert wait_until(lambda: not thread.is_alive())
    assert maker.closed == 1


EXITS = {
    "end of the program, thread at work": "pass",
    "end of the program, thread waiting": "import time; time.sleep(1)",
    "interrupt while waiting": (
        "import os, signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit SIGINT ignored
        "threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "for step in loader: pass"
    ),
}


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_ends_with_a_loader_open(dataset, how):
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.data.test_loader import loader_of
loader = loader_of(Path({str(dataset)!r}))
next(loader)
print("drawn", flush=True)
{EXITS[how]}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "drawn" in done.stdout, done.stderr
    expected = (0,) if how.startswith("end") else (-2, 1, 130)
    assert done.returncode in expected, (done.returncode, done.stderr)
    unexpected = [line for line in done.stderr.splitlines() if "Fatal" in line or "step-loader" in line]
    assert not unexpected, done.stderr
