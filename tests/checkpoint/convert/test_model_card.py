"""README.md of an export, as the hub's own library reads it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hacl_megatron.checkpoint.convert.model_card import hub_name, is_ours, model_card
from hacl_megatron.checkpoint.run.folder import RUN_CONFIG_FILE, locate_checkpoint, read_run_config
from hacl_megatron.config.run import to_yaml
from tests.tiny import write_tiny_llava
from tests.tool_runs import to_hf, to_megatron

LICENCE = "---\nlicense: other\nlicense_name: llama2\nlicense_link: https://x.org/l\nbase_model: a/b\n---\n# A base\n"
DATA = "/home/somebody/secret place/llava|`mix`.json"


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run from a base of the hub's cache has saved at iteration 20."""
    home = tmp_path_factory.mktemp("card") / "home"
    snapshot = home / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "0123"
    base = write_tiny_llava(snapshot, layers=1, vision_layers=2)
    (base / "README.md").write_text(LICENCE)
    save = to_megatron(base, home / "runs" / "my_run")
    folder = (save / "iter_0000000").rename(save / "iter_0000020")
    (save / "latest_checkpointed_iteration.txt").write_text("20\n")
    config = read_run_config(folder)
    config.data.data_path, config.data.image_folder = [DATA, "s3://bucket/part?key=hidden"], str(home / "images")
    config.model.pretrained_checkpoint, config.optimizer.lr = str(base), 1.5e-4
    config.checkpoint.save, config.logging.wandb_project = str(save), "hidden-project"
    (folder / RUN_CONFIG_FILE).write_text(to_yaml(config))
    records = [{"iteration": i, "lm loss": 4 - i / 10, "learning-rate": 1.0} for i in range(1, 31)]
    records[9]["hallucination accuracy validation"], records[29]["hallucination accuracy validation"] = 0.75, 0.99
    (save / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"iter')
    return save


@pytest.fixture(scope="module")
def export(save: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_hf(save, tmp_path_factory.mktemp("exports") / "out")


def test_the_hub_finds_it_by_its_metadata(export: Path) -> None:
    """Catches metadata that the hub does not read, and a licence that is lost."""
    metadata = ModelCard.load(export / "README.md").data.to_dict()
    assert metadata == {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "base_model": "llava-hf/llava-1.5-7b-hf",
        "license": "other", "license_name": "llama2", "license_link": "https://x.org/l",
        "tags": ["hacl", "llava", "hallucination"],
    }  # fmt: skip


def test_it_tells_the_run_and_nothing_of_its_machine(export: Path, save: Path) -> None:
    """Catches numbers of another iteration, flags that are missing, and paths, names of users and keys that are not."""
    text = (export / "README.md").read_text()
    assert "# my\\_run\n" in text and "| iteration | 20 |" in text
    assert "| trained on | `llava/'mix'.json`, `part` |" in text
    assert "| started from | `llava-hf/llava-1.5-7b-hf` |" in text
    assert "  --lr 0.00015" in text and "--seed" not in text
    numbers = text.partition("At iteration 20")[2]
    assert "| lm loss | 2 |" in numbers and "| hallucination accuracy validation | 0.75 |" in numbers
    assert "learning-rate" not in numbers
    for hidden in ("/home/", "somebody", "secret", "hidden", str(save.parent), "s3:"):
        assert hidden not in text, hidden


def test_it_tells_the_data_of_the_runs_before(save: Path) -> None:
    """Catches a stage 1 whose data nobody learns of, and paths inside the sections of megatron-core."""
    config = read_run_config(locate_checkpoint(save))
    config.model.pretrained_checkpoint = str(save)
    config.data.data_path, config.data.contrastive_data_path = ["/home/somebody/stage2.json"], []
    config.transformer = {"one": {"files": ["/home/somebody/a.json"], "size": 3}, "other": "/home/somebody/b.json"}
    text = model_card(save / "iter_0000020", config, model_class="X", library="transformers").text
    assert "| trained on | `stage2.json` |\n| before that, on | `llava/'mix'.json`, `part` |\n" in text
    assert '# transformer: {"one": {"files": ["a.json"], "size": 3}, "other": "b.json"}' in text
    assert "somebody" not in text


def test_a_readme_of_ones_own_stays(save: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches a text that --force takes away, and one of ours that stays though the run has gone on."""
    out = to_hf(save, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert is_ours(out / "README.md")
    metrics = save / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"lm loss": 2.0', '"lm loss": 1.5'))
    to_hf(save, out, "--force")
    again = (out / "README.md").read_text()
    assert "| lm loss | 1.5 |" in again and again != card
    for own in ("# Mine\n", again.replace("my\\_run", "My run"), again.rpartition("<!--")[0], ""):
        (out / "README.md").write_text(own)
        capsys.readouterr()
        to_hf(save, out, "--force")
        assert (out / "README.md").read_text() == own
        assert "README.md is your own and stays as it is" in capsys.readouterr().out


@pytest.mark.parametrize(
    "card",
    ["", "# no front matter", "---\nlicense: [1\n---\n", "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
     "---\nlicense: {a: b}\n---\n", "---\n- a\n---\n", None, "---\nlicense: &a [*a, *a]\n---\n"],
)  # fmt: skip
def test_a_licence_that_is_not_there_is_said(
    tmp_path: Path, save: Path, capsys: pytest.CaptureFixture, card: str | None
) -> None:
    """Catches a made-up licence, a tag that runs, and a base's damaged card that ends the export."""
    folder = locate_checkpoint(save)
    text = (folder / RUN_CONFIG_FILE).read_text()
    config = read_run_config(folder)
    base = tmp_path / "my base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    if card is not None:
        (base / "README.md").write_text(card)
    config.model.pretrained_checkpoint = str(base)
    (folder / RUN_CONFIG_FILE).write_text(to_yaml(config))
    try:
        out = to_hf(save, tmp_path / "out")
    finally:
        (folder / RUN_CONFIG_FILE).write_text(text)
    said = capsys.readouterr().out
    assert "README.md lacks base_model" in said and "and license (the base's folder states none)" in said
    metadata = ModelCard.load(out / "README.md").data.to_dict()
    assert not {"license", "base_model"} & metadata.keys()
    assert "| started from | `my base` |" in (out / "README.md").read_text()


def test_names_on_the_hub(tmp_path: Path) -> None:
    """Catches the name of what a base was itself tuned from: `save_pretrained` writes it into the base's config."""
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "lmsys/vicuna-7b"}))
    assert hub_name(tmp_path) is None
    assert hub_name(Path("/x/models--a--b-c/snapshots/1")) == "a/b-c"


def test_a_towers_licence_and_name_are_not_the_models(
    tmp_path: Path, save: Path, capsys: pytest.CaptureFixture
) -> None:
    """Catches a model that bears its tower's licence, where the language model states none or another."""
    tower = tmp_path / "models--openai--clip" / "snapshots" / "1"
    language = tmp_path / "llama"
    for folder, licence in ((tower, "mit"), (language, "")):
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "# A model\n")
    config = read_run_config(locate_checkpoint(save))
    config.model.pretrained_checkpoint, config.model.vision_tower = str(language), str(tower)

    def card() -> tuple[dict, str]:
        made = model_card(save / "iter_0000020", config, model_class="X", library="transformers")
        made.write(tmp_path, tmp_path / "none")
        return ModelCard.load(tmp_path / "README.md").data.to_dict(), "\n".join(made.notes)

    metadata, notes = card()
    assert not {"license", "base_model"} & metadata.keys()
    assert f"not known here of {language})" in notes and "license (the base's folder states none)" in notes
    assert f"{tower} has another license, mit" in notes
    (language / "README.md").write_text("---\nlicense: llama2\n---\n")
    metadata, notes = card()
    assert metadata["license"] == "llama2" and f"states the license of {language}, llama2" in notes
    assert f"{tower} has another license, mit" in notes
    (tower / "README.md").write_text("---\nlicense: llama2\n---\n")
    assert "another license" not in card()[1]


def test_a_model_that_was_only_converted_tells_no_training(tmp_path: Path) -> None:
    """Catches a card that makes a run of a conversion."""
    save = to_megatron(write_tiny_llava(tmp_path / "base", layers=1, vision_layers=2), tmp_path / "save")
    text = (to_hf(save, tmp_path / "out") / "README.md").read_text()
    assert "was converted, not trained" in text and "torchrun" not in text and "iteration" not in text
