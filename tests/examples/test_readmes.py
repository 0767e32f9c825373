"""The READMEs hold: their links, paths, flags and command lines are those of the repository beside them."""

import re
import shlex
from pathlib import Path

import pytest

from hacl_megatron.config.parser import HINTS
from hacl_megatron.config.run import RunConfig, parse_run_config
from tests.examples.command_lines import ROOT, check_command, split_commands

READMES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        *(path for top in ("examples", "hacl_megatron", "tests", "tools") for path in (ROOT / top).rglob("README.md")),
    ]
}
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.yaml"))
EVERY_README = pytest.mark.parametrize("name", READMES)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_COMMAND = re.compile(r"`((?:[A-Z_]+=\S+ )?(?:python|torchrun|bash|sbatch|pip) [^`]+)`")
PATH = re.compile(r"(?<![\w./-])(?:examples|hacl_megatron|tests|tools)/[\w./*-]*[\w*/]")
FILE = re.compile(r"(?<!`)`([\w-]+\.(?:py|sh|yaml|sbatch))`")
FILES_ELSEWHERE = {"eval_gpt4.py", "inference.py"}
"""MMHal-Bench's and AMBER's."""
FLAGS_ELSEWHERE = {"--nproc-per-node", "--shutdown-timeout", "--no-build-isolation", "--include_path", "--model_args"}
FLAGS_ELSEWHERE |= {"--batch_size", "--output_path"}
"""torchrun's, pip's, and lmms-eval's."""


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def prose(text: str) -> str:
    """Without code blocks, and without what other projects are called with."""
    text = BLOCK.sub("", text)
    return re.sub(r"`accelerate\s[^`]+`|^\| `--[^|]+\|(?=.*\|$)", "", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_defaults_in_brackets_are_those_of_the_parser() -> None:
    """`--queue-size` (16,384): catches a default that was changed on one side alone."""
    found = re.findall(r"`--([\w-]+)` \(([\d.,]*\d)\)", "".join(READMES.values()))
    assert found
    for flag, value in found:
        name = flag.replace("-", "_")
        (section,) = (section for section in vars(RunConfig()).values() if hasattr(section, name))
        assert getattr(section, name) == float(value.replace(",", "")), flag


@EVERY_README
def test_links_lead_to_files_and_headings_that_exist(name: str) -> None:
    """Catches a file that was moved, a picture that was not added, a heading that was reworded."""
    for target in re.findall(r"\]\(([^)]+)\)", READMES[name]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if anchor:
            page = path if path.is_file() else path / "README.md"
            assert anchor in anchors(page.read_text(encoding="utf-8")), target


@EVERY_README
def test_paths_and_files_exist(name: str) -> None:
    """Catches a path or a file's name that a reorganisation has left behind, in prose, tables or commands."""
    missing = [path for path in PATH.findall(READMES[name]) if not any(ROOT.glob(path.rstrip("/")))]
    missing += [path for path in PATH.findall(READMES[name]) if path.endswith("/") and not (ROOT / path).is_dir()]
    folders = [(ROOT / name).parent, *(ROOT / top for top in ("examples", "hacl_megatron", "tests", "tools"))]
    for file in FILE.findall(READMES[name]):
        if file not in FILES_ELSEWHERE and not any(any(folder.rglob(file)) for folder in folders):
            missing.append(file)
    assert not missing, sorted(set(missing))


@EVERY_README
def test_commands_parse(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a flag that was renamed, misspelt or given a value that it does not take, a program that is gone, an
    extra that setup.py does not have, and sizes that do not divide among the processes of a command."""
    text = READMES[name]
    monkeypatch.chdir(ROOT)

    def find_config(file: str) -> str:
        """A configuration of the repository, or else the one that this README shows."""
        if Path(file).exists():
            return file
        (shown,) = blocks(text, "yaml")
        (tmp_path / "shown.yaml").write_text(shown, encoding="utf-8")
        return str(tmp_path / "shown.yaml")

    for shell in [*blocks(text, "bash"), *INLINE_COMMAND.findall(BLOCK.sub("", text).replace("\n", " "))]:
        for words in split_commands(shell):
            check_command(words, find_config, monkeypatch)


@pytest.mark.parametrize("name", CONFIGS)
def test_commands_at_the_head_of_a_configuration_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the same in the comments of the YAML files, and a path in them that leads nowhere."""
    monkeypatch.chdir(ROOT)
    comments = re.findall(r"^# ?(.*)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    missing = [path for path in PATH.findall("\n".join(comments)) if not (ROOT / path).exists()]
    assert not missing
    for words in split_commands("\n".join(line for line in comments if line.startswith("  "))):
        check_command(words, str, monkeypatch)


@EVERY_README
def test_yaml_is_a_configuration(name: str, tmp_path: Path) -> None:
    """Catches a key that no flag has, and a value that its flag does not take."""
    for number, text in enumerate(blocks(READMES[name], "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text, encoding="utf-8")
        parse_run_config(["--config", str(file)])


def test_flags_in_prose_exist() -> None:
    """Catches a flag that the text tells of and no program has; the left column of the migration table is theirs."""
    programs = [
        *(ROOT / "tools").glob("*.py"),
        *(ROOT / "tests" / "measure").glob("*.py"),
        *(ROOT / "examples").rglob("*.sh"),
        *(ROOT / "tests").glob("*.sh"),
        *(ROOT / "tests" / "gpu").glob("*.py"),
    ]
    written = "\n".join(path.read_text(encoding="utf-8") for path in programs)
    known = {"--help", "--config", *FLAGS_ELSEWHERE, *(f"--{flag.replace('_', '-')}" for flag in HINTS)}
    for name, text in READMES.items():
        for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", prose(text)):
            assert flag in known or re.search(rf"{flag}(?![\w-])", written), f"{name}: {flag}"


def test_the_map_of_the_package_names_every_folder() -> None:
    """Catches a folder that was added, moved or taken away without a line in the map."""
    (tree,) = [body for body in blocks(READMES["hacl_megatron/README.md"], "") if body.startswith("hacl_megatron/\n")]
    mapped, path = set(), []
    for indent, folder in re.findall(r"^( +)(\w+)/ ", tree, re.MULTILINE):
        path = [*path[: len(indent) // 2 - 1], folder]
        mapped.add("/".join(path))
    package = ROOT / "hacl_megatron"
    assert mapped == {str(file.parent.relative_to(package)) for file in package.rglob("__init__.py")} - {"."}


def test_the_door_is_short_and_lines_fit() -> None:
    """Catches a README that grows until nobody reads it, a line that no screen shows, and a heavy picture."""
    assert len(READMES["README.md"].splitlines()) <= 170
    for name, text in READMES.items():
        long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
        assert not long, f"{name}: {long}"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", READMES["README.md"]):
        assert (ROOT / picture).stat().st_size < 150_000


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("python tools/evaluate.py --hf EXPORT --taks pope --output F.json", "--taks"),
        ("python tools/evaluate.py --hf EXPORT --task pop --output F.json", "invalid choice: 'pop'"),
        ("python tools/gone.py --load OUT", "gone.py"),
        ("python tools/plan_run.py --nodes 2 --gpu a100-80g --learning-rate 1", "unknown flag --learning-rate"),
        ("python -m tests.measure.measure_nothing", "no module"),
        ("python -m tests.measure.measure_step --sizes 7B", "no flag --sizes"),
        ("torchrun --nproc-per-node 8 -m hacl_megatron.train --config shown.yaml --lrr 1", "unknown flag --lrr"),
        ("torchrun --nproc-per-node 8 tools/score_reference.py --config shown.yaml --output F --lrr 1", "flag --lrr"),
        ("torchrun --nproc-per-node 7 tools/score_reference.py --config shown.yaml --output F", "7 processes"),
        ("torchrun --nproc-per-node 8 tools/score_reference.py --config shown.yaml", "--output"),
        ("torchrun --nproc-per-node 7 -m hacl_megatron.train --config shown.yaml", "7 processes"),
        ("bash examples/quickstart/run.sh --slow", "no flag --slow"),
        ("bash examples/slurm/chain.sh 7b -- --lrr 1", "unknown flag --lrr"),
        ("bash examples/slurm/chain.sh 13b --preference dpo", "no job"),
        ("bash examples/slurm/chain.sh 7b --preference dop", "no recipe of dop"),
        ("sbatch examples/slurm/pretrain_7b.sbatch --lrr 1", "unknown flag --lrr"),
        ("sbatch examples/slurm/evaluate.sbatch --tasks pop", "invalid choice: 'pop'"),
        ("pip install -e '.[gpus]'", "no such extra"),
        ("make all", "knows no program 'make'"),
    ],
)
def test_a_mistake_in_a_command_is_found(
    mistake: str, says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Catches checks above that let anything pass, or that refuse everything."""
    monkeypatch.chdir(ROOT)
    config = "examples/llava_1_5/pretrain_13b.yaml"
    with pytest.raises((AssertionError, ValueError, OSError, SystemExit, pytest.fail.Exception)) as found:
        check_command(shlex.split(mistake), lambda _: config, monkeypatch)
    assert says in f"{found.value}\n{capfd.readouterr().err}"
