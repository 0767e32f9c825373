from pathlib import Path

import pytest

from tests.evaluation.exports import write_exports, write_images


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported folders, `square` and `pad`. To be read only."""
    return write_exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images. To be read only."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder
