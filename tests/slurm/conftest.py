"""One Slurm for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not
from tests.training.runs import make_inputs


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slurm, full = config.getoption("--slurm"), config.getoption("--full")
    reason = "bash tests/run.sh --slurm runs it" if not slurm else why_not()
    for item in items:
        if "tests/slurm" not in str(item.path):
            continue
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.get_closest_marker("full") and not full:
            item.add_marker(pytest.mark.skip(reason="bash tests/run.sh --slurm --full runs it"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = make_inputs(tmp_path_factory.mktemp("cluster"), samples=40)
    with Cluster(folder) as running:
        yield running
