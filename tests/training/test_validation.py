"""What a validation leaves behind: no loader, also where it does not come to its end."""

import pytest

from hacl_megatron.training.validation import Validation
from tests.distributed import run_distributed


class Loader:
    """As far as a validation goes that ends at its first batch."""

    num_samples = 8
    closed = 0

    def __next__(self):
        raise OSError("the disk is gone")

    def close(self) -> None:
        self.closed += 1


def closed_after() -> list[int]:
    """How often each of two validations' loaders was closed."""
    made: list[Loader] = []

    def make() -> Loader:
        made.append(Loader())
        return made[-1]

    validation = Validation(make, num_batches=1, batch_size=8, evaluate_tasks=None)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            validation(None, lambda: None, lambda text: None)
    return [loader.closed for loader in made]


def test_every_loader_is_closed_once() -> None:
    """Catches a loader, with its threads and open files, that each validation leaves behind."""
    assert run_distributed(closed_after, 1) == [[1, 1]]
