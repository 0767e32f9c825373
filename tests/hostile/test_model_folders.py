"""A stranger's model folder: JSON that never ends or says two things, links and pipes among the tokenizer's files."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.run.folder import copy_assets
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.tiny import write_tiny_llava
from tests.tiny_data import write_tiny_data
from tests.tool_runs import run_tool, to_hf, to_megatron
from tests.warm import run_warm

SECONDS = 5


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("pristine") / "llava", layers=1, vision_layers=2)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "llava"))


def refused(command: Callable[[], object]) -> str:
    """The message of a ValueError of one line, which has come in time."""
    started = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        command()
    assert time.perf_counter() - started < SECONDS
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize("part, key", [
    ("text_config", "num_hidden_layers"), ("text_config", "vocab_size"), ("text_config", "num_attention_heads"),
    ("text_config", "hidden_size"), ("text_config", "num_labels"), ("vision_config", "num_hidden_layers"),
    ("vision_config", "image_size"), ("text_config", "seed"), (None, "num_labels"),
])  # fmt: skip
@pytest.mark.parametrize("size", [10**12, 10**30, -(10**12)], ids=["10^12", "10^30", "-10^12"])
def test_sizes_beyond_all_bounds(folder, part, key, size):
    """transformers lists every layer and every label of a configuration: it would go on for ever."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part])[key] = size if key != "seed" else 10**30
    path.write_text(json.dumps(config))
    message = refused(lambda: read_model_config(folder))
    assert str(path) in message and f"{key} is " in message and "expected" in message


TEXTS = {
    "nested": "[" * 100_000,
    "nested and whole": '{"a":' * 100 + "1" + "}" * 100,
    "doubled": '{"a": 1, "a": 2}',
    "NaN": '{"a": NaN}',
    "Infinity": '{"a": [-Infinity]}',
    "too large a float": '{"a": 1e999}',
    "too many digits": '{"a": ' + "9" * 10_000 + "}",
    "a list": "[]",
    "cut": '{"a": ',
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"]
)
def test_json_that_says_no_one_thing(folder, name, text, tmp_path, capsys):
    """Catches a traceback, a last value that wins, and a number that is none; in every settings file of a folder."""
    (folder / name).write_text(TEXTS[text])
    started = time.perf_counter()
    assert run_tool("convert_hf_to_megatron", "--hf-path", folder, "--save", tmp_path / "save") == 2
    assert time.perf_counter() - started < SECONDS
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and "Traceback" not in line
    assert not (tmp_path / "save").exists()
    if name.startswith("tokenizer"):
        assert name in refused(lambda: load_tokenizer(str(folder)))


def test_an_index_that_names_no_files(folder):
    (folder / "model.safetensors").rename(folder / "weights")
    for value in (None, 7, ["model.safetensors"], {"a": 1}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": value}}))
        assert "weight_map names" in refused(lambda: read_model_config(write_tied(folder)))


def write_tied(folder: Path) -> Path:
    """So that reading the sizes looks into the weights."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    return folder


# ------------------------------------------------------------------------------------------------ files that are none

SECRET = "the private key of whoever converts"


@pytest.mark.parametrize("name", ["tokenizer_x.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("where", ["absolute", "relative", "through a folder"])
def test_a_link_out_of_the_folder_is_not_copied(folder, tmp_path, capsys, name, where):
    """Whatever the reader may see would be copied, readable by all, into checkpoint and export."""
    (tmp_path / "secret").write_text(SECRET)
    (folder / name).unlink(missing_ok=True)
    if where == "through a folder":
        (folder / "inside").symlink_to(tmp_path)
    target = {"absolute": tmp_path / "secret", "relative": "../secret", "through a folder": "inside/secret"}[where]
    (folder / name).symlink_to(target)
    assert run_tool("convert_hf_to_megatron", "--hf-path", folder, "--save", tmp_path / "save") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder / name}: a link to {tmp_path / 'secret'}" in line and "expected a file" in line
    assert not (tmp_path / "save").exists()
    assert "a link to" in refused(lambda: copy_assets(folder, tmp_path / "copy"))
    if name != "chat_template.jinja":
        assert "a link to" in refused(lambda: copy_assets(tmp_path, tmp_path / "copy", tokenizer=str(folder)))
    copied = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in copied)
    if name != "tokenizer_x.json":
        assert "a link to" in refused(lambda: load_tokenizer(str(folder)))


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "nowhere", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder, tmp_path, kind):
    path = folder / "tokenizer_config.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop": path.name, "nowhere": "gone.json", "device": "/dev/zero"}[kind])
    assert str(path) in refused(lambda: load_tokenizer(str(folder)))
    if kind != "folder":  # formats of other libraries have folders of such names
        assert str(path) in refused(lambda: copy_assets(folder, tmp_path / "copy"))


def test_a_file_that_belongs_there_by_name_alone(folder, tmp_path):
    with (folder / "tokenizer_dump.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "tokenizer_dump.json: 1,099,511,627,776 bytes" in refused(lambda: copy_assets(folder, tmp_path / "copy"))


def test_the_hubs_cache_works_as_it_is(pristine, tmp_path):
    """Its snapshots are links to blobs two folders up: these must not be taken for an attack."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(pristine.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    load_tokenizer(str(snapshot))
    out = to_hf(to_megatron(snapshot, tmp_path / "save"), tmp_path / "out")
    assert (out / "tokenizer.model").read_bytes() == (pristine / "tokenizer.model").read_bytes()
    assert not any(path.is_symlink() for path in tmp_path.joinpath("save").rglob("*"))
    (tmp_path / "link").symlink_to(snapshot)
    load_tokenizer(str(tmp_path / "link"))


# --------------------------------------------------------------------------------------------- before the first step


def test_a_run_that_could_not_be_exported_does_not_begin(folder, tmp_path):
    """Catches what only an export reads, and so only days later: here the generation settings."""
    write_tiny_data(tmp_path / "data")
    (folder / "generation_config.json").write_text('{"temperature": NaN}')
    data = tmp_path / "data"
    command = [
        "-m", "hacl_megatron.train", "--device", "cpu", "--pretrained-checkpoint", str(folder),
        "--data-path", str(next(data.glob("*.json"))), "--image-folder", str(data), "--model-max-length", "256",
        "--train-iters", "1", "--global-batch-size", "2", "--lr", "1e-4", "--save", str(tmp_path / "save"),
    ]  # fmt: skip
    done = run_warm(command)
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if "generation_config" in line]
    assert "could not be exported" in line and "NaN" in line
    assert not (tmp_path / "save" / "iter_0000001").exists() and "Traceback" not in done.stderr
