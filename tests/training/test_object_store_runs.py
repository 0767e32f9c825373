"""Training out of an object store is training out of the folder: killed, resumed, over a connection that breaks."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hacl_megatron.config.checks.files import check_places
from hacl_megatron.config.run import parse_run_config
from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare
from tests.s3_server import FAULTS, KEY, SECRET, FaultyProxy, S3Server
from tests.training.runs import LOSSES, assert_same_state, make_inputs, metrics
from tests.training.test_bad_luck import PROGRAM
from tests.warm import Warm


class Runs:
    """What was trained from either place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[str, int] = {}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """`folder`: six steps. `store`: the same, killed in the third and started again."""
    folder = make_inputs(tmp_path_factory.mktemp("store_runs"), samples=20)
    (folder / "hangs.py").write_text(PROGRAM)
    for name in ("finetune", "contrastive"):
        run_prepare(
            PrepareSettings(
                inputs=[str(folder / f"data/{name}.json")], output=str(folder / f"prepared/{name}"),
                image_folder=str(folder / "data/images"), write_shards=name == "finetune", progress_bar=False,
            )
        )  # fmt: skip
    server = S3Server()
    proxy = FaultyProxy(server.port, latency=0.005, rates=dict.fromkeys(FAULTS, 0.05), seed=1)
    found = Runs(folder)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "HOME": str(folder), "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
    }  # fmt: skip
    started: list[Warm] = []

    def start(name: str, place: str, images: str, *program: str) -> Warm:
        save = str(folder / name)
        flags = [
            "--config", str(folder / "finetune.yaml"), "--save", save, "--load", save, "--device", "cpu",
            "--data-path", f"{place}/finetune", "--contrastive-data-path", f"{place}/contrastive",
            "--image-folder", images, "--data-cache-dir", str(folder / "cache"), "--train-iters", "6",
            "--save-interval", "1",
        ]  # fmt: skip
        with (folder / f"{name}.log").open("a") as log:
            started.append(Warm([*program, *flags], stdout=log.fileno(), stderr=log.fileno(), env=environment))
        return started[-1]

    try:
        url = server.upload(folder / "prepared", "prepared")
        images = server.upload(folder / "data/images", "images")
        whole = start("folder", str(folder / "prepared"), str(folder / "data/images"), "-m", "hacl_megatron.train")
        killed = start("store", url, images, str(folder / "hangs.py"))
        end = 240.0
        while "now" not in found.log("store") and killed.poll() is None and (end := end - 0.05) > 0:
            time.sleep(0.05)
        killed.kill()
        killed.wait(60)
        assert start("store", url, images, "-m", "hacl_megatron.train").wait(240) == 0, found.log("store")[-3000:]
        assert whole.wait(240) == 0, found.log("folder")[-3000:]
        found.counts = dict(proxy.counts)
        yield found
    finally:
        for process in started:
            process.kill()
        proxy.stop()
        server.stop()


def test_killed_and_resumed_it_is_bitwise_the_run_of_the_folder(runs: Runs) -> None:
    """Catches images that are left out or another's, and data whose identity depends on where it lies."""
    assert all(runs.counts[name] >= 1 for name in FAULTS), runs.counts
    one, other = (metrics(runs.folder / name) for name in ("folder", "store"))
    assert len(one) == len(other) == 6
    for mine, theirs in zip(one, other, strict=True):
        for tag in (*LOSSES, "grad-norm"):
            assert mine.get(tag) == theirs.get(tag), (mine["iteration"], tag)
    assert_same_state(runs.folder / "folder", runs.folder / "store")
    assert not any((runs.folder / name / "bad_samples.jsonl").exists() for name in ("folder", "store"))
    assert runs.log("store").count("iteration 1/6") == 1, "the second start went on"


def test_no_secret_is_left_anywhere(runs: Runs) -> None:
    """Not in logs, run_config.yaml, TensorBoard's files or the cache."""
    looked_at = 0
    for path in [*runs.folder.rglob("*")]:
        if path.is_file():
            data = path.read_bytes()
            assert SECRET.encode() not in data and KEY.encode() not in data, path
            looked_at += b"s3://bucket/prepared/finetune" in data
    assert looked_at >= 2, "run_config.yaml and others do hold the URL"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--save", "s3://bucket/run"], "--save s3://bucket/run: found a URL; checkpoints stay on file systems"),
        (["--load", "s3://u:hidden@bucket/run"], "--load s3://...@bucket/run: found a URL; checkpoints stay"),
        (["--pretrained-checkpoint", "gs://bucket/m"], "--pretrained-checkpoint gs://bucket/m: found a URL; only data"),
        (["--tensorboard-dir", "s3://bucket/t"], "--tensorboard-dir s3://bucket/t: found a URL; only data"),
        (["--data-path", "s3://u:hidden@bucket/a"], "--data-path s3://...@bucket/a: holds a password or a query"),
        (["--image-folder", "https://h/a?sig=hidden"], "--image-folder https://h/a?...: holds a password or a query"),
        (["--valid-data-path", "sftp://h/a"], "--valid-data-path sftp://h/a: found sftp://, expected one of s3"),
    ],
)
def test_urls_that_no_run_takes(flags: list[str], words: str) -> None:
    """Before anything is written: `--save s3://…` would make a folder named `s3:`, and no one would find it."""
    with pytest.raises(ValueError) as error:
        check_places(parse_run_config(flags))
    assert str(error.value).startswith(words) and "hidden" not in str(error.value)
