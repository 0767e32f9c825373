"""How the code is laid out: no circle of files, no room too full, no file too long."""

from pathlib import Path

import grimp
import pytest

from tests.conftest import QUICK

ROOT = Path(__file__).parents[1]
MOST_LINES, MOST_FILES = 450, 16


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """All there are, relative to the repository."""
    found = (path for top in ("hacl_megatron", "tools", "examples", "tests") for path in (ROOT / top).rglob("*"))
    return [path.relative_to(ROOT) for path in found if path.is_file() and "__pycache__" not in path.parts]


def test_no_circle_of_files() -> None:
    """Imports inside functions and for types count too. Layers are import-linter's; a circle may hide inside one."""
    graph = grimp.build_graph("hacl_megatron")
    left = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while leaves := {module for module, imported in left.items() if not imported & left.keys()}:
        left = {module: imported for module, imported in left.items() if module not in leaves}
    assert not left, f"these import one another, or what does: {sorted(left)}"


def test_no_file_is_too_long(files: list[Path]) -> None:
    lengths = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in files if path.suffix == ".py"}
    assert not {str(path): length for path, length in lengths.items() if length > MOST_LINES}


def test_no_folder_of_the_package_is_too_full(files: list[Path]) -> None:
    folders = [path.parent for path in files if path.parts[0] == "hacl_megatron"]
    assert not {str(folder): count for folder in {*folders} if (count := folders.count(folder)) > MOST_FILES}


def test_what_the_quick_tests_name_is_there() -> None:
    """They are looked for with --quick alone, which CI does not give: catches a file that was moved."""
    assert [name for name in QUICK if not (ROOT / name.split("::")[0]).exists()] == []
