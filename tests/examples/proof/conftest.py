"""The scripts of examples/proof, and a small world drawn by them, for their tests."""

import sys
from pathlib import Path

import pytest

from tests.examples.proof import PROOF, SIZES


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    """The scripts import one another by file name, as `python examples/proof/NAME.py` lets them."""
    sys.path[:0] = [str(PROOF), str(PROOF.parent / "quickstart")]
    yield
    sys.path.remove(str(PROOF))
    sys.path.remove(str(PROOF.parent / "quickstart"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, scripts_on_path: None) -> Path:
    from draw_world import draw

    folder = tmp_path_factory.mktemp("proof") / "data"
    draw(folder, SIZES, seed=3, processes=1)
    return folder
