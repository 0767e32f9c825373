"""YAML that is made to hurt: one line that names file and place, at once, whoever reads it."""

import resource
import time
from pathlib import Path

import pytest

from hacl_megatron.checkpoint.run.folder import read_run_config
from hacl_megatron.config.run import parse_run_config

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "m0: &m0 {a: 1, b: 2, c: 3}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)
FILES = {
    "nested lists": ("lr: " + "[" * 100_000, ["line 1", "deeper than 30"]),
    "nested mappings": ("lr: " + "{a: " * 50_000, ["line 1", "deeper than 30"]),
    "nested blocks": ("- " * 100_000, ["line 1", "deeper than 30"]),
    "nested by indentation": ("".join(f"{' ' * i}a:\n" for i in range(600)), ["line 31", "deeper than 30"]),
    "nested in a section": ("transformer:\n  a: " + "[" * 5_000 + "]" * 5_000, ["line 2", "deeper than 30"]),
    "billion laughs": (LAUGHS, ["more than 20,000 values", "line 5"]),
    "laughs in a section": (f"{LAUGHS}transformer: *a11\n", ["more than 20,000 values"]),
    "merged mappings": (MERGES, ["more than 20,000 values"]),
    "a list in itself": ("data_path: &a [x, *a]", ["line 1", "*a stands inside what it names"]),
    "a mapping in itself": ("transformer: &a\n  b: *a", ["line 2", "*a stands inside what it names"]),
    "an alias of nothing": ("lr: *a", ["line 1", "undefined alias"]),
    "a key twice": ("lr: 1\nseed: 2\nlr: 3\n", ["line 3", "'lr' is given twice"]),
    "a key twice in a section": ("transformer:\n  b: 1\n  b: 2\n", ["line 3", "'b' is given twice"]),
    "a key twice in a list": ("data_path:\n  - {b: 1, b: 2}\n", ["line 2", "'b' is given twice"]),
    "not a number": ("lr: .nan", ["line 1", "'lr' found .nan", "finite"]),
    "not a number by its tag": ('lr: !!float ".NaN"', ["line 1", "'lr' found .NaN", "finite"]),
    "infinite": ("clip_grad: -.Inf", ["line 1", "'clip_grad' found -.Inf", "finite"]),
    "infinite by overflow": ("lr: 1e400", ["line 1", "'lr' found 1e400", "finite"]),
    "infinite in a section": ("transformer:\n  layernorm_epsilon: .inf", ["line 2", ".inf", "finite"]),
    "infinite in a list": ("data_path: [a]\ndata_weights: [1, .inf]", ["line 2", "'data_weights' found .inf"]),
    "too many digits for a float": (f"lr: {'9' * 400}", ["--lr", "finite"]),
    "too many digits for anything": (f"train_iters: {'9' * 400}", ["--train-iters", "finite"]),
    "digits to match for ever": (f"lr: {'1' * 200_000}x", ["line 1", "more than 4096 characters"]),
    "a long text": (f"save: {'x' * 5000}", ["line 1", "more than 4096 characters"]),
    "a large file": ("# comment\n" * 100_000, ["more than 256 KB"]),
    "many values": ("data_path: [" + "a," * 30_000 + "]", ["more than 20,000 values"]),
    "no integer": ('seed: !!int ""', ["not valid YAML"]),
    "no switch": ("bf16: !!bool perhaps", ["not valid YAML"]),
    "no date": ("seed: !!timestamp soon", ["not valid YAML"]),
    "Python": ("seed: !!python/object/apply:os.system [id]", ["line 1", "not valid YAML", "python/object"]),
    "a list for a key": ("? [a, b]\n: 1", ["line 1"]),
    "control characters": ("lr: \x00\x1b[2J", ["line 1", "not valid YAML"]),
    "no text": ("\udcff", ["not UTF-8"]),
}


@pytest.fixture(params=list(FILES))
def hostile(request, tmp_path: Path) -> tuple[Path, list[str]]:
    text, words = FILES[request.param]
    path = tmp_path / "run_config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return path, words


def test_a_hostile_config_is_refused_in_one_line_at_once(hostile, capsys: pytest.CaptureFixture) -> None:
    """Catches a RecursionError, a number that trains nothing, and memory or minutes that a bomb takes."""
    path, words = hostile
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(SystemExit) as leaving:
        parse_run_config(["--config", str(path)])
    seconds, grown = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert leaving.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words) and len(line) < 2500, line[:3000]
    assert seconds < 5 and grown < 100_000, (seconds, grown)  # of this process's own time; KB


def test_a_hostile_run_config_of_a_checkpoint_is_refused_likewise(hostile) -> None:
    path, _ = hostile
    with pytest.raises(ValueError) as refusal:
        read_run_config(path.parent)
    assert str(path) in str(refusal.value) or "finite" in str(refusal.value)


def test_endless_files_are_not_read_to_their_end(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_run_config(["--config", "/dev/zero"])
    assert "more than 256 KB" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_number_on_the_command_line_is_finite(value: str, capsys: pytest.CaptureFixture) -> None:
    for flag in ("--lr", "--clip-grad", "--exit-duration-in-mins", "--hang-timeout"):
        with pytest.raises(SystemExit):
            parse_run_config([f"{flag}={value}"])
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and flag in line and "finite" in line


def test_anchors_that_people_write_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: &rate 2.0e-5\nheads_lr: *rate\ndata_path: &data [a.json, b.json]\nvalid_data_path: *data\n")
    config = parse_run_config(["--config", str(path)])
    assert config.optimizer.heads_lr == 2e-5 and config.data.valid_data_path == ["a.json", "b.json"]
