"""open_clip's `ClipLoss` on given pools: what its distributed form computes on one rank, without the other ranks."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor


def open_clip_loss() -> ModuleType:
    """open_clip's loss.py alone: the package imports torchvision, which does not import beside this torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        pytest.fail("open_clip is missing; this test's oracle needs: pip install --no-deps open_clip_torch")
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clip_loss(
    image: Tensor, caption: Tensor, image_columns: Tensor, caption_columns: Tensor, first_pair: int, temperature: Tensor
) -> Tensor:
    """(L_v + L_t) / 2, means over R rows, as the rank with pairs `first_pair` to `first_pair + R` computes them.

    image, caption: [R, d]. image_columns: what captions are compared with; caption_columns: what images are, captions
    in the order of the pairs first. `first_pair` must be a multiple of R, as every rank has as many pairs there.
    """
    assert first_pair % image.shape[0] == 0, (first_pair, image.shape)
    module = open_clip_loss()
    # All that it gathers in between is given; rank and world size still place the diagonal.
    module.gather_features = lambda *_, **__: (image_columns, caption_columns)
    rank = first_pair // image.shape[0]
    return module.ClipLoss(local_loss=True, rank=rank, world_size=rank + 2)(image, caption, 1 / temperature)
