"""Pipes, sockets and devices where a file is expected: refused in one line at once, where they made a reader wait."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare
from hacl_megatron.evaluation.answers.amber import WordLists, read_annotations
from hacl_megatron.evaluation.answers.chair import Synonyms, read_objects
from hacl_megatron.evaluation.journal import Journal
from hacl_megatron.evaluation.json_files import read_json, read_records
from hacl_megatron.hallucinate.files import read_records as read_llava


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return "a named pipe"


def bound(path: Path) -> str:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)
    return "a socket"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "a device"


OPENERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "data": ("a.json", lambda path: Manifest.read([str(path)], version="v1")),
    "lines": ("a.jsonl", lambda path: Manifest.read([str(path)], version="v1")),
    "manifest": ("a.arrow", lambda path: Manifest.read([str(path)], version="v1")),
    "folder": ("manifest.arrow", lambda path: Manifest.read([str(path.parent)], version="v1")),
    "prepare": ("a.json", lambda path: run_prepare(PrepareSettings(inputs=[str(path)], output=str(path) + ".out"))),
    "generate": ("a.json", lambda path: list(read_llava(path))),
    "pope": ("a.json", lambda path: read_records(path, needed=("text",), kind="POPE answers")),
    "json": ("a.json", read_json),
    "chair": ("objects.json", lambda path: read_objects(path, Synonyms.read())),
    "synonyms": ("synonyms.txt", Synonyms.read),
    "amber": ("annotations.json", read_annotations),
    "amber words": ("safe_words.txt", lambda path: WordLists.read(path, path)),
    "answers": ("answers.jsonl", lambda path: Journal(path, {}, str)),
}  # fmt: skip


@pytest.mark.parametrize("make", [pipe, bound, device])
@pytest.mark.parametrize("opener", OPENERS)
def test_what_is_no_file_is_refused_at_once(tmp_path, opener, make):
    name, open_it = OPENERS[opener]
    kind = make(tmp_path / name)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    try:
        with pytest.raises(ValueError, match=f"{name}.* {kind}, not a regular file") as caught:
            open_it(tmp_path / name)
    finally:
        signal.alarm(0)
    assert "\n" not in str(caught.value)
