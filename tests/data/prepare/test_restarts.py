"""A preparation killed or started again: what was done stays done, and nothing of other settings is kept."""

import json
import signal
import subprocess
import sys
import time

import pytest

from hacl_megatron.data.prepare import parts as prepare
from hacl_megatron.data.prepare.arrow_manifest import ArrowManifest
from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare
from tests.data.prepare.prepare_runs import settings, turns
from tests.distributed import context


def prepare_in_small_parts(*options: str) -> None:
    """Runs in a process of its own, which will be killed."""
    prepare.CHUNK_SAMPLES = 64
    source, output, tokenizer = options
    run_prepare(PrepareSettings(inputs=[source], output=output, tokenizer=tokenizer, progress_bar=False))


def test_a_killed_start_goes_on_and_ends_like_an_undisturbed_one(source, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_SAMPLES", 64)
    many = [{"id": n, "image": f"{n % 3}.jpg", "conversations": turns(f"{n}")} for n in range(6000)]
    total = -(-len(many) // 64)
    (source / "a.json").write_text(json.dumps(many))
    tokenizer = str(source / "tokenizer")
    # A process of the tests' fork server, which has paid the imports.
    options = (str(source / "a.json"), str(source / "out"), tokenizer)
    child = context.Process(target=prepare_in_small_parts, args=options)
    child.start()
    work = source / "out" / ".partial"
    end = time.monotonic() + 120
    while len(list(work.glob("*.arrow"))) < 5 and child.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    before = sorted(work.glob("*.arrow"))
    assert 5 <= len(before) < total and not (source / "out" / "manifest.arrow").exists()
    before[0].write_bytes(before[0].read_bytes()[:1000])  # as a power cut may leave it

    built = []
    monkeypatch.setattr(
        prepare, "build_batch", lambda *given, build=prepare.build_batch: built.append(1) or build(*given)
    )
    run_prepare(settings(source, tokenizer=tokenizer))
    assert len(built) == total - (len(before) - 1)
    assert not work.exists()
    run_prepare(settings(source, tokenizer=tokenizer, output=str(source / "undisturbed")))
    one, other = (source / name / "manifest.arrow" for name in ("out", "undisturbed"))
    assert one.read_bytes() == other.read_bytes()


def test_other_settings_do_not_take_over_what_was_measured_before(source, monkeypatch):
    monkeypatch.setattr("hacl_megatron.data.prepare.run.remove_folder", lambda folder, **_: None)
    lengths = []
    for version in ("plain", "v1", "plain"):
        run_prepare(settings(source, tokenizer=str(source / "tokenizer"), version=version))
        lengths.append(ArrowManifest(str(source / "out" / "manifest.arrow")).column("dialogue_tokens").to_pylist())
    assert lengths[0] == lengths[2] != lengths[1]


def test_two_starts_at_once_are_one_too_many(source):
    (source / "out" / ".partial").mkdir(parents=True)
    held = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX);"
         "print('held', flush=True); sys.stdin.read()", str(source / "out" / ".partial")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert held.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="being prepared by another process"):
            run_prepare(settings(source))
    finally:
        held.communicate("")
    run_prepare(settings(source))


def test_a_finished_shard_is_not_written_again(source, monkeypatch):
    options = {"image_folder": str(source / "images"), "write_shards": True, "images_per_shard": 1}
    monkeypatch.setattr("hacl_megatron.data.prepare.run.remove_folder", lambda folder, **_: None)
    run_prepare(settings(source, **options))
    shards = sorted((source / "out" / "shards").iterdir())
    whole = [shard.read_bytes() for shard in shards]
    old = [shard.stat().st_mtime_ns for shard in shards]
    shards[1].unlink()
    run_prepare(settings(source, **options))
    assert [shard.read_bytes() for shard in shards] == whole
    now = [shard.stat().st_mtime_ns for shard in shards]
    assert now[1] != old[1] and now[0] == old[0] and now[2:] == old[2:]


def test_what_a_killed_start_had_half_written_is_removed(source):
    """A gigabyte of `manifest.arrow.tmp-4711` and shards cut short stayed for ever."""
    options = {"image_folder": str(source / "images"), "write_shards": True}
    run_prepare(settings(source, **options))
    whole = sorted(path for path in (source / "out").rglob("*"))
    for name in ("manifest.arrow.tmp-4711", "shards/images-000003.tar.tmp"):
        (source / "out" / name).write_bytes(b"half")
    (source / "out" / "notes.tmp").write_text("a user's own")
    run_prepare(settings(source, **options))
    assert sorted((source / "out").rglob("*")) == sorted([*whole, source / "out" / "notes.tmp"])
