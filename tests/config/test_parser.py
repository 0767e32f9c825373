"""Flags and files into `RunConfig`: precedence, types, spellings, and what a mistake looks like to its maker."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hacl_megatron.config.flags import FLAG_GROUPS
from hacl_megatron.config.names import NAMES_ELSEWHERE
from hacl_megatron.config.parser import GROUPS, HINTS, FlagParser
from hacl_megatron.config.run import from_yaml, parse_run_config, to_yaml


@pytest.fixture
def config_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line on stderr of a command line that must end with status 2."""
    with pytest.raises(SystemExit) as exit:
        parse_run_config(list(argv))
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.out == "" and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


def test_every_flag_is_documented_and_named_once():
    names = [field.name for group in FLAG_GROUPS for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    for group in FLAG_GROUPS:
        assert group.__doc__ and not group.__doc__.startswith(group.__name__)  # dataclasses make one up otherwise
        for field in dataclasses.fields(group):
            assert len(field.metadata["help"]) > 10 and field.metadata["help"].endswith("."), field.name


def help_text(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as exit:
        parse_run_config(["--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


def help_entries(shown: str) -> dict[str, str]:
    """Each flag's entry as one line, by its flag and value (`--lr X`)."""
    entries = re.split(r"\n {0,2}(?=-)", shown)[1:]
    return {re.split(r"  +|\n", entry)[0]: " ".join(entry.split()) for entry in entries}


def test_help_shows_every_flag_once_with_dashes(capsys, monkeypatch):
    """A second spelling, a generated `--no-...` or a group that is missing in the order."""
    entries = [head.partition(" ")[0] for head in help_entries(help_text(capsys, monkeypatch))]
    expected = [f"--{name.replace('_', '-')}" for name in HINTS]
    assert sorted(entries) == sorted([*expected, "--config", "-h,"])


def test_help_names_no_family_where_any_is_taken(capsys, monkeypatch):
    """Catches a flag that says LLaMA where Qwen and Mistral go too. (`--help` of the tools: a look at their text.)"""
    assert "LLaMA" not in help_text(capsys, monkeypatch)
    for path in (Path(__file__).parents[2] / "tools").glob("*.py"):
        assert not re.search(r"LLaMA(?!-Factory)", path.read_text()), path


def test_help_tells_every_default_once(capsys, monkeypatch):
    """`(default: None)`, a default beside the text's own, or none where the value is not plain from the text."""
    entries = help_entries(help_text(capsys, monkeypatch))
    for group in FLAG_GROUPS:
        for field in dataclasses.fields(group):
            flag = f"--{field.name.replace('_', '-')}"
            (entry,) = [entry for entry in entries.values() if entry.split()[0] == flag]
            assert "None" not in entry and "(default" not in entry and "[]" not in entry
            default = getattr(group(), field.name)
            wanted = (default not in ([], None) and default is not False) or "Default:" in field.metadata["help"]
            assert entry.count("Default: ") == wanted, entry
    assert entries["--lr X"].endswith("Default: 0.001.") and "Default: 0." in entries["--profile-ranks N [N ...]"]
    assert entries["--image-folder DIR"].endswith("Default: the working folder.")
    assert entries["--shuffle-block N"].endswith("Default: 0.")


def test_help_shows_values_as_they_are_used(capsys, monkeypatch):
    """A flag's own name in capitals for its value; a switch that seems to need one, or seems to need none."""
    heads = {head.partition(" ")[0]: head.partition(" ")[2] for head in help_entries(help_text(capsys, monkeypatch))}
    assert {heads[flag] for flag in ("--bf16", "--freeze-LM", "--dry-run")} == {""}
    assert {heads[flag] for flag in ("--freeze-ViT", "--balance-micro-batches")} == {"{true,false}"}
    assert heads["--data-path"] == "PATH [PATH ...]" and heads["--save"] == "DIR" and heads["--lora-alpha"] == "X"
    assert heads["--wandb-project"] == "NAME" and not any("_" in head for head in heads.values())


def test_help_is_in_the_users_order_and_wraps_between_words(capsys, monkeypatch):
    """Lines past the terminal's edge, `--use-` at a line's end, or `--dry-run` among the flags that describe a run."""
    for columns in (80, 100, 180):
        shown = help_text(capsys, monkeypatch, columns)
        assert max(map(len, shown.splitlines())) <= columns
        assert "Default:\n" not in shown and not re.search(r"\w-\n", shown)
    titles = re.findall(r"(?m)^(\w.*):$", shown)
    assert titles[:2] == ["model", "data"] and titles[-1] == "trying out" and len(titles) == len(FLAG_GROUPS) + 1
    assert shown.index("--dry-run  ") > shown.index("trying out:")


def test_flags_are_taken_in_every_spelling():
    """A spelling, or a `--no-...`, that was lost when it was no longer shown."""
    for group, members in GROUPS.items():
        for field in dataclasses.fields(members):
            default = getattr(members(), field.name)
            for flag in {field.name, field.name.replace("_", "-")}:
                value = {bool: "true", list: "3"}.get(type(default), "3" if default is None else str(default))
                value = "true" if bool in getattr(HINTS[field.name], "__args__", ()) else value
                value = {"vision_backend": "hf", "vision_parallel": "share"}.get(field.name, value)
                assert f"{getattr(getattr(parse_run_config([f'--{flag}', value]), group), field.name)}" != "None"
                if default is True:
                    no = f"--no{'-' if '-' in flag else '_'}{flag}"
                    assert getattr(getattr(parse_run_config([no]), group), field.name) is False


def test_names_of_other_trainers_lead_to_flags_that_exist():
    assert not set(NAMES_ELSEWHERE) & set(HINTS)
    assert set(NAMES_ELSEWHERE.values()) <= set(HINTS)


# ------------------------------------------------------------------------------------------------ precedence and types


def test_flag_beats_file_and_file_beats_default(config_file):
    path = config_file("lr: 3.0e-4\nmicro_batch_size: 8\ndata_path: [a.json, b.json]\nfreeze_ViT: false\n")
    for argv in (["--config", path, "--lr", "2e-5", "--data-path", "c.json"],
                 ["--lr", "2e-5", "--data-path", "c.json", "--config", path]):  # fmt: skip
        config = parse_run_config(argv)
        assert config.optimizer.lr == 2e-5  # flag
        assert config.data.data_path == ["c.json"]  # a list is replaced, not extended
        assert config.training.micro_batch_size == 8 and config.model.freeze_ViT is False  # file
        assert config.optimizer.adam_beta2 == 0.999  # default


def test_a_flag_that_repeats_the_default_still_beats_the_file(config_file):
    path = config_file("bf16: true\nmask_duplicates: true\nlr: 5\nversion: plain\n")
    config = parse_run_config(
        ["--config", path, "--bf16", "false", "--no-mask-duplicates", "--lr", "1e-3", "--version", "v1"]
    )
    assert config.model.bf16 is False and config.objective.mask_duplicates is False
    assert config.optimizer.lr == 1e-3 and config.data.version == "v1"


@pytest.mark.parametrize(
    ("text", "group", "name", "value"),
    [
        ("lr: 1e-3", "optimizer", "lr", 1e-3),  # text to plain PyYAML
        ("lr: 2", "optimizer", "lr", 2.0),
        ("lr: '2e-5'", "optimizer", "lr", 2e-5),
        ("adam_eps: 1E-8", "optimizer", "adam_eps", 1e-8),
        ("train_iters: 1_000", "training", "train_iters", 1000),
        ("bf16: yes", "model", "bf16", True),
        ("freeze-LM: true", "model", "freeze_LM", True),
        ("freeze_LM: true", "model", "freeze_LM", True),
        ("micro-batch-size: 3", "training", "micro_batch_size", 3),
        ("mm_vision_select_layer: -2", "model", "mm_vision_select_layer", -2),
        ("hallucination_negatives: none", "objective", "hallucination_negatives", "none"),
        ("train_iters: null", "training", "train_iters", None),
        ("data_path: one.json", "data", "data_path", ["one.json"]),
        ("data_path: [-dash.json, 'with space.json', a=b.json]", "data", "data_path",
         ["-dash.json", "with space.json", "a=b.json"]),
        ("data_path: []", "data", "data_path", []),
        ("image_folder: --odd", "data", "image_folder", "--odd"),
        ("wandb_project: '1e-3'", "logging", "wandb_project", "1e-3"),
        ("", "training", "seed", 1234),
        ("# only a comment\n", "training", "seed", 1234),
    ],
)  # fmt: skip
def test_yaml_values(config_file, text, group, name, value):
    found = getattr(getattr(parse_run_config(["--config", config_file(text)]), group), name)
    assert found == value and type(found) is type(value)


def test_both_spellings_of_a_flag():
    for dashes in ("--micro-batch-size", "--micro_batch_size"):
        assert parse_run_config([dashes, "4"]).training.micro_batch_size == 4
        assert parse_run_config([f"{dashes}=4"]).training.micro_batch_size == 4
    assert parse_run_config(["--mm-vision-select-layer", "-2"]).model.mm_vision_select_layer == -2
    for freeze in ("--freeze-LM", "--freeze_LM"):
        assert parse_run_config([freeze]).model.freeze_LM is True


def test_of_two_ways_to_say_one_thing_the_command_line_takes_the_place_of_the_file(config_file):
    path = config_file("micro-batch-tokens: 8192\nnum-train-epochs: 1\n")
    training = parse_run_config(["--config", path, "--micro_batch_size", "4", "--train-iters=10"]).training
    assert (training.micro_batch_size, training.micro_batch_tokens) == (4, None)
    assert (training.train_iters, training.num_train_epochs) == (10, None)
    path = config_file("micro-batch-size: 8\ntrain-iters: 5\n")
    training = parse_run_config(["--config", path, "--micro-batch-tokens", "4096"]).training
    assert (training.micro_batch_size, training.micro_batch_tokens, training.train_iters) == (1, 4096, 5)
    training = parse_run_config(["--config", path, "--train-iters", "1", "--num-train-epochs", "2"]).training
    assert (training.train_iters, training.num_train_epochs) == (1, 2.0)  # refused by `check_flags`


def test_two_configurations_share_no_list():
    first = parse_run_config([])
    first.data.data_path.append("x.json")
    assert parse_run_config([]).data.data_path == []


def test_the_first_pass_leaves_nothing_behind(config_file):
    """Parsing a file once must not change what a run without it gets."""
    parse_run_config(["--config", config_file("lr: 7")])
    assert parse_run_config([]).optimizer.lr == 1e-3


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bogus-thing", "1"], ["unknown flag --bogus-thing", "--help"]),
        (["--mirco-batch-size", "1"], ["unknown flag --mirco-batch-size", "did you mean --micro-batch-size"]),
        (["--freeze-lm"], ["did you mean --freeze-LM"]),
        (["--micro-batch", "1"], ["unknown flag --micro-batch", "--micro-batch-size"]),  # an abbreviation
        (["--learning_rate", "1"], ["did you mean --lr"]),
        (["--no-freeze-LM"], ["write --freeze-LM false"]),
        (["--recompute-granularity", "full"], ["write it under `transformer:`"]),
        (["--grad_reduce_in_fp32", "1"], ["write it under `ddp:`"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--micro-batch-size", "2.5"], ["--micro-batch-size", "'2.5'"]),
        (["--bf16", "perhaps"], ["perhaps"]),
        (["train.json"], ["unexpected argument 'train.json'"]),
        (["--config", "/nowhere/run.yaml"], ["/nowhere/run.yaml", "No such file"]),
        (["--config", "a.yaml", "--config", "b.yaml"], ["--config was given 2 times", "a.yaml", "b.yaml"]),
    ],
)
def test_wrong_command_lines(capsys, argv, expected):
    error = refused(capsys, *argv)
    for part in expected:
        assert part in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1\nmirco_batch_size: 4\n", ["line 2", "unknown key 'mirco_batch_size'; did you mean micro_batch_size"]),
        ("learning_rate: 1e-3", ["did you mean lr"]),
        ("recompute_granularity: full", ["line 1", "write it under `transformer:`"]),
        ("print_config: true", ["--print-config is for the command line"]),
        ("config: other.yaml", ["unknown key 'config'"]),
        ("lr: 1\nlr: 2\n", ["line 2", "'lr' is given twice"]),
        ("micro-batch-size: 1\nmicro_batch_size: 2\n", ["line 2", "'micro_batch_size' is given twice"]),
        ("lr: [1\nseed: 3\n", ["line 2", "not valid YAML"]),
        ("lr: 1\n\tseed: 3\n", ["line 2", "not valid YAML"]),
        ("lr: !!python/object/apply:os.system [ls]", ["line 1", "not valid YAML"]),
        ("lr: \x00", ["line 1", "not valid YAML"]),
        ("wandb_project: 2024-13-45", ["not valid YAML", "quotes"]),
        ("- lr\n", ["found a list", "expected"]),
        ("just text", ["found a str"]),
        ("7: seven", ["found the key 7"]),
        ("[a]: 1", ["not valid YAML"]),
        ("micro_batch_size: 2.5", ["line 1", "micro-batch-size", "2.5"]),
        ("micro_batch_size: true", ["micro-batch-size", "True"]),
        ("micro_batch_size:\n", ["'micro_batch_size' has no value"]),
        ("micro_batch_size: [1, 2]", ["'micro_batch_size'", "one value"]),
        ("micro_batch_size: {a: 1}", ["'micro_batch_size'", "one value"]),
        ("data_path: [[a.json]]", ["'data_path'", "one value an entry"]),
        ("wandb_project: 2024-01-02", ["'wandb_project'", "quotes"]),
        ("tokenizer: no", ["'tokenizer' found False", "quotes"]),  # YAML's `no` is a boolean
        ("version: 1", ["'version' found 1", "quotes"]),
        ("bf16: perhaps", ["line 1", "perhaps"]),
        ("train_iters: 010", ["line 1", "'train_iters' found 010", "base 8, as 8", "write 10 or 8"]),
        ("seed: 3\ndata_weights: [1, 0_17]", ["line 2", "'data_weights' found 0_17", "as 15"]),
        ("exit_duration_in_mins: 1:30", ["line 1", "'exit_duration_in_mins' found 1:30", "base 60, as 90"]),
        ("lr: 1:30.5", ["'lr' found 1:30.5", "as 90.5"]),
        ("optimizer:\n  adam_eps: 1:30", ["line 2", "'optimizer.adam_eps' found 1:30", "as 90"]),
        ("transformer:\n  fp8: None", ["line 2", "'transformer.fp8' found None", "write null"]),
        ("save: None", ["line 1", "'save' found None", "write null or leave the line out"]),
        ("save: none", ["line 1", "'save' found none"]),
        ("lr: None", ["line 1", "'lr' found None"]),
    ],
)
def test_wrong_files(capsys, config_file, text, expected):
    path = config_file(text)
    error = refused(capsys, "--config", path)
    for part in [path, *expected]:
        assert part in error


def test_none_in_quotes_or_as_a_choice_is_a_text(config_file):
    """A folder may be called so, and a flag may have a choice of that name; both come back from run_config.yaml."""
    config = parse_run_config(
        ["--config", config_file('save: "None"\nhallucination_negatives: none\nwandb_project: "010"\n')]
    )
    assert (config.checkpoint.save, config.objective.hallucination_negatives) == ("None", "none")
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(("text", "value"), [("08", 8), ("0", 0), ("07", 7), ("1_000", 1000), ("0x10", 16)])
def test_numbers_that_can_only_mean_one_thing_are_taken(config_file, text, value):
    assert parse_run_config(["--config", config_file(f"seed: {text}")]).training.seed == value


def test_a_file_that_is_no_text(capsys, tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "not UTF-8" in refused(capsys, "--config", str(tmp_path / "run.yaml"))
    assert "cannot be read" in refused(capsys, "--config", str(tmp_path))


def test_one_process_a_node_reports_a_mistake(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as exit:
        parse_run_config(["--bogus"])
    assert exit.value.code == 2 and capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "--bogus" in refused(capsys, "--bogus")


def test_a_real_process_leaves_with_one_line():
    """megatron-core is imported on the way to this message, and its warnings must not bury it."""
    program = "from hacl_megatron.config.run import parse_run_config; parse_run_config()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--recompute-granularity", "full"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "hacl_megatron: error: unknown flag --recompute-granularity; it is a field of megatron-core: write it under "
        "`transformer:` in the --config file\n"
    )


def test_importing_the_configuration_stays_light():
    """torch and megatron-core take seconds that `--help` and a wrong flag should not cost."""
    program = "import sys, hacl_megatron.config.run, hacl_megatron.config.checks.flags"
    program += "; print({'torch', 'megatron'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "set()\n"


def test_the_parser_knows_no_other_flags():
    """A flag outside the dataclasses would be missing from YAML, --print-config and run_config.yaml."""
    extra = {action.dest for action in FlagParser()._actions} - set(HINTS)
    assert extra == {"help", "config"}
