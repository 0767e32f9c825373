"""Which tokenizer a checkpoint carries."""

from pathlib import Path

from hacl_megatron.checkpoint.run.folder import copy_assets


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / f"{name}.json").write_text(text)
    return path


def test_the_tokenizer_in_use_is_stored_and_not_the_one_beside_the_weights(tmp_path: Path) -> None:
    weights = folder_with(tmp_path / "weights", tokenizer="old", tokenizer_config="old", preprocessor_config="image")
    own = folder_with(tmp_path / "own", tokenizer="new", config="not a tokenizer file")
    copy_assets(weights, tmp_path / "stored", tokenizer=str(own))
    stored = {file.name: file.read_text() for file in (tmp_path / "stored").iterdir()}
    assert stored == {"tokenizer.json": "new", "preprocessor_config.json": "image"}

    copy_assets(weights, tmp_path / "as it was")
    assert (tmp_path / "as it was" / "tokenizer.json").read_text() == "old"
